"""Injections that are killed: run as a program, it forks for each line that it reads, and the child makes one.

A line is JSON: ``pid``, ``tid`` (the thread to choose), and either ``stage`` and ``after``: the child kills itself just before
or just after its stage of that number, or with ``pause`` waits there for so many seconds; or ``delay``: it is killed after so many
seconds; or none of them. ``spoil`` names what is wrong in the signal frame that it lays; ``signal`` is sent to the thread right
before it is interrupted. The answer is JSON, too: ``signal`` that ended the child, or 0, ``exit`` (1 for an error of dirtylog's, 2
for any other), and ``stage``, the name of where it was, or that it hung.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from dirtylog import DirtyLogError
from dirtylog.linux import injection
from dirtylog.linux.arch import x86_64
from injection_stages import Stages

if TYPE_CHECKING:
    from collections.abc import Callable

_TGKILL = 234
_A_MOMENT, _A_WHILE = 0.003, 0.0005
_PATIENCE = 20.0


class Died(NamedTuple):
    """How an injection ended."""

    signal: int
    exit: int
    stage: str


class DyingInjector:
    """The program, seen by a test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            (sys.executable, Path(__file__)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, text=False
        )

    def inject(self, pid: int, tid: int, **how: float | str) -> Died:
        """Inject, and die if ``how`` says so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"pid": pid, "tid": tid, **how}).encode() + b"\n")
        return Died(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _die_at(order: dict[str, Any], report: int) -> Callable[[int, str, bool], None]:
    number, after = order["stage"], bool(order["after"])

    def act(stage: int, name: str, done: bool) -> None:
        if "signal" in order and name == "INTERRUPT" and not done:
            ctypes.CDLL(None).syscall(_TGKILL, order["pid"], order["tid"], order.pop("signal"))
            time.sleep(_A_MOMENT)  # until it has stopped to have the signal delivered
        if stage == number and done == after:
            os.write(report, f"{'after' if after else 'before'} {name}".encode())
            time.sleep(order.get("pause", 0))
            if "pause" not in order:
                os.kill(os.getpid(), signal.SIGKILL)

    return act


def _spoil_registers(registers: x86_64.UserRegs) -> x86_64.UserRegs:
    spoilt = x86_64.UserRegs.from_buffer_copy(registers)
    spoilt.r12 ^= 1
    return spoilt


def _spoil(what: str) -> None:
    frame = x86_64.X86_64.frame
    changes: dict[str, tuple[Any, str, Any]] = {
        "red zone": (x86_64, "_RED_ZONE", 0),
        "alternate stack": (x86_64, "_NO_ALTSTACK", 2),
        "extended state": (x86_64, "_FP_XSTATE_MAGIC1", 0),
        "mask": (x86_64.X86_64, "frame", lambda self, tracee, registers, _, gadgets: frame(self, tracee, registers, 0, gadgets)),
        "registers": (
            *(x86_64.X86_64, "frame"),
            lambda self, tracee, registers, *rest: frame(self, tracee, _spoil_registers(registers), *rest),
        ),
    }
    setattr(*changes[what])


def _inject(order: dict[str, Any], report: int) -> int:
    injection.threads_by_preference = lambda *_: [order["tid"]]  # type: ignore[attr-defined]  # the name that the module looks up
    if "spoil" in order:
        _spoil(order["spoil"])
    if "stage" in order:
        Stages(_die_at(order, report))
    try:
        injection.inject_userfaultfd(order["pid"]).close()
    except DirtyLogError:
        return 1
    except BaseException:  # noqa: BLE001 - the parent sees the exit status, and who tests sees the traceback
        traceback.print_exc()
        return 2
    return 0


def _obey(order: dict[str, Any]) -> Died:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os._exit(_inject(order, write))
    if "delay" in order:
        time.sleep(order["delay"])
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.write(write, b", and it hangs")
            os.kill(child, signal.SIGKILL)
        time.sleep(_A_WHILE)
    status = ended[1]
    os.close(write)
    with open(read, "rb") as said:  # noqa: PTH123 - a descriptor
        stage = said.read().decode()
    code = os.waitstatus_to_exitcode(status)
    return Died(max(0, -code), max(0, code), stage)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_obey(json.loads(line))._asdict()), flush=True)
