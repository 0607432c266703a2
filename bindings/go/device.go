//go:build cgo

package kvcache

// A GPU (or its emulator): memory, and kernels on the caller's own memory and stream. Addresses are
// numbers: what lies there is the device's.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Device is a device that is open. Safe for goroutines.
type Device struct {
	h       *C.kvc_device
	cleanup runtime.Cleanup
}

// DeviceFacts are what a device is.
type DeviceFacts struct {
	Kind                     DeviceKind
	Ordinal, Multiprocessors uint32
}

// DeviceRates are what a device does in a microsecond, by which ways to compute the same are chosen: bytes
// from memory and from its second-level cache (of CacheSize bytes), operations of the prefill kernel; and
// the microseconds from one launch's end to the next one's work.
type DeviceRates struct {
	Multiprocessors                             uint32
	CacheSize                                   uint64
	MemoryBytes, CacheBytes, Operations, Launch float64
}

// OpenDevice opens a device: ErrNoKernels where the library has none for it, ErrNoDevice where it is not
// there.
func OpenDevice(kind DeviceKind, ordinal uint32) (*Device, error) {
	var h *C.kvc_device
	if err := try(func() C.kvc_status {
		return C.kvc_device_open(C.uint32_t(kind), C.uint32_t(ordinal), &h)
	}); err != nil {
		return nil, err
	}
	d := &Device{h: h}
	d.cleanup = runtime.AddCleanup(d, func(h *C.kvc_device) { C.kvc_device_close(h) }, h)
	return d, nil
}

// Close closes the device; again it answers ErrStaleHandle.
func (d *Device) Close() error {
	defer runtime.KeepAlive(d)
	d.cleanup.Stop()
	return try(func() C.kvc_status { return C.kvc_device_close(d.h) })
}

// Info is what the device is.
func (d *Device) Info() (DeviceFacts, error) {
	defer runtime.KeepAlive(d)
	var f C.kvc_device_facts
	err := try(func() C.kvc_status { return C.kvc_device_info(d.h, &f, C.uint64_t(unsafe.Sizeof(f))) })
	return DeviceFacts{DeviceKind(f.kind), uint32(f.ordinal), uint32(f.multiprocessors)}, err
}

// Rates are those that caches on this device go by: ErrUnsupported where the driver does not say what they
// follow from.
func (d *Device) Rates() (DeviceRates, error) {
	defer runtime.KeepAlive(d)
	var r C.kvc_device_rates
	err := try(func() C.kvc_status { return C.kvc_device_rates_read(d.handle(), &r, C.uint64_t(unsafe.Sizeof(r))) })
	return DeviceRates{
		uint32(r.multiprocessors), uint64(r.cache_size),
		float64(r.memory_bytes), float64(r.cache_bytes), float64(r.operations), float64(r.launch),
	}, err
}

// Name is the device's name.
func (d *Device) Name() (string, error) {
	defer runtime.KeepAlive(d)
	var buf [256]C.char
	err := try(func() C.kvc_status { return C.kvc_device_name(d.h, &buf[0], 256) })
	return C.GoString(&buf[0]), err
}

// Alloc allocates device memory, aligned to 256, and returns its address.
func (d *Device) Alloc(bytes uint64) (uintptr, error) {
	defer runtime.KeepAlive(d)
	var out unsafe.Pointer
	err := try(func() C.kvc_status { return C.kvc_device_alloc(d.h, C.uint64_t(bytes), &out) })
	return uintptr(out), err
}

// Free frees memory of Alloc, after everything that is enqueued.
func (d *Device) Free(at uintptr) error {
	defer runtime.KeepAlive(d)
	return try(func() C.kvc_status { return C.kvc_device_free(d.h, address(at)) })
}

// Upload copies host memory to the device on a stream, and waits.
func (d *Device) Upload(to uintptr, from []byte, stream uintptr) error {
	defer runtime.KeepAlive(d)
	return try(func() C.kvc_status {
		return C.kvc_device_upload(d.h, address(to), unsafe.Pointer(at(from)), C.uint64_t(len(from)), address(stream))
	})
}

// Download copies device memory to the host, after what is enqueued on a stream, and waits.
func (d *Device) Download(to []byte, from, stream uintptr) error {
	defer runtime.KeepAlive(d)
	return try(func() C.kvc_status {
		return C.kvc_device_download(d.h, unsafe.Pointer(at(to)), address(from), C.uint64_t(len(to)), address(stream))
	})
}

// Zero enqueues the zeroing of device memory.
func (d *Device) Zero(at uintptr, bytes uint64, stream uintptr) error {
	defer runtime.KeepAlive(d)
	return try(func() C.kvc_status {
		return C.kvc_device_zero(d.h, address(at), C.uint64_t(bytes), address(stream))
	})
}

// Sync waits for everything that is enqueued on a stream.
func (d *Device) Sync(stream uintptr) error {
	defer runtime.KeepAlive(d)
	return try(func() C.kvc_status { return C.kvc_device_sync(d.h, address(stream)) })
}

// DeviceAttention is an attention call whose every address is the device's; the fields are those of
// kvc_attend_desc and kvc_device_attend_options, 0 for their defaults.
type DeviceAttention struct {
	Shape
	Seqs                                               uint32
	MaxQTokens, MaxKVTokens, PieceTokens, TotalQTokens uint32
	Multiprocessors, MultiprocessorSharedBytes         uint32
	Planned, NotCausal                                 bool
	Window                                             uint32
	Scale, Softcap                                     float32
	QType, OutType                                     DType
	Q, Out, K, V, Table, KVLens, QIndptr               uintptr
	LSE, Sinks, Alibi, TailMask, BadBlock, Workspace   uintptr
	KBlockStride, KHeadStride, KTokenStride            int64
	VBlockStride, VHeadStride, VTokenStride            int64
	TableStride                                        int64
	WorkspaceBytes                                     uint64
}

func (a *DeviceAttention) c() (d C.kvc_attend_desc, o C.kvc_device_attend_options, err error) {
	if err = a.Shape.desc(&d); err != nil {
		return
	}
	if err = try(func() C.kvc_status {
		return C.kvc_device_attend_options_init(&o, C.uint32_t(unsafe.Sizeof(o)))
	}); err != nil {
		return
	}
	d.seqs = C.uint32_t(max(a.Seqs, 1))
	if a.QType != 0 {
		d.q_dtype = C.uint32_t(a.QType)
	}
	if a.OutType != 0 {
		d.out_dtype = C.uint32_t(a.OutType)
	}
	d.causal, d.window = flag(!a.NotCausal), C.uint32_t(a.Window)
	d.scale, d.softcap = C.float(a.Scale), C.float(a.Softcap)
	d.q, d.out, d.k, d.v = address(a.Q), address(a.Out), address(a.K), address(a.V)
	d.k_block_stride, d.k_head_stride = C.int64_t(a.KBlockStride), C.int64_t(a.KHeadStride)
	d.k_token_stride, d.v_token_stride = C.int64_t(a.KTokenStride), C.int64_t(a.VTokenStride)
	d.v_block_stride, d.v_head_stride = C.int64_t(a.VBlockStride), C.int64_t(a.VHeadStride)
	d.table, d.table_stride = (*C.int32_t)(address(a.Table)), C.int64_t(a.TableStride)
	d.kv_lens, d.q_indptr = (*C.int32_t)(address(a.KVLens)), (*C.int32_t)(address(a.QIndptr))
	d.lse, d.sinks, d.alibi = (*C.float)(address(a.LSE)), (*C.float)(address(a.Sinks)), (*C.float)(address(a.Alibi))
	d.bad_block = (*C.uint32_t)(address(a.BadBlock))
	d.workspace, d.workspace_bytes = address(a.Workspace), C.uint64_t(a.WorkspaceBytes)
	if a.MaxQTokens != 0 {
		o.max_q_tokens = C.uint32_t(a.MaxQTokens)
	}
	o.max_kv_tokens, o.piece_tokens = C.uint32_t(a.MaxKVTokens), C.uint32_t(a.PieceTokens)
	o.total_q_tokens, o.planned = C.uint32_t(a.TotalQTokens), flag(a.Planned)
	o.multiprocessors = C.uint32_t(a.Multiprocessors)
	o.multiprocessor_shared_bytes = C.uint32_t(a.MultiprocessorSharedBytes)
	o.tail_mask = (*C.uint32_t)(address(a.TailMask))
	return
}

func (d *Device) handle() *C.kvc_device {
	if d == nil {
		return nil
	}
	return d.h
}

// AttendWorkspaceSize is the bytes of workspace that Attend needs within a call's sizes. The device may
// be nil where Multiprocessors is given.
func (d *Device) AttendWorkspaceSize(a *DeviceAttention) (uint64, error) {
	defer runtime.KeepAlive(d)
	desc, options, err := a.c()
	if err != nil {
		return 0, err
	}
	var bytes C.uint64_t
	err = try(func() C.kvc_status { return C.kvc_device_attend_workspace_size(d.handle(), &desc, &options, &bytes) })
	return uint64(bytes), err
}

// AttendKernel names the kernel that Attend would run; the device may be nil as above.
func (d *Device) AttendKernel(a *DeviceAttention) (string, error) {
	defer runtime.KeepAlive(d)
	desc, options, err := a.c()
	if err != nil {
		return "", err
	}
	var buf [128]C.char
	err = try(func() C.kvc_status { return C.kvc_device_attend_kernel(d.handle(), &desc, &options, &buf[0], 128) })
	return C.GoString(&buf[0]), err
}

// Attend enqueues attention on a stream.
func (d *Device) Attend(a *DeviceAttention, stream uintptr) error {
	defer runtime.KeepAlive(d)
	desc, options, err := a.c()
	if err != nil {
		return err
	}
	return try(func() C.kvc_status { return C.kvc_device_attend(d.h, &desc, &options, address(stream)) })
}

// DeviceRowsAppend is new rows whose every address is the device's: the fields of kvc_append_desc and
// kvc_device_append_options.
type DeviceRowsAppend struct {
	KVHeads, KDim, VDim, BlockTokens, NumBlocks, Rows uint32
	VInK                                              bool
	Format                                            Format
	Type                                              DType
	K, V, Slots, KRows, VRows, Positions              uintptr
	KBlockStride, KHeadStride, KTokenStride           int64
	VBlockStride, VHeadStride, VTokenStride           int64
	RopeStyle                                         RopeStyle
	RotaryDim, FirstChannel, TablePositions, QHeads   uint32
	Cosines, Sines, Q, QOut, ErrorFlag                uintptr
}

// Append enqueues the writing of new keys and values to their slots on a stream.
func (d *Device) Append(a *DeviceRowsAppend, stream uintptr) error {
	defer runtime.KeepAlive(d)
	var n C.kvc_append_desc
	var o C.kvc_device_append_options
	if err := try(func() C.kvc_status { return C.kvc_append_desc_init(&n, C.uint32_t(unsafe.Sizeof(n))) }); err != nil {
		return err
	}
	if err := try(func() C.kvc_status {
		return C.kvc_device_append_options_init(&o, C.uint32_t(unsafe.Sizeof(o)))
	}); err != nil {
		return err
	}
	n.kv_heads, n.k_dim, n.v_dim = C.uint32_t(a.KVHeads), C.uint32_t(a.KDim), C.uint32_t(a.VDim)
	n.v_in_k, n.format, n.dtype = flag(a.VInK), C.uint32_t(a.Format), C.uint32_t(a.Type)
	n.block_tokens, n.num_blocks, n.rows = C.uint32_t(a.BlockTokens), C.uint32_t(a.NumBlocks), C.uint32_t(a.Rows)
	n.k, n.v, n.k_rows, n.v_rows = address(a.K), address(a.V), address(a.KRows), address(a.VRows)
	n.k_block_stride, n.k_head_stride = C.int64_t(a.KBlockStride), C.int64_t(a.KHeadStride)
	n.k_token_stride, n.v_token_stride = C.int64_t(a.KTokenStride), C.int64_t(a.VTokenStride)
	n.v_block_stride, n.v_head_stride = C.int64_t(a.VBlockStride), C.int64_t(a.VHeadStride)
	n.slots, n.positions = (*C.int64_t)(address(a.Slots)), (*C.uint32_t)(address(a.Positions))
	if a.RopeStyle != 0 {
		o.rope_style = C.uint32_t(a.RopeStyle)
	}
	o.rotary_dim, o.first_channel = C.uint32_t(a.RotaryDim), C.uint32_t(a.FirstChannel)
	o.table_positions, o.q_heads = C.uint32_t(a.TablePositions), C.uint32_t(a.QHeads)
	o.cosines, o.sines = (*C.float)(address(a.Cosines)), (*C.float)(address(a.Sines))
	o.q, o.q_out, o.error_flag = address(a.Q), address(a.QOut), (*C.uint32_t)(address(a.ErrorFlag))
	return try(func() C.kvc_status { return C.kvc_device_append(d.h, &n, &o, address(stream)) })
}

// BlockCopy copies blocks of one pool to blocks of another or the same, or zeroes them: the fields of
// kvc_device_copy_desc. Blocks that lie in one piece are one plane and one run, 0 here.
type BlockCopy struct {
	Count                              uint32
	WideIDs, Zero                      bool
	Planes, Runs, RunBytes, TokenBytes uint32
	FromBlocks, ToBlocks               uint32
	List, Tokens                       uintptr
	From, FromPlanes, To, ToPlanes     uintptr
	FromPlaneStride, FromBlockStride   int64
	FromRunStride, ToPlaneStride       int64
	ToBlockStride, ToRunStride         int64
	ErrorFlag                          uintptr
}

// Copy enqueues copies on a stream.
func (d *Device) Copy(b *BlockCopy, stream uintptr) error {
	defer runtime.KeepAlive(d)
	var c C.kvc_device_copy_desc
	if err := try(func() C.kvc_status { return C.kvc_device_copy_desc_init(&c, C.uint32_t(unsafe.Sizeof(c))) }); err != nil {
		return err
	}
	if b.Planes != 0 {
		c.planes = C.uint32_t(b.Planes)
	}
	if b.Runs != 0 {
		c.runs = C.uint32_t(b.Runs)
	}
	c.count, c.wide_ids, c.zero = C.uint32_t(b.Count), flag(b.WideIDs), flag(b.Zero)
	c.run_bytes, c.token_bytes = C.uint32_t(b.RunBytes), C.uint32_t(b.TokenBytes)
	c.from_blocks, c.to_blocks = C.uint32_t(b.FromBlocks), C.uint32_t(b.ToBlocks)
	c.list, c.tokens = address(b.List), (*C.uint32_t)(address(b.Tokens))
	c.from, c.to = address(b.From), address(b.To)
	c.from_planes, c.to_planes = (*C.uint64_t)(address(b.FromPlanes)), (*C.uint64_t)(address(b.ToPlanes))
	c.from_plane_stride, c.from_block_stride = C.int64_t(b.FromPlaneStride), C.int64_t(b.FromBlockStride)
	c.from_run_stride, c.to_plane_stride = C.int64_t(b.FromRunStride), C.int64_t(b.ToPlaneStride)
	c.to_block_stride, c.to_run_stride = C.int64_t(b.ToBlockStride), C.int64_t(b.ToRunStride)
	c.error_flag = (*C.uint32_t)(address(b.ErrorFlag))
	return try(func() C.kvc_status { return C.kvc_device_copy(d.h, &c, address(stream)) })
}
