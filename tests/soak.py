"""Soak every source: writers that never stop, readers that fail at random, and an oracle of everything that was stored.

``python tests/soak.py --seconds 300`` prints a table, of each source: the writes that could be counted, the pages reported to all
readers, how many of these had not changed, the pages compared, rounds and stops, failures and signals injected, pages lost.
It exits with 1 if a page was lost or anything else went wrong, or if nothing could be soaked. What cannot be soaked here is listed
as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from soak_sources import SOURCES, soak
from soak_tally import document, table


def main(words: list[str] | None = None) -> int:
    """Soak what is asked for, and return the exit status."""
    arguments = _parser().parse_args(words)
    sources = _chosen(arguments.sources)
    seconds = arguments.seconds / len(sources)
    reports = None if arguments.count is None else -(-arguments.count // len(sources))
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"{len(sources)} sources, {seconds:.1f} s each, seed {seed}", file=sys.stderr)
    tallies = []
    for source in sources:
        tallies.append(soak(source, seed, seconds, reports))
        tally = tallies[-1]
        outcome = f"skipped: {tally.skipped}" if tally.skipped else f"{tally.reports:,} page reports, {tally.lost} lost"
        print(f"{source}: {outcome}", file=sys.stderr)
    print(table(tallies))
    if arguments.json is not None:
        arguments.json.write_text(document(tallies, seed) + "\n", encoding="utf-8")
    return 0 if all(tally.good for tally in tallies) and any(tally.skipped is None for tally in tallies) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="for all sources together (default: 300)")
    parser.add_argument("--count", type=int, help="no more page reports than about this, for all sources together")
    parser.add_argument("--sources", default=",".join(SOURCES), help="names, or beginnings of names, with commas between them")
    parser.add_argument("--seed", type=int, help="for all that is random but the order in which threads run (default: a new one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too, as JSON")
    return parser


def _chosen(names: str) -> list[str]:
    chosen = []
    for name in names.split(","):
        found = [name] if name in SOURCES else [source for source in SOURCES if source.startswith(name)]
        if not found:
            sys.exit(f"no source is named {name!r}; there are: {', '.join(SOURCES)}")
        chosen += [source for source in found if source not in chosen]
    return chosen


if __name__ == "__main__":
    sys.exit(main())
