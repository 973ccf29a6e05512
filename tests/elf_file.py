"""Minimal ELF files, packed by hand from the gABI's tables."""

from __future__ import annotations

import struct
from typing import NamedTuple

EM_X86_64, EM_AARCH64, EM_VAX = 62, 183, 75
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
PT_NULL, PT_LOAD, PT_NOTE = 0, 1, 4
EHDR_BYTES, PHDR_BYTES = 64, 56


class Part(NamedTuple):
    """One program header: bytes that lie at ``address``, and zeros after them up to ``nbytes``."""

    address: int
    data: bytes
    nbytes: int | None = None
    virtual: int | None = None
    kind: int = PT_LOAD


def elf(*parts: Part, entry: int = 0x1000, machine: int = EM_X86_64, kind: int = ET_EXEC) -> bytes:
    """Return a little-endian ELF64 file without sections."""
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, EHDR_BYTES, 0, 0, EHDR_BYTES, PHDR_BYTES, len(parts), 0, 0, 0)
    table, contents, offset = b"", b"", EHDR_BYTES + PHDR_BYTES * len(parts)
    for part in parts:
        virtual = part.address if part.virtual is None else part.virtual
        nbytes = len(part.data) if part.nbytes is None else part.nbytes
        table += struct.pack("<IIQQQQQQ", part.kind, 7, offset + len(contents), virtual, part.address, len(part.data), nbytes, 1)
        contents += part.data
    return identity + header + table + contents
