"""The guest programs: the bytes are what the source says, and do what the patterns say."""

from __future__ import annotations

import numpy as np
import pytest

from assemble import TARGETS, assemble, missing_tool
from dirtylog import DirtyLog, Image, InvalidArgumentError, UnsupportedError
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.emulated.isa import ISAS
from dirtylog.guests.machine import RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import PROGRAMS, Pattern, patterns, store_loop
from dirtylog.target import open_guest


@pytest.mark.parametrize("program", TARGETS)
def test_the_bytes_are_what_the_source_says(program: str) -> None:
    lacks = missing_tool(program)
    if lacks:
        pytest.skip(f"{lacks} is not installed")
    code, halt = assemble(program)
    assert store_loop(program) == code
    assert ISAS[program].halt == halt


def expected(pattern: Pattern, word_bytes: int, byte_order: str) -> dict[int, bytes]:
    """Return what the loop leaves in the first word of each page, by page of the memory."""
    contents = {}
    page, value = pattern.page, pattern.value
    assert pattern.count is not None
    for _ in range(pattern.count):
        word = (value & (1 << 8 * word_bytes) - 1).to_bytes(word_bytes, "little" if byte_order == "little" else "big")
        contents[(pattern.base >> 12) + page] = word
        value += pattern.step
        page = page * pattern.mul + pattern.add & pattern.mask
    return contents


LOOPS = {
    "sweep": Pattern(base=8 << 12, mask=63, count=100),
    "random": Pattern(base=64 << 12, page=7, mul=5, add=3, mask=127, value=0x1234, step=0x1111, count=500),
    "one page": Pattern(base=3 << 12, value=1, step=1, count=1000),
    "value wraps": Pattern(base=3 << 12, value=0xFFFF_FFFE, step=1, count=5),
    "one store": Pattern(base=300 << 12, count=1),
    "none": Pattern(base=300 << 12, count=0),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("arch", PORTS)
def test_the_loop_does_what_its_registers_say(arch: str, loop: str) -> None:
    pattern = LOOPS[loop]
    with make_guest(arch, 301 << 12, loops=[pattern]) as memory, DirtyLog(memory) as log:
        isa = ISAS.get(memory.port.isa)
        word_bytes, byte_order = (isa.word_bytes, isa.byte_order) if isa else (8, "little")
        memory.resume()
        assert memory.wait(timeout=30)
        memory.pause()
        contents = expected(pattern, word_bytes, byte_order)
        assert log.get(RAM_SLOT).pages().tolist() == sorted(contents)
        ram = memory.read(RAM_SLOT, np.arange(301))
        assert {page: bytes(ram[page, :word_bytes]) for page in np.flatnonzero(ram.any(axis=1)).tolist()} == {
            page: word for page, word in contents.items() if any(word)
        }


@pytest.mark.parametrize("bits", range(11))
def test_a_period_of_random_meets_every_page_once(bits: int) -> None:
    pattern = PROGRAMS["random"](0, 1 << bits, 0, 1)
    page, seen = pattern.page, []
    for _ in range(1 << bits):
        seen.append(page)
        page = page * pattern.mul + pattern.add & pattern.mask
    assert sorted(seen) == list(range(1 << bits))
    assert page == pattern.page


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("vcpus", [1, 2, 3, 8])
@pytest.mark.parametrize("npages", [1, 2, 3, 64, 1000, 65536])
def test_no_program_leaves_the_memory(program: str, vcpus: int, npages: int) -> None:
    for pattern in patterns(program, npages, vcpus):
        assert pattern.mul % 4 == 1
        first = pattern.base >> 12
        assert first + pattern.page >= 0
        assert first + max(pattern.mask, pattern.page) < npages
        assert pattern.mask & pattern.mask + 1 == 0


X86_IMAGE = bytes.fromhex("4889 3c25 0030 0000 f4".replace(" ", ""))
"""mov [0x3000], rdi; hlt."""

ARM64_IMAGE = b"".join(word.to_bytes(4, "little") for word in (0xD2860000, 0xF9000000, 0x14000000))
"""mov x0, #0x3000; str x0, [x0]; b . (at offset 8)."""


def test_a_user_s_image_runs_and_is_logged() -> None:
    with open_guest("emu:x86", size=8 * 4096, image=Image.raw(X86_IMAGE, load=0x1000)) as memory, DirtyLog(memory) as log:
        memory.resume()
        assert memory.wait(timeout=30), "hlt halts"
        assert log.get(RAM_SLOT).pages().tolist() == [3]
        assert len(memory.slots) == 1, "an image needs no slot for the store loop"


def test_an_image_s_entry_and_halt_address() -> None:
    image = Image.raw(bytes(64) + ARM64_IMAGE, load=0x1000, entry=0x1040, halt=0x1048)
    with open_guest("emu:arm64", size=8 * 4096, image=image) as memory, DirtyLog(memory) as log:
        memory.resume()
        assert memory.wait(timeout=30)
        assert memory.vcpus[0].cpu.pc == 0x1048
        assert log.get(RAM_SLOT).pages().tolist() == [3]
        assert memory.read(RAM_SLOT, [3])[0, :8].tobytes() == (0x3000).to_bytes(8, "little")


def test_an_image_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="does not fit at address 0x7ff0"):
        open_guest("emu:x86", size=8 * 4096, image=Image.raw(bytes(32), load=0x7FF0))
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        open_guest("emu:x86", size=8 * 4096, image=Image.raw(bytes(32), load=1 << 40))


def test_an_image_and_a_program_are_one_too_many() -> None:
    with pytest.raises(InvalidArgumentError, match="program"):
        open_guest("emu:x86:sweep", image=Image.raw(b"\xf4"))


@pytest.mark.parametrize("arch", ["ia64", "loongarch"])
def test_the_trace_cpu_runs_no_images(arch: str) -> None:
    with pytest.raises(UnsupportedError, match="trace CPU"):
        open_guest(f"emu:{arch}", image=Image.raw(b"\xf4"))


@pytest.mark.parametrize(
    ("target", "size", "vcpus", "match"),
    [
        ("emu:vax", "64MiB", 1, "unknown architecture 'vax'.*x86.*ia64"),
        ("emu:x86:nap", "64MiB", 1, "unknown program 'nap'.*sweep.*idle"),
        ("emu:", "64MiB", 1, "unknown target 'emu:'"),
        ("vm:x86", "64MiB", 1, "unknown target 'vm:x86'"),
        ("emu:x86", 0, 1, "0 bytes.*positive multiple"),
        ("emu:x86", -4096, 1, "-4096 bytes"),
        ("emu:x86", 4097, 1, "4097 bytes.*4096"),
        ("emu:x86", "12 parsecs", 1, "12 parsecs"),
        ("emu:x86", "64MiB", 0, "0 vCPUs"),
        ("emu:x86", "64MiB", 9, "9 vCPUs"),
        ("emu:arm", "4GiB", 1, "at most"),
        ("emu:x86", "500GiB", 1, "this host has"),
        ("emu:x86", 1 << 60, 1, "at most"),
    ],
)
def test_bad_input_is_named(target: str, size: str | int, vcpus: int, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        open_guest(target, size=size, vcpus=vcpus)


def test_the_store_loop_s_slot_is_read_only_and_never_dirty() -> None:
    with make_guest("riscv", 64 << 12) as memory, DirtyLog(memory) as log:
        memory.resume()
        memory.pause()
        assert memory.slots[ROM_SLOT].readonly
        assert not log.get(ROM_SLOT).any()


@pytest.mark.parametrize("arch", ["arm", "mips", "ppc-pv"])
def test_the_most_memory_of_a_32_bit_guest(arch: str) -> None:
    loop = Pattern(base=(2 << 30) - (64 << 12), mask=63, count=64)
    with make_guest(arch, 2 << 30, loops=[loop]) as memory, DirtyLog(memory) as log:
        memory.resume()
        assert memory.wait(timeout=30)
        assert log.get(RAM_SLOT).runs().tolist() == [[(2 << 18) - 64, 64]]
