//go:build cgo

package kvcache

// Steps: one forward pass over a batch. Each method crosses once, with checks of what Go can know
// before: lengths of slices, since C sees addresses only.

// #include <stdlib.h>
// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Rows are keys, values, queries or outputs: a Go slice, or an address on the cache's device.
type Rows struct {
	p        unsafe.Pointer
	device   uintptr
	elements int
	dtype    DType
}

// Float32s are rows of 32-bit floats.
func Float32s(x []float32) Rows { return Rows{p: unsafe.Pointer(at(x)), elements: len(x), dtype: F32} }

// Halves are rows of 16-bit floats, by their bits.
func Halves(x []uint16, dtype DType) Rows {
	return Rows{p: unsafe.Pointer(at(x)), elements: len(x), dtype: dtype}
}

// DeviceRows are rows in the memory of the cache's device, aligned to 16 bytes.
func DeviceRows(address uintptr, elements int, dtype DType) Rows {
	return Rows{device: address, elements: elements, dtype: dtype}
}

func (r Rows) pointer() unsafe.Pointer {
	if r.device != 0 {
		return address(r.device)
	}
	return r.p
}

// Batch is work that is made once and used for many steps: one new token for each of its sequences.
// Its memory is C's, so that a step begins without pinning anything.
type Batch struct {
	// Tokens are the sampled tokens, one a sequence: write them before each step.
	Tokens  []uint32
	work    []C.kvc_work
	cache   *Cache
	cleanup runtime.Cleanup
}

// NewBatch makes work for sequences, at least one.
func NewBatch(seqs []Seq) (*Batch, error) {
	n := len(seqs)
	if n == 0 {
		return nil, invalid("a batch has at least one sequence")
	}
	for _, seq := range seqs {
		if seq.cache != seqs[0].cache {
			return nil, invalid("a batch has sequences of several caches")
		}
	}
	size := unsafe.Sizeof(C.kvc_work{})
	// The tokens lie after the work.
	memory := C.calloc(C.size_t(n), C.size_t(size+4))
	if memory == nil {
		return nil, &Error{Code: ErrOutOfMemory.Code, Detail: "no memory for a batch"}
	}
	b := &Batch{cache: seqs[0].cache, work: unsafe.Slice((*C.kvc_work)(memory), n)}
	b.Tokens = unsafe.Slice((*uint32)(unsafe.Add(memory, uintptr(n)*size)), n)
	for i, seq := range seqs {
		b.work[i] = C.kvc_work{seq: C.kvc_seq(seq.ID), token_count: 1, tokens: (*C.uint32_t)(&b.Tokens[i])}
	}
	b.cleanup = runtime.AddCleanup(b, func(p unsafe.Pointer) { C.free(p) }, memory)
	return b, nil
}

// Close frees the batch. Its Tokens are gone.
func (b *Batch) Close() {
	if b.work != nil {
		b.cleanup.Stop()
		C.free(unsafe.Pointer(at(b.work)))
		b.work, b.Tokens = nil, nil
	}
}

// Work is new tokens of one sequence.
type Work struct {
	Seq    Seq
	Tokens []uint32
}

// Step is a forward pass, made once and reused: it keeps its buffers. One call at a time.
type Step struct {
	h       *C.kvc_step
	cleanup runtime.Cleanup
	cache   *Cache
	rows    int
	work    []C.kvc_work
	pins    runtime.Pinner
}

// NewStep makes a step, for any number of passes over any caches.
func NewStep() (*Step, error) {
	s := &Step{}
	var h *C.kvc_step
	if err := try(func() C.kvc_status { return C.kvc_step_create(&h) }); err != nil {
		return nil, err
	}
	s.h = h
	s.cleanup = runtime.AddCleanup(s, func(h *C.kvc_step) { C.kvc_step_destroy(h) }, h)
	return s, nil
}

// Close ends the step, cancelling it where it is open.
func (s *Step) Close() error {
	defer runtime.KeepAlive(s)
	s.cleanup.Stop()
	s.cache = nil
	return try(func() C.kvc_status { return C.kvc_step_destroy(s.h) })
}

// Begin opens the step: it reserves blocks for the new tokens, all or nothing. With ErrOutOfBlocks the
// error's Missing says how many were missing.
func (s *Step) Begin(c *Cache, work []Work) error {
	if cap(s.work) < len(work) {
		s.work = make([]C.kvc_work, 2*len(work))
	}
	list, rows := s.work[:len(work)], 0
	for i := range work {
		// An id means something in its own cache alone.
		if work[i].Seq.cache != c {
			s.pins.Unpin()
			return invalid("work %d is of another cache", i)
		}
		w := &work[i]
		p := at(w.Tokens)
		if p != nil {
			s.pins.Pin(p)
		}
		list[i] = C.kvc_work{seq: C.kvc_seq(w.Seq.ID), token_count: C.uint32_t(len(w.Tokens)), tokens: (*C.uint32_t)(p)}
		rows += len(w.Tokens)
	}
	err := s.begin(c, list, rows)
	s.pins.Unpin()
	clear(list)
	return err
}

// BeginBatch opens the step with a batch's sequences and tokens.
func (s *Step) BeginBatch(c *Cache, b *Batch) error {
	if b.cache != c {
		return invalid("the batch is of another cache")
	}
	err := s.begin(c, b.work, len(b.work))
	runtime.KeepAlive(b)
	return err
}

func (s *Step) begin(c *Cache, work []C.kvc_work, rows int) error {
	runtime.LockOSThread()
	var err error
	if status := C.kvc_step_begin(c.h, s.h, at(work), C.uint32_t(len(work))); status != C.KVC_OK {
		err = failed(status)
	} else {
		s.cache, s.rows = c, rows
	}
	runtime.UnlockOSThread()
	runtime.KeepAlive(c)
	runtime.KeepAlive(s)
	return err
}

// Rows is how many new tokens the open step has.
func (s *Step) Rows() int { return s.rows }

// Positions writes the position of each row in its sequence to out, which has room for all.
func (s *Step) Positions(out []uint32) error {
	if err := s.open(); err != nil {
		return err
	}
	if len(out) < s.rows {
		return &Error{Code: ErrBufferTooSmall.Code, Detail: "positions: fewer than the step has rows"}
	}
	defer runtime.KeepAlive(s)
	var n C.uint32_t
	return try(func() C.kvc_status {
		return C.kvc_step_rows(s.h, (*C.uint32_t)(at(out)), C.uint64_t(len(out)), &n)
	})
}

func (s *Step) open() error {
	if s.cache == nil {
		return &Error{Code: ErrInvalidState.Code, Detail: "the step is not open"}
	}
	return nil
}

func (s *Step) group(group int) (*GroupSpec, error) {
	if err := s.open(); err != nil {
		return nil, err
	}
	if group < 0 || group >= len(s.cache.Groups) {
		return nil, invalid("group %d is not one of the cache's", group)
	}
	return &s.cache.Groups[group], nil
}

func (s *Step) sized(r Rows, name string, heads, dim uint32) error {
	if r.elements != s.rows*int(heads)*int(dim) {
		return invalid("%s has %d elements, not %d rows of %d heads of %d", name, r.elements, s.rows, heads, dim)
	}
	return nil
}

// Append writes the keys and values of the step's rows in a layer: k is [row][kv head][k dim], v
// [row][kv head][v dim], of one element type. With rope, which may be nil, keys are rotated to their
// positions on the way.
func (s *Step) Append(group, layer int, k, v Rows, rope *Rope) error {
	g, err := s.group(group)
	if err != nil {
		return err
	}
	if err := s.sized(k, "k", g.KVHeads, g.KDim); err != nil {
		return err
	}
	if !g.VInK {
		if err := s.sized(v, "v", g.KVHeads, g.vDim()); err != nil {
			return err
		}
		if v.dtype != k.dtype || (v.device != 0) != (k.device != 0) {
			return invalid("k and v are of different element types or places")
		}
	}
	var r *C.kvc_rope
	if rope != nil {
		r = rope.c
	}
	runtime.LockOSThread()
	var status C.kvc_status
	if k.device != 0 {
		status = C.kvc_step_append_device(s.cache.h, s.h, C.uint32_t(group), C.uint32_t(layer), k.pointer(), v.pointer(), C.uint32_t(k.dtype), r)
	} else {
		status = C.kvc_step_append(s.cache.h, s.h, C.uint32_t(group), C.uint32_t(layer), k.p, v.p, C.uint32_t(k.dtype), r)
	}
	if status != C.KVC_OK {
		err = failed(status)
	}
	runtime.UnlockOSThread()
	runtime.KeepAlive(rope)
	runtime.KeepAlive(s)
	return err
}

// Attend computes attention of the step's rows over all that their sequences hold in a layer: q is
// [row][q head][k dim], out [row][q head][v dim], lse nil or [row][q head]. scoring may be nil.
func (s *Step) Attend(group, layer, qHeads int, q, out Rows, scoring *Scoring, lse []float32) error {
	g, err := s.group(group)
	if err != nil {
		return err
	}
	if qHeads <= 0 {
		return invalid("%d query heads", qHeads)
	}
	if err := s.sized(q, "q", uint32(qHeads), g.KDim); err != nil {
		return err
	}
	if err := s.sized(out, "out", uint32(qHeads), g.vDim()); err != nil {
		return err
	}
	if lse != nil && len(lse) != s.rows*qHeads {
		return invalid("lse has %d elements for %d rows of %d heads", len(lse), s.rows, qHeads)
	}
	if (q.device != 0) != (out.device != 0) || (q.device != 0 && lse != nil) {
		return invalid("q, out and lse are in different places")
	}
	var how *C.kvc_scoring
	if scoring != nil {
		if err := scoring.heads(qHeads); err != nil {
			return err
		}
		how = scoring.c
	}
	runtime.LockOSThread()
	var status C.kvc_status
	if q.device != 0 {
		status = C.kvc_step_attend_device(s.cache.h, s.h, C.uint32_t(group), C.uint32_t(layer), C.uint32_t(qHeads),
			q.pointer(), C.uint32_t(q.dtype), out.pointer(), C.uint32_t(out.dtype), how, nil)
	} else {
		status = C.kvc_step_attend(s.cache.h, s.h, C.uint32_t(group), C.uint32_t(layer), C.uint32_t(qHeads),
			q.p, C.uint32_t(q.dtype), out.p, C.uint32_t(out.dtype), how, (*C.float)(at(lse)))
	}
	if status != C.KVC_OK {
		err = failed(status)
	}
	runtime.UnlockOSThread()
	runtime.KeepAlive(scoring)
	runtime.KeepAlive(s)
	return err
}

// Commit makes the step's tokens part of their sequences, publishes the blocks they filled to the
// prefix index, and closes the step.
func (s *Step) Commit() error {
	return s.end(func(c *C.kvc_cache) C.kvc_status { return C.kvc_step_commit(c, s.h) })
}

// Cancel closes the step without its tokens: the sequences are as before.
func (s *Step) Cancel() error {
	return s.end(func(c *C.kvc_cache) C.kvc_status { return C.kvc_step_cancel(c, s.h) })
}

func (s *Step) end(call func(*C.kvc_cache) C.kvc_status) error {
	if err := s.open(); err != nil {
		return err
	}
	cache := s.cache
	runtime.LockOSThread()
	var err error
	if status := call(cache.h); status != C.KVC_OK {
		err = failed(status)
	} else {
		s.cache, s.rows = nil, 0
	}
	runtime.UnlockOSThread()
	runtime.KeepAlive(cache)
	runtime.KeepAlive(s)
	return err
}
