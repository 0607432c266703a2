//go:build cgo

package kvcache

// Sequences that start before what tiers have of them is on the device.

// #include <kvcache.h>
import "C"

import "runtime"

// Onboard is StartMedia for an engine that begins before all blocks are on the device: what tiers have
// of the prompt is counted, and comes layer by layer. Before a layer is attended it must be there
// (Seq.WaitLayer, Step.WaitLayer), and all of them before the step is committed. It waits for nothing.
func (c *Cache) Onboard(prompt []uint32, media []Media, namespace uint64) (Seq, int, error) {
	defer runtime.KeepAlive(c)
	var id C.kvc_seq
	var cached C.uint32_t
	list := mediaList(media)
	err := try(func() C.kvc_status {
		return C.kvc_onboard_start(c.h, (*C.uint32_t)(at(prompt)), C.uint64_t(len(prompt)), at(list), C.uint32_t(len(list)), C.uint64_t(namespace), &id, &cached)
	})
	return Seq{c, uint32(id)}, int(cached), err
}

// WaitLayer tells, after at most waitMS during which others may use the cache, whether a layer of all
// blocks is there. ErrLayerMissing where it never will be: cancel the step, then the load.
func (s Seq) WaitLayer(group, layer int, waitMS uint32) (bool, error) {
	defer runtime.KeepAlive(s.cache)
	var there C.uint32_t
	err := try(func() C.kvc_status {
		return C.kvc_onboard_wait(s.cache.h, C.kvc_seq(s.ID), C.uint32_t(group), C.uint32_t(layer), C.uint32_t(waitMS), &there)
	})
	return there != 0, err
}

// WaitLayer is the same for all sequences of the open step.
func (s *Step) WaitLayer(group, layer int, waitMS uint32) (bool, error) {
	if err := s.open(); err != nil {
		return false, err
	}
	defer runtime.KeepAlive(s)
	var there C.uint32_t
	err := try(func() C.kvc_status {
		return C.kvc_onboard_wait_step(s.cache.h, s.h, C.uint32_t(group), C.uint32_t(layer), C.uint32_t(waitMS), &there)
	})
	return there != 0, err
}

// LoadProgress is how the load of a sequence stands. Where it is complete, all else is 0.
type LoadProgress struct {
	Status                      LoadStatus
	ReadyLayers                 uint32
	DeviceTokens, LoadingTokens uint64
	// MissingGroup and MissingLayer are the first layer, in the order in which they come, that is not there.
	MissingGroup, MissingLayer uint32
	Why                        Missed
}

// LoadProgress copies nothing and waits for nothing.
func (s Seq) LoadProgress() (LoadProgress, error) {
	defer runtime.KeepAlive(s.cache)
	var p C.kvc_onboard_progress
	err := try(func() C.kvc_status {
		return C.kvc_onboard_state(s.cache.h, C.kvc_seq(s.ID), &p, C.sizeof_kvc_onboard_progress)
	})
	return LoadProgress{
		Status: LoadStatus(p.state), ReadyLayers: uint32(p.ready_layers),
		DeviceTokens: uint64(p.device_tokens), LoadingTokens: uint64(p.loading_tokens),
		MissingGroup: uint32(p.missing_group), MissingLayer: uint32(p.missing_layer), Why: Missed(p.why),
	}, err
}

// CancelLoad gives up what has not come, and tells how many tokens the sequence holds then.
func (s Seq) CancelLoad() (int, error) {
	defer runtime.KeepAlive(s.cache)
	var tokens C.uint32_t
	err := try(func() C.kvc_status { return C.kvc_onboard_cancel(s.cache.h, C.kvc_seq(s.ID), &tokens) })
	return int(tokens), err
}
