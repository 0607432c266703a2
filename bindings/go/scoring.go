//go:build cgo

package kvcache

// Rotary embeddings and scoring: option structs that calls point to. They live in C memory, with their
// lists, so that a hot call passes one pointer and pins nothing.

// #include <stdlib.h>
// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Rope is a rotary position embedding: pairs of channels turned by an angle that grows with position.
type Rope struct{ c *C.kvc_rope }

// RopeOptions describe a rotation; zero fields are the library's defaults.
type RopeOptions struct {
	Style RopeStyle
	// RotaryDim is how many channels are rotated, FirstChannel the first of them.
	RotaryDim, FirstChannel uint32
	Theta, Scale            float32
	// Frequencies are radians a token for each pair, in place of Theta.
	Frequencies []float32
}

// NewRope makes a rotation.
func NewRope(o RopeOptions) (*Rope, error) {
	if o.Frequencies != nil && len(o.Frequencies) != int(o.RotaryDim/2) {
		return nil, invalid("%d frequencies for %d channels", len(o.Frequencies), o.RotaryDim)
	}
	c := (*C.kvc_rope)(C.calloc(1, C.size_t(unsafe.Sizeof(C.kvc_rope{}))))
	if err := try(func() C.kvc_status { return C.kvc_rope_init(c, C.uint32_t(unsafe.Sizeof(*c))) }); err != nil {
		C.free(unsafe.Pointer(c))
		return nil, err
	}
	if o.Style != 0 {
		c.style = C.uint32_t(o.Style)
	}
	if o.Theta != 0 {
		c.theta = C.float(o.Theta)
	}
	if o.Scale != 0 {
		c.scale = C.float(o.Scale)
	}
	c.rotary_dim, c.first_channel = C.uint32_t(o.RotaryDim), C.uint32_t(o.FirstChannel)
	c.frequencies = floats(o.Frequencies)
	r := &Rope{c}
	runtime.AddCleanup(r, func(c *C.kvc_rope) {
		C.free(unsafe.Pointer(c.frequencies))
		C.free(unsafe.Pointer(c))
	}, c)
	return r, nil
}

// Rotate turns rows [position][head][head dim] in place, each to its position: for queries.
func (r *Rope) Rotate(rows []float32, heads, headDim int, positions []uint32) error {
	defer runtime.KeepAlive(r)
	if heads <= 0 || headDim <= 0 || len(rows) != len(positions)*heads*headDim {
		return invalid("%d elements are not %d rows of %d heads of %d", len(rows), len(positions), heads, headDim)
	}
	return try(func() C.kvc_status {
		return C.kvc_rope_rotate(r.c, (*C.float)(at(rows)), C.uint32_t(heads), C.uint32_t(headDim),
			(*C.uint32_t)(at(positions)), C.uint64_t(len(positions)))
	})
}

// Scoring is how scores are made from dot products.
type Scoring struct {
	c     *C.kvc_scoring
	lists int
}

// ScoringOptions describe a scoring; zero fields are the library's defaults.
type ScoringOptions struct {
	NotCausal bool
	// Window is keys that a query sees, 0 for the layer group's; Scale 0 is 1 / sqrt(k dim).
	Window         uint32
	Scale, Softcap float32
	// Sinks and Alibi have one number a query head.
	Sinks, Alibi []float32
}

// NewScoring makes a scoring.
func NewScoring(o ScoringOptions) (*Scoring, error) {
	if o.Sinks != nil && o.Alibi != nil && len(o.Sinks) != len(o.Alibi) {
		return nil, invalid("%d sinks and %d slopes", len(o.Sinks), len(o.Alibi))
	}
	c := (*C.kvc_scoring)(C.calloc(1, C.size_t(unsafe.Sizeof(C.kvc_scoring{}))))
	if err := try(func() C.kvc_status { return C.kvc_scoring_init(c, C.uint32_t(unsafe.Sizeof(*c))) }); err != nil {
		C.free(unsafe.Pointer(c))
		return nil, err
	}
	c.causal, c.window = flag(!o.NotCausal), C.uint32_t(o.Window)
	c.scale, c.softcap = C.float(o.Scale), C.float(o.Softcap)
	c.sinks, c.alibi = floats(o.Sinks), floats(o.Alibi)
	s := &Scoring{c, max(len(o.Sinks), len(o.Alibi))}
	runtime.AddCleanup(s, func(c *C.kvc_scoring) {
		C.free(unsafe.Pointer(c.sinks))
		C.free(unsafe.Pointer(c.alibi))
		C.free(unsafe.Pointer(c))
	}, c)
	return s, nil
}

func (s *Scoring) heads(n int) error {
	if s.lists != 0 && s.lists != n {
		return invalid("sinks or slopes for %d query heads, not %d", s.lists, n)
	}
	return nil
}

// floats copies a list to C memory; nil for an empty one.
func floats(x []float32) *C.float {
	if len(x) == 0 {
		return nil
	}
	p := (*C.float)(C.malloc(C.size_t(4 * len(x))))
	copy(unsafe.Slice((*float32)(p), len(x)), x)
	return p
}
