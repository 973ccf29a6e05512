"""KVM guests put together: memory, a program, vCPUs.

========  ==========================================================================================================
slot      what
========  ==========================================================================================================
0         RAM from guest-physical address 0, as far as the architecture's hole (3 GiB on x86)
1         read-only: the tables that the guest runs under, and the built-in program
2         the rest of the RAM, behind the hole, where there is more
========  ==========================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.machine import MAX_VCPUS, RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import Pattern, patterns, store_loop
from dirtylog.kvm.memory import KvmMemory
from dirtylog.memslot import SlotFlags
from dirtylog.options import KvmOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.guests.image import Image
    from dirtylog.kvm.arch.architecture import Rom
    from dirtylog.options import Backing

HIGH_RAM_SLOT = 2

_ROM_ALIGNMENT = 2 << 20
_STACK_BYTES = 64 << 10


def make_kvm_guest(
    nbytes: int,
    *,
    program: str = "sweep",
    vcpus: int = 1,
    loops: Sequence[Pattern] | None = None,
    image: Image | None = None,
    options: KvmOptions | None = None,
) -> KvmMemory:
    """Return a paused guest of ``nbytes`` of RAM. ``loops`` gives each vCPU's registers instead of a named program.

    With ``image`` every vCPU enters it in 64-bit mode (x86) with its index in the first register of the store loop's list, and the
    stack pointer 64 KiB below the one before it, from the end of the RAM in slot 0. It halts at its halt instruction.
    """
    if not 1 <= vcpus <= MAX_VCPUS:
        raise InvalidArgumentError(f"{vcpus} vCPUs: a guest has 1 to {MAX_VCPUS}")
    options = options or KvmOptions()
    memory = KvmMemory(options.log, ring_entries=options.ring_entries)
    try:
        end = _add_ram(memory, nbytes, options.backing)
        if image is None:
            rom = add_rom(memory, end, store_loop(memory.architecture.isa))
            loops = patterns(program, memory.slots[RAM_SLOT].npages, vcpus) if loops is None else loops
            for pattern in loops[:vcpus]:
                memory.add_vcpu(rom, rom.program, loop_registers(memory, pattern))
        else:
            rom = add_rom(memory, end)
            _load_image(memory, image)
            for index in range(vcpus):
                memory.add_vcpu(rom, image.entry, _image_registers(memory, index))
    except BaseException:
        memory.close()
        raise
    return memory


def add_rom(memory: KvmMemory, end: int, program: bytes = b"") -> Rom:
    """Add the read-only slot 1, behind memory that ends at guest-physical ``end``, and return what is in it."""
    architecture, (hole, behind) = memory.architecture, memory.architecture.hole
    address = -(-end // _ROM_ALIGNMENT) * _ROM_ALIGNMENT
    nbytes = len(architecture.make_rom(address, end, program).data)
    if address < behind and hole < address + nbytes:
        address = behind
    # It reaches itself, which may take one more table.
    rom = architecture.make_rom(address, address + nbytes + memory.page_size, program)
    memory.add_slot(ROM_SLOT, rom.address // memory.page_size, len(rom.data) // memory.page_size, SlotFlags.READONLY)
    memory.load(rom.address, rom.data)
    return rom


def loop_registers(memory: KvmMemory, pattern: Pattern) -> dict[str, int]:
    """Return the registers with which a vCPU begins the store loop."""
    return dict(zip(memory.architecture.loop_registers, pattern.registers(), strict=True))


def _add_ram(memory: KvmMemory, nbytes: int, backing: Backing) -> int:
    """Add the slots of the RAM; return the guest-physical address where it ends."""
    page_size, (hole, behind) = memory.page_size, memory.architecture.hole
    if nbytes <= 0 or nbytes % page_size:
        raise InvalidArgumentError(f"a guest of {nbytes} bytes: the size must be a positive multiple of the page size, {page_size}")
    low, high = min(nbytes, hole), max(0, nbytes - hole)
    memory.add_slot(RAM_SLOT, 0, low // page_size, backing=backing)
    if not high:
        return low
    memory.add_slot(HIGH_RAM_SLOT, behind // page_size, high // page_size, backing=backing)
    return behind + high


def _load_image(memory: KvmMemory, image: Image) -> None:
    image.check_isa(memory.architecture.isa)
    if image.halt is not None:
        raise InvalidArgumentError(f"a halt address ({image.halt:#x}): a KVM vCPU halts at its halt instruction only")
    memory.load_segments(image.segments)


def _image_registers(memory: KvmMemory, index: int) -> dict[str, int]:
    stack = memory.slots[RAM_SLOT].nbytes - index * _STACK_BYTES
    return {memory.architecture.loop_registers[0]: index, memory.architecture.stack_register: max(0, stack)}
