"""KV events: what becomes cached and what ceases to be, as it happens, to a callback or to routers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _structs, names
from ._native import ffi, lib
from .errors import _text, check

if TYPE_CHECKING:
    from .cache import Cache


class Event(NamedTuple):
    """One event. `kind` is "stored", "removed" or "cleared"; `seq` numbers the messages, and a number
    that never comes says that events were lost there. Digests have 32 bytes, one for each block;
    `parent` is the block before the first."""

    kind: str
    medium: str
    group: int
    seq: int
    name_space: int
    parent: bytes | None
    digests: list[bytes]
    tokens: list[int]


class EventsCounts(NamedTuple):
    """What a publisher has done."""

    next_seq: int
    queued_events: int
    queued_blocks: int
    capacity_blocks: int
    dropped_events: int
    losses: int
    subscribers: int
    publishing: int


class Events:
    """The publishing of a cache's events, on a thread of its own, until `close`.

    `callback` takes each `Event`, on that thread; what it raises goes to `threading.excepthook`. With a
    library that has the feature zmq, `endpoint` is where a PUB socket binds ("tcp://127.0.0.1:5557")
    and `replay_endpoint` a ROUTER socket that repeats messages. `remote` allows addresses that other
    machines can reach: events carry the tokens of all prompts.
    """

    def __init__(
        self,
        cache: Cache,
        callback: Callable[[Event], None] | None = None,
        *,
        endpoint: str | None = None,
        replay_endpoint: str | None = None,
        topic: str | None = None,
        encoding: str = "map",
        capacity_blocks: int = 0,
        keep_messages: int = 10_000,
        keep_bytes: int = 64 << 20,
        rank: int = 0,
        remote: bool = False,
    ) -> None:
        texts = {"endpoint": endpoint, "replay_endpoint": replay_endpoint, "topic": topic}
        kept = {name: ffi.new("char[]", text.encode()) for name, text in texts.items() if text is not None}
        options = _structs.options(
            "kvc_events_options",
            encoding=names.number(names.ENCODINGS, encoding, "encoding"),
            capacity_blocks=capacity_blocks,
            keep_messages=keep_messages,
            keep_bytes=keep_bytes,
            rank=rank,
            remote=int(remote),
            **kept,
        )
        # The closure must outlive the thread that calls it: the finalizer holds it.
        closure = None if callback is None else ffi.callback("kvc_events_fn", _taker(callback))
        if closure is not None:
            options.callback = closure
        out = ffi.new("kvc_events **")
        check(lib.kvc_events_create(cache._handle, options, out))
        self._handle = out[0]
        self._end = weakref.finalize(self, _destroy, out[0], closure)

    def close(self) -> None:
        """Publishes what still waits, then "cleared", and ends the thread. Again does nothing."""
        self._end()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def snapshot(self) -> None:
        """Publishes "cleared" and then everything resident, for readers that come late."""
        check(lib.kvc_events_snapshot(self._handle))

    def stats(self) -> EventsCounts:
        """What was published and what waits."""
        return _structs.counts(self._handle, lib.kvc_events_stats, "kvc_events_counts", EventsCounts)

    def endpoint(self, *, replay: bool = False) -> str:
        """The address of the PUB socket, or of the ROUTER socket; empty where there is none."""
        length = ffi.new("uint64_t *")

        def write(buf: Any, size: int) -> int:
            check(lib.kvc_events_endpoint(self._handle, int(replay), buf, size, length))
            return length[0]

        return _text(write)


def _destroy(handle: Any, _closure: Any) -> None:
    check(lib.kvc_events_destroy(handle))


def _taker(callback: Callable[[Event], None]) -> Callable[[Any, Any], None]:
    def take(_user: Any, event: Any) -> None:
        try:
            callback(_event(event))
        except BaseException as e:
            threading.excepthook(threading.ExceptHookArgs((type(e), e, e.__traceback__, None)))

    return take


def _event(event: Any) -> Event:
    digests = bytes(ffi.buffer(event.digests, 32 * event.block_count)) if event.block_count else b""
    return Event(
        names.word(names.EVENTS, event.kind),
        names.word(names.MEDIA, event.medium),
        event.group,
        event.seq,
        event.name_space,
        bytes(ffi.buffer(event.parent, 32)) if event.parent else None,
        [digests[at : at + 32] for at in range(0, len(digests), 32)],
        ffi.unpack(event.tokens, event.token_count) if event.token_count else [],
    )
