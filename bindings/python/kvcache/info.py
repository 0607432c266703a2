"""Which library this is."""

from __future__ import annotations

from ._native import ffi, lib
from .errors import _text


def version() -> str:
    """The library's version, "MAJOR.MINOR.PATCH"."""
    return ffi.string(lib.kvc_version()).decode()


def abi_version() -> int:
    """The version of the C ABI, 0x00MAJOR_00MINOR."""
    return lib.kvc_abi_version()


def build_info() -> str:
    """One line about the build: features, formats, the CPU level that runs, GPU kernels inside."""
    return _text(lib.kvc_build_info)


def _require() -> None:
    """Fails where the wheel's declarations and its library are of different ABIs."""
    lib.kvc_abi_0_1()
    if abi_version() != lib.KVC_ABI_VERSION:
        raise ImportError(f"kvcache was made for ABI {lib.KVC_ABI_VERSION}, the library has {abi_version()}")
