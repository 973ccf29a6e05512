"""Mutants of the emulated ports: the miss path that they share, and at least one of each architecture."""

from __future__ import annotations

from mutant import Mutant

_LOST = "test_mutants.py::test_the_real_ports_lose_nothing"
_WALKERS = "test_walkers.py::test_walker_and_port_agree_about_every_page_after_every_step"
_BLOCKS = "test_walkers.py::test_clearing_a_few_pages_protects_the_blocks_that_hold_them_a216e24fc947"
_SPLITS = "test_walkers.py::test_the_log_protects_splits_and_restores_blocks"
_MOVES = "test_walkers.py::test_a_slot_that_moves_takes_its_log_along"
_NEIGHBOURS = "test_walkers.py::test_neighbours_keep_and_report_their_own_pages"
_LOADS = "test_kvm_lessons.py::test_loads_are_not_writes"


def _port(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "emulated/port.py", old, new, tests)


def _arch(arch: str, name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(f"{arch}-{name}", like, f"emulated/arch/{arch.removesuffix('-pml').replace('-', '_')}.py", old, new, tests)


EMULATED = (
    _port(
        "an-upgrade-is-not-logged",
        "KVM edde99ce0529",
        "                entry = memory.load(offset)\n            entry = (entry | self._write) & self._protect_mask\n",
        "                entry = memory.load(offset)\n            entry = (entry | self._write) & self._protect_mask\n"
        "            bitmap = bitmap if block else None\n",
        f"{_LOST}[x86]",
    ),
    _port(
        "a-load-gets-permission",
        "permission without a bit",
        "            if write or (bitmap is None and not slot.readonly):\n",
        "            if write or not slot.readonly:\n",
        f"{_WALKERS}[x86]",
    ),
    _port(
        "a-block-has-one-bit",
        "KVM 687414bebe30",
        "            if block and bitmap is not None:\n",
        "            if block and bitmap is not None and not write:\n",
        f"{_SPLITS}[x86]",
    ),
    _port(
        "blocks-while-logged",
        "KVM 687414bebe30",
        "            and slot.dirty_bitmap is None  # while it is logged, a slot is mapped page by page\n",
        "",
        f"{_SPLITS}[x86]",
    ),
    _port(
        "pages-of-the-slot-for-frames",
        "KVM locking.rst, ABA",
        "        self.tables.revoke(words.pages() + slot.base_gfn)\n",
        "        self.tables.revoke(words.pages())\n",
        f"{_LOST}[x86]",
    ),
    _port(
        "one-vcpu-flushes",
        "KVM 7e71a59b2503",
        "        leave_guest(self.vcpus)\n",
        "        leave_guest(self.vcpus[:1])\n",
        "test_errno.py::test_a_copy_that_faults_loses_nothing_and_flushes[x86]",
    ),
    _port(
        "a-read-only-slot-becomes-writable",
        "KVM 7c8a4742c4ab",
        """\
        if slot is None or (write and slot.readonly):
            return None
        self.stats.faults += 1
        bitmap""",
        """\
        if slot is None:
            return None
        self.stats.faults += 1
        bitmap""",
        "test_kvm_lessons.py::test_a_read_only_slot_stays_so_whatever_the_log_does_7c8a4742c4ab",
    ),
    Mutant(
        "blocks-are-not-protected",
        "KVM a216e24fc947",
        "emulated/tables.py",
        "        for index in self.locate(gfns):\n            self.revoke_entries(index)\n",
        "        self.revoke_entries(self.locate(gfns)[0])\n",
        (f"{_BLOCKS}[x86]",),
    ),
    Mutant(
        "a-freed-table-stays-in-the-walk-cache",
        "a table that nothing finds",
        "emulated/tables.py",
        "            self._leaf_table.pop(gfn >> self._leaf_bits, None)\n",
        "",
        (f"{_SPLITS}[x86]",),
    ),
    Mutant(
        "a-flush-is-not-waited-for",
        "KVM 7e71a59b2503",
        "guests/vcpu.py",
        "        self._wait(lambda: self._flushes_done >= ticket or not self.in_guest,",
        "        self._wait(lambda: self._flushes_asked >= ticket or not self.in_guest,",
        ("test_mutants_seen.py::test_a_flush_is_over_when_the_vcpu_has_flushed_and_not_when_it_was_kicked",),
    ),
    Mutant(
        "a-host-write-is-not-logged",
        "KVM 0a61b222df75",
        "guests/machine.py",
        "                memslot.dirty_bitmap.merge(words_of_pages(offsets))\n",
        "                words_of_pages(offsets)\n",
        ("test_kvm_lessons.py::test_host_writes_are_logged_0a61b222df75",),
    ),
    Mutant(
        "a-host-write-s-bit-is-late",
        "KVM 0a61b222df75",
        "guests/machine.py",
        """\
            if memslot.dirty_bitmap is not None:
                memslot.dirty_bitmap.merge(words_of_pages(offsets))
            self.contents(memslot)[offsets] = pages_of_data
""",
        """\
            self.contents(memslot)[offsets] = pages_of_data
            if memslot.dirty_bitmap is not None:
                memslot.dirty_bitmap.merge(words_of_pages(offsets))
""",
        ("test_kvm_lessons.py::test_no_get_comes_between_a_host_write_s_bit_and_its_bytes",),
    ),
    _arch(
        "x86",
        "wrong-bit",
        "KVM 7c8a4742c4ab",
        "        write=WRITE,\n",
        "        write=HOST_WRITABLE,\n",
        f"{_WALKERS}[x86]",
    ),
    _arch(
        "x86-pml",
        "log-read-from-its-first-entry",
        "KVM 37c3ddfe5238",
        "        return self.entries[self.index + 1 :][::-1]",
        "        return self.entries[: PML_ENTRIES - 1 - self.index][::-1]",
        f"{_LOST}[x86-pml]",
    ),
    _arch(
        "x86-pml",
        "full-log-is-not-emptied",
        "an exit empties a full log",
        "            self._drain(log)\n        log.entries",
        "            log.clear()\n        log.entries",
        "test_walkers.py::test_a_modification_log_that_wraps_loses_nothing",
    ),
    _arch(
        "x86-pml",
        "wrong-address-space",
        "KVM 1f4e5fc83a42",
        "        log.entries[log.index] = gfn << PAGE_SHIFT\n",
        "        log.entries[log.index] = (gfn - slot.base_gfn) << PAGE_SHIFT\n",
        f"{_LOST}[x86-pml]",
    ),
    _arch(
        "x86-pml",
        "a-block-stays-writable",
        "KVM a216e24fc947",
        "        words[blocks] &= np.uint64(~WRITE & (1 << 64) - 1)\n",
        "        words[blocks] &= np.uint64(~DIRTY & (1 << 64) - 1)\n",
        f"{_BLOCKS}[x86-pml]",
    ),
    _arch(
        "x86-pml",
        "moves-with-a-full-log",
        "KVM locking.rst, ABA",
        "        self._drain_all()\n        super().unmap(slot)\n",
        "        super().unmap(slot)\n",
        f"{_MOVES}[x86-pml]",
    ),
    _arch("arm", "wrong-bit", "KVM 7c8a4742c4ab", "HAP_WRITE = 0b10 << 6\n", "HAP_WRITE = 0b10 << 7\n", f"{_WALKERS}[arm]"),
    _arch("arm64", "wrong-bit", "KVM 7c8a4742c4ab", "S2AP_WRITE = 1 << 7\n", "S2AP_WRITE = 1 << 55\n", f"{_WALKERS}[arm64]"),
    _arch("riscv", "wrong-bit", "KVM 7c8a4742c4ab", "        write=WRITE,\n", "        write=DIRTY,\n", f"{_WALKERS}[riscv]"),
    _arch("mips", "hardware-bit-stays", "KVM ba3a6120a4e7", "write=DIRTY | MODIFIED,", "write=MODIFIED,", f"{_WALKERS}[mips]"),
    _arch("loongarch", "hardware-bit-stays", "KVM ba3a6120a4e7", "write=DIRTY | WRITE,", "write=WRITE,", f"{_WALKERS}[loongarch]"),
    _arch(
        "s390",
        "sync-wipes",
        "KVM e88643ba1acb",
        "            self._collect(slot, slot.dirty_bitmap)\n\n    def unmap",
        "            self._collect(slot, None)\n\n    def unmap",
        f"{_LOST}[s390]",
    ),
    _arch(
        "s390",
        "sync-does-not-protect",
        "step 2 left out",
        "        self.tables.revoke_entries(pgstes - ENTRIES)\n",
        "",
        f"{_LOST}[s390]",
    ),
    _arch(
        "s390",
        "a-move-loses-the-change-bits",
        "KVM 6c576e74fd91",
        "        self._collect(slot, slot.dirty_bitmap)\n        super().unmap(slot)\n",
        "        self._collect(slot, None)\n        super().unmap(slot)\n",
        f"{_MOVES}[s390]",
    ),
    _arch(
        "s390",
        "takes-the-neighbour-s-bits",
        "a segment may serve two slots",
        "        here = (frames >= slot.base_gfn) & (frames < slot.end_gfn)",
        "        here = frames >= slot.base_gfn",
        _NEIGHBOURS,
    ),
    _arch(
        "ppc-pv",
        "shadow-entries-outlive-the-get",
        "KVM 7e71a59b2503",
        "        with self.mmu_lock:\n            self.unmap(slot)\n        super().flush_tlbs(slot)\n",
        "        super().flush_tlbs(slot)\n",
        f"{_LOST}[ppc-pv]",
    ),
    _arch(
        "ppc-pv",
        "an-upgrade-is-not-logged",
        "KVM edde99ce0529",
        "        if write and slot.dirty_bitmap is not None:\n",
        "        if write and slot.dirty_bitmap is not None and found is None:\n",
        f"{_LOADS}[ppc-pv]",
    ),
    _arch(
        "ppc-hv",
        "a-paused-guest-s-bits-are-late",
        "KVM 6c576e74fd91",
        "            if vcpu < len(self.vcpus) and self.vcpus[vcpu].in_guest:\n",
        "            if vcpu < len(self.vcpus):\n",
        "test_walkers.py::test_a_paused_guest_reports_every_page_at_once_6c576e74fd91",
    ),
    _arch(
        "ppc-hv",
        "a-late-bit-is-lost",
        "KVM 6c576e74fd91",
        "                self._set_changed(late.old)\n                late.old, late.young",
        "                late.old, late.young",
        "test_kvm_lessons.py::test_a_page_that_two_processors_hold_late_is_reported_once",
    ),
    _arch(
        "ppc-hv",
        "a-page-held-late-is-counted-twice",
        "KVM 6cfd47f91f6a",
        "                late.old.difference_update(entries.tolist())\n",
        "",
        "test_kvm_lessons.py::test_a_page_that_two_processors_hold_late_is_reported_once",
    ),
    _arch(
        "ppc-hv",
        "growing-loses-late-bits",
        "KVM 6c576e74fd91",
        "            self._write_back_all()  # it goes by the number of the entry, which changes now\n",
        "",
        "test_walkers.py::test_a_hashed_page_table_that_grows_keeps_every_entry_and_every_late_bit",
    ),
    _arch(
        "ia64",
        "whole-words-of-the-area",
        "KVM ia64: copied and zeroed whole words",
        "        area[dirty] &= ~values\n",
        "        area[dirty] = 0\n",
        _NEIGHBOURS,
    ),
    _arch(
        "ia64",
        "area-by-page-of-the-slot",
        "KVM 1f4e5fc83a42",
        "            bitmap.merge(words_of_pages(gfns - slot.base_gfn))\n",
        "            bitmap.merge(words_of_pages(gfns - slot.base_gfn // PAGES_PER_WORD * PAGES_PER_WORD))\n",
        f"{_LOST}[ia64]",
    ),
    _arch(
        "ia64",
        "translations-outlive-the-get",
        "KVM 7e71a59b2503",
        "        with self.mmu_lock:\n            self._purge()\n        super().flush_tlbs(slot)\n",
        "        super().flush_tlbs(slot)\n",
        f"{_LOST}[ia64]",
    ),
    _arch(
        "ia64",
        "a-load-gets-permission",
        "KVM ia64: loads marked too",
        "        if write or (slot.dirty_bitmap is None and not slot.readonly):\n",
        "        if write or not slot.readonly:\n",
        f"{_WALKERS}[ia64]",
    ),
)
