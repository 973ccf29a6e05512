"""Images that users bring: what of an ELF file is loaded where, and that no file whatever raises anything but what is promised."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirtylog import Image, InvalidArgumentError, UnsupportedError
from dirtylog.guests.image import ELF_MAGIC, Segment
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.target import open_guest
from elf_file import EHDR_BYTES, EM_AARCH64, EM_VAX, ET_DYN, ET_REL, PHDR_BYTES, PT_NOTE, PT_NULL, Part, elf

if TYPE_CHECKING:
    from pathlib import Path

needs_elftools = pytest.mark.usefixtures("_elftools")

STORE = bytes.fromhex("4889 3c25 0030 0000 f4".replace(" ", ""))
"""mov [0x3000], rdi; hlt"""
GOOD = elf(Part(0x1000, STORE), Part(0x2000, b"data", 4096))


@pytest.fixture
def _elftools() -> None:
    pytest.importorskip("elftools", reason="pyelftools is not installed")


def image_of(folder: Path, data: bytes, **options: int) -> Image:
    path = folder / "image"
    path.write_bytes(data)
    return Image.read(path, **options)


@needs_elftools
def test_an_elf_file_s_segments_entry_and_instruction_set(tmp_path: Path) -> None:
    parts = (
        Part(0x1000, STORE),
        Part(0x5000, b"a note", kind=PT_NOTE),
        Part(0x2000, b"data", 4096),
        Part(0x4000, b"", 64),
        Part(0x6000, b"", 0),
    )
    image = image_of(tmp_path, elf(*parts, entry=0x1003))
    assert image.segments == (Segment(0x1000, STORE, 9), Segment(0x2000, b"data", 4096), Segment(0x4000, b"", 64))
    assert (image.entry, image.halt, image.isa) == (0x1003, None, "x86")
    assert image_of(tmp_path, GOOD, entry=0x1234, halt=0x1239) == Image(
        (Segment(0x1000, STORE, 9), Segment(0x2000, b"data", 4096)), 0x1234, 0x1239, "x86"
    )
    assert image_of(tmp_path, elf(Part(0, b"\0\0\0\0"), machine=EM_AARCH64)).isa == "arm64"


@needs_elftools
def test_an_elf_file_runs_and_its_bss_is_zero(tmp_path: Path) -> None:
    # mov rax, [0x2008]; mov [0x3000], rax; hlt
    code = bytes.fromhex("48 8b 04 25 08 20 00 00 48 89 04 25 00 30 00 00 f4")
    image = image_of(tmp_path, elf(Part(0x1000, b"\xcc" + code), Part(0x2000, b"12345678", 16), entry=0x1001))
    with open_guest("emu:x86", size=8 * 4096, image=image) as memory:
        flat = memory.contents(memory.slots[RAM_SLOT]).reshape(-1)
        assert flat[0x2000:0x2010].tobytes() == b"12345678" + bytes(8)
        flat[0x3000:0x3008] = 0xFF
        memory.load_segments((Segment(0x3000, b"\1", 4),))
        assert flat[0x3000:0x3008].tobytes() == b"\1\0\0\0\xff\xff\xff\xff", "zeros behind the data, and no further"
        memory.resume()
        assert memory.wait(timeout=30)
        assert flat[0x3000:0x3008].tobytes() == bytes(8)


@needs_elftools
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (elf(Part(0x1000, STORE), machine=EM_VAX), "an ELF file for EM_VAX: no guest has that instruction set"),
        (elf(Part(0x1000, STORE), machine=0xFFFF), "an ELF file for 65535"),
        (elf(Part(0x1000, STORE), kind=ET_DYN), r"no program that runs where it was linked \(ET_DYN\); link it statically"),
        (elf(Part(0x1000, STORE), kind=ET_REL), r"\(ET_REL\)"),
        (elf(Part(0x1000, STORE), kind=0x7777), r"\(30583\)"),
        (elf(), "no program that runs where it was linked"),
        (elf(Part(0x1000, STORE, kind=PT_NULL)), "no program"),
        (elf(Part(0x1000, STORE, virtual=0xFFFF_8000_0000_1000)), "linked to run at 0xffff800000001000 and to lie at 0x1000"),
        (elf(Part(0x1000, STORE))[:-1], "is cut short: a segment has 9 bytes at offset 120"),
        (elf(Part(0x1000, STORE, 8)), "cut short"),
        (elf(Part(0x1000, STORE))[:100], "begins as an ELF file but cannot be parsed"),
        (elf(Part(0x1000, STORE))[:EHDR_BYTES], "cannot be parsed"),
        (elf(Part(0x1000, STORE))[:40], "cannot be parsed"),
        (ELF_MAGIC, "cannot be parsed"),
        (ELF_MAGIC + b"\x03" + GOOD[5:], "cannot be parsed"),
        (ELF_MAGIC + bytes(range(256)), "cannot be parsed"),
    ],
)
def test_an_elf_file_that_is_no_guest_program_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        image_of(tmp_path, data)
    assert repr(str(tmp_path / "image")) in str(caught.value)


@needs_elftools
@pytest.mark.parametrize("nbytes", [0, 1, PHDR_BYTES - 1])
def test_program_headers_that_overlap_one_another_are_refused(tmp_path: Path, nbytes: int) -> None:
    """With size 0 a small file could have 65534 segments that are each as long as the file."""
    data = bytearray(GOOD)
    data[54:56] = nbytes.to_bytes(2, "little")  # e_phentsize
    with pytest.raises(InvalidArgumentError):
        image_of(tmp_path, bytes(data))


@needs_elftools
@pytest.mark.parametrize("load", [0, 0x1000])
def test_an_elf_file_goes_with_no_load_address(tmp_path: Path, load: int) -> None:
    with pytest.raises(InvalidArgumentError, match="says itself where it lies: leave the load address out"):
        image_of(tmp_path, GOOD, load=load)


def test_an_elf_file_without_pyelftools_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(UnsupportedError, match="pyelftools is not installed") as caught:
        image_of(tmp_path, GOOD)
    assert caught.value.remedy == "install it: pip install 'dirtylog[elf]'"
    assert image_of(tmp_path, STORE, load=0x1000) == Image.raw(STORE, load=0x1000), "raw bytes need nothing"


@needs_elftools
def test_an_elf_file_for_another_instruction_set_than_the_guest_s_is_refused(tmp_path: Path) -> None:
    image = image_of(tmp_path, elf(Part(0x1000, STORE), machine=EM_AARCH64))
    with pytest.raises(InvalidArgumentError, match="the image is a program for arm64, but the guest is x86"):
        open_guest("emu:x86", size=8 * 4096, image=image)


@needs_elftools
@pytest.mark.parametrize("part", [Part(0x8000, STORE), Part(0x7FFC, STORE), Part(0x7000, STORE, 4097), Part(1 << 63, b"\xf4")])
def test_a_segment_outside_the_memory_is_refused(tmp_path: Path, part: Part) -> None:
    image = image_of(tmp_path, elf(Part(0x1000, STORE), part))
    with pytest.raises(InvalidArgumentError, match=f"does not fit at address {part.address:#x}: no slot holds all of it"):
        open_guest("emu:x86", size=8 * 4096, image=image)


def test_a_raw_file_is_entered_where_it_lies_or_where_it_is_told(tmp_path: Path) -> None:
    assert image_of(tmp_path, STORE) == Image((Segment(0, STORE, 9),), 0)
    assert image_of(tmp_path, STORE, load=0x1000, entry=0x1004, halt=0x1008) == Image((Segment(0x1000, STORE, 9),), 0x1004, 0x1008)
    assert image_of(tmp_path, ELF_MAGIC[:3]).segments[0].data == ELF_MAGIC[:3], "it begins as no ELF file does"


@pytest.mark.parametrize("name", ["missing", ".", "no\0name"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot read the image"):
        Image.read(tmp_path / name)


def only_what_is_promised(folder: Path, data: bytes) -> None:
    try:
        image = image_of(folder, data)
    except InvalidArgumentError:
        return
    for segment in image.segments:
        assert len(segment.data) <= segment.nbytes
        assert segment.data in data
    assert image.isa is not None


fuzzed = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@needs_elftools
@fuzzed
@given(rest=st.binary(max_size=300))
def test_garbage_after_the_magic_is_an_image_or_refused(tmp_path: Path, rest: bytes) -> None:
    only_what_is_promised(tmp_path, ELF_MAGIC + rest)


@needs_elftools
@fuzzed
@given(
    changes=st.dictionaries(
        st.integers(min_value=4, max_value=EHDR_BYTES + 2 * PHDR_BYTES - 1), st.integers(min_value=0, max_value=255), max_size=6
    ),
    length=st.integers(min_value=4, max_value=len(GOOD)) | st.just(len(GOOD)),
)
def test_a_good_file_with_some_bytes_changed_is_an_image_or_refused(tmp_path: Path, changes: dict[int, int], length: int) -> None:
    data = bytearray(GOOD)
    for offset, value in changes.items():
        data[offset] = value
    only_what_is_promised(tmp_path, bytes(data[:length]))


@needs_elftools
@pytest.mark.parametrize("value", [0, 1, 2, 3, 0x7F, 0xFF])
def test_a_good_file_with_any_one_byte_changed_is_an_image_or_refused(tmp_path: Path, value: int) -> None:
    for offset in range(4, EHDR_BYTES + 2 * PHDR_BYTES):
        only_what_is_promised(tmp_path, GOOD[:offset] + bytes([value]) + GOOD[offset + 1 :])
