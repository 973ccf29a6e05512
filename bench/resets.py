"""What a fast reset costs, against Unicorn's own snapshot of CPU and memory, and against copying everything back."""

from __future__ import annotations

import ctypes
import importlib
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.dirty_log import DirtyLog
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.emulated.isa import ISAS
from dirtylog.guests.baseline import Baseline
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.guests.programs import PAGE_SIZE, Pattern, store_loop
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.options import KvmOptions, Log
from kvm_filler import why_no_kvm
from loops import set_registers
from report import Section, Spread, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.guests.machine import Machine

_NBYTES = 16 << 20
_PAGES = 100
_WALK = Pattern(base=1 << 20, mul=5, add=3, mask=255, count=_PAGES)
_LIMIT_US = 200
_DEADLINE = 30
_ALONE, _WITH_STORES = "Unicorn's snapshot, us", "and the stores, us"

unicorn: Any = importlib.import_module("unicorn")


def resets(*, quick: bool) -> Section:
    """Measure resets of guests that have written 100 of 4096 pages and halted."""
    section = Section(
        "Fast reset of a 16 MiB guest",
        f"The guest stores to {_PAGES} pages, out of 256 in a walk, and halts; then it is reset: the log is asked for what was "
        "written, those pages and the registers are put back, and what was translated is flushed. The number of pages is checked "
        "each time, and the memory at the end. Reset alone: CPU time of the thread that calls it; elapsed time for KVM. Whole "
        "loop: resume, run, wait, pause, reset, in elapsed time: a vCPU is a thread, which is woken and waited for. Everything "
        "copied: the whole RAM in place of the pages written. Unicorn's snapshot: a bare Unicorn with one of CPU and memory "
        "(UC_CTL_CONTEXT_MODE) and the same stores: context_restore alone, and with the stores, which copy on write then; a dash "
        "where it fails.",
    )
    rounds = 200 if quick else 1500
    for name in PORTS:
        section.rows.append(_row(name, make_guest(name, _NBYTES, loops=[_WALK]), rounds, time.thread_time))
        isa = ISAS.get(PORTS[name].isa)
        section.rows[-1] |= _without_unicorn() if isa is None else _unicorn_snapshots(isa.name, 10 if quick else 40)
    for log in Log:
        reason = why_no_kvm(log)
        if reason is None:
            memory = make_kvm_guest(_NBYTES, loops=[_WALK], options=KvmOptions(log=log))
            section.rows.append(_row(f"kvm, {log.value}", memory, rounds, time.perf_counter) | _without_unicorn())
    alone = section.values("guest", "reset alone, us")
    text = f"a reset alone in at most {_LIMIT_US} us, which is {1_000_000 // _LIMIT_US} a second"
    section.targets = [Target(text, _LIMIT_US, "us", alone)]
    return section


def _row(name: str, memory: Machine[Any], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    with memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        contents = memory.contents(memory.slots[RAM_SLOT])
        before = contents.copy()
        alone, whole, copied = [], [], []
        for _ in range(rounds):
            start = time.perf_counter()
            _run(memory)
            begin = clock()
            count = memory.reset_to(baseline)
            alone.append(clock() - begin)
            whole.append(time.perf_counter() - start)
            assert count == _PAGES or (name.startswith("kvm") and count >= _PAGES)
        assert np.array_equal(contents, before)
        for _ in range(min(rounds, 200)):
            _run(memory)
            begin = clock()
            np.copyto(contents, before)
            copied.append(clock() - begin)
            memory.reset_to(baseline)
    return {
        "guest": name,
        "reset alone, us": Spread.of(1e6 * seconds for seconds in alone),
        "resets a second": f"{1 / statistics.median(alone):.0f}",
        "whole loop, us": Spread.of(1e6 * seconds for seconds in whole),
        "everything copied, us": Spread.of(1e6 * seconds for seconds in copied),
    }


def _run(memory: Machine[Any]) -> None:
    memory.resume()
    assert memory.wait(_DEADLINE)
    memory.pause()


def _without_unicorn() -> dict[str, Any]:
    return {_ALONE: "-", _WITH_STORES: "-"}


def _unicorn_snapshots(name: str, rounds: int) -> dict[str, Any]:
    """Return the times of Unicorn's own way back."""
    isa = ISAS[name]
    mode = 0
    for flag in isa.modes:
        mode |= getattr(unicorn, f"UC_MODE_{flag}")
    uc: Any = unicorn.Uc(getattr(unicorn, f"UC_ARCH_{isa.arch}"), mode)
    uc.mem_map(0, _NBYTES)
    uc.mem_map(_NBYTES, PAGE_SIZE)
    uc.mem_write(_NBYTES, store_loop(name))
    constants = importlib.import_module(f"unicorn.{isa.constants}_const")
    for register, value in isa.setup:
        uc.reg_write(getattr(constants, f"UC_{isa.arch}_REG_{register}"), value)
    set_registers(uc, isa, _WALK)
    both = ctypes.c_int(unicorn.UC_CTL_CONTEXT_CPU | unicorn.UC_CTL_CONTEXT_MEMORY)
    uc.ctl(unicorn.UC_CTL_CONTEXT_MODE, unicorn.UC_CTL_IO_WRITE, both)
    context = uc.context_save()
    alone, whole = [], []
    for _ in range(rounds):
        start = time.thread_time()
        try:
            uc.emu_start(_NBYTES, _NBYTES + isa.halt)
        except unicorn.UcError:
            return _without_unicorn()
        assert any(uc.mem_read(_WALK.base, isa.word_bytes))
        begin = time.thread_time()
        uc.context_restore(context)
        end = time.thread_time()
        assert not any(uc.mem_read(_WALK.base, isa.word_bytes))
        alone.append(1e6 * (end - begin))
        whole.append(1e6 * (end - start))
    return {_ALONE: Spread.of(alone), _WITH_STORES: Spread.of(whole)}
