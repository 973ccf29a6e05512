"""Structs, ioctl numbers and constants against the kernel's own header, and against a table for other architectures."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import SlotFlags
from dirtylog.kvm import abi
from dirtylog.kvm.arch import x86_64, x86_64_registers
from dirtylog.kvm.arch import x86_64_registers as x86
from dirtylog.linux.layout import KVMIO, U8, U32, U64, Direction, Struct, ioctl_number, offset_of, struct

if TYPE_CHECKING:
    from types import ModuleType

HEADER = Path("/usr/include/linux/kvm.h")
OLD = "headers older than those of Linux 6.1"
NEWER = frozenset({"KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP"})  # Linux 6.2

STRUCTS: dict[type[Struct], str] = {
    abi.UserMemoryRegion: "kvm_userspace_memory_region",
    abi.DirtyLogArgument: "kvm_dirty_log",
    abi.ClearDirtyLogArgument: "kvm_clear_dirty_log",
    abi.EnableCap: "kvm_enable_cap",
    abi.StatsHeader: "kvm_stats_header",
    abi.StatsDescription: "kvm_stats_desc",
    x86.Regs: "kvm_regs",
    x86.Segment: "kvm_segment",
    x86.DescriptorTable: "kvm_dtable",
    x86.Sregs: "kvm_sregs",
    x86.Fpu: "kvm_fpu",
    x86.Xcrs: "kvm_xcrs",
    x86.VcpuEvents: "kvm_vcpu_events",
    x86.Debugregs: "kvm_debugregs",
    x86.MpState: "kvm_mp_state",
}
RUN_PARTS: dict[type[Struct], str] = {
    abi.RunIo: "io",
    abi.RunMmio: "mmio",
    abi.RunFailEntry: "fail_entry",
    abi.RunInternalError: "internal",
}
REGISTERS: dict[type[Struct], str] = {
    x86.Regs: "REGS",
    x86.Sregs: "SREGS",
    x86.Fpu: "FPU",
    x86.Xcrs: "XCRS",
    x86.VcpuEvents: "VCPU_EVENTS",
    x86.Debugregs: "DEBUGREGS",
    x86.MpState: "MP_STATE",
}


def ioctls(module: ModuleType) -> dict[str, int]:
    """Return the ioctl numbers that a module declares, by their names in the header."""
    return {name: value for name, value in vars(module).items() if name.startswith("KVM_")}


CONSTANTS: dict[str, int] = {
    **ioctls(abi),
    **ioctls(x86_64),
    **ioctls(x86_64_registers),
    **{f"KVM_GET_{name}": kind.get_request for kind, name in REGISTERS.items()},
    **{f"KVM_SET_{name}": kind.put_request for kind, name in REGISTERS.items()},
    **{f"KVM_CAP_{cap.name}": cap for cap in abi.Cap},
    **{f"KVM_EXIT_{reason.name}": reason for reason in abi.ExitReason},
    "KVMIO": KVMIO,
    "KVM_API_VERSION": abi.API_VERSION,
    "KVM_DIRTY_GFN_F_DIRTY": abi.GFN_DIRTY,
    "KVM_DIRTY_GFN_F_RESET": abi.GFN_RESET,
    "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE": abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    "KVM_DIRTY_LOG_INITIALLY_SET": abi.DIRTY_LOG_INITIALLY_SET,
    "KVM_DIRTY_LOG_PAGE_OFFSET": x86_64.X86_64.ring_offset_pages,
    "KVM_MEM_LOG_DIRTY_PAGES": SlotFlags.LOG_DIRTY_PAGES,
    "KVM_MEM_READONLY": SlotFlags.READONLY,
    "KVM_EXIT_IO_OUT": 1,
}


def member(kind: type[Struct], field: str) -> str | None:
    """Return the header's name of a field; None for padding, which has a name of its own there."""
    if "pad" in field or field == "reserved":
        return None
    if kind is x86.VcpuEvents and field not in ("sipi_vector", "flags", "exception_has_payload", "exception_payload"):
        outer = "triple_fault" if field.startswith("triple_fault") else field.partition("_")[0]
        return f"{outer}.{field.removeprefix(outer + '_')}"
    return field


def fields(kind: type[Struct]) -> list[tuple[str, str]]:
    named = [(field, member(kind, field)) for field in kind.__annotations__]
    return [(field, name) for field, name in named if name is not None]


def program() -> str:
    """Return a C program that prints what the header says, a key and a number a line."""
    lines = [f"N({name})" for name in CONSTANTS if name not in NEWER]
    lines += [f"\n#ifdef {name}\nN({name})\n#endif" for name in NEWER]
    structs: dict[type[Struct], str] = {**STRUCTS, abi.RunHeader: "kvm_run"}
    for kind, name in structs.items():
        lines += [f'S("{kind.__name__}.{field}", struct {name}, {there})' for field, there in fields(kind)]
        lines += [f'P("{kind.__name__}", sizeof(struct {name}))']
    for kind, part in RUN_PARTS.items():
        lines += [f'R("{kind.__name__}.{field}", {part}, {part}.{there})' for field, there in fields(kind)]
        lines += [f'P("{kind.__name__}", sizeof(((struct kvm_run *)0)->{part}))']
    lines += [f'S("DIRTY_GFN.{field}", struct kvm_dirty_gfn, {field})' for field in abi.DIRTY_GFN.names or ()]
    lines += ['P("DIRTY_GFN", sizeof(struct kvm_dirty_gfn))', 'P("XSAVE_BYTES", sizeof(struct kvm_xsave))']
    lines += ['P("payload", offsetof(struct kvm_run, io))', 'P("sigset", offsetof(struct kvm_signal_mask, sigset))']
    lines += ['P("event", offsetof(struct kvm_run, system_event.data) - offsetof(struct kvm_run, system_event))']
    newline = "\n"
    return f"""
#include <stddef.h>
#include <stdio.h>
#include <linux/kvm.h>
#include <linux/version.h>
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "{OLD}"
#endif
#define P(key, value) printf("%s %llu\\n", key, (unsigned long long)(value));
#define N(name) P(#name, (unsigned long)(name))
#define S(key, type, field) P(key ".offset", offsetof(type, field)) P(key ".size", sizeof(((type *)0)->field))
#define R(key, part, field) P(key ".offset", offsetof(struct kvm_run, field) - offsetof(struct kvm_run, part)) \\
    P(key ".size", sizeof(((struct kvm_run *)0)->field))
int main(void) {{
{newline.join(lines)}
}}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return what the kernel's header says."""
    compiler = shutil.which("cc")
    if platform.machine() != "x86_64":
        pytest.skip(f"the structs are those of x86_64, and this is {platform.machine()}")
    if compiler is None:
        pytest.skip("there is no C compiler (cc)")
    if not HEADER.exists():
        pytest.skip(f"the kernel's headers are not installed ({HEADER})")
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text(program(), encoding="ascii")
    done = subprocess.run([compiler, "-o", folder / "abi", folder / "abi.c"], capture_output=True, text=True, check=False)
    if OLD in done.stderr:
        pytest.skip(OLD)
    assert done.returncode == 0, done.stderr
    output = subprocess.run([folder / "abi"], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in map(str.split, output.splitlines())}


@pytest.mark.parametrize("kind", [*STRUCTS, abi.RunHeader, *RUN_PARTS], ids=lambda kind: kind.__name__)
def test_a_struct_has_the_kernel_s_size_and_every_field_its_place(header: dict[str, int], kind: type[Struct]) -> None:
    name = kind.__name__
    if kind is not abi.RunHeader:  # kvm_run goes on behind it
        assert ctypes.sizeof(kind) == header[name]
    ours = {field: (offset_of(kind, field), getattr(kind, field).size) for field, _ in fields(kind)}
    assert ours == {field: (header[f"{name}.{field}.offset"], header[f"{name}.{field}.size"]) for field in ours}
    assert ours, "no field was compared"


def test_what_follows_kvm_run_s_header_begins_where_its_union_does(header: dict[str, int]) -> None:
    assert ctypes.sizeof(abi.RunHeader) == header["payload"]
    assert offset_of(abi.RunInternalError, "data") == header["event"], "system_event has the layout of internal"


def test_the_signal_mask_has_its_set_where_the_kernel_looks_for_it(header: dict[str, int]) -> None:
    assert offset_of(abi.SignalMask, "sigset") == header["sigset"]
    assert offset_of(abi.SignalMask, "len") == 0


def test_an_entry_of_the_dirty_ring_is_the_kernel_s(header: dict[str, int]) -> None:
    assert abi.DIRTY_GFN.itemsize == header["DIRTY_GFN"]
    assert abi.DIRTY_GFN.fields is not None
    for field, (dtype, offset, *_) in abi.DIRTY_GFN.fields.items():
        assert (offset, dtype.itemsize) == (header[f"DIRTY_GFN.{field}.offset"], header[f"DIRTY_GFN.{field}.size"])


def test_an_xsave_area_is_as_long_as_the_kernel_says(header: dict[str, int]) -> None:
    assert header["XSAVE_BYTES"] == x86.XSAVE_BYTES


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_number_is_the_header_s(header: dict[str, int], name: str) -> None:
    if name in NEWER and name not in header:
        pytest.skip(f"the headers installed here are older than {name}")
    assert header[name] == CONSTANTS[name]


# Computed by hand from Linux include/uapi/asm-generic/ioctl.h and arch/*/include/uapi/asm/ioctl.h: _IO(0xae, 0xc7),
# _IOW(0xae, 0x42, 16), _IOR(0xae, 0x81, 144), _IOWR(0xae, 0xc0, 24), _IOW(0xae, 0xa3, 104), _IOW(0xae, 0x46, 32).
CALLS = (
    (Direction.NONE, 0xC7, 0),
    (Direction.WRITE, 0x42, 16),
    (Direction.READ, 0x81, 144),
    (Direction.BOTH, 0xC0, 24),
    (Direction.WRITE, 0xA3, 104),
    (Direction.WRITE, 0x46, 32),
)
GENERIC = (0x0000_AEC7, 0x4010_AE42, 0x8090_AE81, 0xC018_AEC0, 0x4068_AEA3, 0x4020_AE46)
OWN_BITS = (0x2000_AEC7, 0x8010_AE42, 0x4090_AE81, 0xC018_AEC0, 0x8068_AEA3, 0x8020_AE46)
PARISC = (0x0000_AEC7, 0x8010_AE42, 0x4090_AE81, 0xC018_AEC0, 0x8068_AEA3, 0x8020_AE46)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", GENERIC),
        ("aarch64", GENERIC),
        ("riscv64", GENERIC),
        ("s390x", GENERIC),
        ("loongarch64", GENERIC),
        ("ppc64le", OWN_BITS),
        ("ppc64", OWN_BITS),
        ("mips", OWN_BITS),
        ("mips64", OWN_BITS),
        ("sparc64", OWN_BITS),
        ("alpha", OWN_BITS),
        ("parisc64", PARISC),
    ],
)
def test_ioctl_numbers_of_other_architectures(machine: str, expected: tuple[int, ...]) -> None:
    numbers = tuple(ioctl_number(direction, number, nbytes, machine=machine) for direction, number, nbytes in CALLS)
    assert numbers == expected


def test_a_struct_declared_with_a_wrong_size_is_refused() -> None:
    with pytest.raises(TypeError, match="Wrong has 16 bytes, but the kernel's struct has 12"):

        @struct(12)
        class Wrong(Struct):
            first: U32
            second: U64


def test_a_struct_is_laid_out_natively_from_its_annotations() -> None:
    @struct(16)
    class Native(Struct):
        first: U8
        second: U32
        third: U64

    assert [offset_of(Native, field) for field in ("first", "second", "third")] == [0, 4, 8]
    assert np.frombuffer(bytes(Native(first=1, second=2, third=3)), np.uint64).tolist() == [1 | 2 << 32, 3]
