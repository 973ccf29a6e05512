"""Programs that users bring: raw bytes with an entry point, and ELF files."""

from __future__ import annotations

import importlib
import io
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dirtylog.errors import InvalidArgumentError, UnsupportedError

ELF_MAGIC = b"\x7fELF"
MAX_BYTES = 256 << 20
"""The longest file that is read: a guest program has no need of more."""
_COPIES = 8
_PIECE = 64 << 10
_PN_XNUM = 0xFFFF  # gABI: the number of program headers stands elsewhere

_ISA_OF_ELF = {
    "EM_X86_64": "x86",
    "EM_ARM": "arm",
    "EM_AARCH64": "arm64",
    "EM_MIPS": "mips",
    "EM_PPC": "ppc32",
    "EM_PPC64": "ppc64",
    "EM_RISCV": "riscv64",
    "EM_S390": "s390x",
}


class Segment(NamedTuple):
    """``data`` at guest-physical ``address``, and zeros after it up to ``nbytes``."""

    address: int
    data: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """A user's program: what is loaded where, and where every vCPU enters it.

    An emulated vCPU halts when it reaches ``halt``, and at an instruction that ends emulation, such as x86's hlt; a KVM vCPU
    only at such an instruction. The first register of the store loop's list (rsi on x86) holds the vCPU's index, the others 0;
    on KVM the stack pointer is set too. ``isa`` is the instruction set that an ELF file names.

    A limit of Unicorn: a vCPU that is stopped for a get or a pause may execute the instruction that it was stopped at again.
    Loads and stores bear that; one instruction that reads and writes the same memory (x86's inc, xadd) may happen twice.
    """

    segments: tuple[Segment, ...]
    entry: int
    halt: int | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        for name, address in (("entry", self.entry), ("halt", self.halt or 0)):
            if not 0 <= address < 1 << 64:
                raise InvalidArgumentError(f"the image's {name} {address:#x} is no address: addresses have 64 bits")

    @classmethod
    def raw(cls, data: bytes, *, load: int = 0, entry: int | None = None, halt: int | None = None) -> Image:
        """Return an image of machine code that lies at guest-physical ``load`` and is entered there, or at ``entry``."""
        return cls((Segment(load, data, len(data)),), load if entry is None else entry, halt)

    @classmethod
    def read(cls, path: str | Path, *, load: int | None = None, entry: int | None = None, halt: int | None = None) -> Image:
        """Return the image in a file: ELF if it begins as such a file does, else raw.

        An ELF file says itself where it lies, so ``load`` does not go with it. :class:`InvalidArgumentError` if the file cannot
        be read or is no program for a guest; :class:`UnsupportedError` if it is ELF and pyelftools is not installed.
        """
        try:
            with Path(path).open("rb") as file:
                # Piece by piece: what is read at once is allocated before, and a device has no end.
                data = b"".join(itertools.islice(iter(partial(file.read, _PIECE), b""), MAX_BYTES // _PIECE + 1))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise InvalidArgumentError(f"cannot read the image {str(path)!r}", reason=reason) from error
        if len(data) > MAX_BYTES:
            raise InvalidArgumentError(f"cannot read the image {str(path)!r}", reason=f"it has more than {MAX_BYTES >> 20} MiB")
        if not data.startswith(ELF_MAGIC):
            return cls.raw(data, load=load or 0, entry=entry, halt=halt)
        if load is not None:
            raise InvalidArgumentError(f"{str(path)!r} is an ELF file and says itself where it lies: leave the load address out")
        segments, elf_entry, isa = _read_elf(data, str(path))
        return cls(segments, elf_entry if entry is None else entry, halt, isa)

    def check_isa(self, isa: str) -> None:
        """Raise :class:`InvalidArgumentError` if this is an ELF file for another instruction set."""
        if self.isa is not None and self.isa != isa:
            raise InvalidArgumentError(f"the image is a program for {self.isa}, but the guest is {isa}")


def _read_elf(data: bytes, name: str) -> tuple[tuple[Segment, ...], int, str]:
    try:
        elffile = importlib.import_module("elftools.elf.elffile")
        utils = importlib.import_module("elftools.common.utils")
    except ImportError as error:
        raise UnsupportedError(
            f"{name!r} is an ELF file, and pyelftools is not installed", remedy="install it: pip install 'dirtylog[elf]'"
        ) from error
    try:
        elf: Any = elffile.ELFFile(io.BytesIO(data))
        machine, kind, entry = elf["e_machine"], elf["e_type"], elf["e_entry"]
        if elf["e_phnum"] >= _PN_XNUM or (elf["e_phnum"] and elf["e_phentsize"] < elf.structs.Elf_Phdr.sizeof()):
            raise ValueError("its program headers are too many or too short")  # noqa: TRY301 - said as what the parser says
        # Not by iter_segments: it makes an object of every segment, and goes through all sections for each dynamic one.
        places = (elf["e_phoff"] + number * elf["e_phentsize"] for number in range(elf["e_phnum"]))
        parts = [utils.struct_parse(elf.structs.Elf_Phdr, elf.stream, stream_pos=place) for place in places]
        headers = [part for part in parts if part.p_type == "PT_LOAD" and part.p_memsz]
    except Exception as error:  # pyelftools raises what its parsers raise, of many kinds
        raise InvalidArgumentError(f"{name!r} begins as an ELF file but cannot be parsed", reason=str(error)) from error
    isa = _ISA_OF_ELF.get(machine)
    if isa is None:
        raise InvalidArgumentError(f"{name!r} is an ELF file for {machine}: no guest has that instruction set")
    if kind != "ET_EXEC" or not headers:
        raise InvalidArgumentError(
            f"{name!r} is no program that runs where it was linked ({kind})", remedy="link it statically: -static -no-pie"
        )
    for part in headers:
        if part.p_vaddr != part.p_paddr:
            raise InvalidArgumentError(
                f"{name!r} is linked to run at {part.p_vaddr:#x} and to lie at {part.p_paddr:#x}: a guest's addresses are physical"
            )
        if part.p_filesz > part.p_memsz or part.p_offset + part.p_filesz > len(data):
            raise InvalidArgumentError(f"{name!r} is cut short: a segment has {part.p_filesz} bytes at offset {part.p_offset}")
    if sum(part.p_filesz for part in headers) > _COPIES * len(data):
        raise InvalidArgumentError(f"{name!r} has segments that share their bytes: together they have {_COPIES} times the file's")
    segments = tuple(Segment(part.p_paddr, data[part.p_offset : part.p_offset + part.p_filesz], part.p_memsz) for part in headers)
    return segments, entry, isa
