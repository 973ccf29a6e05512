"""Every question that is put to the explorer: an arrangement of actors, whether it is safe, and how far it is explored."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.emulated.arch import PORTS
from interleave import consumers, orders, rings
from interleave.consumers import ConsumerScene
from interleave.readers import (
    careful_getter,
    clearer,
    getter,
    getter_whose_copy_faults,
    host_writer,
    mover,
    pauser,
    remover,
    toggler,
)
from interleave.rings import RingExploration
from interleave.scenes import FAR, GuestScene

if TYPE_CHECKING:
    from collections.abc import Callable

    from interleave.explorer import Scene


class Question(NamedTuple):
    """One question. ``safe`` is the answer that is right; ``bound`` limits the preemptions."""

    name: str
    scene: Callable[[], Scene]
    safe: bool = True
    bound: int | None = None


X86 = PORTS["x86"]
ONE = (("getter", getter),)
TWO = (("getter-a", getter), ("getter-b", getter))


def guest(
    trace: list[list[int]], bodies: tuple[tuple[str, Callable[[GuestScene], None]], ...] = ONE, **named: object
) -> Callable[[], Scene]:
    """Return what makes a guest of x86."""
    return partial(GuestScene, X86, trace, bodies, **named)  # type: ignore[arg-type]  # by name


def _ports() -> list[Question]:
    found: list[Question] = []
    for name, port in PORTS.items():
        found += [
            Question(f"{name}: a get while a vCPU stores twice", partial(GuestScene, port, [[0, 0]], ONE)),
            Question(f"{name}: the copy after the flush", partial(GuestScene, port, [[0, 0]], ONE, get=orders.flush_then_copy)),
            Question(f"{name}: a get while a vCPU with a cold TLB stores", partial(GuestScene, port, [[1, 0]], ONE, cold=True)),
            Question(f"{name}: two getters", partial(GuestScene, port, [[0, 0]], TWO), bound=2),
            Question(f"{name}: a write from outside", partial(GuestScene, port, [[0]], (*ONE, ("host", host_writer))), bound=2),
            Question(f"{name}: logging off and on", partial(GuestScene, port, [[0, 0]], (("toggler", toggler),))),
        ]
    return found


SAFE = [
    *_ports(),
    Question("two getters, one vCPU, all schedules", guest([[0, 0]], TWO)),
    Question(
        "a vCPU between its miss and the fill of its TLB, with a cold TLB and two getters", guest([[1]], TWO, cold=True), bound=3
    ),
    Question("one getter, two vCPUs, all schedules", guest([[0], [0]])),
    Question("one getter, two vCPUs with cold TLBs", guest([[0, 1], [1]], cold=True), bound=2),
    Question("two getters, two vCPUs", guest([[0], [1]], TWO), bound=1),
    Question("a get and a manual clear", guest([[0]], (*ONE, ("clearer", clearer)))),
    Question("two manual clears", guest([[0]], (("clearer-a", clearer), ("clearer-b", clearer)))),
    Question("a get whose copy faults, and another", guest([[0]], (("failing", getter_whose_copy_faults), ("getter", getter)))),
    Question("a get while logging is switched off and on", guest([[0]], (("getter", careful_getter), ("toggler", toggler)))),
    Question("a get while the slot is moved", guest([[0, FAR]], (*ONE, ("mover", mover))), bound=3),
    Question("a get while the slot is removed", guest([[0, 0]], (("getter", careful_getter), ("remover", remover))), bound=2),
    Question("a pause during a get", guest([[0]], (*ONE, ("pauser", pauser))), bound=3),
    Question("another protector, which puts its flush off", guest([[0]], (*ONE, ("protector", orders.protect_for_another_reason)))),
    Question("the ring: a reader", lambda: RingExploration([0, 0, 1])),
    Question("the ring: two readers", lambda: RingExploration([0, 1], 2), bound=2),
    Question("the ring: a reader and the collector", lambda: RingExploration([0, 1, 0], collector=True), bound=2),
    Question("the ring: full, and round its end", lambda: RingExploration([0, 1, 2, 3, 0]), bound=2),
    Question(
        "two consumers that commit", lambda: ConsumerScene(X86, [[0]], [("a", consumers.take), ("b", consumers.take)]), bound=2
    ),
    Question(
        "a consumer that rolls back, and one that commits",
        lambda: ConsumerScene(X86, [[0]], [("a", consumers.take), ("b", consumers.fail_then_take)]),
        bound=2,
    ),
    Question(
        "a consumer that rolls back, and a get",
        lambda: ConsumerScene(X86, [[0]], [("a", consumers.fail_then_take), ("b", consumers.get)]),
        bound=2,
    ),
]

UNSAFE = [
    Question("no flush", guest([[0, 0]], get=orders.no_flush), safe=False),
    Question("protect before clear", guest([[0]], get=orders.protect_before_clear, cold=True), safe=False),
    Question("copy, then wipe", guest([[1]], get=orders.copy_then_wipe), safe=False),
    Question("the flush after slots_lock", guest([[0, 0]], TWO, get=orders.flush_after_slots_lock), safe=False),
    Question(
        "the flush only if a permission changed",
        guest([[0, 0]], (*ONE, ("protector", orders.protect_for_another_reason)), get=orders.flush_if_changed),
        safe=False,
        bound=2,
    ),
    Question(
        "a fault that marks after it maps",
        partial(GuestScene, orders.MarksAfterMapping, [[0], [0]], ONE, warm=[2], change=orders.tell_port),
        safe=False,
        bound=2,
    ),
    Question(
        "a mark outside the lock, without an atomic or",
        partial(GuestScene, orders.MarksWithoutLock, [[0], [1]], ONE, warm=[2], change=orders.tell_port),
        safe=False,
        bound=1,
    ),
    Question("the ring: the flag before the entry", lambda: RingExploration([0, 1], flag_first=True), safe=False),
    Question("the ring: entries read before flags", lambda: RingExploration([0, 1], ring=rings.EntriesBeforeFlags), safe=False),
    Question(
        "the ring: reset before the entries are read",
        lambda: RingExploration([0, 1, 2, 3, 0], harvest=rings.reset_before_marking),
        safe=False,
        bound=2,
    ),
]
