from __future__ import annotations

import subprocess
import sys

import dirtylog

# Makes the extras impossible to import, as on a host that has only NumPy.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("unicorn", "matplotlib"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Block())
"""

IMPORTS_NEITHER = """
import sys
import dirtylog
loaded = {name.partition(".")[0] for name in sys.modules}
assert "numpy" in loaded
assert not loaded & {"unicorn", "matplotlib"}, loaded & {"unicorn", "matplotlib"}
"""

BITMAPS = """
from dirtylog import DirtyBitmap
one, other = DirtyBitmap.from_pages(130, [0, 63, 64, 129]), DirtyBitmap(130)
other.set_range(60, 10)
assert (one | other).count() == 12
assert (one & other).pages().tolist() == [63, 64]
assert (one - other).runs().tolist() == [[0, 1], [129, 1]]
one |= other
assert 69 in one and DirtyBitmap.from_bytes(130, one.to_bytes()) == one
one.words[:] = 0
assert not one.any()
"""

UNICORN_GUEST = """
import dirtylog
try:
    dirtylog.open("emu:arm64", size="1MiB")
except dirtylog.UnsupportedError as error:
    assert "pip install 'dirtylog[emu]'" in error.remedy, error.remedy
    assert "Unicorn" in str(error) and isinstance(error.__cause__, ImportError), error
else:
    raise AssertionError("an arm64 guest without Unicorn")
"""

TRACE_GUEST = """
import dirtylog
with dirtylog.open("emu:ia64", size="1MiB") as memory, dirtylog.DirtyLog(memory) as log:
    found = dirtylog.DirtyBitmap(256)
    memory.resume()
    while found.count() < 256:
        found |= log.get(0)
        memory.check()
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_public_names() -> None:
    assert dirtylog.__all__ == [
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


def test_every_public_name_is_there() -> None:
    assert [name for name in dirtylog.__all__ if not hasattr(dirtylog, name)] == []


def test_importing_dirtylog_loads_no_extra() -> None:
    run(IMPORTS_NEITHER)


def test_bitmaps_work_without_the_extras() -> None:
    run(BLOCK + IMPORTS_NEITHER + BITMAPS)


def test_a_guest_that_needs_unicorn_says_what_would_help() -> None:
    run(BLOCK + UNICORN_GUEST)


def test_a_trace_guest_runs_without_the_extras() -> None:
    run(BLOCK + TRACE_GUEST)
