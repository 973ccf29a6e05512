"""Reads pages of a store by their places, and checks them."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog import varint
from dirtylog.checkpoint.codecs import NONE, decompressed
from dirtylog.checkpoint.pages import ZERO
from dirtylog.checkpoint.segments import SegmentReader
from dirtylog.errors import CorruptDataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dirtylog.checkpoint.rows import BatchRow
    from dirtylog.checkpoint.store import Store

_AHEAD_BYTES = 16 << 20


class Piece(NamedTuple):
    """Pages of one batch that are wanted: ``which`` of the wanted, and where each is in the batch."""

    batch: BatchRow
    which: NDArray[np.int64]
    within: NDArray[np.int64]


class _Scratch:
    """Memory that is used again and again, so that it stays in the caches."""

    def __init__(self) -> None:
        self._octets = np.empty(0, np.uint8)

    def of(self, nbytes: int) -> NDArray[np.uint8]:
        if nbytes > len(self._octets):
            self._octets = np.empty(nbytes, np.uint8)
        return self._octets[:nbytes]


class Contents:
    """The pages of a store, by place; a snapshot of where they are now."""

    def __init__(self, store: Store) -> None:
        self._checksum = store.checksum
        self._files = SegmentReader(store.folder)
        # Of a row that is damaged the pages alone are lost.
        self.rows, _ = store.index.batches_by_soundness()
        self._firsts = np.array([row.first for row in self.rows], np.int64)

    def pieces(self, places: NDArray[np.int64]) -> Iterator[Piece]:
        """Yield where wanted places are, batch by batch. ZERO is nowhere. :class:`CorruptDataError` for one that is not there."""
        order = np.argsort(places, kind="stable")
        order = order[np.searchsorted(places[order], ZERO, side="right") :]
        wanted = places[order]
        if not len(wanted):
            return
        numbers = np.searchsorted(self._firsts, wanted, side="right") - 1
        if numbers[0] < 0:
            raise CorruptDataError(f"no batch has the page at place {wanted[0]}")
        begins = np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1])))
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(wanted)], strict=True):
            row = self.rows[int(numbers[begin])]
            if row.places is None:
                within = wanted[begin:end] - row.first
            else:
                there = places_of(row)
                within = np.minimum(np.searchsorted(there, wanted[begin:end]), len(there) - 1)
                if not np.array_equal(there[within], wanted[begin:end]):
                    raise CorruptDataError(f"batch {row.batch} lacks pages that a checkpoint has")
            if within[-1] >= row.npages:
                raise CorruptDataError(f"no batch has the page at place {wanted[end - 1]}")
            yield Piece(row, order[begin:end], within)

    def read(
        self, places: NDArray[np.int64], out: NDArray[np.uint8], *, bad: Callable[[NDArray[np.int64], str], None] | None = None
    ) -> None:
        """Fill ``out``, uint8[k, page_size] and contiguous, with the pages at places, checked.

        A page that does not verify is a :class:`CorruptDataError`, or is told to ``bad``: which of the wanted, and why.
        """
        out[places == ZERO] = 0
        telling = threading.Lock()

        def read(piece: Piece, scratch: _Scratch) -> None:
            try:
                self._read_piece(piece, out, scratch)
            except CorruptDataError as error:
                if bad is None:
                    raise
                with telling:
                    self._tell_bad(piece, out, error, bad)

        _by_two(self._expecting(places), read)

    def each(self, places: NDArray[np.int64], page_size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Yield the pages at places, checked, in the order in which they lie: which of the wanted, ascending, and their contents.

        Each batch is read once, however its pages are scattered. Contents, uint8[k, page_size], are good until the next. ZERO is
        left out.
        """
        scratch = _Scratch()
        for piece in self._expecting(places):
            yield self._ascending(piece, page_size, scratch)

    def give(
        self, places: NDArray[np.int64], page_size: int, take: Callable[[NDArray[np.int64], NDArray[np.uint8]], object]
    ) -> None:
        """Give ``take`` what :meth:`each` yields. Two threads call it."""
        _by_two(self._expecting(places), lambda piece, scratch: take(*self._ascending(piece, page_size, scratch)))

    def _ascending(self, piece: Piece, page_size: int, scratch: _Scratch) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        which, contents = piece.which, self._checked(piece, page_size, scratch)
        if (np.diff(which) < 0).any():
            order = np.argsort(which)
            which, contents = which[order], contents[order]
        return which, contents

    def _expecting(self, places: NDArray[np.int64]) -> Iterator[Piece]:
        """Yield pieces, while the disk reads what comes after them."""
        pieces = list(self.pieces(places))
        self._files.hold(dict.fromkeys(piece.batch.segment for piece in pieces))
        expected = ahead = 0
        for number, piece in enumerate(pieces):
            while expected < len(pieces) and (expected <= number or ahead < _AHEAD_BYTES):
                row = pieces[expected].batch
                self._expect(row)
                ahead += row.nbytes
                expected += 1
            yield piece
            ahead -= piece.batch.nbytes

    def _expect(self, row: BatchRow) -> None:
        try:
            self._files.expect(row.segment, row.offset, row.nbytes)
        except (CorruptDataError, OSError):
            return  # it is told when it is read

    def _read_piece(self, piece: Piece, out: NDArray[np.uint8], scratch: _Scratch) -> None:
        row, which, within = piece
        if row.codec == NONE and in_a_row(which) and in_a_row(within) and out.shape[1] == row.page_size:
            into = out[which[0] : which[0] + len(which)]
            self._files.read_into(row.segment, row.offset + int(within[0]) * row.page_size, into.reshape(-1).data)
            self._check(row, within, into)
        else:
            out[which] = self._checked(piece, out.shape[1], scratch)

    def _checked(self, piece: Piece, page_size: int, scratch: _Scratch) -> NDArray[np.uint8]:
        """Return the pages of a piece, checked, maybe in ``scratch``."""
        row, _, within = piece
        if page_size != row.page_size:
            raise CorruptDataError(f"batch {row.batch} has pages of {row.page_size} bytes, not of {page_size}")
        if row.codec == NONE:
            first, npages = int(within[0]), int(within[-1] - within[0]) + 1
            contents = scratch.of(npages * page_size).reshape(npages, page_size)
            self._files.read_into(row.segment, row.offset + first * page_size, contents.reshape(-1).data)
            if npages != len(within):
                contents = contents[within - first]
        else:
            contents = self.batch(row)
            if len(within) != row.npages:
                contents = contents[within]
        self._check(row, within, contents)
        return contents

    def _tell_bad(
        self, piece: Piece, out: NDArray[np.uint8], error: CorruptDataError, bad: Callable[[NDArray[np.int64], str], None]
    ) -> None:
        """Find out which pages of a piece are wrong."""
        row, which, within = piece
        if row.codec == NONE and len(which) > 1:
            # Each can be read without the others.
            for at in range(len(which)):
                one = Piece(row, which[at : at + 1], within[at : at + 1])
                try:
                    self._read_piece(one, out, _Scratch())
                except CorruptDataError as reason:
                    bad(one.which, str(reason))
            return
        try:
            contents = self.batch(row)[within]
        except CorruptDataError:
            bad(which, str(error))
            return
        wrong = self._wrong(row, within, contents)
        good = np.setdiff1d(np.arange(len(which)), wrong)
        out[which[good]] = contents[good]
        bad(which[wrong], str(error))

    def batch(self, row: BatchRow) -> NDArray[np.uint8]:
        """Return all pages of a batch, unchecked."""
        octets = decompressed(row.codec, self.stored(row), row.npages * row.page_size)
        if len(octets) != row.npages * row.page_size:
            raise CorruptDataError(f"batch {row.batch} has {len(octets)} bytes, not {row.npages * row.page_size}")
        return np.frombuffer(octets, np.uint8).reshape(row.npages, row.page_size)

    def stored(self, row: BatchRow) -> memoryview:
        """Return a batch as it is stored."""
        data = memoryview(bytearray(row.nbytes))
        self._files.read_into(row.segment, row.offset, data)
        return data

    def sums(self, places: NDArray[np.int64]) -> list[bytes]:
        """Return the checksums of pages, empty for ZERO."""
        found = [b""] * len(places)
        size = self._checksum.nbytes
        for row, which, within in self.pieces(places):
            for at, offset in zip(which.tolist(), (within * size).tolist(), strict=True):
                found[at] = row.sums[offset : offset + size]
        return found

    def _check(self, row: BatchRow, within: NDArray[np.int64], contents: NDArray[np.uint8]) -> None:
        size = self._checksum.nbytes
        if len(within) == row.npages:
            expected = row.sums
        elif int(within[-1] - within[0]) == len(within) - 1:
            expected = row.sums[int(within[0]) * size : int(within[-1] + 1) * size]
        else:
            expected = b"".join([row.sums[at : at + size] for at in (within * size).tolist()])
        if self._checksum.of_pages(contents) != expected:
            wrong = self._wrong(row, within, contents)
            raise CorruptDataError(
                f"{len(wrong)} of {len(within)} pages in segment {row.segment} at {row.offset} do not have their checksums"
            )

    def _wrong(self, row: BatchRow, within: NDArray[np.int64], contents: NDArray[np.uint8]) -> NDArray[np.int64]:
        size = self._checksum.nbytes
        sums = self._checksum.of_pages(np.ascontiguousarray(contents))
        return np.array(
            [
                number
                for number, at in enumerate((within * size).tolist())
                if sums[number * size : (number + 1) * size] != row.sums[at : at + size]
            ],
            np.int64,
        )

    def close(self) -> None:
        """Close the segments."""
        self._files.close()


def places_of(row: BatchRow) -> NDArray[np.int64]:
    """Return the places of a batch's pages, ascending."""
    if row.places is None:
        return np.arange(row.first, row.first + row.npages)
    return np.cumsum(varint.decode(row.places)) + row.first


def packed_places(places: NDArray[np.int64]) -> bytes:
    """Return places, ascending, as :func:`places_of` reads them."""
    return varint.encode(np.diff(places, prepend=places[0]))


def _by_two(pieces: Iterator[Piece], work: Callable[[Piece, _Scratch], object]) -> None:
    """Do ``work`` for each piece, in this thread and in another one: the one checks while the other reads."""
    begin = list(itertools.islice(pieces, 2))
    if len(begin) < 2:  # noqa: PLR2004 - nothing to share
        for piece in begin:
            work(piece, _Scratch())
        return
    pieces = itertools.chain(begin, pieces)
    taking = threading.Lock()
    failed: list[BaseException] = []

    def until_done() -> None:
        scratch = _Scratch()
        try:
            while not failed:
                with taking:
                    piece = next(pieces, None)
                if piece is None:
                    return
                work(piece, scratch)
        except BaseException as error:  # noqa: BLE001 - it is raised where the work was asked for
            failed.append(error)

    other = threading.Thread(target=until_done, name="checkpoint reader")
    other.start()
    try:
        until_done()
        other.join()
    except BaseException as error:  # noqa: BLE001 - an interrupt: it is raised when the other one has ended
        failed.append(error)
        other.join()
    if failed:
        raise failed[0]


def in_a_row(numbers: NDArray[np.int64]) -> bool:
    """Return whether each number is the one before and 1."""
    return int(numbers[-1] - numbers[0]) == len(numbers) - 1 and bool((np.diff(numbers) == 1).all())
