"""The states of guests' vCPUs, as a checkpoint keeps them beside the pages."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import TYPE_CHECKING, Any

from dirtylog.errors import CorruptDataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.memory import Memory


def pack_vcpus(memories: Sequence[Memory]) -> bytes:
    """Return the states of all vCPUs of memories, that stand still; of one that has none, nothing."""
    states: list[list[str]] = []
    for memory in memories:
        save: Any = getattr(memory, "vcpu_states", None)
        states.append([] if save is None else [base64.b64encode(state).decode() for state in save()])
    return zlib.compress(json.dumps(states).encode(), 1)


def unpack_vcpus(data: bytes) -> list[list[bytes]]:
    """Return the states of each memory's vCPUs."""
    try:
        return [[base64.b64decode(state) for state in of_memory] for of_memory in json.loads(zlib.decompress(data))]
    except (zlib.error, ValueError, TypeError, binascii.Error) as error:
        raise CorruptDataError("the states of the vCPUs cannot be read", reason=str(error)) from error
