"""Mutation check: bugs that dirty page logging has really had, put into a copy of the source; the tests must notice each.

Run by ``make mutants``. Prints a table: mutant, what it is like, file, seconds, and the test that killed it. Exit code 1 if one
survives, 2 if the list does not fit the source, or the tests fail where nothing is mutated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mutant import Fate, ListError, Mutant, Result
from mutant_copy import PACKAGE, PROJECT, Copy
from mutant_list_emulated import EMULATED
from mutant_list_interleaved import INTERLEAVED
from mutant_list_kvm import KVM
from mutant_list_order import ORDER
from mutant_list_process import PROCESS
from mutant_list_readers import READERS
from mutant_list_records import RECORDS
from mutant_list_scan import SCAN
from mutant_list_store import STORE
from mutant_list_watch import WATCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MUTANTS: tuple[Mutant, ...] = (*ORDER, *INTERLEAVED, *READERS, *EMULATED, *KVM, *SCAN, *WATCH, *PROCESS, *RECORDS, *STORE)
"""One list an area."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Test the mutants that are asked for; return the exit code."""
    options = _options(arguments)
    try:
        mutants = _chosen(options.only)
        _check(MUTANTS)
        table = Table(mutants)
        if options.list:
            for mutant in mutants:
                table.row(mutant, "", " ".join(mutant.tests))
            return 0
        results: list[Result] = []
        with Copy() as copy:
            copy.check(mutants)
            for mutant in mutants:
                results.append(copy.test(mutant))
                table.result(results[-1])
    except ListError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([_plain(result) for result in results], indent=2) + "\n")
    return _summary(results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and the tests that must kill them, and test nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="test just these mutants")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file, too")
    return parser.parse_args(arguments)


def _chosen(names: Sequence[str] | None) -> tuple[Mutant, ...]:
    if names is None:
        return MUTANTS
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ListError(f"no such mutant: {', '.join(unknown)}; --list has them all")
    return tuple(known[name] for name in names)


def _check(mutants: Iterable[Mutant]) -> None:
    """Raise :class:`ListError` for the first mutant that does not fit, before anything is run."""
    often = [name for name, count in Counter(mutant.name for mutant in mutants).items() if count > 1]
    if often:
        raise ListError(f"two mutants have one name: {', '.join(often)}")
    for mutant in mutants:
        mutant.applied(PROJECT / PACKAGE)
        for test in mutant.tests:
            if not (PROJECT / "tests" / test.split("::")[0]).is_file():
                raise ListError(f"{mutant.name}: there is no test {test}")


def _plain(result: Result) -> dict[str, str | float | None]:
    mutant = result.mutant
    return {
        "mutant": mutant.name,
        "like": mutant.like,
        "file": mutant.file,
        "fate": result.fate.value,
        "killed_by": result.by if result.fate is Fate.KILLED else None,
        "reason": result.by if result.fate is Fate.SKIPPED else None,
        "seconds": round(result.seconds, 2),
    }


class Table:
    """The kill table, a row as soon as it is known."""

    def __init__(self, mutants: Sequence[Mutant]) -> None:
        self._widths = [max(map(len, column)) for column in zip(*map(_cells, mutants), strict=True)]
        self._print(("mutant", "like", "file"), "s", "killed by")

    def row(self, mutant: Mutant, seconds: str, last: str) -> None:
        """Print a row."""
        self._print(_cells(mutant), seconds, last)

    def result(self, result: Result) -> None:
        """Print what became of a mutant."""
        last = {Fate.KILLED: result.by, Fate.SURVIVED: "SURVIVED", Fate.SKIPPED: f"skipped: {result.by}"}[result.fate]
        self.row(result.mutant, f"{result.seconds:.1f}", last)

    def _print(self, cells: tuple[str, str, str], seconds: str, last: str) -> None:
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, self._widths, strict=True))
        print(*padded, f"{seconds:>5}", last, sep="  ", flush=True)


def _cells(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.name, mutant.like, mutant.file


def _summary(results: Sequence[Result]) -> int:
    fates = Counter(result.fate for result in results)
    seconds = sum(result.seconds for result in results)
    print(f"\n{len(results)} mutants in {seconds:.0f} s:", ", ".join(f"{fates[fate]} {fate.value}" for fate in Fate))
    survived = [result.mutant.name for result in results if result.fate is Fate.SURVIVED]
    if survived:
        print("survived:", " ".join(survived))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
