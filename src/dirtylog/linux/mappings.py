"""The mappings of a process, from /proc/PID/maps, and the choice among them."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.errors import AccessDeniedError, DirtyLogError, InvalidArgumentError, TargetGoneError
from dirtylog.linux import abi

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS = ("heap", "stack", "anonymous", "file", "shared", "private", "writable")
_KERNEL_NAMES = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]", "[uprobes]")
_RANGE = re.compile(r"(0x[0-9a-fA-F]+)-(0x[0-9a-fA-F]+)")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f:]+) (\d+) *(.*)", re.DOTALL | re.ASCII)
_COVERING = 0x10  # PROCMAP_QUERY_COVERING_OR_NEXT_VMA


class Mapping(NamedTuple):
    """One line of /proc/PID/maps: addresses in bytes, ``permissions`` such as "rw-p", ``name`` a path or a name in brackets."""

    start: int
    end: int
    permissions: str
    offset: int
    file: str
    """Device and inode, "00:00 0" for memory without a file."""
    name: str

    @property
    def anonymous(self) -> bool:
        """Whether a page that is not there reads as zeros: private, and of no file."""
        return self.file.endswith(" 0") and self.permissions[3] == "p"

    @property
    def shared(self) -> bool:
        """Whether others can write it through mappings of their own, or through a file."""
        return self.permissions[3] == "s"

    @property
    def of_the_kernel(self) -> bool:
        """Whether it is memory that the kernel keeps in the process, and writes itself."""
        return self.name in _KERNEL_NAMES

    def is_kind(self, kind: str) -> bool:
        """Return whether it is one of :data:`KINDS`."""
        return {
            "heap": self.name == "[heap]",
            "stack": self.name.startswith("[stack"),
            "anonymous": self.anonymous,
            "file": not self.file.endswith(" 0"),
            "shared": self.shared,
            "private": not self.shared,
            "writable": self.permissions[1] == "w",
        }[kind]


def read_mappings(pid: int | None = None) -> list[Mapping]:
    """Return the mappings of a process, ascending; none for one that has ended or is ending."""
    path = f"/proc/{pid or 'self'}/maps"
    try:
        text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    except PermissionError as error:
        raise AccessDeniedError(
            f"cannot read {path}", errno=error.errno, pid=pid, remedy="be the same user, or root (CAP_SYS_PTRACE)"
        ) from error
    except OSError as error:
        raise DirtyLogError(f"cannot read {path}", errno=error.errno, pid=pid, reason=error.strerror) from error
    # By newlines alone, which the kernel escapes in names: these may have anything else in them.
    return _in_order(_mapping(line) for line in text.split("\n") if line)


def _in_order(listed: Iterable[Mapping]) -> list[Mapping]:
    """Return mappings that do not overlap: the kernel lists them in pieces, and one may grow into what was listed before."""
    found: list[Mapping] = []
    end = 0
    for mapping in listed:
        if mapping.end > end:
            found.append(mapping if mapping.start >= end else mapping._replace(start=end))
            end = mapping.end
    return found


def _mapping(line: str) -> Mapping:
    match = _LINE.fullmatch(line)
    if match is None:
        raise DirtyLogError(f"a line of maps that cannot be read: {line!r}")
    start, end, permissions, offset, device, inode, name = match.groups()
    if int(start, 16) >= int(end, 16):
        raise DirtyLogError(f"a line of maps that cannot be read: {line!r}", reason="it ends before it begins")
    return Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), f"{device} {inode}", name)


class Selection:
    """Which mappings to log: all, or those that one of the words chooses.

    A word is one of :data:`KINDS`, a range of addresses such as 0x7f00000000-0x7f10000000, or a pattern of names such as
    ``*/libc.so*`` or ``[anon:*``. A range chooses what it overlaps, as a whole.
    """

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        self._kinds = [word for word in words if word in KINDS]
        self._ranges: list[tuple[int, int]] = []
        self._patterns: list[str] = []
        for word in words:
            match = _RANGE.fullmatch(word)
            if match:
                start, end = int(match[1], 16), int(match[2], 16)
                if start >= end:
                    raise InvalidArgumentError(f"map {word!r}: the range is empty; write START-END with START below END")
                self._ranges.append((start, end))
            elif word not in KINDS:
                if not re.search(r"[/\[*]", word):
                    raise InvalidArgumentError(
                        f"map {word!r}: choose {', '.join(KINDS)}, a range such as 0x1000-0x2000, or a name with / or [ or *"
                    )
                # A bracket is part of the names, not a set of characters.
                self._patterns.append(word.replace("[", "[[]"))

    def __contains__(self, mapping: Mapping) -> bool:
        if not (self._kinds or self._ranges or self._patterns):
            return True
        return (
            any(mapping.is_kind(kind) for kind in self._kinds)
            or any(start < mapping.end and mapping.start < end for start, end in self._ranges)
            or any(fnmatch.fnmatchcase(mapping.name, pattern) for pattern in self._patterns)
        )


@dataclass(slots=True)
class PageSizes:
    """The page sizes of mappings of a process: those of hugetlbfs have larger ones."""

    pid: int | None = None

    def of(self, mapping: Mapping) -> int:
        """Return the page size of a mapping in bytes."""
        if mapping.file.endswith(" 0"):
            return os.sysconf("SC_PAGESIZE")
        try:
            fd = os.open(f"/proc/{self.pid or 'self'}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TargetGoneError(f"there is no process {self.pid}", pid=self.pid) from error
        try:
            query = abi.ProcmapQuery(size=104, query_flags=_COVERING, query_addr=mapping.start)
            fcntl.ioctl(fd, abi.PROCMAP_QUERY, query)
            # The next one, where it has just been unmapped.
            here = query.vma_start <= mapping.start and mapping.end <= query.vma_end
            return int(query.vma_page_size) if here else os.sysconf("SC_PAGESIZE")
        except OSError as error:
            if error.errno != errno.ENOTTY:
                return os.sysconf("SC_PAGESIZE")  # it has just been unmapped
        finally:
            os.close(fd)
        return self._from_smaps(mapping)

    def _from_smaps(self, mapping: Mapping) -> int:
        """Do it as before Linux 6.11, which walks all of the process's memory."""
        here = False
        try:
            with Path(f"/proc/{self.pid or 'self'}/smaps").open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
                for line in lines:
                    if line.startswith(f"{mapping.start:08x}-"):
                        here = True
                    elif here and line.startswith("KernelPageSize:"):
                        return int(line.split()[1]) << 10
        except OSError as error:
            raise DirtyLogError(f"cannot read the smaps of process {self.pid}", pid=self.pid, reason=error.strerror) from error
        return os.sysconf("SC_PAGESIZE")
