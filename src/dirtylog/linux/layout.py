"""C structs declared once, as annotated fields, and the encoding of ioctl numbers.

::

    @struct(16)
    class DirtyLogArgument(Struct):
        slot: U32
        padding: U32
        dirty_bitmap: U64

The annotations are the fields, for ctypes and for the type checker; the size is asserted when the class is made.
"""

from __future__ import annotations

import ctypes
import enum
import platform
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

U8 = Annotated[int, ctypes.c_uint8]
U16 = Annotated[int, ctypes.c_uint16]
U32 = Annotated[int, ctypes.c_uint32]
U64 = Annotated[int, ctypes.c_uint64]


class Struct(ctypes.Structure):
    """A struct of the kernel's interface, in native layout."""

    get_request: ClassVar[int]
    put_request: ClassVar[int]


_S = TypeVar("_S", bound=Struct)


def struct(nbytes: int) -> Callable[[type[_S]], type[_S]]:
    """Declare a :class:`Struct` from its annotations; its size must be ``nbytes``."""

    def declare(cls: type[_S]) -> type[_S]:
        hints = get_type_hints(cls, include_extras=True)
        cls._fields_ = [
            (name, hints[name].__metadata__[0] if hasattr(hints[name], "__metadata__") else hints[name])
            for name in cls.__annotations__
        ]
        if ctypes.sizeof(cls) != nbytes:
            raise TypeError(f"{cls.__name__} has {ctypes.sizeof(cls)} bytes, but the kernel's struct has {nbytes}")
        return cls

    return declare


def registers(*, get: int, put: int) -> Callable[[type[_S]], type[_S]]:
    """Declare a struct as registers of a vCPU, with the numbers of the ioctls that get and set them."""

    def declare(cls: type[_S]) -> type[_S]:
        nbytes = ctypes.sizeof(cls)
        cls.get_request = ioctl_number(Direction.READ, get, nbytes)
        cls.put_request = ioctl_number(Direction.WRITE, put, nbytes)
        return cls

    return declare


def offset_of(kind: type[Struct], field: str) -> int:
    """Return the offset of a field in bytes."""
    return int(getattr(kind, field).offset)


class Direction(enum.Enum):
    """Which way an ioctl moves its argument, seen from user space."""

    NONE = "none"
    WRITE = "write"
    READ = "read"
    BOTH = "both"


# Linux include/uapi/asm-generic/ioctl.h, and the five architectures that came with encodings of their own
# (arch/{mips,powerpc,sparc,alpha,parisc}/include/uapi/asm/ioctl.h): (width of the size field, none, read, write).
_GENERIC = (14, 0, 2, 1)
_OWN_BITS = (13, 1, 2, 4)
_PARISC = (14, 0, 1, 2)
_ENCODINGS = {"mips": _OWN_BITS, "ppc": _OWN_BITS, "powerpc": _OWN_BITS, "sparc": _OWN_BITS, "alpha": _OWN_BITS, "parisc": _PARISC}
_NUMBER_BITS = _TYPE_BITS = 8
KVMIO = 0xAE


def ioctl_number(direction: Direction, number: int, nbytes: int = 0, *, machine: str | None = None, magic: int = KVMIO) -> int:
    """Return the number of an ioctl (_IO, _IOR, _IOW, _IOWR) on ``machine`` (:func:`platform.machine`), by default this one.

    ``magic`` is the letter of the driver, KVM's if none is given.
    """
    name = platform.machine() if machine is None else machine
    size_bits, none, read, write = next((own for prefix, own in _ENCODINGS.items() if name.startswith(prefix)), _GENERIC)
    bits = {Direction.NONE: none, Direction.READ: read, Direction.WRITE: write, Direction.BOTH: read | write}[direction]
    return ((bits << size_bits | nbytes) << _TYPE_BITS | magic) << _NUMBER_BITS | number
