"""Guest images that are nearly ELF files: what a parser of a page reads in them, or a typed error, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import os
import resource
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import Image, InvalidArgumentError
from dirtylog.guests.image import ELF_MAGIC, Segment
from test_fuzz_bounds import FUZZED, KIB, MIB, U16, U32, U64, bounded

if TYPE_CHECKING:
    from pathlib import Path

needs_elftools = pytest.mark.skipif(importlib.util.find_spec("elftools") is None, reason="pyelftools is not installed")

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE = 1, 2, 3, 4
ET_EXEC, EM_X86_64, EM_MIPS = 2, 62, 8
PN_XNUM = 0xFFFF
_MACHINES = {62, 40, 183, 8, 20, 21, 243, 22}


class Header(NamedTuple):
    """The fields of an ELF header behind its identity, as the gABI names them."""

    e_type: int = ET_EXEC
    machine: int = EM_X86_64
    version: int = 1
    entry: int = 0x1000
    phoff: int = 64
    shoff: int = 0
    flags: int = 0
    ehsize: int = 64
    phentsize: int = 56
    phnum: int = 0
    shentsize: int = 64
    shnum: int = 0
    shstrndx: int = 0


class Program(NamedTuple):
    """The fields of a program header, in the order of class 64."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int = 1


def packed(header: Header, programs: list[Program], rest: bytes = b"", *, order: str = "<", elfclass: int = 2) -> bytes:
    """Return an ELF file; of class 32 the numbers are cut to their fields."""
    identity = ELF_MAGIC + bytes([elfclass, 1 if order == "<" else 2, 1]) + bytes(9)
    if elfclass == 2:
        table = [struct.pack(order + "IIQQQQQQ", *program) for program in programs]
        return identity + struct.pack(order + "HHIQQQIHHHHHH", *header) + b"".join(table) + rest
    numbers = [value & 0xFFFF_FFFF for value in header]
    table = []
    for program in programs:
        kind, flags, offset, vaddr, paddr, filesz, memsz, align = (value & 0xFFFF_FFFF for value in program)
        table.append(struct.pack(order + "8I", kind, offset, vaddr, paddr, filesz, memsz, flags, align))
    return identity + struct.pack(order + "HHIIIIIHHHHHH", *numbers) + b"".join(table) + rest


def segments_in(data: bytes) -> tuple[Segment, ...] | None:
    """Return what a little-endian file of class 64 has to load, read without pyelftools; None if it must be refused."""
    header = Header._make(struct.unpack_from("<HHIQQQIHHHHHH", data, 16))
    if header.e_type != ET_EXEC or header.machine not in _MACHINES or (header.phnum and header.phentsize < 56):
        return None
    found = []
    for number in range(header.phnum):
        at = header.phoff + number * header.phentsize
        if at + 56 > len(data):
            return None
        program = Program._make(struct.unpack_from("<IIQQQQQQ", data, at))
        if program.kind != PT_LOAD or not program.memsz:
            continue
        if program.vaddr != program.paddr or program.filesz > program.memsz or program.offset + program.filesz > len(data):
            return None
        found.append(Segment(program.paddr, data[program.offset : program.offset + program.filesz], program.memsz))
    return tuple(found) or None


def read(data: bytes, seconds: float = 2.0) -> Image | None:
    """Read an image from a file, within the stated bounds: 64 bytes for each byte of the file, and 1 MiB."""
    importlib.import_module("elftools.elf.elffile")
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        with bounded(64 * len(data) + MIB, seconds):
            try:
                return Image.read(f"/proc/self/fd/{fd}")
            except InvalidArgumentError:
                return None
    finally:
        os.close(fd)


@st.composite
def nearly_good(draw: st.DrawFn) -> bytes:
    """Draw a little-endian file of class 64 with at most four segments, in which at most two fields have extreme values."""
    count = draw(st.integers(0, 4))
    rest = draw(st.binary(max_size=80))
    total = 64 + 56 * count + len(rest)
    programs: list[Program] = []
    for _ in range(count):
        kind = draw(st.sampled_from([PT_LOAD, PT_LOAD, PT_LOAD, PT_INTERP, PT_NOTE]))
        address, offset = draw(U64), draw(st.integers(0, total))
        filesz = draw(st.integers(0, total - offset))
        memsz = filesz + draw(st.sampled_from([0, 0, 1, 4096, 1 << 60]))
        programs.append(Program(kind, 7, offset, address, address, filesz, memsz))
    header = Header(machine=draw(st.sampled_from([EM_X86_64, *sorted(_MACHINES)])), entry=draw(U64), phnum=count)
    for number in draw(st.lists(st.integers(-2, count - 1), max_size=2)):
        if number >= 0:
            field = draw(st.sampled_from(["offset", "vaddr", "paddr", "filesz", "memsz"]))
            programs[number] = programs[number]._replace(**{field: draw(U64)})
        else:
            field = draw(st.sampled_from(Header._fields))
            wide = U64 if field in ("entry", "phoff", "shoff") else U32 if field in ("version", "flags") else U16
            header = header._replace(**{field: draw(wide)})
    return packed(header._replace(phnum=min(header.phnum, PN_XNUM - 1)), programs, rest)


@needs_elftools
@FUZZED
@given(data=nearly_good())
def test_what_is_loaded_is_what_the_headers_say(data: bytes) -> None:
    """Fewer program headers than PN_XNUM, and none of PT_DYNAMIC: those have a test of their own."""
    image, expected = read(data, seconds=5.0), segments_in(data)
    assert (None if image is None else image.segments) == expected


@st.composite
def of_any_class(draw: st.DrawFn) -> bytes:
    """Draw a file of either class and byte order, with segments that are mostly within it."""
    elfclass, order = draw(st.sampled_from([1, 2])), draw(st.sampled_from(["<", ">"]))
    programs: list[Program] = []
    for _ in range(draw(st.integers(0, 4))):
        kind, address = draw(st.sampled_from([PT_LOAD, PT_LOAD, PT_NOTE, 0x6474E551])), draw(U32)
        offset, filesz = draw(st.integers(0, 200)), draw(st.integers(0, 100))
        programs.append(Program(kind, 7, offset, address, address, filesz, filesz + draw(st.sampled_from([0, 1, 4096]))))
    header = Header(
        machine=draw(st.sampled_from([EM_X86_64, EM_MIPS, 22, 183])),
        entry=draw(U32),
        phoff=52 if elfclass == 1 else 64,
        phentsize=32 if elfclass == 1 else 56,
        phnum=len(programs) + draw(st.sampled_from([0, 0, 0, 1])),
    )
    return packed(header, programs, draw(st.binary(max_size=200)), order=order, elfclass=elfclass)


@needs_elftools
@FUZZED
@given(data=of_any_class())
def test_files_of_every_class_and_byte_order_are_images_or_refused(data: bytes) -> None:
    image = read(data)
    for segment in () if image is None else image.segments:
        assert len(segment.data) <= segment.nbytes
        assert segment.data in data


@FUZZED
@given(data=st.binary(max_size=4 * KIB), load=U64 | st.none(), entry=U64 | st.none())
def test_a_raw_file_is_an_image_of_itself(data: bytes, load: int | None, entry: int | None) -> None:
    if data.startswith(ELF_MAGIC):
        return
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        with bounded(4 * len(data) + 256 * KIB):
            image = Image.read(f"/proc/self/fd/{fd}", load=load, entry=entry)
    finally:
        os.close(fd)
    assert image.segments == (Segment(load or 0, data, len(data)),)
    assert image.entry == (load or 0 if entry is None else entry)


# --- known defects


def section_header(kind: int = 0, *, offset: int = 0, size: int = 0, info: int = 0) -> bytes:
    return struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, 0, info, 1, 0)


def dynamic_segments(count: int) -> bytes:
    """Return a file with as many dynamic segments as sections: pyelftools goes through all sections for each of them."""
    programs = [Program(PT_DYNAMIC, 7, 0, 0, 0, 0, 0)] * count
    shoff = 64 + 56 * count
    return packed(Header(phnum=count, shoff=shoff, shnum=count), programs, section_header(3, offset=shoff) * count)


UNENDING = {
    "2^32 - 1 program headers at offset 0": packed(
        Header(phoff=0, phentsize=0, phnum=PN_XNUM, shoff=64, shnum=1), [], section_header(info=0xFFFF_FFFF)
    ),
    "1000 dynamic segments and 1000 sections": dynamic_segments(1000),
}


@needs_elftools
@pytest.mark.parametrize("what", UNENDING)
def test_a_small_file_does_not_take_for_ever(what: str) -> None:
    assert read(UNENDING[what], seconds=1.5) is None


@needs_elftools
def test_segments_that_share_their_bytes_do_not_multiply_them() -> None:
    count = 1000
    size = 63 + 56 * count
    data = packed(Header(phnum=count), [Program(PT_LOAD, 7, 1, 0x1000, 0x1000, size, size)] * count)
    read(data, seconds=10.0)


_READ = """
import sys
from dirtylog import Image, InvalidArgumentError
try:
    Image.read(sys.argv[1])
except InvalidArgumentError:
    sys.exit(42)
"""


@pytest.mark.parametrize("what", ["a sparse file of 16 GiB", "a device without end"])
def test_a_file_that_is_too_long_for_memory_is_refused(tmp_path: Path, what: str) -> None:
    """In a process that may have 1 GiB of addresses."""
    path = tmp_path / "image"
    if what.startswith("a sparse"):
        path.touch()
        os.truncate(path, 16 << 30)
    else:
        path.symlink_to("/dev/zero")
    done = subprocess.run(
        (sys.executable, "-c", _READ, path),
        check=False,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )
    assert done.returncode == 42, done.stderr.decode()[-300:]
