"""Guests put together: an architecture's port, memory, a program, vCPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.cpu_trace import TraceCpu
from dirtylog.emulated.cpu_unicorn import UnicornCpu
from dirtylog.emulated.isa import ISAS
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.emulated.port import PAGE_SIZE
from dirtylog.errors import InvalidArgumentError, UnsupportedError
from dirtylog.guests.machine import MAX_VCPUS, RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import Pattern, patterns, store_loop
from dirtylog.memslot import MEM_MAX_NR_PAGES, SlotFlags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.emulated.isa import Isa
    from dirtylog.guests.cpu import Cpu
    from dirtylog.guests.image import Image

_ROM_ALIGNMENT_PAGES = 512


def check_size(arch: str, nbytes: int) -> int:
    """Return the number of pages of a guest of ``nbytes``, or raise :class:`InvalidArgumentError`."""
    if nbytes <= 0 or nbytes % PAGE_SIZE:
        raise InvalidArgumentError(f"a guest of {nbytes} bytes: the size must be a positive multiple of the page size, {PAGE_SIZE}")
    isa = ISAS.get(PORTS[arch].isa)
    limit = min(MEM_MAX_NR_PAGES * PAGE_SIZE, PORTS[arch].max_gfn * PAGE_SIZE // 2, isa.max_address // 2 if isa else 1 << 62)
    if nbytes > limit:
        raise InvalidArgumentError(f"a guest of {nbytes} bytes: {arch} guests have at most {limit} bytes of memory")
    return nbytes // PAGE_SIZE


def make_guest(
    arch: str,
    nbytes: int,
    *,
    program: str = "sweep",
    vcpus: int = 1,
    loops: Sequence[Pattern] | None = None,
    image: Image | None = None,
) -> EmulatedMemory:
    """Return a paused guest: slot 0 is its RAM from guest-physical address 0, slot 1 a read-only page with the store loop.

    ``loops`` gives each vCPU's registers instead of a named program. With ``image`` there is no slot 1.
    """
    if arch not in PORTS:
        raise InvalidArgumentError(f"unknown architecture {arch!r}; the architectures are: {', '.join(PORTS)}")
    npages = check_size(arch, nbytes)
    if not 1 <= vcpus <= MAX_VCPUS:
        raise InvalidArgumentError(f"{vcpus} vCPUs: a guest has 1 to {MAX_VCPUS}")
    if loops is None:
        loops = patterns(program, npages, vcpus)
    memory = EmulatedMemory(PORTS[arch])
    memory.add_slot(RAM_SLOT, 0, npages)
    isa = ISAS.get(memory.port.isa)
    if isa is None:
        if image is not None:
            raise UnsupportedError(f"{arch} guests run on the trace CPU, which runs no images")
        make = partial(_trace_cpu, memory, arch, loops)
    elif image is not None:
        image.check_isa(isa.name)
        memory.load_segments(image.segments)
        make = partial(_image_cpu, memory, isa, image)
    else:
        rom = -(-npages // _ROM_ALIGNMENT_PAGES) * _ROM_ALIGNMENT_PAGES
        memory.add_slot(ROM_SLOT, rom, 1, SlotFlags.READONLY)
        memory.load(rom * PAGE_SIZE, store_loop(isa.name))
        make = partial(_loop_cpu, memory, isa, rom * PAGE_SIZE, loops)
    for _ in range(vcpus):
        memory.add_vcpu(make)
    return memory


def _trace_cpu(memory: EmulatedMemory, arch: str, loops: Sequence[Pattern], index: int) -> Cpu:
    return TraceCpu(index, arch, loops[index], memory.port.translate, memory.host_memory)


def _loop_cpu(memory: EmulatedMemory, isa: Isa, rom: int, loops: Sequence[Pattern], index: int) -> Cpu:
    return UnicornCpu(
        index,
        isa,
        memory.host_ranges(),
        memory.port.translate,
        entry=rom,
        halt=rom + isa.halt,
        registers=loops[index].registers(),
    )


def _image_cpu(memory: EmulatedMemory, isa: Isa, image: Image, index: int) -> Cpu:
    return UnicornCpu(
        index, isa, memory.host_ranges(), memory.port.translate, entry=image.entry, halt=image.halt, registers=(index,)
    )
