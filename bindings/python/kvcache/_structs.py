"""Structs of the header from keyword arguments, and back to named tuples.

An options struct is filled by its own `_init` function and then set field by field, so defaults are
the library's; a struct that comes back becomes a `NamedTuple` of the same field names.
"""

from __future__ import annotations

from typing import Any, TypeVar

from ._native import ffi, lib
from .errors import check

T = TypeVar("T", bound="tuple[Any, ...]")

# Types are parsed once: by name it takes a microsecond each time.
_types: dict[str, Any] = {}


def kind(name: str) -> Any:
    """The C type of this name, or a pointer or array of one."""
    found = _types.get(name)
    if found is None:
        found = _types[name] = ffi.typeof(name)
    return found


def options(name: str, **fields: Any) -> Any:
    """A struct with its defaults, but for the fields that are given and not None."""
    struct = ffi.new(kind(f"{name} *"))
    check(getattr(lib, f"{name}_init")(struct, ffi.sizeof(kind(name))))
    for field, value in fields.items():
        if value is not None:
            assign(struct, field, value)
    return struct


def assign(struct: Any, field: str, value: Any) -> None:
    """Sets a field, with an error that names it."""
    try:
        setattr(struct, field, value)
    except OverflowError as e:
        raise ValueError(f"{field} cannot be {value}") from e
    except TypeError as e:
        raise TypeError(f"{field} cannot be {value!r}") from e


def counts(handle: Any, read: Any, name: str, result: type[T]) -> T:
    """What `read(handle, out, sizeof(out))` writes, as a named tuple."""
    struct = ffi.new(kind(f"{name} *"))
    check(read(handle, struct, ffi.sizeof(kind(name))))
    return record(struct, result)


def record(struct: Any, result: type[T]) -> T:
    """The fields of a struct that a named tuple has."""
    fields: tuple[str, ...] = getattr(result, "_fields")
    return result(*(getattr(struct, field) for field in fields))


def uint(value: int, name: str, bits: int = 32) -> int:
    """An integer that fits an argument of the header, or an error that names it."""
    try:
        value = value.__index__()
    except AttributeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} cannot be {value}: 0 to 2^{bits} - 1")
    return value
