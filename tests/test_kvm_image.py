"""A user's program in a KVM guest: loaded where it says, entered with a stack, and refused where it does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dirtylog import DirtyLog, GuestFaultError, Image, InvalidArgumentError
from dirtylog import open as open_target
from dirtylog.guests.machine import RAM_SLOT
from elf_file import EM_AARCH64, EM_X86_64, Part, elf
from kvm_bare import read_ram
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from pathlib import Path

    from dirtylog.kvm.memory import KvmMemory

pytestmark = needs_kvm

MIB = 1 << 20
STACK_BYTES = 64 << 10

# call 1f; mov [rsi*8+0x3000], rax; hlt; 1: push rsi; pop rax; add rax, 5; ret
CALLS = bytes.fromhex("e809000000 488904f500300000 f4 56 58 4883c005 c3")
# mov [rsi*8+0x3000], rsp; hlt
SAYS_ITS_STACK = bytes.fromhex("488924f500300000 f4")
# mov rax, [0x2008]; mov [0x3000], rax; hlt
COPIES = bytes.fromhex("488b042508200000 4889042500300000 f4")


def guest(image: Image, *, size: int = MIB, vcpus: int = 1) -> KvmMemory:
    memory = open_target("kvm", size=size, vcpus=vcpus, image=image)
    assert memory.port.name == "kvm-bitmap"
    return memory  # type: ignore[return-value]  # said by the line before


def run(memory: KvmMemory) -> None:
    memory.resume()
    assert memory.wait(timeout=30)
    memory.pause()


def words(memory: KvmMemory, address: int, count: int) -> list[int]:
    return [int.from_bytes(read_ram(memory, address + 8 * index, 8), "little") for index in range(count)]


def test_a_raw_image_has_a_stack_and_its_vcpu_s_number() -> None:
    image = Image.raw(bytes(0x40) + CALLS, load=0x1000, entry=0x1040)
    with guest(image, vcpus=4) as memory, DirtyLog(memory) as log:
        run(memory)
        assert words(memory, 0x3000, 5) == [5, 6, 7, 8, 0]
        stacks = [(MIB - index * STACK_BYTES) // 4096 - 1 for index in range(4)]
        assert set(log.get(RAM_SLOT).pages().tolist()) >= {3, *stacks}


def test_each_vcpu_s_stack_ends_below_the_one_before() -> None:
    with guest(Image.raw(SAYS_ITS_STACK, load=0x1000), vcpus=3) as memory:
        run(memory)
        assert words(memory, 0x3000, 3) == [MIB, MIB - STACK_BYTES, MIB - 2 * STACK_BYTES]


def test_a_vcpu_for_which_there_is_no_room_for_a_stack_still_runs() -> None:
    with guest(Image.raw(SAYS_ITS_STACK, load=0x1000), size=STACK_BYTES, vcpus=3) as memory:
        run(memory)
        assert words(memory, 0x3000, 3) == [STACK_BYTES, 0, 0]


def test_a_reset_image_begins_again() -> None:
    with guest(Image.raw(CALLS, load=0x1000)) as memory:
        for _ in range(3):
            run(memory)
            assert words(memory, 0x3000, 1) == [5]
            memory.contents(memory.slots[RAM_SLOT])[3] = 0
            memory.reset()


def elf_image(folder: Path, data: bytes) -> Image:
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    path = folder / "image"
    path.write_bytes(data)
    return Image.read(path)


def test_an_elf_image_is_loaded_with_its_bss_and_entered_where_it_says(tmp_path: Path) -> None:
    data = b"12345678" + b"\xa5" * 8
    image = elf_image(tmp_path, elf(Part(0x1000, b"\xcc\xcc" + COPIES), Part(0x2000, data, 4096), entry=0x1002, machine=EM_X86_64))
    with guest(image) as memory:
        assert read_ram(memory, 0x2000, 4096) == data + bytes(4096 - len(data))
        run(memory)
        assert read_ram(memory, 0x3000, 8) == b"\xa5" * 8


def test_an_elf_image_for_another_machine_is_refused(tmp_path: Path) -> None:
    image = elf_image(tmp_path, elf(Part(0x1000, COPIES), machine=EM_AARCH64))
    with pytest.raises(InvalidArgumentError, match="the image is a program for arm64, but the guest is x86"):
        guest(image)


@pytest.mark.parametrize("address", [MIB, MIB - 4, 3 << 30, 1 << 40, -4096])
def test_an_image_outside_the_ram_is_refused(address: int) -> None:
    with pytest.raises(InvalidArgumentError, match="does not fit at address"):
        guest(Image.raw(COPIES, load=address, entry=0x1000)).close()


@pytest.mark.parametrize("offset", [0, 4096, 0x10000])
def test_an_image_that_lies_in_the_tables_is_outside_the_ram_too(offset: int) -> None:
    with guest(Image.raw(COPIES)) as memory:
        tables = memory.slots[1].base_gfn << 12
    with pytest.raises(InvalidArgumentError, match="does not fit at address"):
        guest(Image.raw(COPIES, load=tables + offset)).close()


def test_an_image_with_a_halt_address_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"a halt address \(0x1009\): a KVM vCPU halts at its halt instruction only"):
        guest(Image.raw(COPIES, load=0x1000, halt=0x1009))


def test_an_image_and_a_program_are_one_too_many() -> None:
    with pytest.raises(InvalidArgumentError, match="leave one of them out"):
        open_target("kvm:sweep", image=Image.raw(COPIES))


def test_an_image_that_is_entered_where_no_memory_is_faults() -> None:
    with guest(Image.raw(COPIES, load=0x1000, entry=MIB)) as memory:
        memory.resume()
        with pytest.raises(GuestFaultError):
            memory.wait(timeout=30)


@pytest.mark.parametrize("entry", [-1, 1 << 64])
def test_an_entry_that_is_no_address_is_refused(entry: int) -> None:
    with pytest.raises(InvalidArgumentError):
        guest(Image.raw(COPIES, load=0x1000, entry=entry)).close()
