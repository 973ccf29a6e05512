"""The failures that a soak injects: none of them may lose a page."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

from dirtylog import CopyFaultError, DirtyBitmap, DirtyLogError, SlotFlags
from dirtylog.kvm.memory import KvmMemory
from dirtylog.kvm.ports import KvmBitmapPort, KvmManualPort
from dirtylog.linux import reading
from dirtylog.linux.pagemap import Scanner
from soak_readers import EpochReader

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator
    from random import Random

    from dirtylog import DirtyLog
    from soak_readers import Reader
    from soak_subjects import Subject
    from soak_tally import Tally

_POINTS = 120
"""About as many points as a get has at which Ctrl-C can arrive."""
_EXTRA_SLOT = 7
_EXTRA_GFN = 1 << 20
_SIGNAL = signal.SIGUSR2


class _RefusedError(DirtyLogError):
    """What a call of the kernel ends with that was made to fail."""


class Failures:
    """What can be made to fail of one log. All of it happens on the thread of its readers."""

    def __init__(self, subject: Subject, log: DirtyLog, readers: list[Reader], rng: Random, counts: Counter[str]) -> None:
        self._subject = subject
        self._memory = subject.memory
        self._log = log
        self._readers = readers
        self._rng = rng
        self._counts = counts
        self._kinds: dict[str, Callable[[], None]] = {
            "copy fault": self._copy_fault,
            "consumer raises": lambda: self._consumer().raises(),
            "rollback": lambda: self._consumer().rolls_back(),
            "interrupt": lambda: rng.choice(readers).interrupted(rng.randrange(_POINTS)),
            "toggle": self._toggle,
        }
        if isinstance(self._memory, KvmMemory):
            self._kinds["slot replaced"] = self._replace_slot
            if isinstance(self._memory.port, KvmBitmapPort | KvmManualPort):
                self._kinds["kernel refuses"] = self._refuse

    def inject(self, *, at_rest: bool = False) -> None:
        """Make something fail; nobody else reads meanwhile. With ``at_rest`` the writers stand still, and go on standing still."""
        kind = self._rng.choice([kind for kind in self._kinds if not (at_rest and kind == "toggle")])
        self._kinds[kind]()
        self._counts[kind] += 1

    def _consumer(self) -> EpochReader:
        return self._rng.choice([reader for reader in self._readers if isinstance(reader, EpochReader)])

    def _copy_fault(self) -> None:
        """Have the generic function copy to a caller that cannot take it."""

        def copy(snapshot: DirtyBitmap) -> None:
            raise OSError(f"no room for {snapshot.count()} pages")

        slot = self._rng.choice([slot for slot in self._memory.slots if slot.dirty_bitmap is not None])
        try:
            self._log._take(self._memory, slot.id, copy)
        except CopyFaultError:
            return
        raise AssertionError("a copy that raises is no error")

    def _toggle(self) -> None:
        """Switch logging off and on: get begins anew then, and consumers are told that all may have been written."""
        self._log.stop()
        if self._subject.follows:
            with self._subject.still():
                self._log.start()
                self._begin_anew()
        else:
            self._log.start()
            self._begin_anew()

    def _begin_anew(self) -> None:
        for reader in self._readers:
            if not isinstance(reader, EpochReader):
                reader.begin()

    def _replace_slot(self) -> None:
        """Remove a slot, if it is there, and add another in its place, logged from its start, which this process writes."""
        assert isinstance(self._memory, KvmMemory)
        with self._memory.slots.lock:
            if self._memory.slots.get(_EXTRA_SLOT) is not None:
                self._memory.remove_slot(_EXTRA_SLOT)
            npages = self._rng.randint(1, 200)
            self._memory.add_slot(_EXTRA_SLOT, _EXTRA_GFN + self._rng.randrange(1000), npages, SlotFlags.LOG_DIRTY_PAGES)
        page = self._rng.randrange(npages)
        self._memory.write(_EXTRA_SLOT, [page], np.full((1, self._memory.page_size), self._rng.randint(1, 255), np.uint8))

    def _refuse(self) -> None:
        """Have the kernel fail a call before it does anything, as it may with EINTR."""
        assert isinstance(self._memory, KvmMemory)
        call = "get_dirty_log_into"
        if isinstance(self._memory.port, KvmManualPort) and self._rng.random() < 0.5:
            call = "clear_dirty_log"
        with patch.object(self._memory.vm, call, side_effect=_RefusedError("refused on purpose")):
            for reader in self._readers:
                with suppress(_RefusedError):
                    reader.take()


@contextmanager
def short_reads(rng: Random, counts: Counter[str]) -> Iterator[None]:
    """Have process_vm_readv move less than it is asked for now and then, and scans find less room than there is."""

    def readv(*arguments: int) -> int:
        # Safe: the second argument is the one local iovec, which is the caller's for the call.
        nbytes = ctypes.c_uint64.from_address(arguments[1] + 8)
        if rng.random() < 0.1:
            nbytes.value = rng.randint(1, nbytes.value)
            counts["short read"] += 1
        return int(real.process_vm_readv(*arguments))

    real = reading._libc
    short = SimpleNamespace(process_vm_readv=readv, process_vm_writev=real.process_vm_writev)
    capacity = rng.choice((64, 1024, 1 << 16))
    with patch.object(reading, "_libc", short), patch("dirtylog.linux.uffd_port.Scanner", partial(Scanner, capacity=capacity)):
        yield


@contextmanager
def signals(rng: Random, tally: Tally) -> Iterator[None]:
    """Send signals to this process all the time, which it handles: system calls end with EINTR. From the main thread only."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(rng.random() * 0.01):
            os.kill(os.getpid(), _SIGNAL)
            tally.signals += 1

    before = signal.signal(_SIGNAL, lambda *_: None)
    sender = threading.Thread(target=send, name="soak-signals", daemon=True)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.signal(_SIGNAL, before)
