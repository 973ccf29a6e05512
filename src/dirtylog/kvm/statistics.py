"""What KVM counts of a vCPU: its binary statistics (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD; Linux 5.14)."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from dirtylog.errors import DirtyLogError
from dirtylog.kvm.abi import StatsDescription, StatsHeader
from dirtylog.kvm.descriptor import KvmDescriptor

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBER_BYTES = 8

_FAULTS = "pf_taken"
_INTERPRETED = "insn_emulation"


class KvmStatistics(KvmDescriptor):
    """The statistics descriptor of a vCPU. The kernel lets it be read while the vCPU runs, and stops nothing for that."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        try:
            self._places = self._find_all()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> int | None:
        """Return a counter; None if this kernel has none of that name. Of a histogram it is the first number."""
        place = self._places.get(name)
        return None if place is None else int.from_bytes(self._bytes(_NUMBER_BYTES, place), sys.byteorder)

    def _find_all(self) -> dict[str, int]:
        """Return where in the file the numbers lie, by name: that stays so as long as the vCPU lives."""
        header = StatsHeader.from_buffer_copy(self._bytes(ctypes.sizeof(StatsHeader), 0))
        own = ctypes.sizeof(StatsDescription)
        stride = own + header.name_size
        table = self._bytes(header.num_desc * stride, header.desc_offset)
        places = {}
        for start in range(0, len(table), stride):
            name = table[start + own : start + stride].partition(b"\0")[0].decode("ascii", "replace")
            places[name] = header.data_offset + StatsDescription.from_buffer_copy(table, start).offset
        return places

    def _bytes(self, nbytes: int, offset: int) -> bytes:
        try:
            data = os.pread(self.fileno(), nbytes, offset)
        except OSError as error:
            raise self.error(error, "cannot read what KVM counts") from error
        if len(data) != nbytes:
            raise DirtyLogError(f"KVM gave {len(data)} bytes of statistics at {offset} where it has {nbytes}")
        return data


def faults_taken(vcpus: Sequence[KvmStatistics | None]) -> int | None:
    """Return how many page faults these vCPUs have taken; None where the kernel counts none, or one of them is closed.

    ``pf_taken`` (x86, Linux 5.19) grows by one at each fault on guest memory, those that give a page back its write permission
    included. Where the processor itself logs (Intel's page-modification log), a first store is no fault.

    Nor is it where KVM interprets its guests, as on the machine on which this was measured: at 3072 logged first stores every
    counter of faults stayed 0. Those that grew, ``insn_emulation`` and ``mmu_pte_write``, grew with every instruction and every
    store. Any other KVM takes a fault for the first instruction: so faults that stay 0 while instructions are interpreted are
    not counted.
    """
    counters = [None if one is None or one.closed else (one.read(_FAULTS), one.read(_INTERPRETED)) for one in vcpus]
    faults = interpreted = 0
    for pair in counters:
        if pair is None or pair[0] is None:
            return None
        faults, interpreted = faults + pair[0], interpreted + (pair[1] or 0)
    return None if interpreted and not faults else faults
