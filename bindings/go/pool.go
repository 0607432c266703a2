//go:build cgo

package kvcache

// A block pool alone.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Pool has blocks 0 to n - 1, each free or held by as many holders as retained it. One call at a time.
type Pool struct {
	h       *C.kvc_pool
	cleanup runtime.Cleanup
}

// PoolCounts are what a pool holds: Blocks = Free + Held.
type PoolCounts struct{ Blocks, Free, Held uint32 }

// NewPool makes a pool of free blocks.
func NewPool(blocks uint32) (*Pool, error) {
	p := &Pool{}
	if err := try(func() C.kvc_status { return C.kvc_pool_create(C.uint32_t(blocks), &p.h) }); err != nil {
		return nil, err
	}
	p.cleanup = runtime.AddCleanup(p, func(h *C.kvc_pool) { C.kvc_pool_destroy(h) }, p.h)
	return p, nil
}

// Close ends the pool; again it answers ErrStaleHandle.
func (p *Pool) Close() error {
	defer runtime.KeepAlive(p)
	p.cleanup.Stop()
	return try(func() C.kvc_status { return C.kvc_pool_destroy(p.h) })
}

// Allocate takes len(out) free blocks, all or none.
func (p *Pool) Allocate(out []int32) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status {
		return C.kvc_pool_allocate_n(p.h, C.uint32_t(len(out)), (*C.int32_t)(at(out)))
	})
}

// Retain adds a holder to each block, all or none.
func (p *Pool) Retain(blocks []int32) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status {
		return C.kvc_pool_retain_n(p.h, (*C.int32_t)(at(blocks)), C.uint32_t(len(blocks)))
	})
}

// Free takes a holder from each block, all or none, and tells how many became free.
func (p *Pool) Free(blocks []int32) (uint32, error) {
	defer runtime.KeepAlive(p)
	var freed C.uint32_t
	err := try(func() C.kvc_status {
		return C.kvc_pool_free_n(p.h, (*C.int32_t)(at(blocks)), C.uint32_t(len(blocks)), &freed)
	})
	return uint32(freed), err
}

// Refs is how many hold a block: 0 where it is free or not a block of the pool.
func (p *Pool) Refs(block int32) (uint32, error) {
	defer runtime.KeepAlive(p)
	var refs C.uint32_t
	err := try(func() C.kvc_status { return C.kvc_pool_refs(p.h, C.int32_t(block), &refs) })
	return uint32(refs), err
}

// Stats are the pool's counts.
func (p *Pool) Stats() (PoolCounts, error) {
	defer runtime.KeepAlive(p)
	var c C.kvc_pool_counts
	err := try(func() C.kvc_status { return C.kvc_pool_stats(p.h, &c, C.uint64_t(unsafe.Sizeof(c))) })
	return PoolCounts{uint32(c.blocks), uint32(c.free_blocks), uint32(c.held_blocks)}, err
}
