//go:build cgo

package kvcache

// Statuses to errors, texts to strings, options structs with their defaults: what every other file
// crosses by. The hot calls are listed for the compiler: they keep no pointer and never call Go.

// #include <kvcache.h>
// #if KVC_ABI_VERSION != 1
// #error "this package is for libkvcache's ABI 0.1"
// #endif
// #cgo noescape kvc_step_begin
// #cgo nocallback kvc_step_begin
// #cgo noescape kvc_step_rows
// #cgo nocallback kvc_step_rows
// #cgo noescape kvc_step_append
// #cgo nocallback kvc_step_append
// #cgo noescape kvc_step_attend
// #cgo nocallback kvc_step_attend
// #cgo noescape kvc_step_commit
// #cgo nocallback kvc_step_commit
// #cgo noescape kvc_step_cancel
// #cgo nocallback kvc_step_cancel
// #cgo noescape kvc_seq_start
// #cgo nocallback kvc_seq_start
// #cgo noescape kvc_prefix_lookup
// #cgo nocallback kvc_prefix_lookup
// #cgo noescape kvc_prefix_run
// #cgo nocallback kvc_prefix_run
// #cgo noescape kvc_pool_allocate_n
// #cgo nocallback kvc_pool_allocate_n
// #cgo noescape kvc_pool_refs
// #cgo nocallback kvc_pool_refs
// #cgo noescape kvc_attend
// #cgo nocallback kvc_attend
// #cgo noescape kvc_append
// #cgo nocallback kvc_append
// #cgo noescape kvc_seal
// #cgo nocallback kvc_seal
// #cgo noescape kvc_abi_version
// #cgo nocallback kvc_abi_version
import "C"

import (
	"runtime"
	"unsafe"
)

func init() {
	// A program that was linked with a library of another ABI does not get this far.
	C.kvc_abi_0_1()
}

// Available says why the library cannot be used in this build, or nil.
func Available() error {
	if v := C.kvc_abi_version(); v != C.KVC_ABI_VERSION {
		return &Error{Code: ErrUnsupported.Code, Detail: "the library has another ABI than its header"}
	}
	return nil
}

// Version is the library's version, "MAJOR.MINOR.PATCH".
func Version() string { return C.GoString(C.kvc_version()) }

// BuildInfo is one line about the library: features, formats, the CPU level that runs, GPU kernels.
func BuildInfo() string {
	return text(func(buf *C.char, n C.uint64_t) C.uint64_t { return C.kvc_build_info(buf, n) })
}

// StatusText is a short text of a status code.
func StatusText(code int32) string {
	return text(func(buf *C.char, n C.uint64_t) C.uint64_t {
		return C.kvc_status_text(C.kvc_status(code), buf, n)
	})
}

// text is the whole of what a function writes as snprintf would.
func text(write func(*C.char, C.uint64_t) C.uint64_t) string {
	buf := make([]byte, 512)
	for {
		n := int(write((*C.char)(unsafe.Pointer(unsafe.SliceData(buf))), C.uint64_t(len(buf))))
		if n < len(buf) {
			return string(buf[:n])
		}
		buf = make([]byte, n+1)
	}
}

// try runs a call that answers a status. The text of an error is the thread's, so the goroutine stays
// on it until the text is read; where a call succeeds nothing more is crossed.
func try(call func() C.kvc_status) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if status := call(); status != C.KVC_OK {
		return failed(status)
	}
	return nil
}

// failed is the error of a status on this thread.
func failed(status C.kvc_status) error {
	e := &Error{Code: int32(status)}
	e.Detail = text(func(buf *C.char, n C.uint64_t) C.uint64_t { return C.kvc_last_error(buf, n) })
	if status == C.KVC_ERR_OUT_OF_BLOCKS {
		e.Missing = uint32(C.kvc_last_missing_blocks())
	}
	return e
}

// itemFailed is the error of an item of a batch: the thread keeps no text of those.
func itemFailed(status C.kvc_status) error {
	if status == C.KVC_OK {
		return nil
	}
	return &Error{Code: int32(status), Detail: StatusText(int32(status))}
}

func flag(b bool) C.uint32_t {
	if b {
		return 1
	}
	return 0
}

// at is the address of a slice's memory, nil for an empty one.
func at[T any](s []T) *T {
	if len(s) == 0 {
		return nil
	}
	return unsafe.SliceData(s)
}

// groupArray is the header's array of groups.
func groupArray(groups []GroupSpec) ([]C.kvc_group_spec, error) {
	out := make([]C.kvc_group_spec, len(groups))
	for i := range groups {
		g, spec := &groups[i], &out[i]
		if err := try(func() C.kvc_status {
			return C.kvc_group_spec_init(spec, C.uint32_t(unsafe.Sizeof(*spec)))
		}); err != nil {
			return nil, err
		}
		spec.layers, spec.kv_heads = C.uint32_t(g.Layers), C.uint32_t(g.KVHeads)
		spec.k_dim, spec.v_dim = C.uint32_t(g.KDim), C.uint32_t(g.vDim())
		spec.v_in_k, spec.window = flag(g.VInK), C.uint32_t(g.Window)
		spec.sink_tokens = C.uint32_t(g.SinkTokens)
		if g.Format != 0 {
			spec.format = C.uint32_t(g.Format)
		}
	}
	return out, nil
}
