//go:build cgo

package kvcache

// The tiers of a cache, host memory and disk, and prompts on their way back from them. A store of the
// engine's own is given in C (kvc_tier_store), whose functions the library's threads call.

// #include <stdlib.h>
// #include <kvcache.h>
import "C"

import (
	"runtime"
	"strings"
	"unsafe"
)

// TierSlice is the part of a layer group that a cache holds: its first layer and KV head in the whole model.
type TierSlice struct{ FirstLayer, FirstHead uint32 }

// TierOptions are the tiers of a cache; zero fields are the library's defaults.
type TierOptions struct {
	// Model is what the model is called; it changes whenever the weights do.
	Model string
	// HostBlocks stay in host memory after they were evicted; TransitBlocks are for what is on its way.
	HostBlocks, TransitBlocks uint64
	// DiskDir is the directory of the disk tier, empty for none, DiskBytes the most that its objects take.
	DiskDir   string
	DiskBytes uint64
	// Slices say where in the model the layer groups lie; nil for a cache of the whole model.
	Slices []TierSlice
	// Blocks of a lower priority, 30 by default, or that fewer prompts have found, are not demoted.
	// AllPriorities stands for a LeastPriority of 0.
	LeastPriority, LeastUses uint32
	AllPriorities            bool
	// OnCommit: blocks go to disk when they are committed, not only when they are evicted.
	OnCommit bool
	// PageCache: the disk is read and written through the page cache.
	PageCache bool
	// Readers are threads that read, QueuedBlocks demotions that may wait, of each lower tier.
	Readers, QueuedBlocks uint32
	// PrefillSeconds is what a token of a prompt takes to compute; 0: not known, everything is loaded.
	PrefillSeconds float64
	// Remote is the address of a remote store, empty for none: redis://HOST, redis+unix:///PATH,
	// s3+http://HOST/BUCKET and so on, as the header has them. The library must have been built with it.
	Remote string
	// RemoteTimeoutMS is how long a call of that store may take; 0 is 5 s.
	RemoteTimeoutMS uint32
	// PlainMemory: the host's blocks are not page-locked for a GPU, where so much cannot be had.
	PlainMemory bool
	// AheadBlocks are left free for the next step of a cache on a GPU, copied beside the kernels of this one.
	AheadBlocks uint32
}

// TierCounts are what a tier counted since it was attached, in blocks where the name says nothing else: a
// block with raw rows (SinkTokens) counts as the objects that hold them.
type TierCounts struct {
	Kind Tier
	// Down: the store failed, and is being left alone for a while.
	Down                                                bool
	Stored, StoredBytes, Present, Dropped, Full         uint64
	Loaded, LoadedBytes, Missed, Bad                    uint64
	Failures, Timeouts, Evicted, Queued, Objects, Bytes uint64
	// LoadLatency is seconds before the first byte comes, LoadBandwidth bytes a second; 0 before a load.
	LoadLatency, LoadBandwidth float64
	// PageLocked: a GPU copies from and to its memory by itself. Of the host alone.
	PageLocked bool
}

// AttachTiers gives the cache tiers, before anything is cached in it. After ErrTierFailed it works on
// without.
func (c *Cache) AttachTiers(options *TierOptions) error {
	defer runtime.KeepAlive(c)
	p := options
	if strings.ContainsRune(p.Model, 0) || strings.ContainsRune(p.DiskDir, 0) || strings.ContainsRune(p.Remote, 0) {
		return invalid("the model, the directory or the address has a NUL")
	}
	var o C.kvc_tier_options
	if err := try(func() C.kvc_status { return C.kvc_tier_options_init(&o, C.uint32_t(unsafe.Sizeof(o))) }); err != nil {
		return err
	}
	name, slices, err := transferred(p.Model, p.Slices)
	if err != nil {
		return err
	}
	o.model, o.disk_dir, o.remote = name, optional(p.DiskDir), optional(p.Remote)
	defer C.free(unsafe.Pointer(o.model))
	defer C.free(unsafe.Pointer(o.disk_dir))
	defer C.free(unsafe.Pointer(o.remote))
	o.host_blocks, o.least_uses = C.uint64_t(p.HostBlocks), C.uint32_t(p.LeastUses)
	if p.TransitBlocks != 0 {
		o.transit_blocks = C.uint64_t(p.TransitBlocks)
	}
	if p.DiskBytes != 0 {
		o.disk_bytes = C.uint64_t(p.DiskBytes)
	}
	if p.LeastPriority != 0 || p.AllPriorities {
		o.least_priority = C.uint32_t(p.LeastPriority)
	}
	if p.RemoteTimeoutMS != 0 {
		o.remote_timeout_ms = C.uint32_t(p.RemoteTimeoutMS)
	}
	if p.Readers != 0 {
		o.readers = C.uint32_t(p.Readers)
	}
	if p.QueuedBlocks != 0 {
		o.queued_blocks = C.uint32_t(p.QueuedBlocks)
	}
	o.plain_memory, o.ahead_blocks = flag(p.PlainMemory), C.uint32_t(p.AheadBlocks)
	o.on_commit, o.direct, o.prefill_seconds = flag(p.OnCommit), flag(!p.PageCache), C.double(p.PrefillSeconds)
	var pins runtime.Pinner
	defer pins.Unpin()
	o.slices, o.slice_count = pin(&pins, slices), C.uint32_t(len(slices))
	return try(func() C.kvc_status { return C.kvc_tier_attach(c.h, &o) })
}

// FlushTiers copies everything cached to the lower tiers, waits waitMS at most, and tells whether all is
// there.
func (c *Cache) FlushTiers(waitMS uint32) (bool, error) {
	defer runtime.KeepAlive(c)
	var done C.uint32_t
	err := try(func() C.kvc_status { return C.kvc_tier_flush(c.h, C.uint32_t(waitMS), &done) })
	return done != 0, err
}

// TierStats are what each tier counted, from the host down; none without tiers.
func (c *Cache) TierStats() ([]TierCounts, error) {
	defer runtime.KeepAlive(c)
	var all []TierCounts
	for {
		var t C.kvc_tier_counts
		err := try(func() C.kvc_status {
			return C.kvc_tier_stats(c.h, C.uint32_t(len(all)), &t, C.uint64_t(unsafe.Sizeof(t)))
		})
		// An index past the last tier.
		if e, ok := err.(*Error); ok && e.Code == ErrInvalidArgument.Code {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, TierCounts{
			Kind: Tier(t.kind), Down: t.down != 0,
			Stored: uint64(t.stored), StoredBytes: uint64(t.stored_bytes), Present: uint64(t.present),
			Dropped: uint64(t.dropped), Full: uint64(t.full), Loaded: uint64(t.loaded),
			LoadedBytes: uint64(t.loaded_bytes), Missed: uint64(t.missed), Bad: uint64(t.bad),
			Failures: uint64(t.failures), Timeouts: uint64(t.timeouts), Evicted: uint64(t.evicted),
			Queued: uint64(t.queued), Objects: uint64(t.objects), Bytes: uint64(t.bytes),
			LoadLatency: float64(t.load_latency), LoadBandwidth: float64(t.load_bandwidth),
			PageLocked: t.page_locked != 0,
		})
	}
}

// ExportBlocks writes the full blocks of the sequence to a blocking file, pipe or socket, by its
// descriptor, which stays open, and tells how many tokens those are. Model and slices are as in
// TierOptions. The cache is in use meanwhile.
func (s Seq) ExportBlocks(model string, fd uintptr, slices []TierSlice) (uint64, error) {
	defer runtime.KeepAlive(s.cache)
	name, parts, err := transferred(model, slices)
	if err != nil {
		return 0, err
	}
	defer C.free(unsafe.Pointer(name))
	var tokens C.uint64_t
	err = try(func() C.kvc_status {
		return C.kvc_transfer_export(s.cache.h, C.kvc_seq(s.ID), name, at(parts), C.uint32_t(len(parts)), C.int32_t(fd), &tokens)
	})
	return uint64(tokens), err
}

// ImportBlocks takes blocks that ExportBlocks wrote into the prefix index and tells how many tokens those
// are. Several descriptors are the parts of one stream: of the same tokens, and together all layers and
// heads of this cache.
func (c *Cache) ImportBlocks(fds []uintptr, model string, namespace uint64, slices []TierSlice) (uint64, error) {
	defer runtime.KeepAlive(c)
	name, parts, err := transferred(model, slices)
	if err != nil {
		return 0, err
	}
	defer C.free(unsafe.Pointer(name))
	list := make([]C.int32_t, len(fds))
	for i, fd := range fds {
		list[i] = C.int32_t(fd)
	}
	var tokens C.uint64_t
	err = try(func() C.kvc_status {
		return C.kvc_transfer_import(c.h, C.uint64_t(namespace), name, at(parts), C.uint32_t(len(parts)),
			at(list), C.uint32_t(len(list)), &tokens)
	})
	return uint64(tokens), err
}

// transferred is a model's name in C memory, and the slices as the header has them.
func transferred(model string, slices []TierSlice) (*C.char, []C.kvc_tier_slice, error) {
	if strings.ContainsRune(model, 0) {
		return nil, nil, invalid("the model has a NUL")
	}
	parts := make([]C.kvc_tier_slice, len(slices))
	for i, s := range slices {
		parts[i] = C.kvc_tier_slice{first_layer: C.uint32_t(s.FirstLayer), first_head: C.uint32_t(s.FirstHead)}
	}
	return C.CString(model), parts, nil
}

// TierDecision is what tiers have of a prompt and what is done about it; seconds are 0 where unknown.
type TierDecision struct {
	DeviceTokens, HostTokens, FoundBlocks, LoadBlocks uint64
	LoadSeconds, ComputeSeconds                       float64
	Why                                               Why
}

// Prefetch is a prompt whose blocks are on their way to host memory, from where Start takes them.
type Prefetch struct {
	h       *C.kvc_prefetch
	cleanup runtime.Cleanup
	cache   *Cache
	// Decision says what was found and what is loaded.
	Decision TierDecision
}

// Prefetch begins to load what lower tiers have of a prompt. It waits for nothing.
func (c *Cache) Prefetch(prompt []uint32, namespace uint64) (*Prefetch, error) {
	return c.prefetch(prompt, func(h **C.kvc_prefetch, d *C.kvc_tier_decision) C.kvc_status {
		return C.kvc_prefetch_create(c.h, (*C.uint32_t)(at(prompt)), C.uint32_t(len(prompt)), C.uint64_t(namespace), h, d)
	})
}

// PrefetchMedia is Prefetch for a prompt with media, as StartMedia takes it.
func (c *Cache) PrefetchMedia(prompt []uint32, media []Media, namespace uint64) (*Prefetch, error) {
	list := mediaList(media)
	return c.prefetch(prompt, func(h **C.kvc_prefetch, d *C.kvc_tier_decision) C.kvc_status {
		return C.kvc_prefetch_create_media(c.h, (*C.uint32_t)(at(prompt)), C.uint32_t(len(prompt)), at(list), C.uint32_t(len(list)), C.uint64_t(namespace), h, d)
	})
}

func (c *Cache) prefetch(prompt []uint32, create func(**C.kvc_prefetch, *C.kvc_tier_decision) C.kvc_status) (*Prefetch, error) {
	defer runtime.KeepAlive(c)
	var h *C.kvc_prefetch
	var d C.kvc_tier_decision
	if uint64(len(prompt)) > 1<<32-1 {
		return nil, invalid("a prompt of %d tokens", len(prompt))
	}
	if err := try(func() C.kvc_status { return create(&h, &d) }); err != nil {
		return nil, err
	}
	p := &Prefetch{h: h, cache: c, Decision: TierDecision{
		DeviceTokens: uint64(d.device_tokens), HostTokens: uint64(d.host_tokens),
		FoundBlocks: uint64(d.found_blocks), LoadBlocks: uint64(d.load_blocks),
		LoadSeconds: float64(d.load_seconds), ComputeSeconds: float64(d.compute_seconds), Why: Why(d.why),
	}}
	p.cleanup = runtime.AddCleanup(p, func(h *C.kvc_prefetch) { C.kvc_prefetch_destroy(h) }, h)
	return p, nil
}

// Wait takes what has arrived, after at most waitMS of waiting for the rest, and tells whether nothing
// more comes.
func (p *Prefetch) Wait(waitMS uint32) (bool, error) {
	defer runtime.KeepAlive(p)
	var done C.uint32_t
	err := try(func() C.kvc_status { return C.kvc_prefetch_wait(p.cache.h, p.h, C.uint32_t(waitMS), &done) })
	return done != 0, err
}

// Close gives up what has not arrived; again it answers ErrStaleHandle.
func (p *Prefetch) Close() error {
	defer runtime.KeepAlive(p)
	p.cleanup.Stop()
	return try(func() C.kvc_status { return C.kvc_prefetch_destroy(p.h) })
}
