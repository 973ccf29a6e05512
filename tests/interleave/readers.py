"""What the actors beside the vCPUs do: get in several ways, switch logging, move and remove slots, pause."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from dirtylog import BadSlotError, CopyFaultError, DirtyBitmap, LoggingOffError
from dirtylog.log import clear_dirty_log_protect, read_dirty_log, start_logging, stop_logging
from interleave.explorer import ViolationError
from interleave.scenes import BASE_GFN, FAR, NPAGES, SLOT, GuestScene, named

if TYPE_CHECKING:
    from collections.abc import Callable


def getter(scene: GuestScene) -> None:
    """Get once."""
    scene.get_and_copy()


def careful_getter(scene: GuestScene) -> None:
    """Get once, from a slot that may not be logged now, or may be gone."""
    with contextlib.suppress(LoggingOffError, BadSlotError):
        scene.get_and_copy()


def getter_whose_copy_faults(scene: GuestScene) -> None:
    """Get, and fail to copy what is given: nothing was returned then."""

    def fail(_: DirtyBitmap) -> None:
        scene.run.step("fails to copy the snapshot")
        raise OSError("bad address")

    with contextlib.suppress(CopyFaultError):
        scene.get(scene, fail)


def clearer(scene: GuestScene) -> None:
    """Get as manual protect does, which changes nothing; then clear what was read, and copy it."""
    read = DirtyBitmap(NPAGES)
    read_dirty_log(scene.memory, SLOT, read.assign)
    cleared: list[int] = []
    scene.in_hand.append(cleared)
    clear_dirty_log_protect(scene.memory, SLOT, 0, read, lambda snapshot: cleared.extend(snapshot.pages().tolist()))
    scene.copy_pages(cleared)
    scene.put_down(cleared)


def toggler(scene: GuestScene) -> None:
    """Switch logging off and on, and copy all: nobody has seen what was written in between."""
    everything = list(range(NPAGES))
    scene.in_hand.append(everything)
    stop_logging(scene.memory, SLOT)
    start_logging(scene.memory, SLOT)
    scene.copy_pages(everything)
    scene.put_down(everything)


def mover(scene: GuestScene) -> None:
    """Move the slot."""
    scene.memory.move_slot(SLOT, BASE_GFN + FAR)


def remover(scene: GuestScene) -> None:
    """Remove the slot."""
    scene.memory.remove_slot(SLOT)


def host_writer(scene: GuestScene) -> None:
    """Write to the guest's memory from outside, as a device that is emulated does."""
    for number, page in enumerate((0, 1)):
        scene.run.intend(f"writes page {page} from outside, under mmu_lock")
        scene.memory.write(SLOT, [page], np.full((1, 4096), 200 + number, np.uint8))


def pauser(scene: GuestScene) -> None:
    """Pause, get for the last time, and compare: nothing runs any more, and all must have been copied."""
    scene.memory.pause()
    scene.get_and_copy()
    on_the_way = {page for pages in scene.in_hand for page in pages}
    left = [page for page in scene.lost() if page not in on_the_way]
    if left:
        raise ViolationError(f"LOST: after a pause and a last get the copy of {named(left)} is not what is there")
    scene.memory.resume()


def twice(body: Callable[[GuestScene], None]) -> Callable[[GuestScene], None]:
    """Do something two times."""

    def again(scene: GuestScene) -> None:
        body(scene)
        body(scene)

    return again
