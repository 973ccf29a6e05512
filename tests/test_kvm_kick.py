"""Kicks and signals: a kick ends one run, at once and just one, wherever it comes; the caller's own signals stay the caller's."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from dirtylog.kvm import abi
from dirtylog.kvm import vcpu as vcpu_module
from dirtylog.kvm.arch.x86_64_registers import Regs
from dirtylog.kvm.exits import Exit, Halted, Interrupted, IoAccess, MmioAccess
from dirtylog.kvm.system import KvmSystem
from dirtylog.kvm.vcpu import KICK_SIGNAL, KvmVcpu
from kvm_bare import ENDLESS, HLT, NOWHERE, bare_guest, bare_vcpu, runners
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

pytestmark = needs_kvm

OUTS = "e6 10 eb fc"
"""1: out 0x10, al; jmp 1b"""
SOON = 10.0


@contextmanager
def kicked_at_last(vcpu: KvmVcpu) -> Iterator[None]:
    """Kick a run of this thread that nothing else ends, so that a test that fails ends."""
    timer = threading.Timer(SOON, vcpu.kick)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def run_for_ever(vcpu: KvmVcpu) -> None:
    while True:
        vcpu.run()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_a_kick_ends_an_endless_loop_at_once() -> None:
    with bare_vcpu(ENDLESS) as vcpu, runners() as runner:
        running = runner.submit(vcpu.run)
        time.sleep(0.02)
        assert not running.done()
        began = time.monotonic()
        vcpu.kick()
        assert running.result(timeout=SOON) == Interrupted()
        assert time.monotonic() - began < 1


def test_a_kick_before_the_run_ends_it_and_completes_what_the_last_exit_left() -> None:
    with bare_vcpu("ed f4", rdx=0x10) as vcpu:  # in eax, dx; hlt
        access = vcpu.run()
        assert isinstance(access, IoAccess)
        vcpu.answer(access, b"\1\2\3\4")
        vcpu.kick()
        assert vcpu.run() == Interrupted()
        assert vcpu.get(Regs).rax == 0x0403_0201
        assert vcpu.run() == Halted(), "a kick ends one run"


def test_kicks_that_come_together_are_one() -> None:
    with bare_vcpu(HLT) as vcpu:
        for _ in range(3):
            vcpu.kick()
        assert [vcpu.run(), vcpu.run()] == [Interrupted(), Halted()]


def test_each_of_two_hundred_kicks_ends_a_run() -> None:
    ended: list[Exit] = []
    with bare_vcpu(ENDLESS) as vcpu, runners() as runner:

        def run() -> None:
            ended.extend(vcpu.run() for _ in range(200))

        running = runner.submit(run)
        for number in range(200):
            vcpu.kick()
            wait_until(lambda number=number: len(ended) > number)  # type: ignore[misc]  # bound early
        running.result(timeout=SOON)
    assert ended == [Interrupted()] * 200


def test_no_kick_is_lost_among_exits() -> None:
    """The guest leaves all the time: most kicks come when it is just out, or just going in."""
    with bare_vcpu(OUTS) as vcpu, runners() as runner:

        def run() -> int:
            exits = 0
            while vcpu.run() != Interrupted():
                exits += 1
            return exits

        for number in range(200):
            running = runner.submit(run)
            time.sleep(number % 10 * 0.0001)
            vcpu.kick()
            running.result(timeout=SOON)


def test_threads_that_kick_all_the_time_neither_lose_an_access_nor_repeat_one() -> None:
    with bare_vcpu("e6 10 ff c9 75 fa f4", rcx=300) as vcpu:  # 1: out 0x10, al; dec ecx; jnz 1b; hlt
        stop = threading.Event()

        def kick() -> None:
            while not stop.wait(0.0001):
                vcpu.kick()

        with ThreadPoolExecutor(2) as kickers:
            kicking = [kickers.submit(kick) for _ in range(2)]
            try:
                outs = 0
                while (reason := vcpu.run()) != Halted():
                    outs += isinstance(reason, IoAccess)
            finally:
                stop.set()
            assert [done.result(timeout=SOON) for done in kicking] == [None, None]
        assert outs == 300


@contextmanager
def kick_as_a_run_ends(monkeypatch: pytest.MonkeyPatch, vcpu: KvmVcpu) -> Iterator[None]:
    """Kick just when the next KVM_RUN has come back with an exit of its own, and the runner does not know yet."""
    pending = True

    def ioctl(fd: int, request: int, argument: int = 0) -> int:
        nonlocal pending
        result = fcntl.ioctl(fd, request, argument)
        if request == abi.KVM_RUN and pending:
            pending = False
            vcpu.kick()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(vcpu_module, "fcntl", SimpleNamespace(ioctl=ioctl))
        yield


def test_a_kick_that_coincides_with_an_exit_ends_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_vcpu(OUTS) as vcpu, kick_as_a_run_ends(monkeypatch, vcpu):
        assert [type(vcpu.run()) for _ in range(4)] == [IoAccess, Interrupted, IoAccess, IoAccess]


def test_a_kick_that_coincides_with_an_exit_ends_just_one_run_of_whatever_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal stays pending in the thread that was the runner: it must not end that thread's runs for ever."""
    with bare_vcpu(OUTS) as vcpu, runners() as first, runners() as second:
        with kick_as_a_run_ends(monkeypatch, vcpu):
            assert isinstance(first.submit(vcpu.run).result(timeout=SOON), IoAccess)
        assert second.submit(vcpu.run).result(timeout=SOON) == Interrupted()
        ends = [type(first.submit(vcpu.run).result(timeout=SOON)) for _ in range(3)]
        assert ends.count(IoAccess) >= 2, "at most one run ended for nothing"


def test_a_kick_that_coincides_with_a_halt_does_not_keep_a_reset_machine_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_guest(HLT) as memory:
        with kick_as_a_run_ends(monkeypatch, memory.cpus[0].vcpu):
            memory.resume()
            assert memory.wait(timeout=SOON)
        memory.reset()
        memory.resume()
        assert memory.wait(timeout=2)


def test_one_thread_s_kick_of_one_vcpu_does_not_end_its_runs_of_another_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with bare_guest(OUTS, {}, {}) as memory:
        kicked, other = (cpu.vcpu for cpu in memory.cpus)
        with kick_as_a_run_ends(monkeypatch, kicked):
            assert isinstance(kicked.run(), IoAccess)
        assert [type(other.run()) for _ in range(3)].count(IoAccess) >= 2
        assert kicked.run() == Interrupted(), "its own kick is not lost"
        assert isinstance(kicked.run(), IoAccess)


def test_an_access_in_pieces_is_completed_to_its_last_piece() -> None:
    with bare_vcpu("0f 10 07 f4", rdi=NOWHERE) as vcpu:  # movups xmm0, [rdi]: KVM asks for 8 bytes at a time
        assert isinstance(vcpu.run(), MmioAccess)
        vcpu.complete()
        assert vcpu.run() == Halted()


def test_a_handler_of_a_signal_may_kick_the_vcpu_that_its_own_thread_runs() -> None:
    """Python calls handlers where a function begins and after calls, in whatever the main thread does: in the middle of a run."""
    script = f"""
import itertools
import sys
from kvm_bare import bare_vcpu
from dirtylog.kvm import vcpu as module
from dirtylog.kvm.exits import Interrupted, IoAccess

def run_and_kick_at(point, vcpu):
    def profile(frame, event, _argument):
        nonlocal point
        if frame.f_code.co_filename == module.__file__ and event != "c_call":
            point -= 1
            if point == -1:
                vcpu.kick()
    sys.setprofile(profile)
    reason = vcpu.run()
    sys.setprofile(None)
    return reason, point < 0

with bare_vcpu({OUTS!r}) as vcpu:
    for kicked_before in (False, True):
        for point in itertools.count():
            if kicked_before:
                vcpu.kick()
            reason, reached = run_and_kick_at(point, vcpu)
            if not reached:
                break
            assert Interrupted() in (reason, vcpu.run()), f"lost at point {{point}}"
            vcpu.kick()
            assert Interrupted() in (vcpu.run(), vcpu.run()), f"no kick works after point {{point}}"
            assert [type(vcpu.run()) for _ in range(2)][1] is IoAccess, f"no run works after point {{point}}"
        assert point > 3
"""
    assert in_a_process_of_its_own(script, timeout=5) == (0, "")


def test_a_new_thread_that_the_system_gives_an_old_one_s_number_is_not_killed_by_a_kick() -> None:
    """Thread numbers are used again, and a signal mask goes with its thread."""
    script = """
import mmap
import signal
import threading
import time
import numpy as np
from dirtylog.kvm.arch.x86_64_registers import Regs, Sregs
from dirtylog.kvm.system import KvmSystem
from dirtylog.kvm.vcpu import KICK_SIGNAL

signal.pthread_sigmask(signal.SIG_UNBLOCK, [KICK_SIGNAL])  # a process inherits what its maker blocks
memory = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
memory[:2] = 0xEB, 0xFE  # jmp $
with KvmSystem() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
    vm.set_user_memory_region(0, 0, 0, 4096, memory.ctypes.data)
    sregs = vcpu.get(Sregs)
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.put(sregs)
    vcpu.put(Regs(rip=0, rflags=2))
    seen = [0]
    def run():
        seen.append(threading.get_ident())
        vcpu.run()
    again = 0
    while again < 3 and len(seen) < 100:
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.01)
        vcpu.kick()
        thread.join()
        time.sleep(0.005)
        again += seen[-1] == seen[-2]
"""
    assert in_a_process_of_its_own(script, timeout=SOON) == (0, "")


def in_a_process_of_its_own(script: str, timeout: float) -> tuple[int | str, str]:
    """Run Python that may end by a signal, or not at all; return its status and what it says of errors."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return "it hangs", ""
    return done.returncode, done.stderr


@contextmanager
def handler_of(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_an_alarm_interrupts_the_run_and_its_handler_is_called() -> None:
    called: list[int] = []
    with bare_vcpu(ENDLESS) as vcpu, handler_of(signal.SIGALRM, lambda number, _: called.append(number)), kicked_at_last(vcpu):
        main = threading.get_ident()
        timer = threading.Timer(0.02, lambda: signal.pthread_kill(main, signal.SIGALRM))
        timer.start()
        began = time.monotonic()
        assert vcpu.run() == Interrupted()
        assert time.monotonic() - began < SOON / 2
        timer.join()
        assert called == [signal.SIGALRM]


def test_a_handler_that_raises_ends_the_run_and_the_vcpu_goes_on() -> None:
    # No Exception: it may come while Python makes an enum of a signal's number, which swallows those.
    class StopError(BaseException):
        pass

    def stop(_number: int, _frame: object) -> None:
        raise StopError

    with bare_vcpu(OUTS) as vcpu, handler_of(signal.SIGUSR1, stop):
        main = threading.get_ident()
        timer = threading.Timer(0.02, lambda: signal.pthread_kill(main, signal.SIGUSR1))
        timer.start()
        with pytest.raises(StopError):
            run_for_ever(vcpu)
        timer.join()
        assert isinstance(vcpu.run(), IoAccess)


def test_signals_that_the_caller_blocks_stay_blocked_and_pending() -> None:
    called: list[int] = []
    with handler_of(signal.SIGUSR1, lambda number, _: called.append(number)):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
        try:
            with bare_vcpu(HLT) as vcpu:
                signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
                assert vcpu.run() == Halted(), "it is not let in"
                assert signal.SIGUSR1 in signal.sigpending()
                assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1, KICK_SIGNAL}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert called == [signal.SIGUSR1]


def test_signals_while_machines_are_made_come_to_their_handler_and_to_nobody_else() -> None:
    """The kernel may answer KVM_CREATE_VM with EINTR, and then wants to be asked again."""
    called: list[int] = []
    with KvmSystem() as system, handler_of(signal.SIGALRM, lambda number, _: called.append(number)):
        try:
            for number in range(300):
                # One each, at another time: signals that never stop might come faster than a machine can be made.
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + number % 30))
                system.create_vm().close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert called
