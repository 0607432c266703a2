//go:build cgo

package kvcache

// What a cache counts and times.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Histogram is how often times fell into which bucket; the header has the bounds.
type Histogram struct {
	Counts [22]uint64
	SumMS  uint64
}

// Metrics are everything that a cache counts and times. Block counts are of the first layer group.
type Metrics struct {
	Blocks, ReferencedBlocks, CachedBlocks, Sequences uint32
	QueriesTokens, HitsTokens                         uint64
	EvictedCapacityBlocks, EvictedClearedBlocks       uint64
	OutOfBlocks, MissingBlocks, OutOfSequences        uint64
	DroppedEvents                                     uint64
	WatchedEvery                                      uint32
	EvictedWindowBlocks                               uint64
	Lifetime, IdleBeforeEvict, ReuseGap               Histogram
}

// Metrics reads the cache's metrics.
func (c *Cache) Metrics() (Metrics, error) {
	defer runtime.KeepAlive(c)
	var m C.kvc_metrics
	err := try(func() C.kvc_status { return C.kvc_metrics_read(c.h, &m, C.uint64_t(unsafe.Sizeof(m))) })
	histogram := func(h *C.kvc_histogram) Histogram { return *(*Histogram)(unsafe.Pointer(h)) }
	return Metrics{
		Blocks: uint32(m.blocks), ReferencedBlocks: uint32(m.referenced_blocks),
		CachedBlocks: uint32(m.cached_blocks), Sequences: uint32(m.sequences),
		QueriesTokens: uint64(m.queries_tokens), HitsTokens: uint64(m.hits_tokens),
		EvictedCapacityBlocks: uint64(m.evicted_capacity_blocks), EvictedClearedBlocks: uint64(m.evicted_cleared_blocks),
		OutOfBlocks: uint64(m.out_of_blocks), MissingBlocks: uint64(m.missing_blocks),
		OutOfSequences: uint64(m.out_of_sequences), DroppedEvents: uint64(m.dropped_events),
		WatchedEvery: uint32(m.watched_every),
		Lifetime:     histogram(&m.lifetime), IdleBeforeEvict: histogram(&m.idle_before_evict),
		ReuseGap: histogram(&m.reuse_gap), EvictedWindowBlocks: uint64(m.evicted_window_blocks),
	}, err
}

// MetricsText is the metrics as Prometheus reads them (text format 0.0.4).
func (c *Cache) MetricsText() (string, error) {
	defer runtime.KeepAlive(c)
	return written(func(buf *C.char, n C.uint64_t, length *C.uint64_t) C.kvc_status {
		return C.kvc_metrics_text(c.h, buf, n, length)
	})
}

// written is the whole of a text that a call writes as snprintf would, with a status.
func written(write func(*C.char, C.uint64_t, *C.uint64_t) C.kvc_status) (string, error) {
	buf := make([]byte, 8192)
	for {
		var length C.uint64_t
		err := try(func() C.kvc_status {
			return write((*C.char)(unsafe.Pointer(at(buf))), C.uint64_t(len(buf)), &length)
		})
		if err != nil {
			return "", err
		}
		if int(length) < len(buf) {
			return string(buf[:length]), nil
		}
		buf = make([]byte, length+256)
	}
}

// Watch keeps the times of every n-th block from now on, for the histograms; 0 for none.
func (c *Cache) Watch(n uint32) error {
	defer runtime.KeepAlive(c)
	return try(func() C.kvc_status { return C.kvc_metrics_watch(c.h, C.uint32_t(n)) })
}

// SetTime sets the clock of the metrics; the system's is not read from now on.
func (c *Cache) SetTime(nowMS uint64) error {
	defer runtime.KeepAlive(c)
	return try(func() C.kvc_status { return C.kvc_metrics_set_time(c.h, C.uint64_t(nowMS)) })
}
