"""Several consumers of one log: each has a copy of its own, takes epochs, commits some and rolls others back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dirtylog import DirtyLog
from interleave.cooperation import StepLock
from interleave.scenes import NPAGES, SLOT, GuestScene, named

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from dirtylog.epoch import Consumer
    from interleave.scenes import PortClass

    Act = Callable[["ConsumerScene", str], None]


class ConsumerScene(GuestScene):
    """A guest whose log has consumers; ``acts`` are what each of them does, by its name."""

    def __init__(self, port: PortClass, traces: Sequence[Sequence[int]], acts: Sequence[tuple[str, Act]]) -> None:
        super().__init__(port, traces, [(name, self._bound(name, act)) for name, act in acts])
        self._names = list(dict.fromkeys(name for name, _ in acts))

    @staticmethod
    def _bound(name: str, act: Act) -> Callable[[GuestScene], None]:
        return lambda scene: act(cast("ConsumerScene", scene), name)

    def put_up(self) -> None:
        """Begin the log, and let every consumer copy all."""
        for vcpu in self.memory.vcpus:
            self._store(vcpu, 0)
        self.log = DirtyLog(self.memory)
        self.log._lock = cast("Any", StepLock(self.run, "the log's lock", reentrant=True))
        self.log.start()
        self._flush_idle()
        self.consumers: dict[str, Consumer] = {name: self.log.consumer(name) for name in self._names}
        self.copies: dict[str, NDArray[np.uint8]] = {name: self.memory.read(SLOT, range(NPAGES)) for name in self._names}
        for vcpu in self.memory.vcpus:
            self._store(vcpu, 0)

    def check(self) -> str | None:
        """Let every consumer take a last epoch: now its copy must be what is there; and once more after further stores."""
        for store in (False, True):
            for vcpu in self.memory.vcpus if store else ():
                self._flush_idle()
                for page in range(NPAGES):
                    self._store(vcpu, page)
            for name in self._names:
                take(self, name)
                lost = np.flatnonzero((self.copies[name] != self.memory.read(SLOT, range(NPAGES))).any(axis=1)).tolist()
                if lost:
                    return f"LOST: what was stored to {named(lost)} never comes to the consumer {name}"
        return None

    def copy_for(self, name: str, pages: Sequence[int]) -> None:
        """Copy pages for a consumer."""
        if pages:
            self.run.step(f"reads {named(pages)}", reads=[f"page {page}" for page in pages])
            self.copies[name][pages] = self.memory.read(SLOT, pages)


def take(scene: ConsumerScene, name: str) -> None:
    """Take an epoch, copy, commit."""
    with scene.consumers[name].epoch() as epoch:
        scene.copy_for(name, epoch.dirty[SLOT].pages().tolist())


def fail(scene: ConsumerScene, name: str) -> None:
    """Take an epoch, and fail before anything has been copied: it is rolled back."""
    epoch = scene.consumers[name].epoch()
    with epoch:
        scene.run.step("has no room for what it has taken")
        epoch.rollback()


def fail_then_take(scene: ConsumerScene, name: str) -> None:
    """Fail once, and then do better."""
    fail(scene, name)
    take(scene, name)


def get(scene: ConsumerScene, name: str) -> None:
    """Get, beside the epochs; for a consumer of its own copy, which is not that of this name's epochs."""
    pages = scene.log.get(SLOT).pages().tolist()
    scene.run.step(f"{name} has got {named(pages)}" if pages else f"{name} has got nothing")
