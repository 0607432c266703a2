"""Other libraries' arrays as addresses: nothing is copied.

`rows` is the hot path (a contiguous array to read or write), `array` keeps strides. Both take torch
tensors, whatever has the buffer protocol (NumPy, `array`, `memoryview`), and whatever has DLPack
(JAX, CuPy, TensorFlow). What cannot be taken is refused by a `TypeError` (an element type, a kind of
object) or a `ValueError` (a layout, a device, read-only memory), never converted.

It knows nothing of caches. An address is good while its `keep` lives.

What is used again and again may be looked at once: `Rows`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from ._native import ffi, lib
from ._structs import kind

F32, F16, BF16 = lib.KVC_DTYPE_F32, lib.KVC_DTYPE_F16, lib.KVC_DTYPE_BF16
NAMES = {F32: "f32", F16: "f16", BF16: "bf16", "u32": "u32", "i32": "i32", "i64": "i64", "u8": "u8"}
CPU, CUDA = "cpu", "cuda"
_BUFFER = {"f": F32, "e": F16, "I": "u32", "i": "i32", "q": "i64", "l": "i64", "B": "u8", "c": "u8", "b": "u8"}
# DLPack: (type code, bits).
_DLPACK = {(2, 32): F32, (2, 16): F16, (4, 16): BF16, (1, 32): "u32", (0, 32): "i32", (0, 64): "i64", (1, 8): "u8"}
_NULL = ffi.NULL


class Array(NamedTuple):
    """An array's memory: strides in elements, `keep` what must live as long as the address."""

    address: Any
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    ordinal: int
    writable: bool
    keep: Any


class Rows:
    """An array that is looked at once, for many calls: an engine's buffers of Q, K, V and outputs stay
    where they are from step to step. Taken wherever rows are, in less time than the array itself.

    It keeps the array alive, and what it says is true of the array as it was: the array must not be
    resized or given other storage. On a GPU a
    tensor's calls are ordered with torch's stream as ever; another library's array must be ready on
    the cache's stream.
    """

    __slots__ = ("_found", "_glance", "shape")

    def __init__(self, x: Any) -> None:
        found = rows(x, "x")
        if type(found.dtype) is not int:
            raise TypeError(f"x has elements of type {found.dtype}: rows are f32, f16 or bf16")
        self._found, self.shape = found, found.shape
        self._glance = (found.address, found.dtype) if found.device == CPU else None


def array(x: Any, name: str, stream: int | None = None) -> Array:
    """The memory of `x`, whatever its layout. `stream` is where a GPU's data must be ready."""
    if type(x) is Rows:
        return x._found
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _torch(x, name, torch)
    try:
        view = memoryview(x)
    except (TypeError, ValueError, BufferError):
        return _dlpack(x, name, stream)
    dtype = _BUFFER.get(view.format.lstrip("@=<"))
    if dtype is None or view.itemsize != {F32: 4, F16: 2, "u32": 4, "i32": 4, "i64": 8, "u8": 1}[dtype]:
        raise TypeError(f"{name} has elements of format {view.format!r}, which the library does not know")
    shape = view.shape or ()
    if view.c_contiguous:
        pointer = ffi.from_buffer(x)
        return Array(pointer, dtype, shape, _dense(shape), CPU, 0, not view.readonly, pointer)
    face = getattr(x, "__array_interface__", None)
    if face is None or any(stride % view.itemsize for stride in view.strides or ()):
        raise ValueError(f"{name} is not contiguous")
    strides = tuple(stride // view.itemsize for stride in view.strides or ())
    return Array(ffi.cast("void *", face["data"][0]), dtype, shape, strides, CPU, 0, not view.readonly, x)


def rows(x: Any, name: str, writable: bool = False, stream: int | None = None) -> Array:
    """The memory of a contiguous array."""
    found = array(x, name, stream)
    if found.strides != _dense(found.shape) and not _packed(found):
        raise ValueError(f"{name} is not contiguous: its strides are {found.strides} for the shape {found.shape}")
    if writable and not found.writable:
        raise ValueError(f"{name} is read-only and would be written")
    return found


def quick(x: Any, shapes: tuple[tuple[int, ...], ...] | None, writable: bool) -> tuple[Any, Any] | None:
    """Address and element type of rows on the CPU, of one of `shapes` or any, where a glance is enough;
    where it is not, None, and `rows` finds out what the matter is. A step makes a few of these for each
    layer."""
    kind = type(x)
    if kind is Rows:
        if (shapes is None or x.shape in shapes) and (not writable or x._found.writable):
            return x._glance
    elif kind is _quick.numpy:
        if shapes is None or x.shape in shapes:
            dtype = _FLOATS.get(x.dtype.char)
            if dtype is not None:
                try:
                    return _from_buffer(_BYTES, x, writable), dtype
                except (ValueError, BufferError):
                    return None
    elif kind is _quick.torch:
        if (shapes is None or x.shape in shapes) and x.is_cpu and not x.requires_grad and not x.is_neg():
            dtype = _torch_dtypes.get(x.dtype)
            if dtype.__class__ is int and x.layout is _quick.strided and x.is_contiguous():
                return _cast(_VOID, x.data_ptr()), dtype
    elif _quick.numpy is None or _quick.torch is None:
        _quick.look()
    return None


_FLOATS = {"f": F32, "e": F16}
_from_buffer, _cast, _BYTES = ffi.from_buffer, ffi.cast, kind("char[]")


class _Quick:
    """The two types whose arrays are known at a glance, once their libraries are loaded."""

    __slots__ = ("numpy", "torch", "strided")

    def __init__(self) -> None:
        self.numpy = self.torch = self.strided = None

    def look(self) -> None:
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        self.numpy = getattr(numpy, "ndarray", None)
        if torch is not None and hasattr(torch, "Tensor"):
            _know(torch)
            self.torch, self.strided = torch.Tensor, torch.strided


_quick = _Quick()


def floats(x: Any, name: str) -> Any:
    """A contiguous float32 array on the CPU, or a list of numbers, as a `float *`; None as NULL."""
    if x is None:
        return _NULL, 0
    if isinstance(x, (list, tuple)):
        return ffi.new(kind("float[]"), [float(value) for value in x]), len(x)
    found = typed(rows(x, name), name, F32)
    return ffi.cast(kind("float *"), found.address), count(found.shape)


def tokens(x: Any, name: str = "tokens") -> tuple[Any, int]:
    """Token ids as a `uint32_t *` and their number. A list or an array of 64-bit integers is copied
    to 32 bits; an array of unsigned 32-bit integers is taken as it is."""
    return _ids(x, name, "u32", "uint32_t")


def block_ids(x: Any, name: str = "blocks") -> tuple[Any, int]:
    """Block ids as an `int32_t *` and their number, with the same freedom."""
    return _ids(x, name, "i32", "int32_t")


def slots(x: Any, name: str = "slots") -> tuple[Any, int]:
    """Slots as an `int64_t *` and their number, with the same freedom."""
    return _ids(x, name, "i64", "int64_t")


def _ids(x: Any, name: str, dtype: str, ctype: str) -> tuple[Any, int]:
    if isinstance(x, ffi.CData):
        return x, len(x)
    if not isinstance(x, (list, tuple, range)):
        tolist = getattr(x, "tolist", None)
        try:
            found = rows(x, name)
        except (TypeError, ValueError):
            if tolist is None:
                raise
            found = None
        if found is not None and found.dtype == dtype and found.device == CPU:
            # The view keeps the array's memory alive for as long as the pointer is used.
            pointer = ffi.from_buffer(f"{ctype}[]", x) if not _is_torch(x) else _TorchIds(found, x, ctype).pointer
            return pointer, count(found.shape)
        x = tolist() if tolist is not None else list(x)
    try:
        return ffi.new(kind(f"{ctype}[]"), list(x)), len(x)
    except OverflowError as e:
        raise ValueError(f"{name} has a number that {ctype} does not hold") from e
    except TypeError as e:
        raise TypeError(f"{name} must be integers: {e}") from e


class _TorchIds:
    """A tensor's ids: the pointer's owner is the tensor."""

    __slots__ = ("pointer",)

    def __init__(self, found: Array, x: Any, ctype: str) -> None:
        pointer = ffi.cast(f"{ctype} *", found.address)
        self.pointer = ffi.gc(pointer, lambda _, keep=x: None)


def typed(found: Array, name: str, dtype: Any) -> Array:
    """Refuses an array of another element type, or one that is not on the CPU."""
    if found.dtype != dtype:
        raise TypeError(f"{name} has elements of type {NAMES[found.dtype]}, not {NAMES[dtype]}")
    if found.device != CPU:
        raise ValueError(f"{name} is on {found.device}:{found.ordinal}, not on the CPU")
    return found


def sized(found: Array, name: str, *shape: int) -> Array:
    """Refuses an array that is not `shape`; the last two dimensions may be one."""
    if found.shape != shape and found.shape != (*shape[:-2], shape[-2] * shape[-1]):
        raise ValueError(f"{name} has the shape {found.shape}, not {shape}")
    return found


def count(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    total = 1
    for n in shape:
        total *= n
    return total


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _packed(found: Array) -> bool:
    """Whether the elements lie one after the other: the stride of a dimension of 1 says nothing."""
    pairs = zip(found.shape, found.strides, _dense(found.shape))
    return 0 in found.shape or all(n == 1 or stride == dense for n, stride, dense in pairs)


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


_torch_dtypes: dict[Any, Any] = {}


def _know(torch: Any) -> None:
    if not _torch_dtypes:
        _torch_dtypes.update({torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16})
        _torch_dtypes.update({torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"})
        if hasattr(torch, "uint32"):
            _torch_dtypes[torch.uint32] = "u32"


def _torch(x: Any, name: str, torch: Any) -> Array:
    _know(torch)
    dtype = _torch_dtypes.get(x.dtype)
    if dtype is None:
        raise TypeError(f"{name} has elements of type {x.dtype}, which the library does not know")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} is {x.layout}, not a strided tensor")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which the library does not compute: use torch.no_grad()")
    if x.is_conj() or x.is_neg():
        raise ValueError(f"{name} is a lazy view: call resolve_conj() or resolve_neg()")
    device = x.device
    if device.type not in (CPU, CUDA):
        raise ValueError(f"{name} is on {device}, not on the CPU or a CUDA device")
    pointer = ffi.cast(_VOID, x.data_ptr())
    return Array(pointer, dtype, tuple(x.shape), x.stride(), device.type, device.index or 0, True, x)


_VOID = kind("void *")


def _dlpack(x: Any, name: str, stream: int | None) -> Array:
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} is a {type(x).__name__}: not a tensor, a buffer or an object with DLPack")
    from . import _dlpack as dlpack

    device, ordinal = dlpack.device(x, name)
    tensor = dlpack.tensor(x, name, stream if device == CUDA else None)
    dtype = _DLPACK.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise TypeError(f"{name} has {tensor.bits}-bit elements of DLPack type {tensor.code}, unknown to the library")
    pointer = ffi.cast(_VOID, tensor.address)
    strides = tensor.strides or _dense(tensor.shape)
    return Array(pointer, dtype, tensor.shape, strides, device, ordinal, tensor.writable, tensor.keep)
