//go:build cgo

package kvcache

// What sequences share, on a device: lookups in a copy of a prefix index, cascades, merges of partial
// results. Addresses are numbers: what lies there is the device's.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// DevicePrefix is a device's copy of a prefix index, of what the index was at the last Sync: a block
// that has been evicted since can still be found there. Safe for goroutines.
type DevicePrefix struct {
	h       *C.kvc_device_prefix
	cleanup runtime.Cleanup
}

// DeviceCopyBytes is the device memory that a copy of the index takes.
func (p *Prefix) DeviceCopyBytes() (uint64, error) {
	defer runtime.KeepAlive(p)
	var bytes C.uint64_t
	err := try(func() C.kvc_status { return C.kvc_device_prefix_size(p.h, &bytes) })
	return uint64(bytes), err
}

// NewDevicePrefix makes a copy of an index on the device, of nothing before its first Sync. An index has
// one copy: ErrInvalidState for a second.
func (d *Device) NewDevicePrefix(p *Prefix) (*DevicePrefix, error) {
	defer runtime.KeepAlive(d)
	defer runtime.KeepAlive(p)
	var h *C.kvc_device_prefix
	if err := try(func() C.kvc_status { return C.kvc_device_prefix_create(d.handle(), p.h, &h) }); err != nil {
		return nil, err
	}
	copied := &DevicePrefix{h: h}
	copied.cleanup = runtime.AddCleanup(copied, func(h *C.kvc_device_prefix) { C.kvc_device_prefix_destroy(h) }, h)
	return copied, nil
}

// Close ends the copy; again it answers ErrStaleHandle.
func (c *DevicePrefix) Close() error {
	defer runtime.KeepAlive(c)
	c.cleanup.Stop()
	return try(func() C.kvc_status { return C.kvc_device_prefix_destroy(c.h) })
}

// Sync enqueues the upload of what changed in the index since the last call, and returns the bytes of
// it. Syncs and lookups of one copy must be in one order on the device.
func (c *DevicePrefix) Sync(stream uintptr) (uint64, error) {
	defer runtime.KeepAlive(c)
	var bytes C.uint64_t
	err := try(func() C.kvc_status { return C.kvc_device_prefix_sync(c.h, address(stream), &bytes) })
	return uint64(bytes), err
}

// DeviceLookup is a batch of lookups: the fields of kvc_device_lookup_desc. Leave is how many tokens at
// the end of each request are not looked up; 0 looks all of them up.
type DeviceLookup struct {
	Requests, Leave, MaxBlocks              uint32
	Tokens, Indptr, NameSpaces              uintptr
	Matched, Blocks, TailTokens, TailBlocks uintptr
	ErrorFlag                               uintptr
	BlockStride                             int64
}

// Lookup enqueues lookups in the copy on a stream.
func (c *DevicePrefix) Lookup(l *DeviceLookup, stream uintptr) error {
	defer runtime.KeepAlive(c)
	var d C.kvc_device_lookup_desc
	if err := try(func() C.kvc_status { return C.kvc_device_lookup_desc_init(&d, C.uint32_t(unsafe.Sizeof(d))) }); err != nil {
		return err
	}
	d.requests, d.leave, d.max_blocks = C.uint32_t(l.Requests), C.uint32_t(l.Leave), C.uint32_t(l.MaxBlocks)
	d.tokens, d.indptr = (*C.uint32_t)(address(l.Tokens)), (*C.int32_t)(address(l.Indptr))
	d.name_spaces, d.matched = (*C.uint64_t)(address(l.NameSpaces)), (*C.uint32_t)(address(l.Matched))
	d.blocks, d.block_stride = (*C.int32_t)(address(l.Blocks)), C.int64_t(l.BlockStride)
	d.tail_tokens, d.tail_blocks = (*C.uint32_t)(address(l.TailTokens)), (*C.int32_t)(address(l.TailBlocks))
	d.error_flag = (*C.uint32_t)(address(l.ErrorFlag))
	return try(func() C.kvc_status { return C.kvc_device_prefix_lookup(c.h, &d, address(stream)) })
}

// DeviceMerge is partial results of attention to be made one: the fields of kvc_device_merge_desc, 0 for
// their defaults.
type DeviceMerge struct {
	Count, Rows, Heads, Dim                    uint32
	PartType, OutType                          DType
	Parts, LSE, Out, OutLSE, Sinks             uintptr
	PartStride, RowStride, HeadStride          int64
	LSEPartStride, LSERowStride, LSEHeadStride int64
	OutRowStride, OutHeadStride                int64
	OutLSERowStride, OutLSEHeadStride          int64
}

// Merge enqueues a merge of partial results on a stream.
func (d *Device) Merge(m *DeviceMerge, stream uintptr) error {
	defer runtime.KeepAlive(d)
	var c C.kvc_device_merge_desc
	if err := try(func() C.kvc_status { return C.kvc_device_merge_desc_init(&c, C.uint32_t(unsafe.Sizeof(c))) }); err != nil {
		return err
	}
	c.count, c.rows, c.heads, c.dim = C.uint32_t(m.Count), C.uint32_t(m.Rows), C.uint32_t(m.Heads), C.uint32_t(m.Dim)
	if m.PartType != 0 {
		c.part_dtype = C.uint32_t(m.PartType)
	}
	if m.OutType != 0 {
		c.out_dtype = C.uint32_t(m.OutType)
	}
	c.parts, c.lse, c.out = address(m.Parts), (*C.float)(address(m.LSE)), address(m.Out)
	c.out_lse, c.sinks = (*C.float)(address(m.OutLSE)), (*C.float)(address(m.Sinks))
	c.part_stride, c.row_stride, c.head_stride = C.int64_t(m.PartStride), C.int64_t(m.RowStride), C.int64_t(m.HeadStride)
	c.lse_part_stride, c.lse_row_stride = C.int64_t(m.LSEPartStride), C.int64_t(m.LSERowStride)
	c.lse_head_stride, c.out_row_stride = C.int64_t(m.LSEHeadStride), C.int64_t(m.OutRowStride)
	c.out_head_stride, c.out_lse_row_stride = C.int64_t(m.OutHeadStride), C.int64_t(m.OutLSERowStride)
	c.out_lse_head_stride = C.int64_t(m.OutLSEHeadStride)
	return try(func() C.kvc_status { return C.kvc_device_merge(d.handle(), &c, address(stream)) })
}

// CascadePrefix is neighbouring sequences whose tables begin with the same blocks.
type CascadePrefix struct{ FirstSeq, Seqs, Blocks uint32 }

// CascadeSegment is neighbouring sequences that share a prefix of so many blocks, or 0.
type CascadeSegment struct {
	FirstSeq, Seqs, SharedBlocks uint32
	_                            uint32
}

// CascadeQuery is one layer's attention and what the device does in a microsecond: the fields of
// kvc_device_cascade_query. QTokens 0 is 1.
type CascadeQuery struct {
	QHeads, KVHeads, HeadDim, BlockTokens, TokenBytes uint32
	QTokens, Seqs, Multiprocessors                    uint32
	KVTokens, CacheSize                               uint64
	MemoryBytes, CacheBytes, Operations, Launch       float64
}

// CascadeEstimate is what the cost model says, in microseconds.
type CascadeEstimate struct {
	Pays           bool
	Plain, Cascade float64
}

// ChooseCascade chooses among prefixes, in order and apart, those that a cascade should split off, and
// gives the list that Cascade takes on the device, filled up to a length. Where the answer does not pay
// the list splits nothing off.
func ChooseCascade(q *CascadeQuery, prefixes []CascadePrefix, length int) ([]CascadeSegment, CascadeEstimate, error) {
	var c C.kvc_device_cascade_query
	if err := try(func() C.kvc_status { return C.kvc_device_cascade_query_init(&c, C.uint32_t(unsafe.Sizeof(c))) }); err != nil {
		return nil, CascadeEstimate{}, err
	}
	c.q_heads, c.kv_heads, c.head_dim = C.uint32_t(q.QHeads), C.uint32_t(q.KVHeads), C.uint32_t(q.HeadDim)
	c.block_tokens, c.token_bytes = C.uint32_t(q.BlockTokens), C.uint32_t(q.TokenBytes)
	c.q_tokens, c.seqs = C.uint32_t(max(q.QTokens, 1)), C.uint32_t(q.Seqs)
	c.kv_tokens, c.cache_size = C.uint64_t(q.KVTokens), C.uint64_t(q.CacheSize)
	c.memory_bytes, c.cache_bytes = C.double(q.MemoryBytes), C.double(q.CacheBytes)
	c.operations, c.launch = C.double(q.Operations), C.double(q.Launch)
	c.multiprocessors = C.uint32_t(q.Multiprocessors)
	given := make([]C.kvc_device_cascade_prefix, len(prefixes))
	for i, p := range prefixes {
		given[i] = C.kvc_device_cascade_prefix{
			first_seq: C.uint32_t(p.FirstSeq), seqs: C.uint32_t(p.Seqs), blocks: C.uint32_t(p.Blocks),
		}
	}
	list := make([]C.kvc_device_cascade_segment, max(length, 0))
	var e C.kvc_device_cascade_estimate
	if err := try(func() C.kvc_status {
		return C.kvc_device_cascade_choose(&c, at(given), C.uint32_t(len(given)), at(list), C.uint32_t(len(list)), &e, C.uint64_t(unsafe.Sizeof(e)))
	}); err != nil {
		return nil, CascadeEstimate{}, err
	}
	out := make([]CascadeSegment, len(list))
	for i, s := range list {
		out[i] = CascadeSegment{FirstSeq: uint32(s.first_seq), Seqs: uint32(s.seqs), SharedBlocks: uint32(s.shared_blocks)}
	}
	return out, CascadeEstimate{e.pays != 0, float64(e.plain), float64(e.cascade)}, nil
}

// CascadeWorkspaceSize is the bytes of workspace that Cascade needs within a call's sizes and with a list
// of so many segments. The device may be nil where Multiprocessors is given.
func (d *Device) CascadeWorkspaceSize(a *DeviceAttention, segments uint32) (uint64, error) {
	defer runtime.KeepAlive(d)
	desc, options, err := a.c()
	if err != nil {
		return 0, err
	}
	var bytes C.uint64_t
	err = try(func() C.kvc_status {
		return C.kvc_device_cascade_workspace_size(d.handle(), &desc, &options, C.uint32_t(segments), &bytes)
	})
	return uint64(bytes), err
}

// Cascade enqueues what Attend computes as a cascade: list is the device's, of so many segments.
func (d *Device) Cascade(a *DeviceAttention, list uintptr, segments uint32, stream uintptr) error {
	defer runtime.KeepAlive(d)
	desc, options, err := a.c()
	if err != nil {
		return err
	}
	return try(func() C.kvc_status {
		return C.kvc_device_cascade(d.handle(), &desc, &options, (*C.kvc_device_cascade_segment)(address(list)),
			C.uint32_t(segments), address(stream))
	})
}
