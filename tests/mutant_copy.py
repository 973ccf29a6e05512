"""A copy of the project, in which mutants are made and tested. The project itself is never changed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from mutant import Fate, ListError, Mutant, Result

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src", "dirtylog")
_COPIED = ("src", "tests", "docs", "pyproject.toml", "README.md")
_TEST_SECONDS = 25
"""A test that takes longer hangs: those chosen take a second or two."""
_RUN_SECONDS = 90
_ALL_SECONDS = 600
_FAILED, _NO_TESTS = 1, 5


class Run(NamedTuple):
    """One run of pytest. ``code`` is None when it did not end by itself."""

    code: int | None
    output: str
    seconds: float

    def ids(self, word: str) -> list[str]:
        """Return the tests that the summary lists under a word, FAILED or ERROR."""
        lines = [line for line in self.output.splitlines() if line.startswith(f"{word} ")]
        return [line.removeprefix(f"{word} ").split(" - ")[0].removeprefix("tests/") for line in lines]

    @property
    def hung(self) -> bool:
        """Whether a test was ended because it took too long."""
        return self.code is None or "from pytest-timeout" in self.output

    @property
    def skipped(self) -> str | None:
        """Why nothing was tested, if nothing was; None if something was."""
        reasons = [line.split(": ", 1)[1] for line in self.output.splitlines() if line.startswith("SKIPPED ") and ": " in line]
        return reasons[0] if reasons and " passed" not in self.output else None


class Copy:
    """A copy of the source and the tests in a temporary directory; a context manager."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dirtylog-mutants-"))

    def __enter__(self) -> Self:
        for name in _COPIED:
            source = PROJECT / name
            if source.is_dir():
                shutil.copytree(source, self._folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(source, self._folder / name)
        self._check_that_it_wins()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def check(self, mutants: Iterable[Mutant]) -> None:
        """Raise :class:`ListError` unless the tests of all mutants pass where nothing is mutated."""
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        run = self._run(tests, _ALL_SECONDS)
        if run.code not in (0, _NO_TESTS):
            failed = "\n".join((*run.ids("FAILED"), *run.ids("ERROR"))) or run.output[-2000:]
            raise ListError(f"the tests fail where nothing is mutated:\n{failed}")

    def test(self, mutant: Mutant) -> Result:
        """Apply a mutant, run its tests, and restore the file."""
        with self._mutated(mutant):
            run = self._run(mutant.tests, _RUN_SECONDS)
        if run.code == 0:
            skipped = run.skipped
            return Result(mutant, Fate.SURVIVED if skipped is None else Fate.SKIPPED, skipped or "", run.seconds)
        if run.code is not None and run.code < 0:
            return Result(mutant, Fate.KILLED, f"the end of the interpreter: {signal.Signals(-run.code).name}", run.seconds)
        by = [test for test in (*run.ids("FAILED"), *run.ids("ERROR")) if "::" in test]
        if run.code is not None and not by:
            raise ListError(f"{mutant.name}: its tests do not run (pytest says {run.code}):\n{run.output[-2000:]}")
        name = by[0] if by else " ".join(mutant.tests)
        return Result(mutant, Fate.KILLED, f"{name} (it hung)" if run.hung else name, run.seconds)

    @contextmanager
    def _mutated(self, mutant: Mutant) -> Iterator[None]:
        path = self._folder / PACKAGE / mutant.file
        before = path.read_text()
        try:
            self._write(path, mutant.applied(self._folder / PACKAGE))
            yield
        finally:
            self._write(path, before)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        # Its time stamp has whole seconds, and its length may be that of the text before.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def _check_that_it_wins(self) -> None:
        """The installed package must not be tested in the place of the copy."""
        code = "import dirtylog; print(dirtylog.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=self._folder, env=self._environment(), capture_output=True, check=True
        )
        if not Path(os.fsdecode(found.stdout.strip())).is_relative_to(self._folder):
            raise ListError(f"the tests would import {os.fsdecode(found.stdout.strip())}, which is not the copy")

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(self._folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])))
        # Without DIRTYLOG_LONG some tests are not even collected; of those only the chosen ones run.
        return {**os.environ, "PYTHONPATH": path, "DIRTYLOG_LONG": "1", "COLUMNS": "400"}

    def _run(self, tests: Iterable[str], seconds: float) -> Run:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", f"--timeout={_TEST_SECONDS}"]
        # In the order given, so that it is the same test each time that kills.
        command += ["-p", "no:cacheprovider", "-p", "no:randomly", *(f"tests/{test}" for test in tests)]
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self._folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            output = self._end(process)
            return Run(None, output, time.monotonic() - start)
        except BaseException:
            self._end(process)
            raise
        return Run(process.returncode, output, time.monotonic() - start)

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> str:
        """End the run and what its tests have started: all that is in its session's first process group."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]
