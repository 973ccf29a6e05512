"""How many page faults a process takes."""

from __future__ import annotations

from pathlib import Path

# proc_pid_stat(5), fields 10 and 12, of the process as a whole; counted from the state, which follows the name.
_MINOR, _MAJOR = 7, 9


class FaultCount:
    """The faults of a process since this was made: minor and major, of all its threads, whatever programs it executed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = self._now()

    def since(self) -> int | None:
        """Return how many there were; None if the kernel does not say. Whoever asks knows that the process has not ended."""
        now = self._now()
        return None if now is None or self._before is None else now - self._before

    def _now(self) -> int | None:
        try:
            # The name, in parentheses, may have anything in it.
            fields = Path(f"/proc/{self._pid}/stat").read_bytes().rpartition(b") ")[2].split()
            return int(fields[_MINOR]) + int(fields[_MAJOR])
        except (OSError, ValueError, IndexError):
            return None
