"""What cannot be tracked, and that the error says why; nothing stays behind."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from address_space import PAGE, READ, SHARED, Area, file_to_read
from array_likes import InGradient, OnCuda, ThatCopies, WithCudaInterface, WithDlpack, WithInterface, read_only
from dirtylog.buffers.memory import BufferMemory
from memory_kinds import memory_of
from uffd_here import missing_uffd_here, needs_uffd, port_of_its_own

if TYPE_CHECKING:
    from collections.abc import Callable

NBYTES = 10 * PAGE

WRITABLE = np.zeros(NBYTES, np.uint8)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bytes": (lambda: b"abc", "read-only"),
    "a read-only array": (lambda: read_only(WRITABLE), "read-only"),
    "a view of bytes": (lambda: memoryview(b"abc"), "read-only"),
    "a read-only mmap": (lambda: mmap.mmap(-1, PAGE, prot=mmap.PROT_READ), "read-only"),
    "a broadcast array": (lambda: np.broadcast_to(WRITABLE, (3, NBYTES)), "read-only"),
    "a NumPy scalar": (lambda: np.float64(3), "read-only"),
    "a read-only interface": (lambda: WithInterface(read_only(WRITABLE)), "read-only"),
    "a read-only tensor": (lambda: WithDlpack(read_only(WRITABLE)), "read-only"),
    "a list": (lambda: [1, 2, 3], "a list has no buffer"),
    "a str": (lambda: "abc", "a str has no buffer"),
    "None": (lambda: None, "a NoneType has no buffer"),
    "a class": (lambda: np.ndarray, "no buffer"),
    "no bytes": (bytearray, "without any bytes"),
    "no elements": (lambda: np.zeros((0, 5)), "without any bytes"),
    "no view": (lambda: memoryview(bytearray(5))[5:], "without any bytes"),
    "a tensor on a graphics processor": (OnCuda, "cpu"),
    "a graphics processor's interface": (WithCudaInterface, "no buffer"),
    "a tensor in a gradient": (lambda: InGradient(WRITABLE), "detach"),
    "a tensor that only copies itself": (lambda: ThatCopies(WRITABLE), "can only be copied"),
    "a closed mmap": (lambda: _ended(mmap.mmap(-1, PAGE), "close"), "closed"),
    "a released view": (lambda: _ended(memoryview(bytearray(9)), "release"), "released"),
}


def _ended(buffer: Any, how: str) -> Any:
    getattr(buffer, how)()
    return buffer


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_tracked_is_refused_and_the_error_says_why(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(dirtylog.InvalidArgumentError, match=why):
        dirtylog.track(make()).close()


@pytest.mark.parametrize("port", ["", "UFFD", "soft-dirty", "auto "])
def test_a_port_that_there_is_not_is_refused(port: str) -> None:
    with pytest.raises(dirtylog.InvalidArgumentError, match=r"auto, uffd, compare"):
        dirtylog.track(WRITABLE, port=port)


def test_auto_is_the_best_that_works() -> None:
    with dirtylog.track(WRITABLE) as log:
        assert log.memory.port.name == ("compare" if missing_uffd_here() else "uffd")


# --- what the kernel does not watch


@needs_uffd
def test_a_file_that_may_not_be_written_is_refused_and_auto_compares() -> None:
    with file_to_read(b"x" * NBYTES) as fd, Area.map(10, SHARED, fd=fd, protection=READ) as area:
        with pytest.raises(dirtylog.AccessDeniedError, match="a file that may not be written"):
            dirtylog.track(area.octets, port="uffd")
        with dirtylog.track(area.octets) as log:
            assert log.memory.port.name == "compare"


@needs_uffd
def test_memory_in_pages_of_two_sizes_is_refused_and_auto_compares() -> None:
    with memory_of("hugetlb-private") as huge:
        behind = huge.address + huge.npages * huge.page_size
        try:
            small = Area.map_at(behind, 4)
        except OSError:
            pytest.skip("something lies behind the huge pages")
        with small:
            both = Area(huge.address, huge.npages * (huge.page_size // PAGE) + 4).octets
            with pytest.raises(dirtylog.InvalidArgumentError, match="pages of one size"):
                dirtylog.track(both, port="uffd")
            with dirtylog.track(both[-5 * PAGE :]) as log:
                assert log.memory.port.name == "compare"
                both[-1] = 1
                assert log.get(0).pages().tolist() == [4]


@needs_uffd
def test_what_is_refused_leaves_no_descriptor_open() -> None:
    with (
        port_of_its_own() as port,
        file_to_read(b"x" * NBYTES) as fd,
        Area.map(10, SHARED, fd=fd, protection=READ) as area,
    ):
        with pytest.raises(dirtylog.AccessDeniedError):
            dirtylog.track(area.octets, port="uffd")
        assert port.descriptors() == 0


@needs_uffd
def test_a_memory_that_was_never_logged_leaves_no_descriptor_open() -> None:
    with port_of_its_own() as port, Area.map(10) as area:
        BufferMemory(area.octets, port="uffd").close()
        assert port.descriptors() == 0
