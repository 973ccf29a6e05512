"""A command finds the surroundings that it would find without dirtylog."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from victims import needs_victims
from writers import command_line, dirtylog

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_victims

# What Python ignores, and no shell does.
LAUNCH = """\
import os, resource, signal, sys
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
"""


def alone_and_logged(*command: str, prepare: str = "") -> tuple[list[str], list[str]]:
    """Return what a command says when it runs alone, and when dirtylog runs it, both after ``prepare``, which is Python."""
    said: list[list[str]] = []
    for before in ((), command_line("run", "--jsonl", "--port", "uffd", "--")):
        words = (*before, *command)
        launcher = f"{LAUNCH}{prepare}\nos.execvp(sys.argv[1], sys.argv[1:])"
        ran = subprocess.run(
            (sys.executable, "-I", "-S", "-c", launcher, *words),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in ran.stderr, ran.stderr
        said.append([line for line in ran.stdout.splitlines() if not line.startswith('{"schema"')])
    assert said[0], "it says nothing"
    return said[0], said[1]


def same(*command: str, prepare: str = "") -> None:
    alone, logged = alone_and_logged(*command, prepare=prepare)
    assert logged == alone


def test_open_files() -> None:
    same("sh", "-c", "cd /proc/self/fd; for fd in *; do test -e $fd && echo $fd; done")


def test_signals() -> None:
    alone, logged = alone_and_logged("grep", "^Sig[BIC]", "/proc/self/status")
    assert logged == alone
    assert "SigIgn:\t0000000000000000" in logged


def test_signals_that_dirtylog_s_parent_ignores() -> None:
    same("grep", "^Sig[BIC]", "/proc/self/status", prepare="signal.signal(signal.SIGUSR2, signal.SIG_IGN)")


def test_sigpipe_ends_it() -> None:
    result = dirtylog("run", "--jsonl", "--", "sh", "-c", "yes | true; kill -l $?; exec 1>&2; sh -c 'kill -PIPE $$; echo not'")
    assert "not" not in result.err.split()


def test_the_environment() -> None:
    same("env", prepare="os.environ.update({'COLOUR': 'blue', 'LANG': 'C.UTF-8'})")


def test_the_directory_the_umask_and_the_priority(tmp_path: Path) -> None:
    same("pwd", prepare=f"os.chdir({str(tmp_path)!r})")
    same("sh", "-c", "umask", prepare="os.umask(0o027)")
    same("nice", prepare="os.nice(3)")


def test_limits() -> None:
    same("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c", prepare="resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))")


def test_its_own_name_and_words() -> None:
    same(
        "sh", "-c", "cat /proc/$$/comm; tr '\\0' '|' < /proc/$$/cmdline; readlink /proc/$$/exe; echo $0", "argument zero", "-h", ""
    )


def test_the_process_group_and_the_session() -> None:
    words = ("run", "--jsonl", "--", "sh", "-c", "cut -d' ' -f5,6 /proc/$$/stat; cut -d' ' -f5,6 /proc/$PPID/stat >&2")
    result = dirtylog(*words)
    own, parents = result.out.splitlines()[0], result.err.strip()
    assert own == parents


def test_output_is_in_order_and_errors_are_apart() -> None:
    result = dirtylog("run", "--json", "--", "sh", "-c", "echo out; echo err >&2")
    assert result.out.startswith("out\n")
    assert result.err == "err\n"


def test_input_reaches_it() -> None:
    ran = subprocess.run(command_line("run", "--json", "--", "cat"), input="a\nb\n", capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("a\nb\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_waits_for_its_own_children(number: int) -> None:
    words = ("sh", "-c", f"sh -c 'kill -{int(number)} $$'; echo $?; (exit 7); echo $?; sleep 0.01 & wait $!; echo $?")
    same(*words)
