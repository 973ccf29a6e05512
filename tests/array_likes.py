"""Objects that have a buffer, each in its own way: imitations of what other libraries have."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class WithInterface:
    """An object with the array interface only, as of an image library."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._array.__array_interface__


class WithDlpack:
    """A tensor on the CPU, with the protocol of today."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class WithOldDlpack(WithDlpack):
    """The protocol before 1.0, which has no flags and so cannot say what is read-only."""

    def __dlpack__(self, stream: None = None) -> Any:  # type: ignore[override]  # that is the old signature
        assert stream is None
        return self._array.__dlpack__()


class ThatCopies(WithDlpack):
    """A tensor that can give only a copy of itself, unless it is told not to: then it refuses, as the protocol wants."""

    def __dlpack__(self, *, copy: bool | None = None, **options: Any) -> Any:
        if copy is False:
            raise BufferError("this tensor can only be copied")
        return self._array.copy().__dlpack__(**options)


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class OnCuda:
    """A tensor on a graphics processor (DLPack's device 2): the capsule is a real one, the memory is not looked at."""

    def __init__(self) -> None:
        self._shape = (ctypes.c_int64 * 1)(1024)
        uint8 = 1 | 8 << 8 | 1 << 16
        self._tensor = _Tensor(0x1000, _Device(2, 0), 1, uint8, self._shape)

    def __dlpack__(self, **_options: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


class WithCudaInterface:
    """A tensor on a graphics processor that has that interface only."""

    __cuda_array_interface__ = {"shape": (1024,), "typestr": "|u1", "data": (0x1000, False), "version": 3}  # noqa: RUF012


class InGradient(WithDlpack):
    """A tensor that is part of a computation: its library refuses to give it away."""

    def __dlpack__(self, **_options: Any) -> Any:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view that may not be written."""
    view = array[:]
    view.flags.writeable = False
    return view


def bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a contiguous array as its bytes."""
    return array.reshape(-1).view(np.uint8)
