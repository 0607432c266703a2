//go:build cgo

package kvcache

// The memory planner.

// #include <kvcache.h>
import "C"

import "unsafe"

// PlanOptions are what to plan for.
type PlanOptions struct {
	// BlockTokens 0 is 16.
	BlockTokens uint32
	// ReservePPM is the share of the memory left to activations, in millionths; 0 is the default, a
	// tenth.
	ReservePPM                              uint32
	MemoryBytes, WeightBytes, ContextTokens uint64
	// Batch is sequences at the same time; 0 is 1.
	Batch uint64
}

// PlanGroup is one layer group's part of a plan.
type PlanGroup struct {
	TokenBytes, BlockBytes, SequenceBlocks, Blocks uint64
}

// Planned is what a budget holds. MaxContextTokens is 1<<64 - 1 where any length fits.
type Planned struct {
	KVBytes, TokenBytes, SequenceBytes, BatchBytes uint64
	MaxBatch, MaxContextTokens                     uint64
	Fits                                           bool
	Groups                                         []PlanGroup
}

// Plan computes how much memory a cache takes, and what fits.
func Plan(groups []GroupSpec, options PlanOptions) (*Planned, error) {
	specs, err := groupArray(groups)
	if err != nil {
		return nil, err
	}
	var o C.kvc_plan_options
	if err := try(func() C.kvc_status { return C.kvc_plan_options_init(&o, C.uint32_t(unsafe.Sizeof(o))) }); err != nil {
		return nil, err
	}
	if options.BlockTokens != 0 {
		o.block_tokens = C.uint32_t(options.BlockTokens)
	}
	if options.ReservePPM != 0 {
		o.reserve_ppm = C.uint32_t(options.ReservePPM)
	}
	if options.Batch != 0 {
		o.batch = C.uint64_t(options.Batch)
	}
	o.memory_bytes, o.weight_bytes = C.uint64_t(options.MemoryBytes), C.uint64_t(options.WeightBytes)
	o.context_tokens = C.uint64_t(options.ContextTokens)
	var out C.kvc_plan_result
	parts := make([]C.kvc_plan_group, len(specs))
	if err := try(func() C.kvc_status {
		return C.kvc_plan_compute(&o, at(specs), C.uint32_t(len(specs)), &out, C.uint64_t(unsafe.Sizeof(out)), at(parts))
	}); err != nil {
		return nil, err
	}
	plan := &Planned{
		KVBytes: uint64(out.kv_bytes), TokenBytes: uint64(out.token_bytes),
		SequenceBytes: uint64(out.sequence_bytes), BatchBytes: uint64(out.batch_bytes),
		MaxBatch: uint64(out.max_batch), MaxContextTokens: uint64(out.max_context_tokens), Fits: out.fits != 0,
	}
	for _, p := range parts {
		plan.Groups = append(plan.Groups, PlanGroup{
			uint64(p.token_bytes), uint64(p.block_bytes), uint64(p.sequence_blocks), uint64(p.blocks),
		})
	}
	return plan, nil
}
