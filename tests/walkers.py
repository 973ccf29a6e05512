"""A second reading of every port's tables: what the hardware would find for a guest frame, decoded from raw bytes.

Each decoder is written from the architecture's manual and from the kernel's headers, with numbers of its own. None of them
uses what the ports are made of; so where a port and its decoder agree about a page, two descriptions of one format agree.
On the way each decoder refuses what the hardware, or the kernel that owns the table, would not accept: reserved bits, a wrong
type, a block that is not aligned, software bits that contradict the hardware's.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.emulated.arch.ia64 import Ia64Port
from dirtylog.emulated.arch.ppc_hv import PpcHvPort
from dirtylog.emulated.arch.ppc_pv import PpcPvPort
from dirtylog.emulated.port import RadixPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.port import Port

    Read = Callable[[int, int], bytes]


class Mapping(NamedTuple):
    """What the tables say about one page. ``writable``: a store goes through without a fault, a dirty-bit event or a log entry."""

    address: int
    writable: bool
    npages: int = 1
    """How many pages the leaf maps that maps this one."""
    user_change: bool = False
    """The UC bit of the page-status-table entry; s390 only."""


class MalformedTableError(AssertionError):
    """An entry that its architecture does not allow."""


def find(port: Port, gfn: int, vcpu: int = 0) -> Mapping | None:
    """Return what a port's tables say about a guest frame, or None where they have no entry. Only ia64's are per vCPU."""
    if isinstance(port, RadixPort):
        return TREES[port.name](port.tables.memory.read, port.tables.root, gfn)
    if isinstance(port, PpcHvPort):
        return walk_ppc_hpt(port.table.buffer, gfn)
    if isinstance(port, PpcPvPort):
        return walk_ppc32_hash(port.table.buffer, gfn)
    assert isinstance(port, Ia64Port)
    return walk_ia64_vhpt(port.vhpt(vcpu), gfn)


def walk_ept(read: Read, root: int, gfn: int) -> Mapping | None:
    """x86 EPT: Intel SDM volume 3C, 29.3.2 and 29.3.3.1 (misconfigurations); arch/x86/kvm/mmu/spte.h for bits 57 and 58."""
    found = _ept(read, root, gfn)
    return None if found is None else found[1]


def walk_ept_with_dirty_bits(read: Read, root: int, gfn: int) -> Mapping | None:
    """x86 EPT with accessed and dirty flags (SDM volume 3C, 29.3.5): a store where D (bit 9) is clear sets it, and is logged."""
    found = _ept(read, root, gfn)
    if found is None:
        return None
    entry, mapping = found
    dirty = bool(entry & 0x200)
    _check(not dirty or entry & 0x100, "dirty, but not accessed", entry)
    return mapping._replace(writable=mapping.writable and dirty)


def _ept(read: Read, root: int, gfn: int) -> tuple[int, Mapping] | None:
    """Return the leaf and what it maps."""
    table, writable, level = root, True, 4
    while True:
        entry = _little(read, table + 8 * (gfn >> 9 * (level - 1) & 511))
        if not entry & 0b111:
            return None
        _check(entry & 0b001, "EPT misconfiguration: writable or executable, but not readable", entry)
        writable = writable and bool(entry & 0b010)
        if level == 1 or entry & 0x80:
            break
        _check(not entry & 0x78, "EPT misconfiguration: bits 6:3 of an entry that references a table", entry)
        table, level = entry & 0x000F_FFFF_FFFF_F000, level - 1
    _check(level <= 3, "EPT misconfiguration: bit 7 of a PML4 entry", entry)
    _check(entry >> 3 & 7 == 6, "memory that is not write-back", entry)
    if entry & 0b010:
        _check(entry >> 58 & 1, "writable, but not MMU-writable (check_spte_writable_invariants)", entry)
    if entry >> 58 & 1:
        _check(entry >> 57 & 1, "MMU-writable, but not host-writable (check_spte_writable_invariants)", entry)
    return entry, _leaf(entry & 0x000F_FFFF_FFFF_F000, gfn, 512 ** (level - 1), writable=writable)


def walk_stage2(read: Read, root: int, gfn: int, address_bits: int) -> Mapping | None:
    """Stage 2 of arm and arm64 with 4 KiB granules, 40-bit guest addresses, from level 1.

    ARM DDI 0406C, B3.6.1 and B3.6.2 (LPAE); Arm ARM DDI 0487, D8.3, stage 2.
    """
    mask = (1 << address_bits) - 4096
    table = root
    for level, index in ((1, gfn >> 18 & 1023), (2, gfn >> 9 & 511), (3, gfn & 511)):
        descriptor = _little(read, table + 8 * index)
        kind = descriptor & 0b11
        if not kind & 1:
            return None
        if level == 3 or kind == 0b01:
            break
        _check(descriptor & ~mask == 0b11, "attributes in a table descriptor of stage 2", descriptor)
        table = descriptor & mask
    _check(level < 3 or kind == 0b11, "01 is reserved at level 3", descriptor)
    _check(not descriptor & (1 << 52) - (1 << address_bits), "an address that is too wide", descriptor)
    _check(descriptor & 1 << 10, "the access flag is clear: this is an Access flag fault", descriptor)
    _check(descriptor >> 8 & 3 == 3, "not inner shareable", descriptor)
    _check(descriptor >> 2 & 15 == 15, "not normal, write-back memory", descriptor)
    _check(descriptor & 1 << 6, "not readable", descriptor)
    return _leaf(descriptor & mask, gfn, 512 ** (3 - level), writable=bool(descriptor & 1 << 7))


def walk_arm(read: Read, root: int, gfn: int) -> Mapping | None:
    """LPAE: output addresses of 40 bits. HAP[2:1] is in bits 7:6, as S2AP is."""
    return walk_stage2(read, root, gfn, address_bits=40)


def walk_arm64(read: Read, root: int, gfn: int) -> Mapping | None:
    """VMSAv8-64 without LPA2: output addresses of 48 bits."""
    return walk_stage2(read, root, gfn, address_bits=48)


def walk_mips(read: Read, root: int, gfn: int) -> Mapping | None:
    """KVM's guest-physical table on a 64-bit MIPS host: pgtable-64.h (4 KiB pages, three levels), pgtable-bits.h, pte_to_entrylo.

    The leaf is judged as EntryLo, the way the TLB sees it (MIPS64 Architecture volume III).
    """
    table = root
    for index in (gfn >> 18 & 1023, gfn >> 9 & 511):
        pointer = _big(read, table + 8 * index)
        if pointer == 0:
            return None
        _check(pointer >> 62 == 0b10, "a pointer that is not in XKPHYS", pointer)
        _check(pointer >> 59 & 7 == 3, "a pointer to XKPHYS with a cache attribute that is not 3", pointer)
        _check(pointer >> 48 & 0x7FF == 0, "an Address Error: the physical address has more than 48 bits", pointer)
        _check(pointer & 0xFFF == 0, "pmd_bad: a table that is not page-aligned", pointer)
        table = pointer & 0xFFFF_FFFF_FFFF
    pte = _big(read, table + 8 * (gfn & 511))
    present, write, accessed, modified = (pte >> bit & 1 for bit in range(4))
    if not present:
        _check(pte == 0, "pte_none is zero", pte)
        return None
    _check(pte >> 4 & 0xF == 0, "huge, special, no-execute or no-read", pte)
    entrylo = pte >> 8
    dirty = entrylo >> 2 & 1
    _check(entrylo & 1 == 0, "global", pte)
    _check(entrylo >> 1 & 1 and accessed, "not valid: a load raises TLB Invalid", pte)
    _check(entrylo >> 3 & 7 == 3, "not cached", pte)
    _check(dirty == modified, "D and modified differ: pte_mkdirty and pte_mkclean change both", pte)
    _check(write or not dirty, "D in a slot that is not writable", pte)
    return _leaf(entrylo >> 6 << 12, gfn, 1, writable=bool(dirty))


def walk_riscv(read: Read, root: int, gfn: int) -> Mapping | None:
    """Sv39x4: RISC-V Privileged Specification, Sv39 (what it reserves) and the G-stage of the H extension."""
    table = root
    for level, index in ((2, gfn >> 18 & 2047), (1, gfn >> 9 & 511), (0, gfn & 511)):
        pte = _little(read, table + 8 * index)
        if not pte & 0x01:
            return None
        _check(pte >> 54 == 0, "reserved bits 63:54", pte)
        if pte & 0x0E:
            break
        _check(level > 0, "a pointer at the last level", pte)
        _check(pte & 0x3FF == 0x01, "D, A or U in a pointer", pte)
        table = pte >> 10 << 12
    _check(pte & 0x02, "writable or executable, but not readable", pte)
    _check(pte & 0x10, "U is clear: G-stage accesses are user accesses, and fault", pte)
    _check(pte & 0x40, "A is clear: this is a page fault, or an update by hardware", pte)
    _check(pte & 0x80, "D is clear: KVM sets it in every leaf", pte)
    _check(pte & 0x320 == 0, "global, or software's bits", pte)
    return _leaf(pte >> 10 << 12, gfn, 512**level, writable=bool(pte & 0x04))


def walk_loongarch(read: Read, root: int, gfn: int) -> Mapping | None:
    """LoongArch Reference Manual volume 1, 5.4.2 to 5.4.5 (lddir, ldpte); pgtable-bits.h and kvm_mmu.h of arch/loongarch."""
    table, level = root, 3
    while True:
        entry = _little(read, table + 8 * (gfn >> 9 * level & 511))
        if level == 0 or entry == 0 or entry & 0x40:
            break
        _check(entry & 0xFFF == 0 and entry >> 48 == 0, "an entry above the leaves is a bare address", entry)
        table, level = entry, level - 1
    if not entry & 0x80:
        _check(entry == 0, "not present, but not zero", entry)
        return None
    _check(level <= 1, "huge in an entry that cannot be", entry)
    _check(bool(entry & 0x40) == (level == 1), "H in a leaf would be G, global", entry)
    _check(entry & 0x01, "not valid", entry)
    _check(entry >> 2 & 3 == 0, "a privilege level other than 0", entry)
    _check(entry >> 4 & 3 == 1, "not coherent and cached", entry)
    _check(entry & 0xC00 == 0 and entry >> 48 == 0, "bits that KVM never sets", entry)
    dirty, write = bool(entry & 0x002), bool(entry & 0x100)
    _check(dirty == write, "D and W differ: a hardware walker may set D where W is (kvm_pte_mkclean takes both)", entry)
    _check(entry & 0x200 or not dirty, "D where KVM_PAGE_WRITEABLE is clear", entry)
    return _leaf(entry & 0xFFFF_FFFF_F000, gfn, 512**level, writable=dirty)


def walk_s390(read: Read, root: int, gfn: int) -> Mapping | None:
    """z/Architecture Principles of Operation, chapter 3, from a region-third table; asm/pgtable.h of arch/s390 since v6.14."""
    region = _big(read, root + 8 * (gfn >> 19 & 0x7FF))
    if region & 0x20:
        return None
    _check(region & 0x0C == 0x04, "translation specification: not a region-third-table entry", region)
    _check(region & 0x03 == 0x03 and region & 0xC0 == 0, "a segment table that is not whole", region)
    _check(not region & 0x400, "a region of 2 GiB", region)
    segment = _big(read, (region & ~0xFFF) + 8 * (gfn >> 8 & 0x7FF))
    if segment & 0x20:
        return None
    _check(segment & 0x0C == 0, "translation specification: not a segment-table entry", segment)
    _check(segment & 0x01, "valid, but not present", segment)
    protected = bool((region | segment) & 0x200)
    if segment & 0x400:
        _check(segment & 0xF_0000 == 0, "bits 44 to 47: access control that nobody set", segment)
        _check(segment & 0x5000 == 0x5000, "a block that software may not read, or that is old", segment)
        _check(protected or segment & 0xA000 == 0xA000, "not protected, though software's write or dirty is clear", segment)
        return _leaf(segment & ~0xF_FFFF, gfn, 256, writable=not protected)
    table = segment & ~0x7FF
    _check(table % 4096 == 0, "a page table without room for its PGSTEs", segment)
    pte = _big(read, table + 8 * (gfn & 0xFF))
    if pte & 0x400:
        _check(pte == 0x400, "invalid, but not empty", pte)
        return None
    _check(not pte & 0x800, "translation specification: bit 52", pte)
    _check(pte & 0x15 == 0x15, "not present, not readable or old", pte)
    protected = protected or bool(pte & 0x200)
    _check(protected or pte & 0x28 == 0x28, "not protected, though software's write or dirty is clear", pte)
    pgste = _big(read, table + 2048 + 8 * (gfn & 0xFF))
    _check(pgste & ~0x8000 == 0, "a page-status bit that no one set", pgste)
    return _leaf(pte & ~0xFFF, gfn, 1, writable=not protected)._replace(user_change=bool(pgste & 0x8000))


def walk_ppc_hpt(table: bytes | bytearray | memoryview, gfn: int) -> Mapping | None:
    """The hashed page table of Power ISA 2.07 book III-S, 5.7.7; mmu-hash.h; the VRMA of kvm_book3s_64.h: a 1 TiB segment."""
    vpn = 0x1FF_FFFF << 28 | gfn
    value = (0x1FF_FFFF ^ 0x1FF_FFFF << 25 ^ vpn & 0xFFF_FFFF) & 0x7F_FFFF_FFFF
    mask = len(table) // 128 - 1
    found = []
    for secondary, group in ((0, value & mask), (2, ~value & mask)):
        words = struct.unpack_from(">16Q", table, 128 * group)
        for first, second in zip(words[::2], words[1::2], strict=True):
            if first & 0x03 == secondary | 1 and first >> 62 == 1 and first >> 7 & (1 << 55) - 1 == vpn >> 11:
                _check(not first & 0x7C, "locked, absent, bolted or large", first)
                found.append(second)
    _check(len(found) <= 1, "two entries for one page are a machine check", gfn)
    if not found:
        return None
    (second,) = found
    protection = second & 0x03
    _check(protection in (2, 3), "a protection that the host never gives", second)
    _check(second >> 60 == 0 and second & 0xE00 == 0, "PP0, or a storage key", second)
    _check(second & 0x100, "valid, but not referenced", second)
    _check(second & 0x7C == 0x10, "WIMG other than M, or no-execute", second)
    changed = bool(second & 0x80)
    _check(protection == 2 or not changed, "changed, but read-only", second)
    return _leaf(second & 0x0FFF_FFFF_FFFF_F000, gfn, 1, writable=changed)


def walk_ppc32_hash(table: bytes | bytearray | memoryview, gfn: int) -> Mapping | None:
    """The 32-bit hashed page table: Programming Environments Manual, 7.6; segment n of the guest has VSID 0x1000 + n."""
    vsid, page = 0x1000 + (gfn >> 16), gfn & 0xFFFF
    value = (vsid ^ page) & 0x7_FFFF
    mask = len(table) // 64 - 1
    found = []
    for secondary, group in ((0, value & mask), (1, ~value & mask)):
        words = struct.unpack_from(">16I", table, 64 * group)
        wanted = 1 << 31 | vsid << 7 | secondary << 6 | page >> 10
        found += [second for first, second in zip(words[::2], words[1::2], strict=True) if first == wanted]
    _check(len(found) <= 1, "two entries for one page", gfn)
    if not found:
        return None
    (second,) = found
    _check(second & 0x180 == 0x180, "R or C is clear: the host sets both", second)
    _check(second & 0xE7C == 0x010, "an extended address, WIMG other than M, or X", second)
    _check(second & 0x03 in (2, 3), "a protection that the host never gives", second)
    return _leaf(second & 0xFFFF_F000, gfn, 1, writable=second & 0x03 == 2)


def walk_ia64_vhpt(table: bytes | bytearray, gfn: int) -> Mapping | None:
    """The long-format VHPT: Itanium SDM volume 2, 4.1. Its hash is the processor's own: the low 11 page bits."""
    entry, itir, tag, guest_address = struct.unpack_from("<4Q", table, 32 * (gfn % 2048))
    if tag != gfn >> 11 or not entry & 0x001:  # a tag with bit 63 is invalid, and equals none
        return None
    _check(entry & (0x002 | 3 << 50) == 0 and entry >> 52 == 0, "reserved or ignored bits, or exception deferral", entry)
    _check(entry >> 2 & 7 == 0, "not write-back", entry)
    _check(entry & 0x020, "A is clear: this is an access-bit fault", entry)
    _check(entry >> 7 & 3 == 0, "a privilege level other than 0", entry)
    _check(entry >> 9 & 7 in (1, 3), "access rights that the monitor never gives", entry)
    _check(itir == 12 << 2, "not a page of 4 KiB with key 0", itir)
    _check(guest_address == gfn << 12, "the guest-physical address is another page's", guest_address)
    dirty, may_write = bool(entry & 0x040), entry >> 9 & 7 == 3
    _check(may_write or not dirty, "D, but not writable", entry)
    return _leaf(entry & 0x0003_FFFF_FFFF_F000, gfn, 1, writable=dirty)


TREES: dict[str, Callable[[Read, int, int], Mapping | None]] = {
    "x86": walk_ept,
    "x86-pml": walk_ept_with_dirty_bits,
    "arm": walk_arm,
    "arm64": walk_arm64,
    "mips": walk_mips,
    "riscv": walk_riscv,
    "loongarch": walk_loongarch,
    "s390": walk_s390,
}


def _leaf(address: int, gfn: int, npages: int, *, writable: bool) -> Mapping:
    """Return the mapping of one page of a leaf of ``npages`` pages at ``address``, which must be aligned to them."""
    _check(address % (npages << 12) == 0, f"a block of {npages} pages that is not aligned", address)
    return Mapping(address + (gfn % npages << 12), writable, npages)


def _check(holds: object, what: str, word: int) -> None:
    if not holds:
        raise MalformedTableError(f"{what}: {word:#018x}")


def _little(read: Read, address: int) -> int:
    word: int = struct.unpack("<Q", read(address, 8))[0]
    return word


def _big(read: Read, address: int) -> int:
    word: int = struct.unpack(">Q", read(address, 8))[0]
    return word
