"""A guest on one of the ports, its vCPUs, and readers of its log, all as actors; and what must be true when all is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

import dirtylog.guests.vcpu as vcpu_module
from dirtylog import DirtyBitmap
from dirtylog.emulated.arch.ppc_hv import PpcHvPort
from dirtylog.emulated.cpu_trace import Access, TraceCpu
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.emulated.port import PAGE_SHIFT
from dirtylog.log import get_dirty_log, get_dirty_log_protect, start_logging
from dirtylog.port import ProtectPort
from dirtylog.words import DirtyWords
from interleave.cooperation import StepLock, StepThreading, StepTlb
from interleave.explorer import ViolationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dirtylog.emulated.port import SoftwareProtectPort, SoftwareSyncPort
    from dirtylog.guests.vcpu import Vcpu
    from interleave.explorer import Run

    Get = Callable[["GuestScene", Callable[[DirtyBitmap], None]], None]
    Body = Callable[["GuestScene"], None]
    PortClass = type[SoftwareProtectPort | SoftwareSyncPort]

SLOT = 0
BASE_GFN = 5
NPAGES = 3
FAR = 8
"""So many frames further on the slot lies after a move; a trace names a page there as page + FAR."""


def real_get(scene: GuestScene, copy: Callable[[DirtyBitmap], None]) -> None:
    """Call the generic function that goes with the port."""
    get = get_dirty_log_protect if isinstance(scene.memory.port, ProtectPort) else get_dirty_log
    get(scene.memory, SLOT, copy)


class GuestScene:
    """A slot of three pages, logged. ``traces`` are the pages that each vCPU stores to; ``warm`` were written since the last
    get, and may be written on through the TLBs, unless those are ``cold``.

    A consumer's copy of the memory is brought up to date from what gets report, as a migration would: in the end nothing else may
    differ in it than what is reported then.
    """

    def __init__(
        self,
        port: PortClass,
        traces: Sequence[Sequence[int]],
        bodies: Iterable[tuple[str, Body]],
        *,
        warm: Sequence[int] = (0,),
        cold: bool = False,
        get: Get = real_get,
        change: Callable[[GuestScene], None] | None = None,
    ) -> None:
        self._port = port
        self._traces = traces
        self._bodies = list(bodies)
        self._warm = warm
        self._cold = cold
        self._change = change
        self.get = get
        self._value = 0
        self.in_hand: list[list[int]] = []
        """What gets have taken, and nobody has copied yet."""

    # --- put up

    def begin(self, run: Run) -> None:
        """Put the guest up; nobody has made a step yet."""
        self.run = run
        self.memory = EmulatedMemory(self._port)
        self.memory.add_slot(SLOT, BASE_GFN, NPAGES)
        self.slot = self.memory.slots[SLOT]
        self.copy = self.memory.read(SLOT, range(NPAGES))
        self.memory.slots.lock = cast("Any", StepLock(run, "slots_lock", reentrant=True))
        # A sync of ppc-hv looks whether vCPUs are in the guest, without their locks.
        looks_at = tuple(f"vcpu-{index}'s lock" for index in range(len(self._traces))) if self._port is PpcHvPort else ()
        self.memory.port.mmu_lock = StepLock(run, "mmu_lock", reads=looks_at)
        before = vcpu_module.__dict__["threading"]
        vcpu_module.__dict__["threading"] = StepThreading(run)
        try:
            for trace in self._traces:
                self.memory.add_vcpu(lambda index, trace=trace: self._cpu(index, trace))  # type: ignore[misc]  # a stand-in
            if self._change is not None:
                self._change(self)
            self.put_up()
            self._tell_what_is_taken()
            for vcpu in self.memory.vcpus:
                self._tell_intents(vcpu)
                vcpu.resume()
        finally:
            vcpu_module.__dict__["threading"] = before
        for name, body in self._bodies:
            run.actor(name, lambda body=body: body(self))  # type: ignore[misc]  # a stand-in

    def put_up(self) -> None:
        """Log the slot, and have each vCPU write what is warm."""
        for vcpu in self.memory.vcpus:
            self._store(vcpu, 0)
        start_logging(self.memory, SLOT)
        self._flush_idle()
        self.copy = self.memory.read(SLOT, range(NPAGES))
        for vcpu in self.memory.vcpus:
            for page in self._warm:
                self._store(vcpu, page)
            if self._cold:
                vcpu.cpu.flush_tlb()

    def _tell_intents(self, vcpu: Any) -> None:
        """Say what a vCPU's lock is taken for."""
        name = f"vcpu-{vcpu.index}"
        for method, intent in {
            "_enter": "serves requests, and enters the guest if it may",
            "_left": "leaves the guest",
            "request_flush": f"asks {name} to flush",
            "wait_flushed": f"waits for {name}",
            "request_pause": f"asks {name} to pause",
            "wait_outside": f"waits for {name}",
        }.items():
            setattr(vcpu, method, self._with_intent(getattr(vcpu, method), intent))

    def _tell_what_is_taken(self) -> None:
        """Say what becomes of the bitmap, and what is protected."""
        bitmap, port = cast("Any", self.slot.dirty_bitmap), cast("Any", self.memory.port)

        def told(call: Callable[..., Any], what: Callable[..., str]) -> Callable[..., Any]:
            def tell(*arguments: Any) -> Any:
                result = call(*arguments)
                self.run.say(what(result, *arguments))
                return result

            return tell

        bitmap.mark = told(bitmap.mark, lambda _, page: f"sets the bit of page {page}")
        bitmap.exchange = told(bitmap.exchange, lambda words: f"takes and clears {bits(words)}")
        bitmap.read = told(bitmap.read, lambda words: f"reads {bits(words)}")
        if isinstance(self.memory.port, ProtectPort):
            port.enable_log_dirty = told(port.enable_log_dirty, lambda _, __, words: f"protects {bits(words)}")

    def _with_intent(self, call: Callable[..., Any], intent: str) -> Callable[..., Any]:
        def told(*arguments: Any, **named: Any) -> Any:
            self.run.intend(intent)
            return call(*arguments, **named)

        return told

    def _cpu(self, index: int, trace: Sequence[int]) -> TraceCpu:
        cpu = TraceCpu(index, "trace", self._accesses(index, trace), self.memory.port.translate, self.memory.host_memory)
        cpu._tlb = StepTlb(self.run, index, lambda gfn: f"page {(gfn - BASE_GFN) % FAR}")
        return cpu

    def _accesses(self, index: int, trace: Sequence[int]) -> Iterable[tuple[int, int | None]]:
        return [(BASE_GFN + page << PAGE_SHIFT, 1000 * (index + 1) + number) for number, page in enumerate(trace)]

    # --- what actors do

    def get_and_copy(self) -> None:
        """Get, and then copy what is reported."""
        reported: list[int] = []

        def copy(snapshot: DirtyBitmap) -> None:
            self.run.step("copies the snapshot")
            reported.extend(snapshot.pages().tolist())

        # Others may return before this does: what it has taken counts as returned, although nobody has read the pages yet.
        self.in_hand.append(reported)
        self.get(self, copy)
        self._check_returned()
        self.copy_pages(reported)
        self.put_down(reported)

    def put_down(self, pages: list[int]) -> None:
        """Take pages out of hand: they have been copied."""
        self.in_hand = [one for one in self.in_hand if one is not pages]

    def _check_returned(self) -> None:
        """See that the invariant holds at the return of a get, as far as that shows without a sync of what hardware keeps.

        Every page is in the current bitmap, or cannot be written without being set again; and nothing stored is in neither of what
        was returned and the current bitmap.
        """
        bitmap, port = self.slot.dirty_bitmap, self.memory.port
        if bitmap is None or not isinstance(port, ProtectPort) or type(port).sync_dirty_log is not ProtectPort.sync_dirty_log:
            return
        current = DirtyBitmap.from_words(NPAGES, DirtyWords(np.flatnonzero(bitmap._flags), bitmap._current[bitmap._flags]))
        reported = {page for pages in self.in_hand for page in pages}
        missing = [page for page in self.lost() if page not in reported and page not in current]
        if missing:
            raise ViolationError(f"LOST: {named(missing)} has been stored to, and is neither in a returned log nor in the bitmap")
        for vcpu in self.memory.vcpus:
            if vcpu.in_guest or vcpu._flushes_done == vcpu._flushes_asked:
                tlb = cast("TraceCpu", vcpu.cpu)._tlb
                stale = [page for page in range(NPAGES) if page not in current and tlb.peek(BASE_GFN + page)]  # type: ignore[attr-defined]  # a StepTlb
                if stale:
                    raise ViolationError(
                        f"a get has returned, {named(stale)} is not in the bitmap, and vcpu-{vcpu.index} may store through its TLB"
                    )

    def copy_pages(self, pages: Sequence[int]) -> None:
        """Copy the contents of pages that were reported."""
        if pages:
            self.run.step(f"reads {named(pages)}", reads=[f"page {page}" for page in pages], writes=["the copy"])
            self.copy[pages] = self.memory.read(SLOT, pages)

    # --- the end

    def check(self) -> str | None:
        """Look whether anything is lost: now, and of what is written next through whatever translations are still there."""
        if self.slot.dirty_bitmap is None:
            return None
        for held in (self.memory.slots.lock, self.memory.port.mmu_lock):
            if cast("StepLock", held).held:
                return f"{cast('StepLock', held).name} is held at the end"
        self._last_get()
        if lost := self.lost():
            return f"LOST: what was stored to {named(lost)} is in no log"
        for vcpu in self.memory.vcpus:
            self._flush_idle()
            for page in range(NPAGES):
                self._store(vcpu, page)
                self._last_get()
                if lost := self.lost():
                    return f"LOST: vcpu-{vcpu.index} can store to {named(lost)} through a stale translation, and no get reports it"
        return None

    def _last_get(self) -> None:
        pages: list[int] = []
        real_get(self, lambda snapshot: pages.extend(snapshot.pages().tolist()))
        self.copy[pages] = self.memory.read(SLOT, pages)

    def lost(self) -> list[int]:
        return np.flatnonzero((self.copy != self.memory.read(SLOT, range(NPAGES))).any(axis=1)).tolist()

    def _store(self, vcpu: Vcpu, page: int) -> None:
        self._value += 1
        cast("TraceCpu", vcpu.cpu).access(Access(self.slot.base_gfn + page << PAGE_SHIFT, self._value))

    def _flush_idle(self) -> None:
        """Have vCPUs that are out of the guest flush, if they were asked to, as they do before they enter it."""
        for vcpu in self.memory.vcpus:
            if vcpu._flushes_done != vcpu._flushes_asked:
                vcpu.cpu.flush_tlb()
                self.memory.port.tlb_flushed(vcpu.index)
                vcpu._flushes_done = vcpu._flushes_asked


def bits(words: DirtyWords) -> str:
    """Return the pages of words in words."""
    pages = words.pages().tolist()
    return named(pages) if pages else "nothing"


def named(pages: Sequence[int]) -> str:
    """Return pages in words."""
    return f"page{'s' if len(pages) > 1 else ''} {', '.join(map(str, pages))}"
