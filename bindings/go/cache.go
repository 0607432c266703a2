//go:build cgo

package kvcache

// The whole cache and its sequences.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Cache is a KV cache: block pools, prefix index, storage of K and V, kernels. Safe for goroutines.
type Cache struct {
	h       *C.kvc_cache
	cleanup runtime.Cleanup
	// Groups are the layer groups that it was made with.
	Groups []GroupSpec
}

// CacheOptions are the sizes and policies of a cache; zero fields are the library's defaults.
type CacheOptions struct {
	// BlockTokens is 16 by default, Blocks (of each group) 1024, MaxSeqs 256, Threads one a core.
	BlockTokens, Blocks, MaxSeqs, Threads uint32
	// NoPrefixReuse: nothing is published to the prefix index and nothing taken from it.
	NoPrefixReuse bool
	Device        DeviceKind
	DeviceOrdinal uint32
	// Stream is the device's stream (a CUstream), 0 for its default one.
	Stream        uintptr
	Deterministic bool
	Eviction      Eviction
	// StagingBlocks are raw blocks of each group with sealed tiles, 0 for two a sequence.
	StagingBlocks uint32
	// Scrub zeroes every block that becomes free, before anybody else can have it.
	Scrub bool
	// GroupBlocks are the blocks of each layer group where they differ.
	GroupBlocks []uint32
	// Cascade has a prefix that neighbours in a step share read once for all of them, on a device, where
	// that is estimated to be faster (never with Deterministic). It has not run on a GPU yet.
	Cascade bool
}

// CacheCounts are what a cache holds now and what happened since it was made. Block counts are of the
// first layer group: Blocks = FreeBlocks + CachedBlocks + ReferencedBlocks.
type CacheCounts struct {
	Blocks, FreeBlocks, CachedBlocks, ReferencedBlocks, Sequences        uint32
	SequenceTokens, WasteTokens, BlockBytes, PoolBytes                   uint64
	LookedUpTokens, HitTokens, EvictedBlocks, CopiedBlocks, MergedBlocks uint64
	// Raw blocks of sealed tiles, those in use, their bytes, and full tiles that cannot be sealed.
	StagingBlocks, StagedBlocks  uint32
	StagingBytes, UnsealedBlocks uint64
	// Attention calls on a device that read a shared prefix once for all sequences that have it.
	Cascades uint64
}

// NewCache makes a cache of 1 to 16 layer groups. options may be nil.
func NewCache(groups []GroupSpec, options *CacheOptions) (*Cache, error) {
	specs, err := groupArray(groups)
	if err != nil {
		return nil, err
	}
	var o C.kvc_cache_options
	if err := try(func() C.kvc_status { return C.kvc_cache_options_init(&o, C.uint32_t(unsafe.Sizeof(o))) }); err != nil {
		return nil, err
	}
	if p := options; p != nil {
		set := func(to *C.uint32_t, value uint32) {
			if value != 0 {
				*to = C.uint32_t(value)
			}
		}
		set(&o.block_tokens, p.BlockTokens)
		set(&o.blocks, p.Blocks)
		set(&o.max_seqs, p.MaxSeqs)
		set(&o.threads, p.Threads)
		set(&o.staging_blocks, p.StagingBlocks)
		o.prefix_reuse, o.deterministic = flag(!p.NoPrefixReuse), flag(p.Deterministic)
		o.device, o.device_ordinal = C.uint32_t(p.Device), C.uint32_t(p.DeviceOrdinal)
		o.scrub, o.cascade = flag(p.Scrub), flag(p.Cascade)
		if p.GroupBlocks != nil {
			if len(p.GroupBlocks) != len(groups) {
				return nil, invalid("%d numbers of blocks for %d groups", len(p.GroupBlocks), len(groups))
			}
			var pins runtime.Pinner
			defer pins.Unpin()
			o.group_blocks = (*C.uint32_t)(pin(&pins, p.GroupBlocks))
		}
		o.stream, o.eviction = address(p.Stream), C.uint32_t(p.Eviction)
	}
	c := &Cache{Groups: append([]GroupSpec(nil), groups...)}
	if err := try(func() C.kvc_status {
		return C.kvc_cache_create(&o, at(specs), C.uint32_t(len(specs)), &c.h)
	}); err != nil {
		return nil, err
	}
	c.cleanup = runtime.AddCleanup(c, func(h *C.kvc_cache) { C.kvc_cache_destroy(h) }, c.h)
	return c, nil
}

// address is a number of another library as the pointer that C takes.
func address(n uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&n)) }

// Close ends the cache with all its sequences; again it answers ErrStaleHandle.
func (c *Cache) Close() error {
	defer runtime.KeepAlive(c)
	if err := try(func() C.kvc_status { return C.kvc_cache_destroy(c.h) }); err != nil {
		return err
	}
	c.cleanup.Stop()
	return nil
}

// Sync waits for everything that is enqueued on the device.
func (c *Cache) Sync() error {
	defer runtime.KeepAlive(c)
	return try(func() C.kvc_status { return C.kvc_cache_sync(c.h) })
}

// Advance sets the time of the prefix index, in ms since whenever the caller likes.
func (c *Cache) Advance(nowMS uint64) error {
	defer runtime.KeepAlive(c)
	return try(func() C.kvc_status { return C.kvc_cache_advance(c.h, C.uint64_t(nowMS)) })
}

// ClearPrefix drops everything from the prefix index that no sequence uses.
func (c *Cache) ClearPrefix() error {
	defer runtime.KeepAlive(c)
	return try(func() C.kvc_status { return C.kvc_cache_clear_prefix(c.h) })
}

// Audit checks that pools, tables and index agree; what does not hold is a bug in the library.
func (c *Cache) Audit() error {
	defer runtime.KeepAlive(c)
	return try(func() C.kvc_status { return C.kvc_cache_audit(c.h) })
}

// SetScales sets the scales by which keys and values of a layer's heads are divided when they are stored
// (fp8, nvfp4), one positive number a KV head each; v is nil for latents. Before anything is stored.
func (c *Cache) SetScales(group, layer int, k, v []float32) error {
	defer runtime.KeepAlive(c)
	if group < 0 || group >= len(c.Groups) || len(k) != int(c.Groups[group].KVHeads) || (v != nil && len(v) != len(k)) {
		return invalid("%d and %d scales for group %d: one a KV head", len(k), len(v), group)
	}
	return try(func() C.kvc_status {
		return C.kvc_cache_set_scales(c.h, C.uint32_t(group), C.uint32_t(layer), (*C.float)(at(k)), (*C.float)(at(v)), C.uint32_t(len(k)))
	})
}

// SetDeviceRates has the cache go by these rates, as somebody measured them, instead of by what its device
// says of itself. ErrInvalidState where it is on the CPU.
func (c *Cache) SetDeviceRates(r DeviceRates) error {
	defer runtime.KeepAlive(c)
	var o C.kvc_device_rates
	if err := try(func() C.kvc_status { return C.kvc_device_rates_init(&o, C.uint32_t(unsafe.Sizeof(o))) }); err != nil {
		return err
	}
	o.multiprocessors, o.cache_size = C.uint32_t(r.Multiprocessors), C.uint64_t(r.CacheSize)
	o.memory_bytes, o.cache_bytes = C.double(r.MemoryBytes), C.double(r.CacheBytes)
	o.operations, o.launch = C.double(r.Operations), C.double(r.Launch)
	return try(func() C.kvc_status { return C.kvc_cache_set_device_rates(c.h, &o) })
}

// Stats are the cache's counts.
func (c *Cache) Stats() (CacheCounts, error) {
	defer runtime.KeepAlive(c)
	var o C.kvc_cache_counts
	err := try(func() C.kvc_status { return C.kvc_cache_stats(c.h, &o, C.uint64_t(unsafe.Sizeof(o))) })
	return CacheCounts{
		Blocks: uint32(o.blocks), FreeBlocks: uint32(o.free_blocks), CachedBlocks: uint32(o.cached_blocks),
		ReferencedBlocks: uint32(o.referenced_blocks), Sequences: uint32(o.sequences),
		SequenceTokens: uint64(o.sequence_tokens), WasteTokens: uint64(o.waste_tokens),
		BlockBytes: uint64(o.block_bytes), PoolBytes: uint64(o.pool_bytes),
		LookedUpTokens: uint64(o.looked_up_tokens), HitTokens: uint64(o.hit_tokens),
		EvictedBlocks: uint64(o.evicted_blocks), CopiedBlocks: uint64(o.copied_blocks),
		MergedBlocks:  uint64(o.merged_blocks),
		StagingBlocks: uint32(o.staging_blocks), StagedBlocks: uint32(o.staged_blocks),
		StagingBytes: uint64(o.staging_bytes), UnsealedBlocks: uint64(o.unsealed_blocks),
		Cascades: uint64(o.cascades),
	}, err
}

// Seq is a sequence of a cache. It lives until Release or the end of its cache.
type Seq struct {
	cache *Cache
	ID    uint32
}

// Start begins a sequence with what the prefix index has of the prompt, and tells how many tokens that
// is: fewer than the prompt has. Feed the rest to a step. namespace separates what may share prefixes
// from what may not (tenant, adapter).
func (c *Cache) Start(prompt []uint32, namespace uint64) (Seq, int, error) {
	defer runtime.KeepAlive(c)
	var id C.kvc_seq
	var cached C.uint32_t
	err := try(func() C.kvc_status {
		return C.kvc_seq_start(c.h, (*C.uint32_t)(at(prompt)), C.uint64_t(len(prompt)), C.uint64_t(namespace), &id, &cached)
	})
	return Seq{c, uint32(id)}, int(cached), err
}

// Media is something in a prompt that its tokens do not name: an image, a clip, an embedding.
type Media struct {
	// Position is that of the first token that stands for it.
	Position uint64
	// Digest is of its content, and of how it is processed where that may differ. Equal digests are
	// taken for equal content.
	Digest [32]byte
}

func mediaList(media []Media) []C.kvc_media {
	list := make([]C.kvc_media, len(media))
	for n, m := range media {
		list[n].position = C.uint64_t(m.Position)
		for at, b := range m.Digest {
			list[n].digest[at] = C.uint8_t(b)
		}
	}
	return list
}

// StartMedia is Start for a prompt in which tokens stand for media, in the order of their positions.
// What is before the first is shared with all prompts, what comes from then on only with those that
// have the same media there.
func (c *Cache) StartMedia(prompt []uint32, media []Media, namespace uint64) (Seq, int, error) {
	defer runtime.KeepAlive(c)
	var id C.kvc_seq
	var cached C.uint32_t
	list := mediaList(media)
	err := try(func() C.kvc_status {
		return C.kvc_seq_start_media(c.h, (*C.uint32_t)(at(prompt)), C.uint64_t(len(prompt)), at(list), C.uint32_t(len(list)), C.uint64_t(namespace), &id, &cached)
	})
	return Seq{c, uint32(id)}, int(cached), err
}

// Fork makes a second sequence with the same tokens, sharing every block.
func (s Seq) Fork() (Seq, error) {
	defer runtime.KeepAlive(s.cache)
	var id C.kvc_seq
	err := try(func() C.kvc_status { return C.kvc_seq_fork(s.cache.h, C.kvc_seq(s.ID), &id) })
	return Seq{s.cache, uint32(id)}, err
}

// Truncate forgets the tokens from position tokens on (rejected speculation).
func (s Seq) Truncate(tokens uint32) error {
	defer runtime.KeepAlive(s.cache)
	return try(func() C.kvc_status { return C.kvc_seq_truncate(s.cache.h, C.kvc_seq(s.ID), C.uint32_t(tokens)) })
}

// Release ends the sequence. Its full blocks stay in the prefix index until they are evicted.
func (s Seq) Release() error {
	defer runtime.KeepAlive(s.cache)
	return try(func() C.kvc_status { return C.kvc_seq_release(s.cache.h, C.kvc_seq(s.ID)) })
}

// Prioritize gives priorities to the sequence's full blocks in the prefix index.
func (s Seq) Prioritize(ranges []Retention) error {
	defer runtime.KeepAlive(s.cache)
	list := retentions(ranges)
	return try(func() C.kvc_status {
		return C.kvc_seq_prioritize(s.cache.h, C.kvc_seq(s.ID), at(list), C.uint32_t(len(list)))
	})
}

// Hint says what is known of the next use of what the sequence holds, from a block on. Before Release.
func (s Seq) Hint(hint Hint, fromBlock, whenMS uint64) error {
	defer runtime.KeepAlive(s.cache)
	return try(func() C.kvc_status {
		return C.kvc_seq_hint(s.cache.h, C.kvc_seq(s.ID), C.uint64_t(fromBlock), C.uint32_t(hint), C.uint64_t(whenMS))
	})
}

// Len is how many tokens the sequence holds.
func (s Seq) Len() (int, error) {
	defer runtime.KeepAlive(s.cache)
	var n C.uint64_t
	err := try(func() C.kvc_status { return C.kvc_seq_tokens(s.cache.h, C.kvc_seq(s.ID), nil, 0, &n) })
	return int(n), err
}

// Tokens are the tokens whose K and V the sequence holds.
func (s Seq) Tokens() ([]uint32, error) {
	defer runtime.KeepAlive(s.cache)
	return listed(func(out *uint32, room C.uint64_t, n *C.uint64_t) C.kvc_status {
		return C.kvc_seq_tokens(s.cache.h, C.kvc_seq(s.ID), (*C.uint32_t)(out), room, n)
	})
}

// Blocks are the blocks that hold the sequence in a layer group, in order.
func (s Seq) Blocks(group int) ([]int32, error) {
	defer runtime.KeepAlive(s.cache)
	return listed(func(out *int32, room C.uint64_t, n *C.uint64_t) C.kvc_status {
		return C.kvc_seq_blocks(s.cache.h, C.kvc_seq(s.ID), C.uint32_t(group), (*C.int32_t)(out), room, n)
	})
}

// listed reads a list whose length may change until it is read.
func listed[T any](read func(*T, C.uint64_t, *C.uint64_t) C.kvc_status) ([]T, error) {
	var n C.uint64_t
	if err := try(func() C.kvc_status { return read(nil, 0, &n) }); err != nil {
		return nil, err
	}
	for {
		out := make([]T, n+1)
		err := try(func() C.kvc_status { return read(at(out), C.uint64_t(len(out)), &n) })
		if e, ok := err.(*Error); ok && e.Code == ErrBufferTooSmall.Code {
			n = C.uint64_t(2 * len(out))
			continue
		}
		if err != nil {
			return nil, err
		}
		return out[:n], nil
	}
}
