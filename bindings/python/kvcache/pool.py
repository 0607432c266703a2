"""A block pool alone: ids and reference counts, for engines with tables and tensors of their own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Ids
from typing import Any, NamedTuple

from . import _structs
from ._native import ffi, lib
from .arrays import block_ids
from .errors import check


class PoolCounts(NamedTuple):
    """What a pool holds now: `blocks` = `free_blocks` + `held_blocks`."""

    blocks: int
    free_blocks: int
    held_blocks: int


class Pool:
    """Blocks 0 to n - 1, each free or held by as many holders as retained it. One call at a time."""

    def __init__(self, blocks: int) -> None:
        out = ffi.new("kvc_pool **")
        check(lib.kvc_pool_create(_structs.uint(blocks, "blocks"), out))
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_pool_destroy, out[0])

    def close(self) -> None:
        """Ends the pool. Closing it again does nothing."""
        self._end()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def allocate(self, n: int) -> list[int]:
        """Takes `n` free blocks, all or none, each with one holder; `OutOfBlocks` where fewer are free."""
        n = _structs.uint(n, "n")
        if n == 0:
            return []
        # More than the pool has is refused before anything is written: no memory is needed for it.
        out = ffi.new("int32_t[]", min(n, self.stats().blocks))
        check(lib.kvc_pool_allocate_n(self._handle, n, out))
        return ffi.unpack(out, n)

    def retain(self, blocks: Ids[int]) -> None:
        """Adds a holder to each block, all or none. A block may occur several times."""
        ids, n = block_ids(blocks)
        check(lib.kvc_pool_retain_n(self._handle, ids, n))

    def free(self, blocks: Ids[int]) -> int:
        """Takes a holder from each block, all or none, and tells how many became free."""
        ids, n = block_ids(blocks)
        freed = ffi.new("uint32_t *")
        check(lib.kvc_pool_free_n(self._handle, ids, n, freed))
        return freed[0]

    def refs(self, block: int) -> int:
        """How many hold the block: 0 where it is free or not a block of the pool."""
        out = ffi.new("uint32_t *")
        check(lib.kvc_pool_refs(self._handle, block, out))
        return out[0]

    def stats(self) -> PoolCounts:
        """What the pool holds."""
        return _structs.counts(self._handle, lib.kvc_pool_stats, "kvc_pool_counts", PoolCounts)
