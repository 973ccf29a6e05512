"""The properties of the fuzz tests under atheris, which looks for inputs that reach new code: ``make fuzz``.

``guided.py SECONDS`` gives each property that long, and says which did not hold. ``guided.py NAME FLAGS`` runs one, with
libFuzzer's flags; the input of a failure is left in a file beside the interpreter's, and ``guided.py NAME FILE`` shows it again.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import atheris  # type: ignore[import-untyped]  # it has no types

if TYPE_CHECKING:
    from collections.abc import Callable

_TESTS = Path(__file__).parent.parent
_LIMITS = ("-timeout=20", "-rss_limit_mb=2048", "-max_len=8192", f"-artifact_prefix={sys.prefix}/")


def properties() -> dict[str, Callable[[bytes], object]]:
    """Return by name what runs a property with the choices that some bytes make."""
    found: dict[str, Callable[[bytes], object]] = {}
    sys.path.insert(0, str(_TESTS))
    for path in sorted(_TESTS.glob("test_fuzz_*.py")):
        module = importlib.import_module(path.stem)
        for name, test in vars(module).items():
            handle: Any = getattr(test, "hypothesis", None)
            if name.startswith("test_") and handle is not None:
                found[name] = handle.fuzz_one_input
    return found


def run_one(name: str, flags: list[str]) -> None:
    """Run one property until its time is up or it fails; the process ends with it."""
    with atheris.instrument_imports(include=["dirtylog", "elftools"]):
        run = properties()[name]

    def once(data: bytes) -> None:
        run(data)

    atheris.Setup([sys.argv[0], *_LIMITS, *flags], once)
    atheris.Fuzz()


def run_all(seconds: int) -> int:
    """Run every property for so long, each in a process of its own; return how many did not hold."""
    failed = []
    for name in properties():
        flags = (f"-max_total_time={seconds}", "-verbosity=0")
        done = subprocess.run((sys.executable, __file__, name, *flags), check=False, capture_output=True, text=True)
        print(f"{'FAILS' if done.returncode else 'holds'} {name}", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
    return len(failed)


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        sys.exit(run_all(int(sys.argv[1])) > 0)
    run_one(sys.argv[1], sys.argv[2:])
