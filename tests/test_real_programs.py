"""Programs that nobody wrote for this, started under a log: they do what they do without it, and end as they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from dirtylog.linux.process import ProcessMemory
from dirtylog.observe.rounds import rounds
from shadows import Shadow
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_victims

INTERVAL = 0.05


def run_to_the_end(*command: str, seconds: float = 30.0) -> ProcessMemory:
    """Run a command under a log, and return what is left of its memory."""
    with dirtylog.open(command, port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
        assert isinstance(memory, ProcessMemory)
        memory.resume()
        deadline = time.monotonic() + seconds
        for _ in rounds(log, None, INTERVAL):
            assert time.monotonic() < deadline
    return memory


THREADS = """\
import hashlib, threading
found = {}
def work(number):
    data = bytearray(b"x" * 100_000)
    for step in range(300):
        data[step * 7 : step * 7 + 50] = hashlib.sha256(data).hexdigest().encode()[:50]
    found[number] = hashlib.sha256(data).hexdigest()
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(set(found.values())) == 1
"""


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (THREADS, 0),
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os._exit(3)", 3),
        ("import os; os.execv('/bin/sh', ['sh', '-c', 'exit 9'])", 9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("import subprocess; raise SystemExit(subprocess.call(['sh', '-c', 'exit 4']))", 4),
        ("import os; pid = os.fork(); pid and os.waitpid(pid, 0); x = bytearray(1 << 20)", 0),
    ],
    ids=["threads", "nothing", "exit", "at-once", "exec", "killed", "fault", "child", "fork"],
)
def test_a_python_program(script: str, status: int) -> None:
    memory = run_to_the_end(sys.executable, "-c", script)
    assert memory.status == status


def test_a_python_program_whose_other_thread_executes_another() -> None:
    """From then on it is not traced: its end is not waited for, and comes as that of any process."""
    script = "import os, threading; threading.Thread(target=os.execv, args=('/bin/sh', ['sh', '-c', 'sleep 0.3; exit 9'])).start()"
    with dirtylog.open([sys.executable, "-c", script], port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
        assert isinstance(memory, ProcessMemory)
        memory.resume()
        found = 0
        with suppress(dirtylog.TargetGoneError):
            for _ in rounds(log, 200, INTERVAL):
                found += 1
        assert memory.stats.programs == 2
        assert found
    assert memory.status == 9


@pytest.mark.parametrize(
    "pipeline",
    ["seq 1 200000 | sort -rn | head -n 3 > out", "for i in 1 2 3 4 5; do ls /usr/bin | wc -l; done | sort -u > out; exec cat out"],
)
def test_a_pipeline_of_a_shell(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    memory = run_to_the_end("/bin/sh", "-c", pipeline)
    assert memory.status == 0
    logged = (tmp_path / "out").read_text()
    subprocess.run(("/bin/sh", "-c", pipeline), check=True)
    assert (tmp_path / "out").read_text() == logged
    assert memory.stats.programs == (2 if "exec" in pipeline else 1)
    assert "rror" not in capfd.readouterr().err


def test_a_program_that_is_killed_while_it_is_logged() -> None:
    with dirtylog.open([sys.executable, "-c", "while True: x = bytearray(1 << 20)"], port="uffd") as memory:
        assert isinstance(memory, ProcessMemory)
        with dirtylog.DirtyLog(memory) as log:
            memory.resume()
            killer = threading.Timer(0.5, os.kill, (memory.pid, signal.SIGKILL))
            killer.start()
            try:
                found = [one.dirty_pages for one in rounds(log, 1000, INTERVAL)]
            except dirtylog.TargetGoneError:
                found = [1] * 4
            assert len(found) > 3
            killer.join()
            with pytest.raises(dirtylog.TargetGoneError):
                until_gone(memory, log.update)
    assert memory.status == -signal.SIGKILL


def until_gone(memory: ProcessMemory, act: Callable[[], object]) -> None:
    memory.end()
    for _ in range(1000):
        act()
        time.sleep(0.001)


def test_a_program_that_ignores_sigterm_is_ended_by_a_close() -> None:
    script = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); x = bytearray(1 << 22); print('on', flush=True); "
        "signal.pause()"
    )
    memory = dirtylog.open([sys.executable, "-c", script], port="uffd")
    assert isinstance(memory, ProcessMemory)
    with dirtylog.DirtyLog(memory) as log:
        memory.resume()
        assert sum(one.dirty_pages for one in rounds(log, 10, INTERVAL)) > (1 << 22) // 4096
    began = time.monotonic()
    memory.close()
    assert time.monotonic() - began < 8.0
    assert memory.status == -signal.SIGKILL
    assert not Path(f"/proc/{memory.pid}").exists()


def test_a_program_of_numpy_is_copied_at_its_end() -> None:
    """What it has when it ends is what the log has reported: the array that it printed the address of."""
    script = (
        "import numpy as np, sys; a = np.zeros((300, 512)); r = np.random.default_rng(5)\n"
        "for step in range(200): a[r.integers(300, size=20)] += step\n"
        "open(sys.argv[1], 'w').write(f'{a.ctypes.data} {a.sum()}')\n"
        "import os; os._exit(0)"  # as it is: Python would free the array
    )
    result = Path(os.environ.get("TMPDIR", "/tmp")) / f"dirtylog-numpy-{os.getpid()}"  # noqa: S108 - named by this process
    with dirtylog.open([sys.executable, "-c", script, str(result)], port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
        assert isinstance(memory, ProcessMemory)
        shadow = Shadow(memory, log)
        memory.resume()
        while not memory.ending(INTERVAL):
            shadow.follow()
        shadow.follow()
        assert not shadow.compare().lost
        address, total = result.read_text().split()
        result.unlink()
        contents = shadow.octets(int(address), 300 * 512 * 8).view(np.float64)
        assert contents.sum() == float(total)
