"""What a call of the library can answer but success, as exceptions.

Every code of the header has its class here, below `Error`; codes about arguments are `ValueError`s
too, so that callers who know nothing of this library catch what they expect. A test holds the table
against the header.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._native import ffi, lib


class Error(Exception):
    """The library answered with a code below 0. `code` is the code, the text says what was wrong."""

    code = 0


class InvalidArgument(Error, ValueError):
    """An argument has a value that the function does not accept."""


class NullPointer(Error, ValueError):
    """A required pointer is NULL."""


class Misaligned(Error, ValueError):
    """A pointer is not aligned for its element type."""


class StructSize(Error):
    """The wheel's declarations and its library do not fit together."""


class SizeOverflow(Error, OverflowError):
    """A size or an address does not fit."""


class Unsupported(Error, NotImplementedError):
    """Valid, but this build cannot do it."""


class StaleHandle(Error, LookupError):
    """A handle, sequence, pin or position is not live, or belongs to another object."""


class BufferTooSmall(Error, ValueError):
    """A buffer is smaller than the call needs."""


class BadBlock(Error, ValueError):
    """A block id is outside the pool, or the block is not allocated."""


class OutOfBlocks(Error):
    """Not enough free or evictable blocks; nothing was taken. An ordinary answer.

    `missing` is how many must be freed before the same call can succeed.
    """

    missing = 0


class OutOfSequences(Error):
    """Every sequence slot is in use."""


class OutOfMemory(Error, MemoryError):
    """The system refused memory."""


class TooManyHandles(Error):
    """Every handle slot of the process is in use."""


class NoKernels(Error):
    """The library was built without kernels for this device."""


class NoDevice(Error):
    """The device is not present."""


class DeviceFailed(Error, RuntimeError):
    """The device or its driver reported an error."""


class TierFailed(Error, RuntimeError):
    """A tier's files or store failed; the cache works on without it."""


class InvalidState(Error, RuntimeError):
    """The object is not in a state in which the call is allowed, or another call is using it."""


class LayerMissing(Error, RuntimeError):
    """A layer of a sequence was to be loaded from a tier, and never will be: `Sequence.cancel_load`, and
    compute its tokens."""


class Panic(Error, RuntimeError):
    """The library panicked; the object involved is poisoned."""


class Poisoned(Error, RuntimeError):
    """An earlier panic left the object unusable; only closing it is allowed."""


# Constant of the header, class.
BY_NAME: dict[str, type[Error]] = {
    "KVC_ERR_INVALID_ARGUMENT": InvalidArgument,
    "KVC_ERR_NULL_POINTER": NullPointer,
    "KVC_ERR_MISALIGNED": Misaligned,
    "KVC_ERR_STRUCT_SIZE": StructSize,
    "KVC_ERR_OVERFLOW": SizeOverflow,
    "KVC_ERR_UNSUPPORTED": Unsupported,
    "KVC_ERR_STALE_HANDLE": StaleHandle,
    "KVC_ERR_BUFFER_TOO_SMALL": BufferTooSmall,
    "KVC_ERR_BAD_BLOCK": BadBlock,
    "KVC_ERR_OUT_OF_BLOCKS": OutOfBlocks,
    "KVC_ERR_OUT_OF_SEQUENCES": OutOfSequences,
    "KVC_ERR_OUT_OF_MEMORY": OutOfMemory,
    "KVC_ERR_TOO_MANY_HANDLES": TooManyHandles,
    "KVC_ERR_NO_KERNELS": NoKernels,
    "KVC_ERR_NO_DEVICE": NoDevice,
    "KVC_ERR_DEVICE_FAILED": DeviceFailed,
    "KVC_ERR_TIER_FAILED": TierFailed,
    "KVC_ERR_INVALID_STATE": InvalidState,
    "KVC_ERR_LAYER_MISSING": LayerMissing,
    "KVC_ERR_PANIC": Panic,
    "KVC_ERR_POISONED": Poisoned,
}
BY_CODE = {getattr(lib, name): kind for name, kind in BY_NAME.items()}


def error(status: int, text: str | None = None) -> Error:
    """The exception for `status`, with this thread's last error as its text."""
    kind = BY_CODE.get(status, Error)
    if text is None:
        text = last_error() or status_text(status)
    made = kind(text)
    made.code = status
    if isinstance(made, OutOfBlocks):
        made.missing = lib.kvc_last_missing_blocks()
    return made


def check(status: int) -> None:
    """Raises where a call did not succeed."""
    if status != 0:
        raise error(status)


def last_error() -> str:
    """The text of the last error of a call on this thread; empty before the first."""
    return _text(lib.kvc_last_error)


def status_text(status: int) -> str:
    """A short text of a status code."""
    return _text(lambda buf, size: lib.kvc_status_text(status, buf, size))


def _text(write: Callable[[Any, int], int]) -> str:
    """The whole of a text that `write` copies as snprintf would."""
    size = write(ffi.NULL, 0) + 1
    buf = ffi.new("char[]", size)
    write(buf, size)
    return ffi.string(buf).decode("utf-8", "replace")
