"""Names of variables, from the symbol tables of the files that were mapped, or of a guest's program.

A recording names files; at the time of the report there may be other files of that name, or damaged ones, or none. Those give no
names, and never an error.
"""

from __future__ import annotations

import importlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dirtylog.memslot import MemorySlot

_MAX_TABLE = 256 << 20
_TYPES = (0, 1, 2, 5, 10)  # NOTYPE, OBJECT, FUNC, COMMON, GNU_IFUNC
_SPECIAL_SECTIONS = 0xFF00  # and above: SHN_ABS and others that name no place; 0 is undefined
_PAGE = 4096


class Segment(NamedTuple):
    """A PT_LOAD program header, in bytes."""

    offset: int
    address: int
    file_bytes: int
    nbytes: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Table:
    """The symbols of one file, by address: uint64[k] each. ``names`` are offsets into ``strings``."""

    segments: tuple[Segment, ...]
    addresses: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    names: NDArray[np.uint32]
    strings: bytes

    def bias_of(self, file_offset: int, address: int) -> int | None:
        """Return by how much addresses differ from the file's, where its byte ``file_offset`` lies at ``address``."""
        for segment in sorted(self.segments, key=lambda one: not one.writable):
            if segment.offset // _PAGE * _PAGE <= file_offset < segment.offset + segment.file_bytes:
                return address - (file_offset - segment.offset + segment.address)
        return None

    def find(self, start: int, end: int) -> list[tuple[int, str]]:
        """Return (bytes, name) of what lies between two addresses of the file. A label has no bytes, and reaches to the next."""
        if not any(part.address < end and start < part.address + part.nbytes for part in self.segments):
            return []
        stop = int(np.searchsorted(self.addresses, np.uint64(min(max(end, 0), (1 << 64) - 1)), "left"))
        begins, sizes = self.addresses[:stop].astype(np.float64), self.sizes[:stop].astype(np.float64)
        ends = begins + sizes
        inside = np.minimum(ends, end) - np.maximum(begins, start)
        found = np.flatnonzero((inside > 0) | ((sizes == 0) & (begins >= start)))
        if not len(found) and stop and sizes[stop - 1] == 0:
            return [(0, f"{self._name(stop - 1)}+{start - int(self.addresses[stop - 1]):#x}")]
        order = found[np.argsort(-inside[found], kind="stable")]
        return [(int(max(inside[index], 0)), self._name(int(index))) for index in order[:_MANY]]

    def _name(self, index: int) -> str:
        offset = int(self.names[index])
        return self.strings[offset : self.strings.find(b"\0", offset)].decode("utf-8", "replace")


_MANY = 100


class Symbols:
    """What lies where in the memory of a recording."""

    def __init__(self, slots: Sequence[MemorySlot], image: str | None = None, started: float | None = None) -> None:
        self._placed: dict[tuple[str, int], Table] = {}
        tables: dict[str, Table | None] = {}
        for slot in slots:
            if not slot.name.startswith("/"):
                continue
            if slot.name not in tables:
                tables[slot.name] = read_table(slot.name, started)
            table = tables[slot.name]
            bias = None if table is None else table.bias_of(slot.file_offset, slot.base_gfn * slot.page_size)
            if table is not None and bias is not None:
                self._placed[slot.name, bias] = table
        program = read_table(image, started) if image else None
        if program is not None:
            self._placed[str(image), 0] = program

    def find(self, start: int, end: int, limit: int = 4) -> list[str]:
        """Return the names of what lies between two addresses, the largest first, and how many more there are."""
        found = [named for (_, bias), table in self._placed.items() for named in table.find(start - bias, end - bias)]
        names = list(dict.fromkeys(name for _, name in sorted(found, key=lambda named: -named[0])))
        more = len(names) - limit
        return names[:limit] + ([f"and {more}{'+' if len(names) >= _MANY else ''} more"] if more > 0 else [])


def read_table(path: str, started: float | None = None) -> Table | None:
    """Return the symbols of an ELF file; None if there are none, or if the file has changed since the recording started."""
    try:
        facts = Path(path).stat()
        # A recording may name anything: a pipe would be waited for.
        if not stat.S_ISREG(facts.st_mode) or (started is not None and facts.st_mtime > started):
            return None
        with Path(path).open("rb") as file:
            return _parse(file)
    except Exception:  # noqa: BLE001 - beside ours, pyelftools and NumPy raise errors of many kinds for damaged files
        return None


def _parse(file: BinaryIO) -> Table | None:
    try:
        elffile = importlib.import_module("elftools.elf.elffile")
    except ImportError:
        return None
    elf: Any = elffile.ELFFile(file)
    headers = (elf.get_segment(number).header for number in range(elf.num_segments()))
    segments = tuple(
        Segment(part.p_offset, part.p_vaddr, part.p_filesz, part.p_memsz, bool(part.p_flags & 2))
        for part in headers
        if part.p_type == "PT_LOAD"
    )
    for section in _symbol_sections(elf):
        strings = elf.get_section(section["sh_link"])
        if max(section["sh_size"], strings["sh_size"]) > _MAX_TABLE:
            continue
        entries = np.frombuffer(section.data(), _layout(elf), count=section["sh_size"] // _layout(elf).itemsize)
        kinds, where = entries["info"] & 0xF, entries["section"]
        entries = entries[np.isin(kinds, _TYPES) & (where != 0) & (where < _SPECIAL_SECTIONS) & (entries["name"] != 0)]
        texts = strings.data()
        # $d, $x and the like mark where code and data begin.
        first = np.frombuffer(texts, np.uint8)[np.minimum(entries["name"], len(texts) - 1)]
        entries = entries[first != ord("$")]
        if len(entries):
            entries = entries[np.argsort(entries["value"], kind="stable")]
            values, sizes = entries["value"].astype(np.uint64), entries["size"].astype(np.uint64)
            return Table(segments, values, sizes, entries["name"].astype(np.uint32), texts)
    return None


def _symbol_sections(elf: Any) -> Iterator[Any]:  # noqa: ANN401 - pyelftools has no types
    for name in (".symtab", ".dynsym"):
        section = elf.get_section_by_name(name)
        if section is not None:
            yield section


def _layout(elf: Any) -> np.dtype[Any]:  # noqa: ANN401 - pyelftools has no types
    order = "<" if elf.little_endian else ">"
    if elf.elfclass == 64:  # noqa: PLR2004 - the class is its number of bits
        fields = [("name", "u4"), ("info", "u1"), ("other", "u1"), ("section", "u2"), ("value", "u8"), ("size", "u8")]
    else:
        fields = [("name", "u4"), ("value", "u4"), ("size", "u4"), ("info", "u1"), ("other", "u1"), ("section", "u2")]
    return np.dtype([(name, order + kind) for name, kind in fields])
