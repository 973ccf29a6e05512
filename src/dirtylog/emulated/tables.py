"""Second-stage translation tables in an architecture's own entry format.

The tables lie in memory of their own, at host-physical addresses from :data:`TABLES` on, as a hardware walker would find
them: an independent walker needs :attr:`RadixTables.root` and :meth:`TableMemory.read` and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

TABLES = 1 << 39
"""Host-physical address of the table memory: above any guest's memory, within every format's address field."""

TABLE_PAGE = 4096
_ENTRY = 8
_ALL = (1 << 64) - 1
_CHUNK = 1 << 20


class TableMemory:
    """Host-physical memory for tables, allocated in 4 KiB units and grown as needed."""

    def __init__(self, byte_order: Literal["little", "big"]) -> None:
        prefix = "<" if byte_order == "little" else ">"
        self._dtype = np.dtype(f"{prefix}u8")
        self.codec = struct.Struct(f"{prefix}Q")
        self._used = 0
        self._free: list[int] = []
        self.words: NDArray[np.uint64] = np.zeros(64 * TABLE_PAGE // _ENTRY, self._dtype)
        self.buffer = self.words.view(np.uint8).data

    def _grow(self) -> None:
        words = np.zeros(2 * len(self.words), self._dtype)
        words[: len(self.words)] = self.words
        self.words = words
        self.buffer = words.view(np.uint8).data

    def allocate(self, nbytes: int, fill: int = 0) -> int:
        """Return the offset of a table of ``nbytes``, every entry ``fill``, aligned to its size."""
        if nbytes == TABLE_PAGE and self._free:
            offset = self._free.pop()
        else:
            offset = -(-self._used // nbytes) * nbytes
            self._free.extend(range(self._used, offset, TABLE_PAGE))
            self._used = offset + nbytes
            while self._used > self.words.nbytes:
                self._grow()
        self.words[offset // _ENTRY : (offset + nbytes) // _ENTRY] = fill
        return offset

    def release(self, offset: int) -> None:
        """Free a table of one 4 KiB unit."""
        self._free.append(offset)

    def load(self, offset: int) -> int:
        """Return the 64-bit entry at a byte offset."""
        entry: int = self.codec.unpack_from(self.buffer, offset)[0]
        return entry

    def store(self, offset: int, entry: int) -> None:
        """Write the 64-bit entry at a byte offset."""
        self.codec.pack_into(self.buffer, offset, entry)

    def read(self, address: int, nbytes: int) -> bytes:
        """Return bytes at a host-physical address, as a hardware walker reads them."""
        return bytes(self.buffer[address - TABLES : address - TABLES + nbytes])


@dataclass(frozen=True, slots=True)
class EntryFormat:
    """How an architecture writes its entries: masks and bits of the 64-bit entry, little or big-endian in memory.

    An entry is present when it has any bit of ``present`` (a leaf or block) or of ``table_present`` (above the leaves). The
    guest may write through it when every bit of ``write`` is set and none of ``protect`` is.
    """

    byte_order: Literal["little", "big"]
    index_bits: tuple[int, ...]
    """The width of the index at each level, root first."""
    address_mask: int
    leaf: int
    """A present leaf that may be read and executed."""
    present: int
    table: int
    """An entry that points to a table of leaves."""
    table_present: int
    write: int = 0
    protect: int = 0
    writable_slot: int = 0
    """Bits of a leaf that record that its slot is writable; they stay when the permission is taken away."""
    writable_slot_block: int = 0
    """The same for a block."""
    address_shift: int = 0
    """The address is the masked entry, shifted left by this (right, if negative)."""
    table_address_shift: int = 0
    table_address_mask: int = (1 << 48) - 4096
    block: int | None = None
    """A present block (huge leaf) in an entry of the last level but one; None where there are no huge mappings."""
    block_mask: int = 0
    """An entry above the leaves is a block when its bits in this mask are those of ``block``."""
    upper_table: int | None = None
    """An entry that points to another table, where that differs from ``table``."""
    empty_table: int = 0
    empty_leaf: int = 0

    def leaf_entry(self, address: int, bits: int) -> int:
        """Return the leaf or block of these bits for a host-physical address."""
        return _shift(address, -self.address_shift) | bits

    def address(self, entry: int) -> int:
        """Return the host-physical address in a leaf or block."""
        return _shift(entry & self.address_mask, self.address_shift)


def _shift(value: int, left: int) -> int:
    return value << left if left >= 0 else value >> -left


class RadixTables:
    """A tree of tables indexed by guest frame number. Whoever calls holds mmu_lock.

    Offsets are in bytes in the table memory. A *leaf* maps one page; a *block*, one level higher, ``block_pages`` of them.
    """

    def __init__(self, entry_format: EntryFormat, *, leaf_table_bytes: int = TABLE_PAGE) -> None:
        form = self.format = entry_format
        self.memory = TableMemory(form.byte_order)
        self._leaf_table_bytes = leaf_table_bytes
        shift = sum(form.index_bits)
        self.max_gfn = 1 << shift
        levels = []
        for bits in form.index_bits:
            shift -= bits
            levels.append((shift, (1 << bits) - 1))
        self._upper = tuple(levels[:-1])
        self._leaf_mask = levels[-1][1]
        self.block_pages = self._leaf_mask + 1
        self._block_value = (form.block or 0) & form.block_mask
        # Without blocks the value is one that no masked entry has.
        self._walk_constants = (
            form.table_present,
            form.table_address_mask,
            form.table_address_shift,
            form.block_mask,
            self._block_value if form.block_mask else -1,
        )
        self._leaf_bits = form.index_bits[-1]
        # The page-walk cache, as a processor has one: where the leaf table of a run of frames lies, from its first walk on.
        self._leaf_table: dict[int, int] = {}
        self._root = self.memory.allocate((1 << form.index_bits[0]) * _ENTRY, form.empty_table)

    @property
    def root(self) -> int:
        """Host-physical address of the root table."""
        return TABLES + self._root

    def walk(self, gfn: int) -> tuple[int, int, bool]:
        """Return (offset, entry, is it a block) for the leaf or block that maps ``gfn``.

        Where an entry above the leaves is empty, the answer is that entry's offset, 0, and True.
        """
        # Every miss comes through here: names are looked up once, and the loads are not calls of load.
        unpack, buffer = self.memory.codec.unpack_from, self.memory.buffer
        cached = self._leaf_table.get(gfn >> self._leaf_bits)
        if cached is not None:
            offset = cached + (gfn & self._leaf_mask) * _ENTRY
            return offset, unpack(buffer, offset)[0], False
        table_present, address_mask, address_shift, block_mask, block_value = self._walk_constants
        table = self._root
        for shift, mask in self._upper:
            offset = table + (gfn >> shift & mask) * _ENTRY
            entry: int = unpack(buffer, offset)[0]
            if not entry & table_present:
                return offset, 0, True
            if entry & block_mask == block_value:
                return offset, entry, True
            table = ((entry & address_mask) << address_shift) - TABLES
        self._leaf_table[gfn >> self._leaf_bits] = table
        offset = table + (gfn & self._leaf_mask) * _ENTRY
        return offset, unpack(buffer, offset)[0], False

    def leaf(self, gfn: int) -> int:
        """Return the offset of the leaf of ``gfn``, making tables on the way. There must be no block there."""
        return self._descend(gfn, len(self._upper))

    def block(self, gfn: int) -> int | None:
        """Return the offset of the entry for the block of ``gfn``, making tables above it, or None if it holds a table."""
        offset = self._descend(gfn, len(self._upper) - 1)
        return None if self.memory.load(offset) & self.format.table_present else offset

    def page_in_block(self, address: int, gfn: int) -> int:
        """Return the address of a frame's page from that field of its block, whose low bits may hold other things (s390)."""
        pages = self.block_pages
        return address // (pages * TABLE_PAGE) * (pages * TABLE_PAGE) + gfn % pages * TABLE_PAGE

    def split(self, offset: int) -> None:
        """Replace the block at ``offset`` by a table of leaves with the same permissions."""
        form = self.format
        block = self.memory.load(offset)
        kept = block & (form.write | form.protect)
        if block & form.writable_slot_block:
            kept |= form.writable_slot
        first = form.leaf_entry(self.page_in_block(form.address(block), 0), form.leaf | kept)
        step = form.leaf_entry(TABLE_PAGE, 0)
        start = self._new_table(offset, len(self._upper)) // _ENTRY
        leaves = np.arange(self.block_pages, dtype=np.uint64) * np.uint64(step) + np.uint64(first)
        self.memory.words[start : start + self.block_pages] = leaves

    def revoke(self, gfns: NDArray[np.int64]) -> None:
        """Take the write permission of every leaf or block that maps one of ``gfns``."""
        for index in self.locate(gfns):
            self.revoke_entries(index)

    def revoke_entries(self, index: NDArray[np.int64]) -> None:
        """Take the write permission of the leaves or blocks at these word indices."""
        words = self.memory.words
        words[index] = words[index] & np.uint64(self.format.write ^ _ALL) | np.uint64(self.format.protect)

    def locate(self, gfns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the word indices of the present leaves, and of the blocks, that map ``gfns``. A block may repeat."""
        form, words = self.format, self.memory.words
        blocks = np.empty(0, np.int64)
        if not len(gfns):
            return blocks, blocks
        # Frames of one leaf table that has been walked to, which is what a guest of some MiB mostly writes between two gets.
        first, last = int(gfns.min()) >> self._leaf_bits, int(gfns.max()) >> self._leaf_bits
        cached = self._leaf_table.get(first) if first == last else None
        if cached is not None:
            index = cached // _ENTRY + (gfns & self._leaf_mask)
            return index[words[index] & np.uint64(form.present) != 0], blocks
        table = np.full(1, self._root // _ENTRY, np.int64)
        for shift, mask in self._upper:
            index = table + (gfns >> shift & mask)
            entries = words[index].astype(np.uint64, copy=False)
            descend = entries & np.uint64(form.table_present) != 0
            if form.block_mask:
                block = descend & (entries & np.uint64(form.block_mask) == self._block_value)
                blocks = np.concatenate((blocks, index[block]))
                descend &= ~block
            gfns, table = gfns[descend], self._table_offsets(entries[descend]) // _ENTRY
        index = table + (gfns & self._leaf_mask)
        return index[words[index] & np.uint64(form.present) != 0], blocks

    def leaf_tables(self, base_gfn: int, npages: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (first gfn, offset) of each leaf table that maps a page of a range, ascending."""
        form = self.format
        gfns = np.arange(base_gfn & ~(self.block_pages - 1), base_gfn + npages, self.block_pages, dtype=np.int64)
        table = np.full(len(gfns), self._root, np.int64)
        for shift, mask in self._upper:
            entries = self.memory.words[table // _ENTRY + (gfns >> shift & mask)].astype(np.uint64, copy=False)
            there = entries & np.uint64(form.table_present) != 0
            if form.block_mask:
                there &= entries & np.uint64(form.block_mask) != self._block_value
            gfns, table = gfns[there], self._table_offsets(entries[there])
        return gfns, table

    def unmap(self, base_gfn: int, npages: int) -> None:
        """Make every entry of a range not present, and free the leaf tables that lie wholly in it."""
        for gfns in gfn_chunks(base_gfn, npages):
            leaves, blocks = self.locate(gfns)
            self.memory.words[leaves] = self.format.empty_leaf
            self.memory.words[blocks] = self.format.empty_table
        self.free_leaf_tables(base_gfn, npages)

    def free_leaf_tables(self, base_gfn: int, npages: int) -> None:
        """Drop the leaf tables that lie wholly in a range: what they mapped is not present, and may be mapped by a block next."""
        gfns, tables = self.leaf_tables(base_gfn, npages)
        whole = (gfns >= base_gfn) & (gfns + self.block_pages <= base_gfn + npages)
        for gfn, table in zip(gfns[whole].tolist(), tables[whole].tolist(), strict=True):
            # Out of the walk cache first: a table that is no longer in the tree is found by nothing that takes permissions.
            self._leaf_table.pop(gfn >> self._leaf_bits, None)
            self.memory.store(self._descend(gfn, len(self._upper) - 1), self.format.empty_table)
            self.memory.release(table)

    def _table_offsets(self, entries: NDArray[np.uint64]) -> NDArray[np.int64]:
        address = (entries & np.uint64(self.format.table_address_mask)) << np.uint64(self.format.table_address_shift)
        return address.astype(np.int64) - TABLES

    def _descend(self, gfn: int, depth: int) -> int:
        """Return the offset of the entry for ``gfn`` at this depth (0: in the root), making the tables above it."""
        form = self.format
        levels = (*self._upper, (0, self._leaf_mask))
        table = self._root
        for level, (shift, mask) in enumerate(levels[:depth]):
            offset = table + (gfn >> shift & mask) * _ENTRY
            entry = self.memory.load(offset)
            if entry & form.table_present:
                table = _shift(entry & form.table_address_mask, form.table_address_shift) - TABLES
            else:
                table = self._new_table(offset, level + 1)
        shift, mask = levels[depth]
        return table + (gfn >> shift & mask) * _ENTRY

    def _new_table(self, offset: int, level: int) -> int:
        """Make the entry at ``offset`` point to a fresh table of this level, and return the table's offset."""
        form = self.format
        if level == len(self._upper):
            table, bits = self.memory.allocate(self._leaf_table_bytes), form.table
            self.memory.words[table // _ENTRY : table // _ENTRY + self.block_pages] = form.empty_leaf
        else:
            bits = form.table if form.upper_table is None else form.upper_table
            table = self.memory.allocate((1 << form.index_bits[level]) * _ENTRY, form.empty_table)
        self.memory.store(offset, _shift(TABLES + table, -form.table_address_shift) | bits)
        return table


def gfn_chunks(base_gfn: int, npages: int) -> Iterator[NDArray[np.int64]]:
    """Yield the guest frame numbers of a range, a bounded number at a time."""
    for start in range(base_gfn, base_gfn + npages, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, base_gfn + npages), dtype=np.int64)
