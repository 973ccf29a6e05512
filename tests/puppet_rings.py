"""A ring of io_uring in a puppet, as io_uring.Ring is one in this process."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import io_uring
from address_space import PAGE, SHARED

if TYPE_CHECKING:
    from puppets import Puppet

_UNREGISTER = 1
_GET_EVENTS = 1


class PuppetRing:
    """:class:`OSError` where the kernel gives none."""

    def __init__(self, puppet: Puppet) -> None:
        self._puppet = puppet
        parameters = io_uring._Parameters()
        at = puppet.scratch
        puppet.poke(at, bytes(parameters))
        self.fd = puppet.call(io_uring._SETUP, io_uring._ENTRIES, at)
        parameters = io_uring._Parameters.from_buffer_copy(puppet.peek(at, len(bytes(parameters))))
        self._sq, self._cq = parameters.sq, parameters.cq
        self._rings = puppet.map(4, SHARED, fd=self.fd)
        self._sqes = puppet.map(1, SHARED, fd=self.fd, offset=io_uring._SQES)

    def register(self, address: int, npages: int) -> None:
        """Make pages the ring's only registered buffer: they are pinned from now on."""
        self._puppet.poke(self._puppet.scratch, struct.pack("=QQ", address, npages * PAGE))
        self._puppet.call(io_uring._REGISTER, self.fd, 0, self._puppet.scratch, 1)

    def unregister(self) -> None:
        """Let go of it."""
        self._puppet.call(io_uring._REGISTER, self.fd, _UNREGISTER, 0, 0)

    def read(self, fd: int, address: int, nbytes: int) -> None:
        """Read from the beginning of a file into the registered buffer."""
        tail = self._word(self._sq.tail)
        slot = tail & self._word(self._sq.ring_mask)
        sqe = io_uring._SQE.pack(io_uring._READ_FIXED, 0, 0, fd, 0, address, nbytes, 0, 0, 0, 0, 0)
        self._puppet.poke(self._sqes + slot * io_uring._SQE.size, sqe)
        self._set_word(self._sq.last + 4 * slot, slot)
        self._set_word(self._sq.tail, tail + 1)
        self._puppet.call(io_uring._ENTER, self.fd, 1, 1, _GET_EVENTS, 0, 0)
        head = self._word(self._cq.head)
        entry = self._rings + self._cq.cqes + io_uring._CQE_BYTES * (head & self._word(self._cq.ring_mask))
        _, result, _ = struct.unpack("=QiI", self._puppet.peek(entry, io_uring._CQE_BYTES))
        self._set_word(self._cq.head, head + 1)
        assert result == nbytes

    def close(self) -> None:
        """Close it: what it had registered is let go, a little later."""
        self._puppet.close_file(self.fd)

    def _word(self, offset: int) -> int:
        return int(struct.unpack("=I", self._puppet.peek(self._rings + offset, 4))[0])

    def _set_word(self, offset: int, value: int) -> None:
        self._puppet.poke(self._rings + offset, struct.pack("=I", value))
