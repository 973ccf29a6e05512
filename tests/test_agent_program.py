"""``python -m dirtylog.agent``: a program runs as it would without."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import dirtylog
from agented import WITHOUT_AGENT, Agented, written
from dirtylog.linux.attach import Attached
from dirtylog.linux.process import ProcessMemory
from victims import needs_victims

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """\
import atexit, os, pickle, sys, threading, time
WORD = "global"
class Thing:
    pass
print(sys.argv)
print(__name__, os.path.isabs(__file__), os.path.realpath(__file__), __spec__ is None or __spec__.name)
print(sys.modules["__main__"].WORD, type(pickle.loads(pickle.dumps(Thing()))).__module__)
import sibling
print(sibling.NAME)
def late():
    time.sleep(0.1)
    print("thread", WORD, flush=True)
threading.Thread(target=late).start()
atexit.register(lambda: print("atexit", WORD, flush=True))
sys.exit(int(sys.argv[1]))
"""


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, *words), capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    for place in (tmp_path, tmp_path / "package"):
        (place / "script.py").write_text(SCRIPT, encoding="ascii")
        (place / "sibling.py").write_text("NAME = __name__", encoding="ascii")
    return tmp_path


@pytest.mark.parametrize(
    "words", [("script.py",), ("package/script.py",), ("./script.py",), ("-m", "script"), ("-m", "package.script")]
)
@pytest.mark.parametrize("status", ["0", "3"])
def test_it_runs_as_it_would_alone(words: tuple[str, ...], status: str, folder: Path) -> None:
    arguments = (*words, status, "--flag", "-m", "a b")
    alone, with_agent = python(*arguments, cwd=folder), python("-m", "dirtylog.agent", *arguments, cwd=folder)
    assert alone.returncode == int(status)
    assert (with_agent.returncode, with_agent.stdout, with_agent.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_a_script_elsewhere_finds_its_neighbours(folder: Path) -> None:
    result = python("-m", "dirtylog.agent", str(folder / "script.py"), "0", cwd="/")
    assert result.returncode == 0, result.stderr
    assert "sibling\n" in result.stdout


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("raise ValueError('bad')", 1, "ValueError: bad"),
        ("raise SystemExit('sorry')", 1, "sorry"),
        ("import os; os._exit(9)", 9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(9)", -15, ""),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt"),
    ],
)
def test_however_it_ends(text: str, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(text, encoding="ascii")
    result = python("-m", "dirtylog.agent", "script.py", cwd=tmp_path)
    assert result.returncode == status
    assert said in result.stderr


@pytest.mark.parametrize("words", [(), ("-m",), ("-h",), ("--help",)])
def test_usage(words: tuple[str, ...]) -> None:
    result = python("-m", "dirtylog.agent", *words)
    assert result.returncode == (0 if words in (("-h",), ("--help",)) else 2)
    assert result.stderr == "usage: python -m dirtylog.agent [-m MODULE | PROGRAM] [ARGS]\n"


@needs_victims
@pytest.mark.parametrize("how", ["script", "module"])
def test_it_is_logged_through_its_agent(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "obeying.py").write_text(WITHOUT_AGENT, encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    words = (str(tmp_path / "obeying.py"),) if how == "script" else ("-m", "obeying")
    with Agented(before=("-m", "dirtylog.agent", *words)) as target:
        memory = dirtylog.open(f"pid:{target.pid}", maps=[target.map])
        assert isinstance(memory, ProcessMemory)
        with memory, dirtylog.DirtyLog(memory) as log:
            assert memory.attached is Attached.AGENT
            target.order("store(7)")
            assert written(log, target) == {7}
