"""Generic dirty page logging: which pages of a memory were written since the last time somebody asked."""

from dirtylog.bitmap import DirtyBitmap
from dirtylog.buffers.track import empty, track
from dirtylog.checkpoint.arrays import restore
from dirtylog.checkpoint.restore import restore_memory
from dirtylog.checkpoint.retention import Keep
from dirtylog.checkpoint.saver import Checkpointer
from dirtylog.dirty_log import DirtyLog
from dirtylog.epoch import Consumer, Epoch
from dirtylog.errors import (
    AccessDeniedError,
    BadSlotError,
    CopyFaultError,
    CorruptDataError,
    CoverageLostError,
    DirtyLogError,
    GuestFaultError,
    InvalidArgumentError,
    LoggingOffError,
    TargetGoneError,
    UnsupportedError,
)
from dirtylog.guests.baseline import Baseline
from dirtylog.guests.image import Image
from dirtylog.memory import Memory
from dirtylog.memslot import MemorySlot, SlotFlags, SlotTable
from dirtylog.port import Exactness, KernelPort, Port, ProtectPort, SyncPort
from dirtylog.recording.background import record
from dirtylog.recording.reader import Recording
from dirtylog.recording.recorder import Recorder
from dirtylog.target import open_target as open  # noqa: A004 - dirtylog.open, as gzip.open

__all__ = [
    "AccessDeniedError",
    "BadSlotError",
    "Baseline",
    "Checkpointer",
    "Consumer",
    "CopyFaultError",
    "CorruptDataError",
    "CoverageLostError",
    "DirtyBitmap",
    "DirtyLog",
    "DirtyLogError",
    "Epoch",
    "Exactness",
    "GuestFaultError",
    "Image",
    "InvalidArgumentError",
    "Keep",
    "KernelPort",
    "LoggingOffError",
    "Memory",
    "MemorySlot",
    "Port",
    "ProtectPort",
    "Recorder",
    "Recording",
    "SlotFlags",
    "SlotTable",
    "SyncPort",
    "TargetGoneError",
    "UnsupportedError",
    "empty",
    "open",
    "record",
    "restore",
    "restore_memory",
    "track",
]
