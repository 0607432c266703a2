//go:build cgo

package kvcache

// The kernels alone, on the caller's own memory.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Blocks are K or V of one layer as an engine keeps them. Element (block, head, token, channel) lies
// block * BlockStride + head * HeadStride + token * TokenStride + channel elements after the first; all
// strides 0 for [block][kv head][token][channel].
type Blocks struct {
	Rows                                 Rows
	BlockStride, HeadStride, TokenStride int64
}

// extent is the elements that a call may touch of blocks of these sizes, -1 for a negative stride.
func (b Blocks) extent(blocks, heads, tokens, dim int) int {
	if b.BlockStride == 0 && b.HeadStride == 0 && b.TokenStride == 0 {
		return blocks * heads * tokens * dim
	}
	if b.BlockStride < 0 || b.HeadStride < 0 || b.TokenStride < 0 {
		return -1
	}
	return int(int64(blocks-1)*b.BlockStride+int64(heads-1)*b.HeadStride+int64(tokens-1)*b.TokenStride) + dim
}

// Shape is the sizes of an attention call.
type Shape struct {
	QHeads, KVHeads, KDim, VDim uint32
	// VInK: values are the first VDim channels of the keys (latent attention).
	VInK        bool
	Format      Format
	BlockTokens uint32
	// NumBlocks is the blocks that K and V have.
	NumBlocks uint32
	// Threads 0 is the calling one alone; -1 one a core.
	Threads int
}

// Attention is one batched call over ragged sequences: decode, chunked prefill and latent attention.
type Attention struct {
	Shape
	Q, Out Rows
	K, V   Blocks
	// Scales may be nil, for K and V of Codes that have theirs behind them, or one scale of 1.
	Scales *Scales
	// Tiles are in the place of K and V where the format is of sealed tiles, with Raw, the tiles that each
	// sequence reads raw, ascending: all that hold its queries, and every one before that is not sealed.
	Tiles *Tiles
	Raw   [][]RawTile
	// Table is [seqs][TableStride] block ids, KVLens the cached tokens of each sequence, its queries'
	// included, QIndptr [seqs + 1] where its query tokens begin.
	Table           []int32
	TableStride     int64
	KVLens, QIndptr []int32
	NotCausal       bool
	Window          uint32
	Scale, Softcap  float32
	// LSE, Sinks and Alibi may be nil.
	LSE, Sinks, Alibi []float32
	// Workspace is kept for later calls where it is large enough, and made where it is not.
	Workspace []byte
}

func (s *Shape) desc(d *C.kvc_attend_desc) error {
	if err := try(func() C.kvc_status { return C.kvc_attend_desc_init(d, C.uint32_t(unsafe.Sizeof(*d))) }); err != nil {
		return err
	}
	d.q_heads, d.kv_heads = C.uint32_t(s.QHeads), C.uint32_t(s.KVHeads)
	d.k_dim, d.v_dim, d.v_in_k = C.uint32_t(s.KDim), C.uint32_t(s.VDim), flag(s.VInK)
	d.format, d.block_tokens, d.num_blocks = C.uint32_t(s.Format), C.uint32_t(s.BlockTokens), C.uint32_t(s.NumBlocks)
	if s.Threads < 0 {
		d.threads = 0
	}
	d.seqs = 1
	return nil
}

// WorkspaceSize is an upper bound of the bytes of workspace of calls with at most so many sequences,
// query tokens in all and cached tokens a sequence.
func (s *Shape) WorkspaceSize(seqs, maxQTokens, maxKVTokens uint32) (uint64, error) {
	var d C.kvc_attend_desc
	if err := s.desc(&d); err != nil {
		return 0, err
	}
	d.seqs = C.uint32_t(seqs)
	var bytes C.uint64_t
	err := try(func() C.kvc_status {
		return C.kvc_attend_workspace_size(&d, C.uint32_t(maxQTokens), C.uint32_t(maxKVTokens), &bytes)
	})
	return uint64(bytes), err
}

// Kernel names the kernel that Attend would run for a sequence with so many query tokens.
func (s *Shape) Kernel(qTokens uint32) (string, error) {
	var d C.kvc_attend_desc
	if err := s.desc(&d); err != nil {
		return "", err
	}
	var buf [128]C.char
	err := try(func() C.kvc_status { return C.kvc_attend_kernel(&d, C.uint32_t(qTokens), &buf[0], 128) })
	return C.GoString(&buf[0]), err
}

// Attend computes attention on the CPU. What C cannot see, the lengths of slices, is checked here.
func Attend(a *Attention) error {
	var d C.kvc_attend_desc
	if err := a.Shape.desc(&d); err != nil {
		return err
	}
	seqs, rows := len(a.KVLens), 0
	if len(a.QIndptr) != seqs+1 || a.TableStride < 0 || int64(len(a.Table)) < int64(seqs)*a.TableStride {
		return invalid("%d lengths, %d query offsets, %d table entries", seqs, len(a.QIndptr), len(a.Table))
	}
	longest := int32(0)
	for _, n := range a.KVLens {
		longest = max(longest, n)
	}
	if int64(longest) > a.TableStride*int64(a.BlockTokens) {
		return invalid("a sequence has %d tokens, its row of the table is good for %d", longest, a.TableStride*int64(a.BlockTokens))
	}
	rows = int(a.QIndptr[seqs])
	codes, tiles := a.Format.isCodes(), a.Format.isTiles()
	if tiles != (a.Tiles != nil) {
		return invalid("sealed tiles are for their formats alone, and those for sealed tiles")
	}
	for _, part := range []struct {
		name       string
		have, want int
	}{
		{"q", a.Q.elements, rows * int(a.QHeads) * int(a.KDim)},
		{"out", a.Out.elements, rows * int(a.QHeads) * int(a.VDim)},
		{"k", a.K.Rows.elements, a.K.extent(int(a.NumBlocks), int(a.KVHeads), int(a.BlockTokens), int(a.KDim))},
		{"v", a.V.Rows.elements, a.V.extent(int(a.NumBlocks), int(a.KVHeads), int(a.BlockTokens), int(a.VDim))},
		{"lse", len(a.LSE), rows * int(a.QHeads)},
		{"sinks", len(a.Sinks), int(a.QHeads)},
		{"alibi", len(a.Alibi), int(a.QHeads)},
	} {
		optional := part.have == 0 && (part.name == "lse" || part.name == "sinks" || part.name == "alibi" || (part.name == "v" && a.VInK))
		if (codes || tiles) && (part.name == "k" || part.name == "v") {
			continue
		}
		if !optional && (part.want < 0 || part.have < part.want) {
			return invalid("%s has %d elements, the call needs %d", part.name, part.have, part.want)
		}
	}
	if !tiles && !stored(a.Format, a.K, a.V, a.VInK) {
		return invalid("K and V are not of the call's format")
	}
	size, err := a.WorkspaceSize(uint32(seqs), uint32(rows), uint32(longest))
	if err != nil {
		return err
	}
	const align = 64
	if uint64(len(a.Workspace)) < size+align {
		a.Workspace = make([]byte, size+align)
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	for _, p := range []unsafe.Pointer{a.Q.p, a.Out.p, a.K.Rows.p, a.V.Rows.p} {
		if p != nil {
			pins.Pin(p)
		}
	}
	if codes {
		d.scales, err = a.Scales.c(&pins, blockSizes{a.Format, int(a.NumBlocks), int(a.KVHeads), int(a.BlockTokens), int(a.KDim), int(a.VDim), a.VInK}, a.K, a.V)
	} else if tiles {
		d.tiles, err = a.Tiles.forAttend(&pins, &a.Shape, a.Raw, seqs)
	}
	if err != nil {
		return err
	}
	d.q_dtype, d.out_dtype, d.seqs = C.uint32_t(a.Q.dtype), C.uint32_t(a.Out.dtype), C.uint32_t(seqs)
	d.causal, d.window = flag(!a.NotCausal), C.uint32_t(a.Window)
	d.scale, d.softcap = C.float(a.Scale), C.float(a.Softcap)
	d.q, d.out, d.k, d.v = a.Q.p, a.Out.p, a.K.Rows.p, a.V.Rows.p
	d.k_block_stride, d.k_head_stride = C.int64_t(a.K.BlockStride), C.int64_t(a.K.HeadStride)
	d.k_token_stride, d.v_token_stride = C.int64_t(a.K.TokenStride), C.int64_t(a.V.TokenStride)
	d.v_block_stride, d.v_head_stride = C.int64_t(a.V.BlockStride), C.int64_t(a.V.HeadStride)
	d.table, d.table_stride = (*C.int32_t)(pin(&pins, a.Table)), C.int64_t(a.TableStride)
	d.q_indptr, d.kv_lens = (*C.int32_t)(pin(&pins, a.QIndptr)), (*C.int32_t)(pin(&pins, a.KVLens))
	d.lse = (*C.float)(pin(&pins, a.LSE))
	d.sinks, d.alibi = (*C.float)(pin(&pins, a.Sinks)), (*C.float)(pin(&pins, a.Alibi))
	base := pin(&pins, a.Workspace)
	skip := (align - uintptr(unsafe.Pointer(base))%align) % align
	d.workspace, d.workspace_bytes = unsafe.Add(unsafe.Pointer(base), skip), C.uint64_t(size)
	return try(func() C.kvc_status { return C.kvc_attend(&d) })
}

// stored says whether K and V are of a format that is not of tiles.
func stored(f Format, k, v Blocks, vInK bool) bool {
	dtype := DType(f)
	if f.isCodes() {
		dtype = 0
	}
	return k.Rows.dtype == dtype && (vInK || v.Rows.dtype == dtype)
}

// MergeStates merges attention over two disjoint sets of keys, row by row, into the first: out and
// other are [rows][vDim], lse and otherLSE one value a row.
func MergeStates(out, lse, other, otherLSE []float32, vDim int) error {
	rows := len(lse)
	if vDim <= 0 || len(otherLSE) != rows || len(out) != rows*vDim || len(other) != rows*vDim {
		return invalid("%d and %d elements are not %d and %d rows of %d", len(out), len(other), rows, len(otherLSE), vDim)
	}
	return try(func() C.kvc_status {
		return C.kvc_merge_states((*C.float)(at(out)), (*C.float)(at(lse)), (*C.float)(at(other)),
			(*C.float)(at(otherLSE)), C.uint64_t(rows), C.uint32_t(vDim))
	})
}

// NewRows are new keys and values of one layer, and the blocks that they go to.
type NewRows struct {
	KVHeads, KDim, VDim uint32
	VInK                bool
	Format              Format
	BlockTokens         uint32
	NumBlocks           uint32
	// K and V are written, and what Scales, which may be nil, has of rows.
	K, V   Blocks
	Scales *Scales
	// Slots are block * BlockTokens + offset, no two alike; -1 skips a row.
	Slots []int64
	// KRows are [row][kv head][k dim], VRows [row][kv head][v dim].
	KRows, VRows Rows
	// Rope, which may be nil, rotates keys to Positions.
	Rope      *Rope
	Positions []uint32
}

// Append writes new keys and values to their slots.
func Append(n *NewRows) error {
	var d C.kvc_append_desc
	if err := try(func() C.kvc_status { return C.kvc_append_desc_init(&d, C.uint32_t(unsafe.Sizeof(d))) }); err != nil {
		return err
	}
	rows, heads := len(n.Slots), int(n.KVHeads)
	if n.KRows.elements != rows*heads*int(n.KDim) || (!n.VInK && n.VRows.elements != rows*heads*int(n.VDim)) {
		return invalid("%d and %d elements are not %d rows", n.KRows.elements, n.VRows.elements, rows)
	}
	blocks, tokens := int(n.NumBlocks), int(n.BlockTokens)
	k, v := n.K.extent(blocks, heads, tokens, int(n.KDim)), n.V.extent(blocks, heads, tokens, int(n.VDim))
	codes := n.Format.isCodes()
	if !codes && (k < 0 || n.K.Rows.elements < k || (!n.VInK && (v < 0 || n.V.Rows.elements < v))) {
		return invalid("K and V are smaller than %d blocks", blocks)
	}
	if !stored(n.Format, n.K, n.V, n.VInK) || (!n.VInK && n.VRows.dtype != n.KRows.dtype) {
		return invalid("K and V are not of the call's format, or the rows of two types")
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	for _, p := range []unsafe.Pointer{n.K.Rows.p, n.V.Rows.p, n.KRows.p, n.VRows.p} {
		if p != nil {
			pins.Pin(p)
		}
	}
	if codes {
		var err error
		d.scales, err = n.Scales.c(&pins, blockSizes{n.Format, blocks, heads, tokens, int(n.KDim), int(n.VDim), n.VInK}, n.K, n.V)
		if err != nil {
			return err
		}
	}
	d.kv_heads, d.k_dim, d.v_dim = C.uint32_t(n.KVHeads), C.uint32_t(n.KDim), C.uint32_t(n.VDim)
	d.v_in_k, d.format, d.dtype = flag(n.VInK), C.uint32_t(n.Format), C.uint32_t(n.KRows.dtype)
	d.block_tokens, d.num_blocks, d.rows = C.uint32_t(n.BlockTokens), C.uint32_t(n.NumBlocks), C.uint32_t(rows)
	d.k, d.v, d.k_rows, d.v_rows = n.K.Rows.p, n.V.Rows.p, n.KRows.p, n.VRows.p
	d.k_block_stride, d.k_head_stride = C.int64_t(n.K.BlockStride), C.int64_t(n.K.HeadStride)
	d.k_token_stride, d.v_token_stride = C.int64_t(n.K.TokenStride), C.int64_t(n.V.TokenStride)
	d.v_block_stride, d.v_head_stride = C.int64_t(n.V.BlockStride), C.int64_t(n.V.HeadStride)
	d.slots = (*C.int64_t)(pin(&pins, n.Slots))
	if n.Rope != nil {
		if len(n.Positions) != rows {
			return invalid("%d positions for %d rows", len(n.Positions), rows)
		}
		d.rope, d.positions = n.Rope.c, (*C.uint32_t)(pin(&pins, n.Positions))
	}
	defer runtime.KeepAlive(n.Rope)
	return try(func() C.kvc_status { return C.kvc_append(&d) })
}
