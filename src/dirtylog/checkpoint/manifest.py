"""What a remote copy consists of: docs/remote.md.

A manifest names all objects that a copy needs, with their digests. It is written last, so that it never names what is not there.
Objects have their digests in their names: one of the same name has the same contents, and none is ever written over by another.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.errors import CorruptDataError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dirtylog.checkpoint.index import Index
    from dirtylog.checkpoint.location import Location
    from dirtylog.checkpoint.rows import BatchRow

NAME = "manifest.json"
SEGMENTS = "segments"
INDEX = "index"
VERSION = 1
_FORMAT = "dirtylog remote copy"
_OURS = re.compile(r"(segments/\d{8,}\.\d+-\d+|index/[0-9]+)\.[0-9a-f]{64}(\.\d+\.partial)?")


class Stamp(NamedTuple):
    """Which checkpoint it is: another one of the same id was made at another time."""

    id: int
    created: float


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of a segment from ``begin`` to ``end``, or of the index where ``segment`` is None: an object of its own.

    ``rows`` is the digest of what the index says of them: while that is the same, so are the bytes, and none has to be read.
    """

    segment: int | None
    begin: int
    end: int
    digest: str
    rows: str = ""

    @property
    def nbytes(self) -> int:
        """The length in bytes."""
        return self.end - self.begin

    @property
    def name(self) -> str:
        """The object's name."""
        if self.segment is None:
            return f"{INDEX}/{self.begin}.{self.digest}"
        return f"{SEGMENTS}/{self.segment:08}.{self.begin}-{self.end}.{self.digest}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a copy consists of."""

    checkpoints: tuple[Stamp, ...]
    parts: tuple[Part, ...]
    index: tuple[Part, ...]

    @property
    def objects(self) -> tuple[Part, ...]:
        """All of the parts."""
        return (*self.parts, *self.index)

    @property
    def nbytes(self) -> int:
        """The length of all objects."""
        return sum(part.nbytes for part in self.objects)

    def packed(self) -> bytes:
        """Return it as it is stored."""
        body = asdict(self)
        return json.dumps({"format": _FORMAT, "version": VERSION, "digest": _of_body(body), "body": body}, indent=0).encode()


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a push or a pull did.

    ``objects`` of ``nbytes`` together were sent or fetched, of a copy of ``total`` bytes with so many ``checkpoints``. ``removed``
    objects or segments that nothing needs any more are gone; ``left`` of them could not be removed, and the next push tries again.
    """

    objects: int
    nbytes: int
    total: int
    checkpoints: int
    removed: int = 0
    left: int = 0


def _of_body(body: object) -> str:
    return digest(json.dumps(body, sort_keys=True).encode())


def digest(data: bytes | memoryview) -> str:
    """Return the digest of an object: BLAKE2b of 256 bits."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def digest_of_rows(rows: Iterable[BatchRow]) -> str:
    """Return the digest of what says which bytes lie in a part of a segment, by their checksums."""
    found = hashlib.blake2b(digest_size=32)
    for row in rows:
        found.update(repr((row.offset, row.nbytes, row.codec, row.page_size, row.first, row.npages, row.places, row.sums)).encode())
    return found.hexdigest()


def stamps(index: Index) -> tuple[Stamp, ...]:
    """Return which checkpoints an index has."""
    return tuple(Stamp(row.id, row.created) for row in index.checkpoints())


def rows_by_segment(index: Index) -> dict[int, list[BatchRow]]:
    """Return the batches of each segment, by offset."""
    found: dict[int, list[BatchRow]] = {}
    for row in sorted(index.batches(), key=lambda row: (row.segment, row.offset)):
        found.setdefault(row.segment, []).append(row)
    return found


def is_ours(name: str) -> bool:
    """Return whether a name is one that only an object of a copy has."""
    return _OURS.fullmatch(name) is not None


def read(location: Location) -> Manifest | None:
    """Return the manifest of the copy at a location, None if there is none; :class:`UnsupportedError` for a newer one."""
    try:
        data = location.get(NAME)
    except FileNotFoundError:
        return None
    where = f"{NAME} at {location.url!r}"
    try:
        found = json.loads(data)
        kind, version = found["format"], int(found["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{where} is damaged, or no remote copy's", reason=str(error)) from error
    if kind != _FORMAT:
        raise CorruptDataError(f"{where} is another program's", remedy="name another place")
    if version > VERSION:
        raise UnsupportedError(
            f"{where} has version {version}, and this dirtylog knows up to {VERSION}", remedy="use a newer dirtylog"
        )
    try:
        body = found["body"]
        if _of_body(body) != found["digest"]:
            raise CorruptDataError(f"{where} is damaged", reason="it does not have its digest")
        return Manifest(
            tuple(Stamp(*one) for one in body["checkpoints"]),
            tuple(Part(**one) for one in body["parts"]),
            tuple(Part(**one) for one in body["index"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{where} is damaged", reason=str(error)) from error
