"""What KVM refuses: every refusal has a type, the kernel's errno, and what would help where something would; and holds nothing."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog import (
    AccessDeniedError,
    BadSlotError,
    CopyFaultError,
    DirtyLogError,
    InvalidArgumentError,
    LoggingOffError,
    SlotFlags,
    UnsupportedError,
)
from dirtylog import open as open_target
from dirtylog.kvm import abi
from dirtylog.kvm.abi import Cap
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.kvm.memory import KvmMemory
from dirtylog.kvm.system import DEVICE, KvmSystem
from dirtylog.options import Backing, KvmOptions, Log
from kvm_bare import NOWHERE, PAGE, nothing_is_left
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.kvm.vm import KvmVm

LOGGED = SlotFlags.LOG_DIRTY_PAGES


def refusal(call: Callable[[], object], kind: type[DirtyLogError], number: int | None) -> DirtyLogError:
    """Return the error that a call raises, of just this type, with this errno and the words for it."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert error.errno == number
    return error


# --- the device


def test_a_device_that_is_not_there_says_what_to_do() -> None:
    with nothing_is_left():
        error = refusal(lambda: KvmSystem("/dev/no-such-kvm"), UnsupportedError, errno.ENOENT)
        assert error.message == "this host has no /dev/no-such-kvm"
        assert error.remedy is not None
        assert "kvm_intel" in error.remedy
        assert "emu:ARCH" in error.remedy


def test_a_device_that_is_not_kvm_is_unsupported_and_closed_again() -> None:
    with nothing_is_left():
        error = refusal(lambda: KvmSystem("/dev/null"), UnsupportedError, errno.ENOTTY)
        assert error.message == "/dev/null is not KVM"
        assert isinstance(error.__cause__, OSError)
        refusal(lambda: KvmMemory(device="/dev/null"), UnsupportedError, errno.ENOTTY)


@pytest.mark.parametrize("name", ["plain", "with {braces}", "{0}", "100%", "%s"])
def test_a_file_that_is_not_kvm_is_named_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with nothing_is_left():
        error = refusal(lambda: KvmSystem(str(path)), UnsupportedError, errno.ENOTTY)
        assert error.message == f"{path} is not KVM"


def test_a_device_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    error = refusal(lambda: KvmSystem(str(tmp_path)), DirtyLogError, errno.EISDIR)
    assert error.reason == "KVM says EISDIR: Is a directory"
    refusal(lambda: KvmSystem("/dev/null/kvm"), UnsupportedError, errno.ENOTDIR)


@needs_kvm
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permission")
def test_a_user_without_permission_is_told_what_to_ask_for() -> None:
    if Path(DEVICE).stat().st_mode & 0o006:
        pytest.skip(f"every user of this host may open {DEVICE}")
    script = """
import json
import os
from dirtylog.kvm.memory import KvmMemory
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    KvmMemory()
except Exception as error:
    print(json.dumps([type(error).__name__, error.errno, error.message, error.remedy]))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30).stdout
    kind, number, message, remedy = json.loads(output)
    assert (kind, number) == (AccessDeniedError.__name__, errno.EACCES)
    assert message == f"this user may not open {DEVICE}"
    assert "usermod -aG kvm" in remedy


@needs_kvm
def test_another_version_of_the_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with KvmSystem() as system:
        assert system.api_version == 12
    monkeypatch.setattr(abi, "API_VERSION", 13)
    with nothing_is_left():
        error = refusal(KvmSystem, UnsupportedError, errno.ENXIO)
        assert error.message == f"{DEVICE} speaks version 12 of KVM's interface; dirtylog speaks 13"


# --- slots


@pytest.fixture
def memory() -> Iterator[KvmMemory]:
    """Give a machine with 16 pages in slot 0."""
    with KvmMemory() as machine:
        machine.add_slot(0, 0, 16)
        yield machine


@needs_kvm
@pytest.mark.parametrize(
    ("slot", "gfn", "npages", "number"),
    [
        (1, 0, 1, errno.EEXIST),
        (1, 15, 10, errno.EEXIST),
        (0, 100, 1, errno.EEXIST),
        (-1, 100, 1, errno.EINVAL),
        (1 << 15, 100, 1, errno.EINVAL),
        (0xFFFF, 100, 1, errno.EINVAL),
        (1 << 16, 100, 1, errno.EINVAL),
        (7 << 16, 100, 1, errno.EINVAL),
    ],
)
def test_a_slot_in_the_wrong_place_is_refused_and_holds_nothing(
    memory: KvmMemory, slot: int, gfn: int, npages: int, number: int
) -> None:
    with nothing_is_left():
        error = refusal(lambda: memory.add_slot(slot, gfn, npages, backing=Backing.MEMFD), BadSlotError, number)
        assert error.slot == slot
    assert [one.id for one in memory.slots] == [0]


@needs_kvm
@pytest.mark.parametrize(
    ("slot", "address", "number"),
    [(1, 0, errno.EEXIST), (1, 15 * PAGE, errno.EEXIST), (1 << 16, 1 << 20, errno.EINVAL), (0xFFFF, 1 << 20, errno.EINVAL)],
)
def test_the_kernel_refuses_the_same_slots(memory: KvmMemory, slot: int, address: int, number: int) -> None:
    ram = memory.slots[0].host_address
    kind = BadSlotError if number == errno.EEXIST else InvalidArgumentError
    error = refusal(lambda: memory.vm.set_user_memory_region(slot, SlotFlags.NONE, address, PAGE, ram), kind, number)
    assert error.slot == slot
    assert f"cannot set slot {slot:#x}: 4096 bytes at guest address {address:#x}" in error.message
    assert error.reason is not None
    assert errno.errorcode[number] in error.reason


@needs_kvm
def test_the_last_slot_id_that_the_kernel_has_is_good_and_the_next_is_not(memory: KvmMemory) -> None:
    last = memory.vm.check_extension(Cap.NR_MEMSLOTS) - 1
    memory.add_slot(last, 100, 1)
    refusal(lambda: memory.add_slot(last + 1, 200, 1), BadSlotError, errno.EINVAL)
    ram = memory.slots[0].host_address
    raw = lambda: memory.vm.set_user_memory_region(last + 1, SlotFlags.NONE, 200 * PAGE, PAGE, ram)  # noqa: E731 - one call
    refusal(raw, InvalidArgumentError, errno.EINVAL)


@needs_kvm
@pytest.mark.parametrize(
    ("address", "nbytes", "shift", "flags"),
    [
        ((1 << 20) + 1, PAGE, 0, 0),
        (1 << 20, PAGE - 1, 0, 0),
        (1 << 20, PAGE, 1, 0),
        (1 << 20, PAGE, 0, 1 << 20),
        ((1 << 64) - PAGE, 2 * PAGE, 0, 0),
        (1 << 20, 0, 0, 0),  # to delete what is not there
    ],
)
def test_a_region_that_breaks_a_rule_of_the_kernel_s_is_einval(
    memory: KvmMemory, address: int, nbytes: int, shift: int, flags: int
) -> None:
    ram = memory.slots[0].host_address + shift
    raw = lambda: memory.vm.set_user_memory_region(1, flags, address, nbytes, ram)  # type: ignore[arg-type]  # noqa: E731 - a flag that is none
    refusal(raw, InvalidArgumentError, errno.EINVAL)


def pages(count: int, **options: int) -> mmap.mmap:
    return mmap.mmap(-1, count * PAGE, **options)


BAD_BUFFERS: dict[str, tuple[Callable[[], Any], str]] = {
    "misaligned": (lambda: memoryview(pages(5))[8 : 8 + 4 * PAGE], "begin at a multiple of that"),
    "a byte short": (lambda: memoryview(pages(5))[: 4 * PAGE - 1], "must be whole pages of 4096 bytes"),
    "every other byte": (lambda: memoryview(pages(8))[::2], "must be a contiguous buffer"),
    "a page too many": (lambda: pages(5), "a buffer of 5 pages for a slot of 4"),
    "read-only": (lambda: pages(4, prot=mmap.PROT_READ), "must be writable"),
    "bytes": (lambda: bytes(4 * PAGE), "must be writable"),
    "empty": (lambda: b"", "must be"),
    "a number": (lambda: 4 * PAGE, "must be a contiguous buffer"),
}


@needs_kvm
@pytest.mark.parametrize("buffer", BAD_BUFFERS)
def test_a_buffer_that_is_no_guest_memory_is_refused(memory: KvmMemory, buffer: str) -> None:
    make, words = BAD_BUFFERS[buffer]
    error = refusal(lambda: memory.add_slot(1, 100, 4, buffer=make()), InvalidArgumentError, errno.EINVAL)
    assert words in str(error)
    assert [one.id for one in memory.slots] == [0]
    memory.add_slot(1, 100, 4, buffer=mmap.mmap(-1, 4 * PAGE))


@needs_kvm
@pytest.mark.parametrize(("gfn", "npages"), [(NOWHERE >> 12, 1), ((3 << 18) - 1, 2), ((4 << 18) - 1, 2), (0x100, 1 << 20)])
def test_memory_in_the_hole_is_refused_with_where_to_put_it(memory: KvmMemory, gfn: int, npages: int) -> None:
    error = refusal(lambda: memory.add_slot(1, gfn, npages), InvalidArgumentError, errno.EINVAL)
    assert error.slot == 1
    assert error.remedy == "end it before, or begin it at gfn 0x100000"
    memory.add_slot(1, 4 << 18, 1)
    error = refusal(lambda: memory.move_slot(1, gfn), InvalidArgumentError, errno.EINVAL) if npages == 1 else error
    assert memory.slots[1].base_gfn == 4 << 18


@needs_kvm
def test_more_memory_than_the_host_has_is_refused() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with nothing_is_left():
        error = refusal(lambda: open_target("kvm", size=2 * total + (4 << 30)), InvalidArgumentError, errno.EINVAL)
        assert f"this host has {total} bytes" in error.message


@needs_kvm
def test_huge_pages_that_nobody_reserved_are_unsupported_with_the_setting_that_helps() -> None:
    if "HugePages_Free:        0" not in Path("/proc/meminfo").read_text(encoding="ascii"):
        pytest.skip("this host has huge pages in reserve")
    options = KvmOptions(backing=Backing.HUGETLB)
    with nothing_is_left():
        error = refusal(lambda: make_kvm_guest(6 << 20, options=options), UnsupportedError, errno.ENOMEM)
        assert error.remedy is not None
        assert "sysctl vm.nr_hugepages=3" in error.remedy
        error = refusal(lambda: make_kvm_guest(3 << 20, options=options), InvalidArgumentError, errno.EINVAL)
        assert "it must be a multiple of 2097152" in error.message


# --- rings


@needs_kvm
@pytest.mark.parametrize(
    ("entries", "number"),
    [
        (0, errno.EINVAL),
        (-4096, errno.EINVAL),
        (100, errno.EINVAL),
        (64, errno.EINVAL),
        (131072, errno.E2BIG),
        (1 << 28, errno.EINVAL),
    ],
)
def test_a_ring_of_a_bad_length_is_refused(entries: int, number: int) -> None:
    with nothing_is_left():
        error = refusal(lambda: KvmMemory(Log.RING, ring_entries=entries), InvalidArgumentError, number)
        assert str(entries) in error.message or str(16 * entries) in error.message
        if entries == 100:
            assert error.remedy == "such as 4096"


@pytest.fixture
def vm() -> Iterator[KvmVm]:
    with KvmSystem() as system, system.create_vm() as machine:
        yield machine


@needs_kvm
def test_a_ring_comes_once_and_before_any_vcpu(vm: KvmVm) -> None:
    vm.enable_dirty_ring(Cap.DIRTY_LOG_RING, 1 << 16)
    error = refusal(lambda: vm.enable_dirty_ring(Cap.DIRTY_LOG_RING, 1 << 16), InvalidArgumentError, errno.EINVAL)
    assert error.message == "cannot enable dirty rings of 65536 bytes"
    with KvmSystem() as system, system.create_vm() as other, other.create_vcpu(0):
        refusal(lambda: other.enable_dirty_ring(Cap.DIRTY_LOG_RING, 1 << 16), InvalidArgumentError, errno.EINVAL)
        refusal(other.reset_dirty_rings, InvalidArgumentError, errno.EINVAL)


@needs_kvm
def test_the_kernel_gives_no_bitmap_beside_a_ring(vm: KvmVm) -> None:
    if vm.check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP):
        pytest.skip("this host's KVM has bitmaps beside rings")
    ram, words = mmap.mmap(-1, PAGE), np.zeros(1, np.uint64)
    vm.enable_dirty_ring(Cap.DIRTY_LOG_RING, 1 << 16)
    vm.set_user_memory_region(0, LOGGED, 0, PAGE, np.frombuffer(ram, np.uint8).ctypes.data)
    for call in (
        lambda: vm.get_dirty_log(0, words),
        lambda: vm.clear_dirty_log(0, 0, 1, words),
        lambda: vm.get_dirty_log(9, words),
    ):
        refusal(call, UnsupportedError, errno.ENXIO)
    assert vm.reset_dirty_rings() == 0


# --- the kernel's bitmap


@pytest.fixture
def logged(memory: KvmMemory) -> KvmVm:
    """Give a VM whose slot 0 is logged, of 130 pages, and whose slot 1 is not."""
    memory.add_slot(1, 200, 130, LOGGED)
    return memory.vm


@needs_kvm
@pytest.mark.parametrize(
    ("slot", "kind", "number"),
    [
        (0, LoggingOffError, errno.ENOENT),
        (5, LoggingOffError, errno.ENOENT),
        (0x7FFF, InvalidArgumentError, errno.EINVAL),
        (1 << 16, InvalidArgumentError, errno.EINVAL),
    ],
)
def test_a_get_of_a_slot_that_is_not_logged_is_refused(logged: KvmVm, slot: int, kind: type[DirtyLogError], number: int) -> None:
    words = np.zeros(3, np.uint64)
    assert refusal(lambda: logged.get_dirty_log(slot, words), kind, number).slot == slot
    assert refusal(lambda: logged.clear_dirty_log(slot, 0, 64, words), kind, number).slot == slot


@needs_kvm
@pytest.mark.parametrize(
    ("first", "npages"), [(1, 64), (32, 64), (0, 63), (0, 65), (64, 67), (128, 1), (128, 3), (192, 0), (0, 192)]
)
def test_a_clear_that_is_not_on_words_or_ends_elsewhere_is_einval(logged: KvmVm, first: int, npages: int) -> None:
    words = np.zeros(4, np.uint64)
    error = refusal(lambda: logged.clear_dirty_log(1, first, npages, words), InvalidArgumentError, errno.EINVAL)
    assert error.message == f"cannot clear {npages} pages from page {first} of slot 0x1"
    for good in ((0, 130), (64, 66), (128, 2), (64, 64), (0, 0)):
        logged.clear_dirty_log(1, *good, words)


@needs_kvm
def test_a_bitmap_that_the_kernel_cannot_write_is_efault(logged: KvmVm) -> None:
    argument = abi.DirtyLogArgument(slot=1, dirty_bitmap=8)
    error = refusal(lambda: logged.get_dirty_log_into(argument), CopyFaultError, errno.EFAULT)
    assert error.slot == 1


# --- vCPUs and capabilities


@needs_kvm
@pytest.mark.parametrize("number", [-1, 1 << 20, 1 << 40])
def test_a_vcpu_s_number_out_of_range_is_einval(vm: KvmVm, number: int) -> None:
    error = refusal(lambda: vm.create_vcpu(number), InvalidArgumentError, errno.EINVAL)
    assert error.message == f"cannot create vCPU {number}"


@needs_kvm
def test_a_vcpu_s_number_is_given_once(vm: KvmVm) -> None:
    vm.create_vcpu(3).close()
    error = refusal(lambda: vm.create_vcpu(3), InvalidArgumentError, errno.EEXIST)
    assert error.message == "cannot create vCPU 3"


@needs_kvm
def test_a_capability_that_cannot_be_enabled_is_einval(vm: KvmVm) -> None:
    error = refusal(lambda: vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 2), InvalidArgumentError, errno.EINVAL)
    assert error.message == "cannot enable MANUAL_DIRTY_LOG_PROTECT2 with (2,)"
    refusal(lambda: vm.enable_cap(Cap.USER_MEMORY), InvalidArgumentError, errno.EINVAL)


@needs_kvm
def test_a_closed_descriptor_says_so() -> None:
    with KvmSystem() as system, system.create_vm() as machine:
        pass
    for call in (system.create_vm, lambda: machine.create_vcpu(0), machine.reset_dirty_rings, machine.fileno):
        assert "is closed" in refusal(call, DirtyLogError, errno.EBADF).message
    assert system.closed
    assert machine.closed
    machine.close()
