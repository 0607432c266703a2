//go:build cgo

package kvcache

// KV events: what becomes cached and what ceases to be, to a function or to routers.

// #include <stdlib.h>
// #include <kvcache.h>
// kvc_status kvcache_go_events_create(kvc_cache *, const kvc_events_options *, uintptr_t, kvc_events **);
import "C"

import (
	"runtime"
	"runtime/cgo"
	"unsafe"
)

// Event is one event. Digests have 32 bytes, one for each block; Parent is the block before the first.
// Seq numbers the messages: a number that never comes says that events were lost there.
type Event struct {
	Kind           EventKind
	Medium         Medium
	Group          uint32
	Seq, NameSpace uint64
	Parent         *[32]byte
	Digests        [][32]byte
	Tokens         []uint32
}

// EventsOptions say where events go; zero fields are the library's defaults. At least Func or Endpoint.
type EventsOptions struct {
	// Func takes each event, on the publishing thread. It must not panic, nor close the Events.
	Func func(Event)
	// Endpoint is where a PUB socket binds ("tcp://127.0.0.1:5557"), ReplayEndpoint a ROUTER socket that
	// repeats messages; both need a library with the feature zmq.
	Endpoint, ReplayEndpoint, Topic         string
	Encoding                                Encoding
	CapacityBlocks, KeepMessages, KeepBytes uint64
	Rank                                    uint32
	// Remote allows addresses that other machines can reach: events carry the tokens of all prompts.
	Remote bool
}

// EventsCounts are what a publisher has done.
type EventsCounts struct {
	NextSeq, QueuedEvents, QueuedBlocks, CapacityBlocks, DroppedEvents, Losses uint64
	Subscribers                                                                uint32
	Publishing                                                                 bool
}

// Events is the publishing of a cache's events, on a thread of its own, until Close.
type Events struct {
	h       *C.kvc_events
	cleanup runtime.Cleanup
	end     eventsEnd
}

type eventsEnd struct {
	h    *C.kvc_events
	user cgo.Handle
}

func (e eventsEnd) close() C.kvc_status {
	status := C.kvc_events_destroy(e.h)
	if status == C.KVC_OK && e.user != 0 {
		e.user.Delete()
	}
	return status
}

// DescribeNamespace says what a name space is in the server's words (empty for none), before anything is
// cached in it, so that its digests are the same in every process that says the same.
func (c *Cache) DescribeNamespace(namespace uint64, salt, lora string) error {
	defer runtime.KeepAlive(c)
	s, l := optional(salt), optional(lora)
	defer C.free(unsafe.Pointer(s))
	defer C.free(unsafe.Pointer(l))
	return try(func() C.kvc_status { return C.kvc_events_describe(c.h, C.uint64_t(namespace), s, l) })
}

func optional(s string) *C.char {
	if s == "" {
		return nil
	}
	return C.CString(s)
}

// Publish publishes the cache's events from now on: first EventCleared and all that is resident.
func (c *Cache) Publish(options EventsOptions) (*Events, error) {
	defer runtime.KeepAlive(c)
	var o C.kvc_events_options
	if err := try(func() C.kvc_status { return C.kvc_events_options_init(&o, C.uint32_t(unsafe.Sizeof(o))) }); err != nil {
		return nil, err
	}
	o.endpoint, o.replay_endpoint, o.topic = optional(options.Endpoint), optional(options.ReplayEndpoint), optional(options.Topic)
	defer C.free(unsafe.Pointer(o.endpoint))
	defer C.free(unsafe.Pointer(o.replay_endpoint))
	defer C.free(unsafe.Pointer(o.topic))
	o.encoding, o.rank, o.remote = C.uint32_t(options.Encoding), C.uint32_t(options.Rank), flag(options.Remote)
	if options.CapacityBlocks != 0 {
		o.capacity_blocks = C.uint64_t(options.CapacityBlocks)
	}
	if options.KeepMessages != 0 {
		o.keep_messages = C.uint64_t(options.KeepMessages)
	}
	if options.KeepBytes != 0 {
		o.keep_bytes = C.uint64_t(options.KeepBytes)
	}
	e := &Events{}
	if options.Func != nil {
		e.end.user = cgo.NewHandle(options.Func)
	}
	var h *C.kvc_events
	if err := try(func() C.kvc_status {
		return C.kvcache_go_events_create(c.h, &o, C.uintptr_t(e.end.user), &h)
	}); err != nil {
		if e.end.user != 0 {
			e.end.user.Delete()
		}
		return nil, err
	}
	e.h, e.end.h = h, h
	e.cleanup = runtime.AddCleanup(e, func(end eventsEnd) { end.close() }, e.end)
	return e, nil
}

// Close publishes what still waits, then EventCleared, and ends the thread.
func (e *Events) Close() error {
	defer runtime.KeepAlive(e)
	if err := try(e.end.close); err != nil {
		return err
	}
	e.cleanup.Stop()
	return nil
}

// Snapshot publishes EventCleared and then everything resident, for readers that come late.
func (e *Events) Snapshot() error {
	defer runtime.KeepAlive(e)
	return try(func() C.kvc_status { return C.kvc_events_snapshot(e.h) })
}

// Stats are what was published and what waits.
func (e *Events) Stats() (EventsCounts, error) {
	defer runtime.KeepAlive(e)
	var c C.kvc_events_counts
	err := try(func() C.kvc_status { return C.kvc_events_stats(e.h, &c, C.uint64_t(unsafe.Sizeof(c))) })
	return EventsCounts{
		uint64(c.next_seq), uint64(c.queued_events), uint64(c.queued_blocks), uint64(c.capacity_blocks),
		uint64(c.dropped_events), uint64(c.losses), uint32(c.subscribers), c.publishing != 0,
	}, err
}

// Endpoint is the address of the PUB socket, or with replay of the ROUTER socket; empty for none.
func (e *Events) Endpoint(replay bool) (string, error) {
	defer runtime.KeepAlive(e)
	return written(func(buf *C.char, n C.uint64_t, length *C.uint64_t) C.kvc_status {
		return C.kvc_events_endpoint(e.h, flag(replay), buf, n, length)
	})
}

//export kvcacheGoEvent
func kvcacheGoEvent(user C.uintptr_t, event *C.kvc_event) {
	out := Event{
		Kind: EventKind(event.kind), Medium: Medium(event.medium), Group: uint32(event.group),
		Seq: uint64(event.seq), NameSpace: uint64(event.name_space),
	}
	if event.parent != nil {
		parent := *(*[32]byte)(unsafe.Pointer(event.parent))
		out.Parent = &parent
	}
	if n := int(event.block_count); n > 0 {
		out.Digests = append(out.Digests, unsafe.Slice((*[32]byte)(unsafe.Pointer(event.digests)), n)...)
	}
	if n := int(event.token_count); n > 0 {
		out.Tokens = append(out.Tokens, unsafe.Slice((*uint32)(event.tokens), n)...)
	}
	cgo.Handle(user).Value().(func(Event))(out)
}
