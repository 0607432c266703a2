"""Reads DLPack capsules (https://dmlc.github.io/dlpack) where they lie.

The capsule is looked into, not consumed: it stays the producer's, whose deleter runs when the last
reference goes. Loaded only when an object comes that has nothing but DLPack.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


class Found(NamedTuple):
    """What a capsule describes."""

    address: int
    code: int
    bits: int
    lanes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    writable: bool
    keep: Any


_READ_ONLY = 1
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]


def device(x: Any, name: str) -> tuple[str, int]:
    """Where the array lies: "cpu" or "cuda" (pinned and managed memory included), and its number."""
    kind, ordinal = x.__dlpack_device__()
    found = _DEVICES.get(int(kind))
    if found is None:
        raise ValueError(f"{name} is on a device of DLPack type {int(kind)}, not on the CPU or a CUDA device")
    return found, int(ordinal)


def tensor(x: Any, name: str, stream: int | None) -> Found:
    """The array's memory, ready on `stream`."""
    # Only the versioned form says what is read-only; producers from before it know no max_version.
    arguments = {} if stream is None else {"stream": stream}
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 0), **arguments)
        except TypeError:
            capsule = x.__dlpack__(**arguments)
    except BufferError as e:
        raise ValueError(f"{name} cannot be exported: {e}") from e
    label = _name(capsule)
    if label == b"dltensor_versioned":
        managed = _Versioned.from_address(_pointer(capsule, label))
        if managed.major != 1:
            raise ValueError(f"{name} is of DLPack {managed.major}.{managed.minor}, which is not known here")
        found, writable = managed.tensor, not managed.flags & _READ_ONLY
    elif label == b"dltensor":
        found, writable = _Tensor.from_address(_pointer(capsule, label)), True
    else:
        raise TypeError(f"{name}.__dlpack__() did not return a DLPack capsule")
    shape = tuple(found.shape[: found.ndim])
    strides = tuple(found.strides[: found.ndim]) if found.strides else None
    address = (found.data or 0) + found.byte_offset
    return Found(address, found.code, found.bits, found.lanes, shape, strides, writable, (capsule, x))
