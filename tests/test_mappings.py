"""The mappings of a process as the kernel lists them, however they are named, and the words that choose among them."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from address_space import ANONYMOUS, HUGE, HUGETLB, MFD_HUGETLB, PAGE, PRIVATE, SHARED, Area, memory_file
from dirtylog import InvalidArgumentError, TargetGoneError
from dirtylog.linux import mappings as mappings_module
from dirtylog.linux.mappings import KINDS, Mapping, PageSizes, Selection, read_mappings

if TYPE_CHECKING:
    from collections.abc import Iterator

_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
# Every octet that a name may have and that some reader takes for the end of a line or of a word.
ODD_NAMES = (
    "two  spaces",
    " begins and ends with a space ",
    "new\nline",
    "carriage\rreturn",
    "tab\tand\vvertical\fand form feed",
    "file\x1cgroup\x1drecord\x1eunit\x1fseparators",
    "next\x85line",
    "line\u2028and paragraph\u2029separators",
    "no-break\u00a0and ideographic\u3000space",
    "not utf-8 \udcff\udc80",
    "[brackets]",
    "star*and?",
    "ends (deleted)",
    "back\\slash \\012",
    "00400000-00500000 rw-p 00000000 00:00 0",
)


def mapping_at(address: int) -> Mapping:
    """Return this process's mapping at an address."""
    return next(one for one in read_mappings() if one.start <= address < one.end)


@contextmanager
def mapped_file(path: Path, flags: int = SHARED) -> Iterator[Area]:
    """Give the two pages of a new file, mapped."""
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as file, Area.map(2, flags, fd=file.fileno()) as area:
        yield area


def as_the_kernel_writes(path: Path) -> str:
    """Return a name as /proc/PID/maps has it: a newline in octal, everything else as it is."""
    return str(path).replace("\n", "\\012")


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_file_with_an_odd_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with mapped_file(path) as area:
        found = mapping_at(area.address)
        inode = path.stat().st_ino
        assert (found.start, found.end, found.permissions, found.offset) == (area.address, area.address + 2 * PAGE, "rw-s", 0)
        assert found.file.split()[1] == str(inode)
        assert found.name == as_the_kernel_writes(path)
        assert found in Selection((f"{tmp_path}/*",))
        path.unlink()
        assert mapping_at(area.address).name == f"{as_the_kernel_writes(path)} (deleted)"


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_all_mappings_are_found_beside_one_with_an_odd_name(tmp_path: Path, name: str) -> None:
    lines = Path("/proc/self/maps").read_bytes().count(b"\n")
    with mapped_file(tmp_path / name):
        found = read_mappings()
        assert len(found) in range(lines, lines + 4)
        assert all(one.start < one.end <= other.start for one, other in itertools.pairwise(found))


def test_memory_with_a_name_but_no_file() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Area.map(2) as private, Area.map(2, SHARED | ANONYMOUS) as shared:
        for area, prefix in ((private, "[anon:"), (shared, "[anon_shmem:")):
            named = libc.prctl(
                _PR_SET_VMA, _PR_SET_VMA_ANON_NAME, ctypes.c_ulong(area.address), ctypes.c_ulong(2 * PAGE), b"a  name "
            )
            if named:
                pytest.skip("this kernel gives anonymous memory no names")
            assert mapping_at(area.address).name == f"{prefix}a  name ]"
            assert mapping_at(area.address) in Selection((f"{prefix}a*",))


def test_a_memory_file_of_any_name() -> None:
    fd = os.memfd_create("odd\rname\x0b (deleted)")
    try:
        os.ftruncate(fd, PAGE)
        with Area.map(1, SHARED, fd=fd) as area:
            found = mapping_at(area.address)
            assert found.name == "/memfd:odd\rname\x0b (deleted) (deleted)"
            assert found.shared
            assert not found.anonymous
    finally:
        os.close(fd)


def test_the_kinds_of_this_process() -> None:
    with ExitStack() as stack:
        private = stack.enter_context(Area.map(2))
        shared = stack.enter_context(Area.map(2, SHARED | ANONYMOUS))
        read_only = stack.enter_context(Area.map(2, protection=mmap.PROT_READ))
        fd = stack.enter_context(memory_file(PAGE))
        copied = stack.enter_context(Area.map(1, PRIVATE, fd=fd))
        stack_top = next(one for one in read_mappings() if one.name == "[stack]").start
        kinds = {
            private.address: {"anonymous", "private", "writable"},
            shared.address: {"file", "shared", "writable"},
            read_only.address: {"anonymous", "private"},
            copied.address: {"file", "private", "writable"},
            stack_top: {"stack", "anonymous", "private", "writable"},
        }
        for address, expected in kinds.items():
            found = mapping_at(address)
            assert {kind for kind in KINDS if found in Selection((kind,))} == expected
            assert not found.of_the_kernel
        heap = next((one for one in read_mappings() if one.name == "[heap]"), None)
        if heap is not None:
            assert {kind for kind in KINDS if heap in Selection((kind,))} == {"heap", "anonymous", "private", "writable"}
        assert any(one.of_the_kernel for one in read_mappings())


HEAP = Mapping(0x1000, 0x3000, "rw-p", 0, "00:00 0", "[heap]")
LIBRARY = Mapping(0x10000, 0x20000, "r-xp", 0, "08:01 77", "/usr/lib/libc.so.6")
NAMED = Mapping(0x30000, 0x31000, "rw-p", 0, "00:00 0", "[anon:ab]")
NAMELESS = Mapping(0x7FFFFFFFE000, 0x7FFFFFFFF000, "rw-s", 0, "00:01 5", "")
ALL = (HEAP, LIBRARY, NAMED, NAMELESS)


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ((), ALL),
        (("heap",), (HEAP,)),
        (("heap", "file"), (HEAP, LIBRARY, NAMELESS)),
        (("[heap]",), (HEAP,)),
        (("[h*",), (HEAP,)),
        (("[heap",), ()),
        (("[anon:*",), (NAMED,)),
        (("[anon:[ab]]",), ()),
        (("[anon:ab]",), (NAMED,)),
        (("[anon:?b]",), (NAMED,)),
        (("*/libc.so*",), (LIBRARY,)),
        (("*LIBC*",), ()),
        (("/usr/*",), (LIBRARY,)),
        (("*",), ALL),
        (("/nowhere",), ()),
        (("0x1000-0x1001",), (HEAP,)),
        (("0x2fff-0x10000",), (HEAP,)),
        (("0x3000-0x10000",), ()),
        (("0x0-0xffffffffffffffff",), ALL),
        (("0x7FFFFFFFE000-0x7fffffffe001",), (NAMELESS,)),
        (("0x1-0x2", "shared"), (NAMELESS,)),
    ],
    ids=str,
)
def test_words_choose_mappings(words: tuple[str, ...], chosen: tuple[Mapping, ...]) -> None:
    selection = Selection(words)
    assert tuple(one for one in ALL if one in selection) == chosen


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("", "choose heap, stack, anonymous"),
        ("heaps", "choose heap, stack, anonymous"),
        ("Heap", "choose heap, stack, anonymous"),
        ("libc.so.6", "a name with / or [ or *"),
        ("0x1000", "a range such as 0x1000-0x2000"),
        ("1000-2000", "a range such as 0x1000-0x2000"),
        ("0x1000-0x2000 ", "a range such as 0x1000-0x2000"),
        ("0x1000-0x1000", "START below END"),
        ("0x2000-0x1000", "START below END"),
    ],
)
def test_a_bad_word_is_refused_with_the_rule(word: str, rule: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Selection(("heap", word))
    assert repr(word) in str(caught.value)
    assert rule in str(caught.value)


def test_there_is_no_such_process() -> None:
    child = subprocess.Popen((sys.executable, "-c", ""))
    child.wait()
    with pytest.raises(TargetGoneError):
        read_mappings(child.pid)


@pytest.mark.parametrize("where", ["PROCMAP_QUERY", "smaps"])
@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_page_sizes(monkeypatch: pytest.MonkeyPatch, flags: int, where: str) -> None:
    if where == "smaps":
        # As a kernel before 6.11 answers: this file has no such ioctl.
        monkeypatch.setattr(mappings_module.abi, "PROCMAP_QUERY", mappings_module.abi.PROCMAP_QUERY ^ 0xFF00)  # type: ignore[attr-defined]  # the name that the module looks up
    with ExitStack() as stack:
        try:
            areas = [stack.enter_context(Area.map(2, flags | ANONYMOUS | HUGETLB, page_size=HUGE))]
            fd = stack.enter_context(memory_file(2 * HUGE, MFD_HUGETLB))
            areas.append(stack.enter_context(Area.map(2, flags, fd=fd, page_size=HUGE)))
        except OSError as error:
            pytest.skip(f"no huge pages are free: {error.strerror}")
        small = stack.enter_context(memory_file(PAGE))
        areas += [stack.enter_context(Area.map(1, flags, fd=small)), stack.enter_context(Area.map(2, flags | ANONYMOUS))]
        sizes = [PageSizes(pid).of(mapping_at(area.address)) for area in areas for pid in (None, os.getpid())]
        assert sizes == [HUGE, HUGE, HUGE, HUGE, PAGE, PAGE, PAGE, PAGE]


def test_the_page_size_of_what_has_been_unmapped_is_the_usual_one(tmp_path: Path) -> None:
    with mapped_file(tmp_path / "file") as area:
        found = mapping_at(area.address)
    assert PageSizes().of(found) == PAGE
