"""The mappings of a process: files that have names of any octets in them, files of any bytes, and words that choose among them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.linux import mappings
from dirtylog.linux.mappings import KINDS, Mapping, PageSizes, Selection, read_mappings
from test_fuzz_bounds import FUZZED, KIB, U64, bounded
from test_fuzz_proc import PID, proc_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

_ODD = [
    b"/x\rKernelPageSize:\tz",
    b"/x\r7f0000000000-7f0000001000 rw-p 0 00:00 0",
    b"/ ends (deleted)",
    b"[anon:a b]",
    b"/\x85\x1c\x0b",
    b"/\xff",
]
names = st.sampled_from([b"", b"[heap]", b"[stack]", b"/usr/lib/libc.so.6", *_ODD]) | st.binary(max_size=40).map(
    lambda name: b"/" + name
)
one_line_names = names.filter(lambda name: b"\r" not in name)


@st.composite
def address_spaces(draw: st.DrawFn, name: st.SearchStrategy[bytes] = names) -> list[Mapping]:
    """Draw mappings as the kernel has them: ascending, and none overlapping."""
    bounds = sorted(draw(st.sets(U64, max_size=12)))
    spaces = []
    for start, end in zip(bounds[::2], bounds[1::2], strict=False):
        permissions = "".join(draw(st.sampled_from([letter, "-"])) for letter in "rwx") + draw(st.sampled_from("ps"))
        device, inode = draw(st.sampled_from(["00:00", "fd:01", "103:1a"])), draw(st.sampled_from([0, 7, (1 << 64) - 1]))
        text = draw(name).replace(b"\n", b"\\012").lstrip(b" ").decode("utf-8", "surrogateescape")
        spaces.append(Mapping(start, end, permissions, draw(U64), f"{device} {inode}", text))
    return spaces


def line_of(mapping: Mapping) -> bytes:
    """Return its line as the kernel writes it (fs/proc/task_mmu.c): a name begins in column 73."""
    head = f"{mapping.start:08x}-{mapping.end:08x} {mapping.permissions} {mapping.offset:08x} {mapping.file} "
    name = mapping.name.encode("utf-8", "surrogateescape")
    return (head.ljust(73).encode() + name if name else head.encode()) + b"\n"


def maps_of(text: bytes) -> list[Mapping]:
    """Read a file of mappings: 64 bytes for each of its bytes, and 64 KiB, are allocated at most."""
    with proc_tree({f"/proc/{PID}/maps".lstrip("/"): text}, mappings), bounded(64 * len(text) + 64 * KIB):
        return read_mappings(PID)


@FUZZED
@given(spaces=address_spaces())
def test_mappings_are_read_as_they_were_written_whatever_their_names(spaces: list[Mapping]) -> None:
    assert maps_of(b"".join(map(line_of, spaces))) == spaces


_GOOD = b"7f0000000000-7f0000001000 rw-p 00000000 fd:01 77                         /x\n"
mutated = st.builds(
    lambda at, cut, new: _GOOD + _GOOD[:at] + new + _GOOD[at + cut :],
    st.integers(0, len(_GOOD)),
    st.integers(0, 30),
    st.sampled_from([b"", b"\n", b" ", b"f" * 20, b"0" * 5000, b"-", b"\xd9\xa0", b"g"]) | st.binary(max_size=4),
)


@FUZZED
@given(text=mutated | st.binary(max_size=200))
@example(text=b"1-2 rw-p 0 0 0")
@example(text=b"0-" + b"f" * 5000 + b" rw-p 0 0 0")
def test_mappings_of_any_bytes_are_in_order_or_an_error_of_ours(text: bytes) -> None:
    try:
        found = maps_of(text)
    except DirtyLogError:
        return
    assert all(one.end <= other.start or one.end <= other.end for one, other in itertools.pairwise(found))
    assert all(one.start <= other.start for one, other in itertools.pairwise(found) if one.start < one.end)


def test_a_mapping_that_ends_before_it_begins_is_refused() -> None:
    try:
        found = maps_of(b"00002000-00001000 rw-p 00000000 00:00 0 \n")
    except DirtyLogError:
        return
    assert all(one.start < one.end for one in found)


# --- page sizes before Linux 6.11


def sizes_of(spaces: Sequence[Mapping], kilobytes: Sequence[int]) -> list[int]:
    """Return the page size of each mapping from a file of them all."""
    text = b"".join(
        line_of(one) + f"Size:{4:15} kB\nKernelPageSize:{size:9} kB\nMMUPageSize:{size:12} kB\nVmFlags: rd wr\n".encode()
        for one, size in zip(spaces, kilobytes, strict=False)
    )
    with proc_tree({f"proc/{PID}/smaps": text}, mappings), bounded(16 * len(text) + 64 * KIB):
        return [PageSizes(PID)._from_smaps(one) for one in spaces]


SIZES = [4, 64, 2048, 1 << 20, 4, 2048]


@FUZZED
@given(spaces=address_spaces(one_line_names))
def test_page_sizes_are_read_whatever_the_names(spaces: list[Mapping]) -> None:
    assert sizes_of(spaces, SIZES) == [size << 10 for size in SIZES[: len(spaces)]]


@FUZZED
@given(spaces=address_spaces())
@example(spaces=[Mapping(0x1000, 0x2000, "rw-s", 0, "fd:01 7", "/x\rKernelPageSize: 2048 kB")])
def test_page_sizes_are_read_whatever_line_ends_are_in_the_names(spaces: list[Mapping]) -> None:
    assert sizes_of(spaces, SIZES) == [size << 10 for size in SIZES[: len(spaces)]]


# --- words

addresses = st.integers(0, 0x9000) | U64
patterns = st.text("/[]*?ab!-^\\\n", max_size=12) | st.text(max_size=12)
ranges = st.builds(lambda start, end: f"0x{start:x}-0x{end:X}", addresses, addresses)
words = st.sampled_from(KINDS) | ranges | patterns | st.builds(lambda one, other: one + other, ranges, patterns)
MAPPINGS = [
    Mapping(0x1000, 0x3000, "rw-p", 0, "00:00 0", "[heap]"),
    Mapping(0x3000, 0x8000, "r--s", 0, "fd:01 7", "/a/b*[ab]"),
    Mapping((1 << 64) - 4096, (1 << 64) - 1, "--xp", 0, "00:00 0", "[anon:!ab]"),
    Mapping(0x8000, 0x9000, "rw-p", 0, "00:00 0", ""),
]


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern in which only * and ? stand for others is that of a name."""
    reached = {0}
    for letter in pattern:
        if letter == "*":
            reached = set(range(min(reached, default=len(name) + 1), len(name) + 1))
        else:
            reached = {place + 1 for place in reached if place < len(name) and letter in ("?", name[place])}
    return len(name) in reached


def chosen_by(word: str, mapping: Mapping) -> bool:
    if word in KINDS:
        return mapping.is_kind(word)
    start, dash, end = word.partition("-")
    try:
        low, high = (int(part.removeprefix("0x"), 16) for part in (start, end))
    except ValueError:
        return matches(word, mapping.name)
    in_range = dash and start.startswith("0x") and end.startswith("0x") and (start + end).isalnum()
    return low < mapping.end and mapping.start < high if in_range else matches(word, mapping.name)


@FUZZED
@given(chosen=st.lists(words, min_size=1, max_size=4), name=st.text("/[]*ab!", max_size=8))
def test_words_choose_what_a_simple_reading_of_them_chooses(chosen: list[str], name: str) -> None:
    """A selection of words allocates 512 bytes a letter at most, for it makes regular expressions of patterns, and 256 KiB."""
    with bounded(512 * sum(map(len, chosen)) + 256 * KIB):
        try:
            selection = Selection(tuple(chosen))
        except InvalidArgumentError:
            return
        for mapping in (*MAPPINGS, MAPPINGS[3]._replace(name=name)):
            assert (mapping in selection) == any(chosen_by(word, mapping) for word in chosen), mapping


@pytest.mark.parametrize("word", ["*a" * 2000 + "b", "*?" * 2000 + "b", "[" * 4000 + "*", "0x0-0x" + "f" * 4000, "*" * 8000])
def test_a_long_word_takes_no_longer_than_its_length_asks_for(word: str) -> None:
    with bounded(1024 * len(word) + 256 * KIB):
        assert Mapping(1, 2, "rw-p", 0, "0 0", "/" + "a" * 4000) in Selection((word, "writable"))
