"""Programs with an agent: their userfaultfd is had without ptrace, and from nobody else than themselves."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dirtylog
from agented import NPAGES, WITH_AGENT, WITHOUT_AGENT, Agented, written
from dirtylog import AccessDeniedError, DirtyLog, UnsupportedError
from dirtylog.linux.abi import userfaultfd_number
from dirtylog.linux.agents import address_of, ask_agent
from dirtylog.linux.attach import Attached
from dirtylog.linux.process import ProcessMemory
from dirtylog.linux.ptrace import Tracee
from dirtylog.linux.ptrace_abi import Option
from victims import (
    NOBODY,
    eventually,
    needs_root,
    needs_victims,
    same_descriptors,
    state_of,
    threads_of,
    tracer_of,
    watched_mappings,
)
from writers import Writer, run_in_process_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_victims


def opened(target: Agented, port: str = "uffd") -> ProcessMemory:
    memory = dirtylog.open(f"pid:{target.pid}", port=port, maps=[target.map])
    assert isinstance(memory, ProcessMemory)
    return memory


@pytest.fixture
def target() -> Iterator[Agented]:
    with Agented() as running:
        yield running


# --- it works, and nobody is stopped


def test_an_agent_is_used_and_what_is_written_is_reported(target: Agented) -> None:
    with opened(target, "auto") as memory, DirtyLog(memory) as log:
        assert memory.attached is Attached.AGENT
        assert memory.fallback == ""
        for pages in ({3}, {0, 5, 63}, set(range(NPAGES))):
            target.order(f"store(*{sorted(pages)})")
            assert written(log, target) == pages
            assert written(log, target) == set()
        assert target.ask("dirtylog.agent.AGENT.handed_over") == "1"
    assert watched_mappings(target.pid) == 0


def test_no_ptrace_is_needed(target: Agented) -> None:
    """A process has one tracer at a time, and here it is the test."""
    tracee = Tracee(target.pid, target.pid, Option.NONE)
    with opened(target) as memory, DirtyLog(memory) as log:
        assert memory.attached is Attached.AGENT
        target.order("store(7)")
        assert written(log, target) == {7}
    tracee.stop()
    tracee.detach()


# Load the number of the call; if it is userfaultfd, end the process; else allow.
FILTER = """\
import ctypes, struct
def forbid(number, libc=ctypes.CDLL(None)):
    code = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7fff0000))
    kept = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    argument = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(kept)))
    assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, argument) == 0
"""


def test_a_thread_that_must_not_make_the_call_does_not() -> None:
    """A program's seccomp filter would end it; the agent's thread is older than the filter."""
    with Agented(FILTER + WITH_AGENT) as target:
        target.order(f"forbid({userfaultfd_number()})")
        with opened(target) as memory, DirtyLog(memory) as log:
            assert memory.attached is Attached.AGENT
            target.order("store(7)")
            assert written(log, target) == {7}


def test_without_an_agent_it_is_injected() -> None:
    with Agented(WITHOUT_AGENT) as target, opened(target) as memory, DirtyLog(memory) as log:
        assert memory.attached is Attached.INJECTED
        target.order("store(7)")
        assert written(log, target) == {7}


def test_nothing_of_it_is_left_in_the_program(target: Agented) -> None:
    before = threads_of(target.pid)
    with same_descriptors(target.pid), same_descriptors(os.getpid()):
        for _ in range(30):
            with opened(target) as memory, DirtyLog(memory):
                assert memory.attached is Attached.AGENT
                assert tracer_of(target.pid) == 0
        assert threads_of(target.pid) == before
    assert target.ask("dirtylog.agent.AGENT.handed_over") == "30"


@needs_root
def test_the_same_user_needs_no_privilege() -> None:
    program = (
        "import dirtylog.agent, os\nimport encodings.ascii\nos.setgroups([])\n"
        f"os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
        "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE\n"
    )
    with Agented(program + WITHOUT_AGENT) as target:
        ran = run_in_process_of(NOBODY, "run", f"pid:{target.pid}", "--map", target.map, "--rounds", "1", "--json")
        assert ran.status == 0, ran.err
        assert ran.document["attached"] == "agent"


@needs_root
def test_another_user_is_refused(target: Agented) -> None:
    ran = run_in_process_of(NOBODY, "run", f"pid:{target.pid}", "--rounds", "1")
    assert ran.status == 4
    assert target.ask("dirtylog.agent.AGENT.handed_over") == "0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        os.seteuid(NOBODY)
        try:
            connection.connect(address_of(target.pid))
        finally:
            os.seteuid(0)
        connection.settimeout(10)
        assert connection.recv(100) == b""
    assert ask_and_close(target.pid), "it serves others all the same"


def ask_and_close(pid: int) -> bool:
    uffd = ask_agent(pid)
    if uffd is not None:
        uffd.close()
    return uffd is not None


def test_a_thread_that_stores_all_the_time_and_one_that_is_logged(target: Agented) -> None:
    """A store must never wait for the agent: it is made with the interpreter's lock held."""
    target.order("sys.setswitchinterval(0.0005)")
    target.order("stored = []; import itertools")
    target.order("spin = lambda: [store(*range(64)) or stored.append(n) for n in itertools.count()]")
    target.order("threading.Thread(target=spin, daemon=True).start()")
    with opened(target) as memory, DirtyLog(memory) as log:
        for _ in range(50):
            before = int(target.ask("len(stored)"))
            eventually(lambda: len(written(log, target)) > 0, "nothing is written")
            eventually(lambda: int(target.ask("len(stored)")) > before, "it does not go on")  # noqa: B023 - called at once


# --- children


def test_a_forked_child_has_an_agent_of_its_own(target: Agented) -> None:
    target.order("child = os.fork() or (time.sleep(0.2), store(9), time.sleep(60), os._exit(0))")
    child = int(target.ask("child"))
    try:
        with opened(target) as parents, DirtyLog(parents) as log, dirtylog.open(f"pid:{child}", maps=[target.map]) as childs:
            assert isinstance(childs, ProcessMemory)
            assert childs.attached is Attached.AGENT
            with DirtyLog(childs) as childs_log:
                eventually(lambda: written(childs_log, target) == {9}, "the child's page is not reported")
                assert written(log, target) == set(), "it is not the parent's"
                target.order("store(4)")
                assert written(log, target) == {4}
    finally:
        os.kill(child, signal.SIGKILL)
        target.order("os.waitpid(child, 0)")


def test_a_program_that_it_executes_has_none(target: Agented) -> None:
    target.order("child = __import__('subprocess').Popen(['sleep', '60'])")
    child = int(target.ask("child.pid"))
    try:
        assert ask_agent(child) is None
    finally:
        os.kill(child, signal.SIGKILL)
        target.order("child.wait()")


# --- others, and agents that are not well


def test_an_impostor_at_the_address_is_not_believed() -> None:
    with Writer("spin", "5") as target, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address_of(target.pid))
        listener.listen()
        asked: list[int] = []

        def pretend() -> None:
            with listener.accept()[0] as connection, Path("/dev/null").open("rb") as file:
                asked.append(1)
                with suppress(OSError):
                    socket.send_fds(connection, [b"dirtylog-agent 1"], [file.fileno()])

        impostor = threading.Thread(target=pretend, daemon=True)
        impostor.start()
        memory = dirtylog.open(f"pid:{target.pid}", port="uffd")
        assert isinstance(memory, ProcessMemory)
        with memory:
            assert memory.attached is Attached.INJECTED
        impostor.join(10)
        assert asked


def test_a_program_whose_address_somebody_has_taken_runs_without_an_agent() -> None:
    """Its process id is known before it begins: a name that is taken must not keep it from running."""
    read, write = os.pipe()
    program = f"import os; os.read({read}, 1)\n{WITH_AGENT}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        process = subprocess.Popen(
            (sys.executable, "-c", program), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=(read,), text=True
        )
        listener.bind(address_of(process.pid))
        listener.listen()
        os.write(write, b".")
        out, _ = process.communicate(timeout=60)
    os.close(read)
    os.close(write)
    assert out.startswith("ready ")
    assert process.returncode == 0


def test_an_agent_that_hangs_is_not_waited_for_long(target: Agented) -> None:
    os.kill(target.pid, signal.SIGSTOP)
    eventually(lambda: state_of(target.pid) == "T", "it does not stop")
    began = time.monotonic()
    with opened(target, "auto") as memory, DirtyLog(memory) as log:
        assert 4 < time.monotonic() - began < 15
        assert memory.port.name in ("compare", "soft-dirty")
        assert "is stopped" in memory.fallback
        assert "kill -CONT" in memory.fallback
        with pytest.raises(UnsupportedError, match="is stopped"):
            opened(target, "uffd")
        os.kill(target.pid, signal.SIGCONT)
        target.order("store(7)")
        assert written(log, target) == {7}
    with opened(target) as memory:
        assert memory.attached is Attached.AGENT, "those who did not wait are forgotten"


@pytest.mark.parametrize("answer", ["b''", "b'dirtylog-agent 2'", "b'x' * 5000"])
def test_an_agent_that_says_something_else_is_none(answer: str) -> None:
    program = textwrap.dedent(f"""\
        import os, socket, threading
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(chr(0) + "dirtylog-agent-" + str(os.getpid()))
        listener.listen()
        def serve():
            while True:
                with listener.accept()[0] as connection:
                    socket.send_fds(connection, [{answer}], [0, 1])
        threading.Thread(target=serve, daemon=True).start()
    """)
    with Agented(program + WITHOUT_AGENT) as target, same_descriptors(os.getpid()):
        assert ask_agent(target.pid) is None
        with opened(target) as memory:
            assert memory.attached is Attached.INJECTED


def test_an_agent_without_free_descriptors_recovers() -> None:
    with Agented(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))) as target:
        target.order("files = []")
        target.say("[files.append(os.open('/dev/null', 0)) for _ in range(100)]")
        assert "Too many open files" in target.line()
        assert ask_agent(target.pid) is None
        target.order("[os.close(files.pop()) for _ in range(5)]")
        assert ask_and_close(target.pid), "the agent has not survived"


def test_a_process_that_may_have_no_userfaultfd_says_so_and_its_agent_survives() -> None:
    with Agented("import dirtylog.linux.agents as agents\nreal = agents.new_userfaultfd\n" + WITH_AGENT) as target:
        target.order("from dirtylog import AccessDeniedError")
        target.order("agents.new_userfaultfd = lambda: (_ for _ in ()).throw(AccessDeniedError('userfaultfd is refused'))")
        assert ask_agent(target.pid) is None
        target.order("agents.new_userfaultfd = real")
        assert ask_and_close(target.pid), "the agent has not survived"


def test_who_goes_away_while_he_is_served_does_no_harm(target: Agented) -> None:
    for _ in range(50):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(address_of(target.pid))
    assert ask_and_close(target.pid)
    with same_descriptors(target.pid):
        assert ask_and_close(target.pid)


def test_many_ask_at_once(target: Agented) -> None:
    got: list[bool] = []
    threads = [threading.Thread(target=lambda: got.append(ask_and_close(target.pid))) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] * 40


def test_a_process_that_ends_while_it_is_asked() -> None:
    with Agented() as target:
        target.process.kill()
        target.process.wait()
        assert ask_agent(target.pid) is None
        with pytest.raises((dirtylog.TargetGoneError, AccessDeniedError)):
            opened(target)
