"""Whether a system call can be made in another process without harm; looked at before anything is done to it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dirtylog.errors import AccessDeniedError, DirtyLogError, InvalidArgumentError, TargetGoneError, UnsupportedError
from dirtylog.linux.ptrace import ATTACH_REMEDY

if TYPE_CHECKING:
    from dirtylog.linux.arch.architecture import Architecture

_AGENT = "let the program run dirtylog.agent, or use port compare"
_GO_MAGIC = b"\xff Go buildinf:"
_ELF_MACHINE = 18
_FLAGS = 6  # of the fields of /proc/PID/stat after the name
_PF_KTHREAD = 0x200000
GONE = "ZXx"
"""States of a thread that has ended."""


class Status(NamedTuple):
    """What /proc/PID/status says that matters here.

    ``pinned`` and ``held``, in memory or in swap, are in bytes; ``threads`` are how many, of the process ``tgid``.
    """

    state: str
    tracer: int
    seccomp: bool
    has_memory: bool
    pinned: int
    shadow_stack: bool
    threads: int
    tgid: int
    held: int


def status_lines(path: Path) -> list[str]:
    """Return the lines of a status. By newlines alone, which the kernel escapes in names: these may have anything else in them."""
    return path.read_bytes().decode("utf-8", "replace").split("\n")


def read_status(pid: int, tid: int | None = None) -> Status:
    """Return the status of a process, or of one of its threads; :class:`TargetGoneError` if there is none."""
    path = Path(f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status")
    try:
        lines = status_lines(path)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    except PermissionError as error:
        raise AccessDeniedError(f"process {pid} is hidden", errno=error.errno, pid=pid, remedy=ATTACH_REMEDY) from error
    values = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    try:
        return Status(
            state=values.get("State", "?")[:1],
            tracer=int(values.get("TracerPid", 0)),
            seccomp=values.get("Seccomp", "0") != "0",
            has_memory="VmSize" in values,
            pinned=int(values.get("VmPin", "0 kB").split()[0]) << 10,
            held=sum(int(values.get(name, "0 kB").split()[0]) << 10 for name in ("VmRSS", "VmSwap")),
            shadow_stack="shstk" in values.get("x86_Thread_features", ""),
            threads=int(values.get("Threads", 0)),
            tgid=int(values.get("Tgid", pid)),
        )
    except (ValueError, IndexError) as error:
        raise DirtyLogError(f"the status of process {pid} cannot be read", pid=pid, reason=str(error)) from error


def has_ended(pid: int, tid: int) -> bool:
    """Return whether a thread has ended."""
    try:
        return read_status(pid, tid).state in GONE
    except TargetGoneError:
        return True


def check_has_memory(pid: int, status: Status) -> None:
    """Raise what there is to say of a process without memory of its own: it has ended, or is the kernel's, or another's thread."""
    if pid == os.getpid():
        raise InvalidArgumentError(f"{pid} is this process", pid=pid, remedy="use dirtylog.track for memory of its own")
    if status.tgid != pid:
        raise InvalidArgumentError(f"{pid} is a thread, not a process", pid=pid, remedy=f"name its process, {status.tgid} (Tgid)")
    if status.state in GONE:
        if runs_without_first(pid):
            raise UnsupportedError(
                f"the first thread of process {pid} has left, and others run on",
                pid=pid,
                reason="the kernel shows the memory of such a process no longer by its number",
            )
        raise TargetGoneError(f"process {pid} has ended", pid=pid, reason="its parent has not asked for its exit status yet")
    if not status.has_memory:
        if _is_of_the_kernel(pid):
            raise InvalidArgumentError(f"{pid} is a thread of the kernel: it has no memory of its own", pid=pid)
        raise TargetGoneError(f"process {pid} has ended", pid=pid, reason="its memory has gone, and it goes, too")


def _is_of_the_kernel(pid: int) -> bool:
    try:
        # The name, in parentheses, may have anything in it.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    try:
        return bool(int(fields[_FLAGS]) & _PF_KTHREAD)
    except (ValueError, IndexError) as error:
        raise DirtyLogError(f"the stat of process {pid} cannot be read", pid=pid, reason=str(error)) from error


def runs_without_first(pid: int) -> bool:
    """Return whether threads of a process run on of which the first has ended."""
    try:
        tids = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
        return any(read_status(pid, tid).state not in GONE for tid in tids if tid != pid)
    except (OSError, TargetGoneError):
        return False


def check_process(pid: int, architecture: Architecture[Any]) -> Status:
    """Return the status of a process in which a system call can be made, or raise why it cannot."""
    status = read_status(pid)
    check_has_memory(pid, status)
    if status.tracer:
        raise UnsupportedError(
            f"process {pid} is being traced by process {status.tracer}",
            pid=pid,
            remedy=f"end the debugger or tracer, or {_AGENT}",
        )
    if status.state in "Tt":
        raise UnsupportedError(f"process {pid} is stopped", pid=pid, remedy=f"let it go on (kill -CONT {pid}), then try again")
    if status.shadow_stack:
        raise UnsupportedError(
            f"process {pid} has a shadow stack", pid=pid, reason="the return into a signal frame would end it", remedy=_AGENT
        )
    _check_executable(pid, architecture)
    return status


def _check_executable(pid: int, architecture: Architecture[Any]) -> None:
    try:
        with Path(f"/proc/{pid}/exe").open("rb") as file:
            head = file.read(64)
            machine = int.from_bytes(head[_ELF_MACHINE : _ELF_MACHINE + 2], "little")
            if head[:5] != b"\x7fELF\x02" or machine != architecture.elf_machine:
                raise UnsupportedError(
                    f"process {pid} is a program for another machine",
                    pid=pid,
                    reason=f"ELF machine {machine}, class {head[4:5].hex()}; this is {architecture.elf_machine}, class 02",
                    remedy=_AGENT,
                )
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as image:
                if image.find(_GO_MAGIC) >= 0:
                    raise UnsupportedError(
                        f"process {pid} is a Go program",
                        pid=pid,
                        reason="a goroutine's stack may have no room for a signal frame",
                        remedy="use port compare",
                    )
    except PermissionError as error:
        raise AccessDeniedError(f"cannot look at process {pid}", errno=error.errno, pid=pid, remedy=ATTACH_REMEDY) from error
    except FileNotFoundError as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    except OSError as error:
        raise DirtyLogError(f"cannot read the program of process {pid}", pid=pid, reason=str(error)) from error


def threads_by_preference(pid: int, architecture: Architecture[Any]) -> list[int]:
    """Return the threads in which to make a system call, best first.

    First those in a sleep that goes on after a stop as if nothing had been, then those that run, then those in a system call that
    may end with EINTR. One in an uninterruptible sleep cannot be stopped, and is none of them.
    """
    ranked: list[tuple[int, int]] = []
    try:
        entries = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    for entry in entries:
        tid = int(entry.name)
        try:
            call = (entry / "syscall").read_bytes().split()
            state = read_status(pid, tid).state
            number = -1 if call[:1] == [b"running"] else int(call[0])
        except (OSError, TargetGoneError):
            continue
        except (ValueError, IndexError) as error:
            raise DirtyLogError(f"the system call of thread {tid} cannot be read", pid=pid, reason=str(error)) from error
        if state not in "D" + GONE:
            ranked.append((0 if number in architecture.restartable else 1 if number < 0 else 2, tid))
    return [tid for _, tid in sorted(ranked)]
