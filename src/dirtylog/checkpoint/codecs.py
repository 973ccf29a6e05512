"""Checksums of pages and compression of batches: which there are, by the names that the index keeps."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dirtylog.errors import CorruptDataError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

_FAST_REMEDY = "install it: pip install 'dirtylog[fast]'"


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum: ``digest`` of octets has ``nbytes``. A cryptographic one is safe against people, the others against accidents."""

    name: str
    nbytes: int
    digest: Callable[[memoryview], bytes]

    def of_pages(self, pages: NDArray[np.uint8]) -> bytes:
        """Return the digests of pages, uint8[k, page_size], contiguous, one after the other."""
        size, digest = pages.shape[1], self.digest
        octets = pages.reshape(-1).data
        return b"".join([digest(octets[at : at + size]) for at in range(0, len(octets), size)])


def _xxh3() -> Checksum:
    try:
        import xxhash  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UnsupportedError("checksum xxh3 needs xxhash", remedy=_FAST_REMEDY) from error
    return Checksum("xxh3", 8, xxhash.xxh3_64_digest)


_CRC = struct.Struct("<I")
_CHECKSUMS: dict[str, Callable[[], Checksum]] = {
    "xxh3": _xxh3,
    "crc32": lambda: Checksum("crc32", 4, lambda octets: _CRC.pack(zlib.crc32(octets))),
    "blake2b": lambda: Checksum("blake2b", 32, lambda octets: hashlib.blake2b(octets, digest_size=32).digest()),
    "sha256": lambda: Checksum("sha256", 32, lambda octets: hashlib.sha256(octets).digest()),
}
CHECKSUMS = tuple(_CHECKSUMS)


def checksum(name: str | None = None) -> Checksum:
    """Return a checksum by its name; without one xxh3, or crc32 where xxhash is not installed."""
    if name is None:
        try:
            return _xxh3()
        except UnsupportedError:
            name = "crc32"
    if name not in _CHECKSUMS:
        raise InvalidArgumentError(f"unknown checksum {name!r}; it is one of: {', '.join(_CHECKSUMS)}")
    return _CHECKSUMS[name]()


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression: ``decompress`` takes the length that comes out, and fails if it is another."""

    name: str
    compress: Callable[[memoryview], bytes]
    decompress: Callable[[memoryview, int], bytes]


def _lz4() -> Codec:
    try:
        import lz4.block  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UnsupportedError("compression lz4 needs lz4", remedy=_FAST_REMEDY) from error
    block: Any = lz4.block

    def decompress(data: memoryview, nbytes: int) -> bytes:
        return bytes(block.decompress(data, uncompressed_size=nbytes))

    return Codec("lz4", lambda data: bytes(block.compress(data, store_size=False)), decompress)


def _zstd() -> Codec:
    try:
        from compression import zstd  # type: ignore[import-not-found]  # noqa: PLC0415 - of the standard library from 3.14 on
    except ImportError:
        try:
            import zstandard  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise UnsupportedError("compression zstd needs zstandard, or Python 3.14", remedy=_FAST_REMEDY) from error
        packer, unpacker = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
        return Codec("zstd", packer.compress, lambda data, nbytes: unpacker.decompress(data, max_output_size=nbytes))

    def decompress(data: memoryview, nbytes: int) -> bytes:
        return bytes(zstd.ZstdDecompressor().decompress(data, nbytes))

    return Codec("zstd", lambda data: bytes(zstd.compress(data, 1)), decompress)


NONE = "none"
_CODECS: dict[str, Callable[[], Codec]] = {"lz4": _lz4, "zstd": _zstd}
COMPRESSIONS = (NONE, *_CODECS)


def codec(name: str) -> Codec | None:
    """Return a compression by its name, None for "none"."""
    if name == NONE:
        return None
    if name not in _CODECS:
        raise InvalidArgumentError(f"unknown compression {name!r}; it is one of: {', '.join(COMPRESSIONS)}")
    return _CODECS[name]()


def decompressed(name: str, data: memoryview, nbytes: int) -> bytes:
    """Return what a batch holds; :class:`CorruptDataError` if that cannot be."""
    one = codec(name)
    if one is None:
        return bytes(data)
    try:
        found = one.decompress(data, nbytes)
    except Exception as error:  # each library has errors of its own
        raise CorruptDataError(f"a batch does not decompress by {name}", reason=str(error)) from error
    if len(found) != nbytes:
        raise CorruptDataError(f"a batch decompresses to {len(found)} bytes, not to {nbytes}")
    return found


class Adaptive:
    """Compresses while that pays: a batch that shrinks by less than a fifth turns it off for some batches, ever longer."""

    _WORTH = 0.8
    _LONGEST_OFF = 1024

    def __init__(self, one: Codec | None) -> None:
        self._codec = one
        self._off = 0
        self._next_off = 16

    def compress(self, data: memoryview) -> tuple[str, bytes | memoryview]:
        """Return the name of what was done, and what is to be stored."""
        if self._codec is None or self._off:
            self._off = max(0, self._off - 1)
            return NONE, data
        packed = self._codec.compress(data)
        if len(packed) <= self._WORTH * len(data):
            self._next_off = 16
            return self._codec.name, packed
        self._off, self._next_off = self._next_off, min(2 * self._next_off, self._LONGEST_OFF)
        return NONE, data
