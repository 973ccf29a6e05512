"""Rows of numbers as unsigned LEB128: seven bits an octet, the lowest first; the top bit says that more follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import CorruptDataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BITS = 7
_MORE = 0x80
LONGEST = 9
"""So many octets hold every number below 2**63."""


def encode(numbers: NDArray[np.int64]) -> bytes:
    """Return numbers, none below 0, one after the other."""
    sizes = np.ones(len(numbers), np.int64)
    largest = int(numbers.max(initial=0))
    for octets in range(1, LONGEST):
        if not largest >> (octets * _BITS):
            break
        sizes += numbers >> (octets * _BITS) != 0
    ends = np.cumsum(sizes)
    data = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    begins = ends - sizes
    for octet in range(int(sizes.max(initial=0))):
        has = sizes > octet
        more = np.where(sizes[has] > octet + 1, _MORE, 0)
        data[begins[has] + octet] = (numbers[has] >> (octet * _BITS)) & (_MORE - 1) | more
    return data.tobytes()


def decode(data: bytes) -> NDArray[np.int64]:
    """Return the numbers. :class:`CorruptDataError` for one that is too long, or ends early."""
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < _MORE)
    if len(octets) and (not len(ends) or ends[-1] != len(octets) - 1):
        raise CorruptDataError("stored numbers end early")
    begins = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    sizes = ends - begins + 1
    if sizes.max(initial=0) > LONGEST:
        raise CorruptDataError("a stored number is too long")
    numbers = octets[begins].astype(np.int64) & (_MORE - 1)
    for octet in range(1, int(sizes.max(initial=0))):
        has = np.flatnonzero(sizes > octet)
        numbers[has] |= (octets[begins[has] + octet].astype(np.int64) & (_MORE - 1)) << (octet * _BITS)
    return numbers
