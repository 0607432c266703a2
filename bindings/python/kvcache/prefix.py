"""The prefix index alone: which token sequences are cached in which blocks of the engine's own pools.

Matching compares the tokens, so there is never a false hit. All methods are thread-safe.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _structs, names
from ._native import ffi, lib
from .arrays import block_ids, tokens as token_ids
from .errors import Error, check, error

# No end: to the end of the prefix.
END = 2**64 - 1


class Position:
    """The end of a matched or inserted prefix. Good until blocks at its end are evicted."""

    __slots__ = ("_struct",)

    def __init__(self, struct: Any) -> None:
        self._struct = ffi.new("kvc_prefix_position *", struct)


class Hit(NamedTuple):
    """What a lookup found: whole blocks, and how many tokens more agree with `tail_blocks`."""

    tokens: int
    blocks: list[int]
    tail_tokens: int
    tail_blocks: list[int]
    at: Position


class Inserted(NamedTuple):
    """What an insertion did. `present` are the ids of the leading blocks that were cached already:
    use those. `stored_blocks` after them are cached now: retain theirs."""

    present_blocks: int
    present: list[int]
    stored_blocks: int
    at: Position


class PrefixCounts(NamedTuple):
    """Sizes of an index."""

    blocks: int
    capacity_blocks: int
    name_spaces: int
    nodes: int
    pins: int
    bytes: int


@dataclass(frozen=True)
class Retention:
    """A priority (0 to 100; blocks given none have 35) for the tokens from `start` to before `end`,
    for `duration_ms` after the last release, or until another is given."""

    priority: int
    start: int = 0
    end: int = END
    duration_ms: int = 0


@dataclass
class Commit:
    """Blocks to cache, in a `Prefix.run`; `above` is the position they follow, or None."""

    tokens: Any
    blocks: Any
    name_space: int = 0
    above: Position | None = None


@dataclass
class Query:
    """A sequence to look up, in a `Prefix.run`, and whether to pin what is found."""

    tokens: Any
    name_space: int = 0
    max_tokens: int | None = None
    pin: bool = False


class Answer(NamedTuple):
    """What became of a query; `pin` is 0 where none was asked for."""

    hit: Hit
    pin: int


class Ran(NamedTuple):
    """What became of each item of a `Prefix.run`: a result, or the `Error` that it met."""

    unlocked: list[Error | None]
    committed: list[Inserted | Error]
    answers: list[Answer | Error]


def retention_array(ranges: Iterable[Retention]) -> tuple[Any, int]:
    """A `kvc_retention[]` and its length."""
    listed = list(ranges)
    out = ffi.new("kvc_retention[]", len(listed))
    for struct, item in zip(out, listed):
        for field in ("start", "end", "priority", "duration_ms"):
            _structs.assign(struct, field, getattr(item, field))
    return out, len(listed)


def media_list(media: Iterable[tuple[int, bytes]]) -> Any:
    """A `kvc_media[]` of pairs of a position and 32 bytes."""
    listed = list(media)
    out = ffi.new("kvc_media[]", len(listed))
    for struct, (position, digest) in zip(out, listed):
        digest = bytes(digest)
        if len(digest) != 32:
            raise ValueError(f"the digest of a medium must have 32 bytes, not {len(digest)}")
        struct.position = _structs.uint(position, "position", 64)
        struct.digest = digest
    return out


class Prefix:
    """An exact radix index over token ids, with one block id for each of `groups` layer groups."""

    def __init__(
        self, *, block_tokens: int = 16, groups: int = 1, capacity_blocks: int = 1024, eviction: str = "lru"
    ) -> None:
        options = _structs.options(
            "kvc_prefix_options",
            block_tokens=block_tokens,
            groups=groups,
            capacity_blocks=capacity_blocks,
            eviction=names.number(names.EVICTIONS, eviction, "eviction"),
        )
        out = ffi.new("kvc_prefix **")
        check(lib.kvc_prefix_create_with(options, out))
        self.block_tokens, self.groups = block_tokens, groups
        self._handle = out[0]
        self._end = weakref.finalize(self, lib.kvc_prefix_destroy, out[0])

    def close(self) -> None:
        """Ends the index. Closing it again does nothing."""
        self._end()

    def __enter__(self) -> Prefix:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _room(self, count: int) -> int:
        return -(-count // self.block_tokens) * self.groups

    def lookup(self, tokens: Any, *, name_space: int = 0, max_tokens: int | None = None) -> Hit:
        """The longest cached prefix of the first `max_tokens` tokens (all but the last by default,
        whose logits sampling needs). Marks nothing as used: see `lock`."""
        ids, n = token_ids(tokens)
        limit = max(n - 1, 0) if max_tokens is None else max_tokens
        room = self._room(n)
        blocks, tail = ffi.new("int32_t[]", max(room, 1)), ffi.new("int32_t[]", self.groups)
        hit = ffi.new("kvc_prefix_hit *")
        check(lib.kvc_prefix_lookup(self._handle, name_space, ids, n, limit, blocks, room, tail, hit))
        return self._hit(hit, blocks, tail)

    def _hit(self, hit: Any, blocks: Any, tail: Any) -> Hit:
        tail_ids = ffi.unpack(tail, self.groups) if hit.tail_tokens else []
        return Hit(hit.tokens, ffi.unpack(blocks, hit.block_ids), hit.tail_tokens, tail_ids, Position(hit.at))

    def insert(self, tokens: Any, blocks: Any, *, name_space: int = 0) -> Inserted:
        """Caches whole blocks of tokens under `blocks[block][group]`; -1 for a group that has none."""
        ids, n = token_ids(tokens)
        named, count = block_ids(blocks)
        present = ffi.new("int32_t[]", max(count, 1))
        out = ffi.new("kvc_prefix_inserted *")
        check(lib.kvc_prefix_insert(self._handle, name_space, ids, n, named, count, present, count, out))
        return self._inserted(out, present)

    def _inserted(self, out: Any, present: Any) -> Inserted:
        ids = ffi.unpack(present, out.present_blocks * self.groups)
        return Inserted(out.present_blocks, ids, out.stored_blocks, Position(out.at))

    def lock(self, at: Position) -> int:
        """Pins the prefix that ends at `at` against eviction and marks it as used. Returns the pin."""
        pin = ffi.new("uint64_t *")
        check(lib.kvc_prefix_lock(self._handle, at._struct, pin))
        return pin[0]

    def unlock(self, pin: int) -> None:
        """Ends a pin without marking the prefix as used."""
        check(lib.kvc_prefix_unlock(self._handle, pin))

    def release(self, pin: int) -> None:
        """Ends a pin at the end of the request: the prefix is the most recently used one."""
        check(lib.kvc_prefix_release(self._handle, pin))

    def touch(self, at: Position) -> None:
        """Marks the prefix that ends at `at` as used."""
        check(lib.kvc_prefix_touch(self._handle, at._struct))

    def evict(self, want_blocks: int) -> list[int]:
        """Evicts up to `want_blocks` entries and returns their ids `[entry][group]`, to be freed."""
        room = min(want_blocks, self.stats().blocks) * self.groups
        blocks, evicted = ffi.new("int32_t[]", max(room, 1)), ffi.new("uint64_t *")
        check(lib.kvc_prefix_evict(self._handle, min(want_blocks, room // self.groups), blocks, room, evicted))
        return ffi.unpack(blocks, evicted[0] * self.groups)

    def set_windows(self, windows: Iterable[int]) -> None:
        """Gives the groups of an empty index their sliding windows, in tokens; 0 for none. An id of -1
        stands for a block that a group with a window has not."""
        listed = list(windows)
        check(lib.kvc_prefix_set_windows(self._handle, ffi.new("uint32_t[]", listed), len(listed)))

    def forget(self, group: int, blocks: Iterable[int]) -> list[int]:
        """Takes blocks of a group with a window out of their entries, which stay for the other groups.
        Returns those that an entry had, to be freed."""
        listed, forgotten = list(blocks), ffi.new("uint64_t *")
        array = ffi.new("int32_t[]", listed or 1)
        check(lib.kvc_prefix_forget(self._handle, _structs.uint(group, "group"), array, len(listed), forgotten))
        return ffi.unpack(array, forgotten[0])

    def advance(self, now_ms: int) -> None:
        """Sets the time in ms, and ends the priorities and expectations that end by then."""
        check(lib.kvc_prefix_advance(self._handle, now_ms))

    def prioritize(self, at: Position, ranges: Iterable[Retention]) -> None:
        """Gives priorities to the blocks of the prefix that ends at `at`."""
        array, n = retention_array(ranges)
        check(lib.kvc_prefix_prioritize(self._handle, at._struct, array, n))

    def hint(self, at: Position, hint: str, *, from_block: int = 0, when_ms: int = 0) -> None:
        """Says what is known of the next use: "none", "ended", "expected" (at `when_ms`), "waited"."""
        number = names.number(names.HINTS, hint, "hint")
        check(lib.kvc_prefix_hint(self._handle, at._struct, from_block, number, when_ms))

    def stats(self) -> PrefixCounts:
        """Sizes of the index."""
        return _structs.counts(self._handle, lib.kvc_prefix_stats, "kvc_prefix_counts", PrefixCounts)

    def run(
        self, *, unlocks: Iterable[int] = (), commits: Iterable[Commit] = (), queries: Iterable[Query] = ()
    ) -> Ran:
        """Ends pins, then caches blocks, then looks sequences up, in one call. A failed item changes
        nothing and stops none of the others."""
        pins, commits, queries = list(unlocks), list(commits), list(queries)
        keep: list[Any] = []
        batch = _structs.options("kvc_prefix_batch")
        statuses = ffi.new("kvc_status[]", max(len(pins), 1))
        unlock_ids = ffi.new("uint64_t[]", pins or 1)
        commit_structs = ffi.new("kvc_prefix_commit[]", max(len(commits), 1))
        committed = ffi.new("kvc_prefix_committed[]", max(len(commits), 1))
        query_structs = ffi.new("kvc_prefix_query[]", max(len(queries), 1))
        answers = ffi.new("kvc_prefix_answer[]", max(len(queries), 1))
        for struct, commit in zip(commit_structs, commits):
            struct.name_space = commit.name_space
            if commit.above is not None:
                struct.above = commit.above._struct[0]
            struct.tokens, struct.token_count = ids = token_ids(commit.tokens)
            struct.blocks, struct.block_ids = blocks = block_ids(commit.blocks)
            struct.out_present = present = ffi.new("int32_t[]", max(blocks[1], 1))
            struct.capacity = blocks[1]
            keep += [ids, blocks, present]
        for struct, query in zip(query_structs, queries):
            struct.name_space = query.name_space
            struct.tokens, struct.token_count = ids = token_ids(query.tokens)
            struct.max_tokens = max(ids[1] - 1, 0) if query.max_tokens is None else query.max_tokens
            struct.out_blocks = found = ffi.new("int32_t[]", max(self._room(ids[1]), 1))
            struct.capacity = self._room(ids[1])
            struct.out_tail_blocks = tail = ffi.new("int32_t[]", self.groups)
            struct.pin = int(query.pin)
            keep += [ids, found, tail]
        batch.unlock_count, batch.unlocks, batch.out_unlocked = len(pins), unlock_ids, statuses
        batch.commit_count, batch.commits, batch.out_committed = len(commits), commit_structs, committed
        batch.query_count, batch.queries, batch.out_answers = len(queries), query_structs, answers
        check(lib.kvc_prefix_run(self._handle, batch))
        return Ran(
            [_failed(status) for status in statuses[0 : len(pins)]],
            [
                _failed(out.status) or self._inserted(out.inserted, commit_structs[i].out_present)
                for i, out in enumerate(committed[0 : len(commits)])
            ],
            [
                _failed(out.status)
                or Answer(self._hit(out.hit, query_structs[i].out_blocks, query_structs[i].out_tail_blocks), out.pin)
                for i, out in enumerate(answers[0 : len(queries)])
            ],
        )


def _failed(status: int) -> Error | None:
    # Of a batch's items the thread keeps no text each.
    from .errors import status_text

    return None if status == 0 else error(status, status_text(status))
