"""Mutants of orders that only threads can show: killed by the tests that step through every interleaving."""

from __future__ import annotations

from mutant import Mutant
from mutant_list_order import COPY, EXCHANGE, FLUSH


def _safe(*questions: str) -> tuple[str, ...]:
    return tuple(f"test_interleave.py::test_an_order_that_is_safe[{question.replace(' ', '-')}]" for question in questions)


INTERLEAVED = (
    Mutant(
        "protect-before-clear",
        "KVM edde99ce0529",
        "log.py",
        EXCHANGE,
        """\
            with port.mmu_lock:
                words = bitmap.read()
                port.enable_log_dirty(slot, words)
            with port.mmu_lock:
                bitmap.exchange()
""",
        _safe("x86: a get while a vCPU with a cold TLB stores"),
    ),
    Mutant(
        "flush-before-protect",
        "KVM 7e71a59b2503",
        "log.py",
        EXCHANGE + COPY + FLUSH,
        """\
            with port.mmu_lock:
                words = bitmap.exchange()
            port.flush_tlbs(slot)
            with port.mmu_lock:
                port.enable_log_dirty(slot, words)
            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)
""",
        _safe("x86: a get while a vCPU stores twice"),
    ),
    Mutant(
        "get-without-slots-lock",
        "why 4 before slots_lock is let go",
        "log.py",
        """\
    with slots.lock:
        slot, bitmap = slots.logged(slot_id)
        _check_has_bitmap(port, slot)
        with _NothingLost(port, slot, bitmap):
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.exchange()  # 1.""",
        """\
    if slots.lock is not None:
        slot, bitmap = slots.logged(slot_id)
        _check_has_bitmap(port, slot)
        with _NothingLost(port, slot, bitmap):
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.exchange()  # 1.""",
        _safe("x86: two getters"),
    ),
    Mutant(
        "a-vcpu-outside-is-not-asked",
        "KVM 7e71a59b2503",
        "guests/vcpu.py",
        "            self._flushes_asked += 1\n            if not self.in_guest:\n                return None\n",
        "            if not self.in_guest:\n                return None\n            self._flushes_asked += 1\n",
        _safe("x86: a get while a vCPU stores twice"),
    ),
    Mutant(
        "a-vcpu-enters-before-it-looks",
        "requests before the guest",
        "guests/vcpu.py",
        """\
                if self._may_run and self.state is VcpuState.READY:
                    self.in_guest = True
                    return True
                self._changed.wait()
""",
        """\
                if self._may_run and self.state is VcpuState.READY:
                    break
                self._changed.wait()
        with self._changed:
            self.in_guest = True
        return True
""",
        _safe("x86: a get while a vCPU stores twice"),
    ),
    Mutant(
        "entries-before-flags",
        "KVM 8929bc965964",
        "kvm/ring_port.py",
        """\
        if ring.place is Place.KNOWN and (count := ring.waiting()):
            self._mark_ahead(ring, count)
""",
        """\
        entries = ring.ahead(ring.size)
        if ring.place is Place.KNOWN and (count := ring.waiting()):
            self._mark(entries[:count])
""",
        _safe("the ring: a reader"),
    ),
    Mutant(
        "rings-are-harvested-outside-mmu-lock",
        "KVM 530a8ba71b4c",
        "kvm/ring_port.py",
        "        with self.mmu_lock:\n            self.collect()\n            if self._with_bitmap",
        "        self.collect()\n        with self.mmu_lock:\n            if self._with_bitmap",
        _safe("the ring: a reader and the collector"),
    ),
)
