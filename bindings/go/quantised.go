//go:build cgo

package kvcache

// Quantised K and V in the caller's own memory: codes with their scales, and sealed tiles with the raw
// rows of those that are not sealed yet. For Attend and Append; a Cache of these formats does both.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Codes are rows of a quantised format, by their bytes; strides of their Blocks are bytes.
func Codes(x []byte) Rows { return Rows{p: unsafe.Pointer(at(x)), elements: len(x)} }

// isCodes says whether rows of a format are codes of bytes.
func (f Format) isCodes() bool { return f >= FormatFP8E4M3 && f <= FormatNVFP4 }

// isTiles says whether a format is of sealed tiles.
func (f Format) isTiles() bool { return f >= FormatKT8V8 }

// RowElements is what a row of dim channels has: bytes of codes, or as many elements as channels.
func (f Format) RowElements(dim int) int {
	switch {
	case !f.isCodes():
		return dim
	case f == FormatInt4T || f == FormatNVFP4:
		return (dim + 31) / 32 * 16
	}
	return (dim + 15) / 16 * 16
}

// ScaleBytes is the bytes of the scales of one row of dim channels, 0 where a head has one scale. Keys
// of latent attention whose values are fewer channels have two parts.
func (f Format) ScaleBytes(dim, parts int) int {
	switch f {
	case FormatInt8T:
		return 2 * parts
	case FormatInt4T:
		return 4 * parts
	case FormatNVFP4:
		return dim / 16
	}
	return 0
}

// Scales say where the scales of quantised rows are. Strides are bytes.
type Scales struct {
	// K and V are the scales of rows: a float16 of int8_t, a float16 scale and minimum of int4_t, an e4m3
	// for 16 channels of nvfp4. Nil where they lie behind the codes of each block and head.
	K, V                                    []byte
	KBlockStride, KHeadStride, KTokenStride int64
	VBlockStride, VHeadStride, VTokenStride int64
	// KHeads and VHeads are one scale for all of a head (fp8, nvfp4); nil for 1.
	KHeads, VHeads []float32
	// KUnrotated: keys of int8_t are as they were given.
	KUnrotated bool
}

// blockSizes are what codes and scales are checked against.
type blockSizes struct {
	format                Format
	blocks, heads, tokens int
	kDim, vDim            int
	vInK                  bool
}

// codesFit says whether the codes of one side, and scales that lie behind them, are in their memory.
func (z blockSizes) codesFit(b Blocks, dim, parts int, scaled bool) bool {
	row, behind := int64(z.format.RowElements(dim)), int64(0)
	native := b.BlockStride == 0 && b.HeadStride == 0 && b.TokenStride == 0
	if native || !scaled {
		behind = int64(z.format.ScaleBytes(dim, parts))
	}
	run := int64(z.tokens) * (row + behind)
	block, head := run*int64(z.heads), run
	if !native {
		if b.BlockStride < 0 || b.HeadStride < 0 || b.TokenStride < 0 {
			return false
		}
		block, head = b.BlockStride, b.HeadStride
		run = max(run, int64(z.tokens-1)*b.TokenStride+row)
		if behind == 0 {
			run = int64(z.tokens-1)*b.TokenStride + row
		}
	}
	return int64(b.Rows.elements) >= int64(z.blocks-1)*block+int64(z.heads-1)*head+run
}

// c is the header's struct, pinned, checked against the codes that it is for.
func (s *Scales) c(pins *runtime.Pinner, z blockSizes, k, v Blocks) (*C.kvc_scales, error) {
	if s == nil {
		s = &Scales{}
	}
	parts := 1
	if z.vInK && z.vDim < z.kDim {
		parts = 2
	}
	if !z.codesFit(k, z.kDim, parts, s.K != nil) || (!z.vInK && !z.codesFit(v, z.vDim, 1, s.V != nil)) {
		return nil, invalid("K and V are smaller than %d blocks of codes", z.blocks)
	}
	for _, side := range []struct {
		name               string
		have               []byte
		block, head, token int64
		bytes              int
		unused             bool
	}{
		{"K", s.K, s.KBlockStride, s.KHeadStride, s.KTokenStride, z.format.ScaleBytes(z.kDim, parts), false},
		{"V", s.V, s.VBlockStride, s.VHeadStride, s.VTokenStride, z.format.ScaleBytes(z.vDim, 1), z.vInK},
	} {
		last := int64(z.blocks-1)*side.block + int64(z.heads-1)*side.head + int64(z.tokens-1)*side.token
		if side.have == nil || side.unused {
			continue
		}
		if side.block < 0 || side.head < 0 || side.token < 0 || int64(len(side.have)) < last+int64(side.bytes) {
			return nil, invalid("scales %s have %d bytes, the call needs %d", side.name, len(side.have), last+int64(side.bytes))
		}
	}
	if (s.KHeads != nil && len(s.KHeads) != z.heads) || (s.VHeads != nil && len(s.VHeads) != z.heads) {
		return nil, invalid("%d and %d scales of heads for %d heads", len(s.KHeads), len(s.VHeads), z.heads)
	}
	out := new(C.kvc_scales)
	if err := try(func() C.kvc_status { return C.kvc_scales_init(out, C.uint32_t(unsafe.Sizeof(*out))) }); err != nil {
		return nil, err
	}
	pins.Pin(out)
	out.k_unrotated = flag(s.KUnrotated)
	out.k, out.v = unsafe.Pointer(pin(pins, s.K)), unsafe.Pointer(pin(pins, s.V))
	out.k_block_stride, out.k_head_stride, out.k_token_stride = C.int64_t(s.KBlockStride), C.int64_t(s.KHeadStride), C.int64_t(s.KTokenStride)
	out.v_block_stride, out.v_head_stride, out.v_token_stride = C.int64_t(s.VBlockStride), C.int64_t(s.VHeadStride), C.int64_t(s.VTokenStride)
	out.k_heads, out.v_heads = (*C.float)(pin(pins, s.KHeads)), (*C.float)(pin(pins, s.VHeads))
	return out, nil
}

// Tiles are the sealed tiles of one layer, and the raw rows of those that are not sealed. A query reads
// the tile that it is in raw, and every tile before that sealed.
type Tiles struct {
	KVHeads, KDim, VDim uint32
	VInK                bool
	// Format is one of FormatKT8V8 to FormatKT2V2.
	Format      Format
	BlockTokens uint32
	// NumBlocks is the blocks that Records has.
	NumBlocks uint32
	// Records begin at an address that 16 divides, as do BlockBytes and HeadBytes; 0 for records one
	// after the other, [block][kv head].
	Records               []byte
	BlockBytes, HeadBytes int64
	// Staging and Scratch are raw blocks of bfloat16: [kv head][token][k dim] keys, then as many values.
	// Slot s is block s of Staging, or past its end a block of Scratch. Bytes 0 for contiguous ones.
	Staging, Scratch                     []uint16
	StagingBlockBytes, ScratchBlockBytes int64
}

// SealTile is a full raw tile and the block that it is sealed into.
type SealTile struct{ Slot, Block int32 }

// RawTile is where the raw rows of one tile of a sequence are.
type RawTile struct{ Tile, Slot int32 }

func (t *Tiles) desc(d *C.kvc_seal_desc) error {
	if err := try(func() C.kvc_status { return C.kvc_seal_desc_init(d, C.uint32_t(unsafe.Sizeof(*d))) }); err != nil {
		return err
	}
	d.kv_heads, d.k_dim, d.v_dim = C.uint32_t(t.KVHeads), C.uint32_t(t.KDim), C.uint32_t(t.VDim)
	d.v_in_k, d.format, d.block_tokens = flag(t.VInK), C.uint32_t(t.Format), C.uint32_t(t.BlockTokens)
	d.num_blocks = C.uint32_t(t.NumBlocks)
	return nil
}

// RecordBytes is the bytes of the record of one tile and KV head.
func (t *Tiles) RecordBytes() (int, error) {
	var d C.kvc_seal_desc
	if err := t.desc(&d); err != nil {
		return 0, err
	}
	var bytes C.uint64_t
	err := try(func() C.kvc_status { return C.kvc_seal_record_size(&d, &bytes) })
	return int(bytes), err
}

// view is the header's struct, pinned, its memory checked.
func (t *Tiles) view(pins *runtime.Pinner) (*C.kvc_tile_view, error) {
	record, err := t.RecordBytes()
	if err != nil {
		return nil, err
	}
	head, block := t.HeadBytes, t.BlockBytes
	if head == 0 {
		head = int64(record)
	}
	if block == 0 {
		block = head * int64(t.KVHeads)
	}
	need := int64(t.NumBlocks-1)*block + int64(t.KVHeads-1)*head + int64(record)
	if t.NumBlocks == 0 || head < 0 || block < 0 || int64(len(t.Records)) < need {
		return nil, invalid("records have %d bytes, %d blocks need %d", len(t.Records), t.NumBlocks, need)
	}
	out := new(C.kvc_tile_view)
	if err := try(func() C.kvc_status { return C.kvc_tile_view_init(out, C.uint32_t(unsafe.Sizeof(*out))) }); err != nil {
		return nil, err
	}
	raw := int64(t.KDim)
	if !t.VInK {
		raw += int64(t.VDim)
	}
	raw *= 2 * int64(t.KVHeads) * int64(t.BlockTokens)
	blocks := func(x []uint16, stride int64) (C.uint32_t, error) {
		if stride == 0 {
			stride = raw
		}
		if stride < raw {
			return 0, invalid("raw blocks of %d bytes are %d bytes apart", raw, stride)
		}
		if int64(len(x))*2 < raw {
			return 0, nil
		}
		return C.uint32_t((int64(len(x))*2-raw)/stride + 1), nil
	}
	pins.Pin(out)
	if out.staging_blocks, err = blocks(t.Staging, t.StagingBlockBytes); err != nil {
		return nil, err
	}
	if out.scratch_blocks, err = blocks(t.Scratch, t.ScratchBlockBytes); err != nil {
		return nil, err
	}
	out.records = unsafe.Pointer(pin(pins, t.Records))
	out.block_bytes, out.head_bytes = C.int64_t(t.BlockBytes), C.int64_t(t.HeadBytes)
	out.staging, out.scratch = unsafe.Pointer(pin(pins, t.Staging)), unsafe.Pointer(pin(pins, t.Scratch))
	out.staging_block_bytes, out.scratch_block_bytes = C.int64_t(t.StagingBlockBytes), C.int64_t(t.ScratchBlockBytes)
	return out, nil
}

// Seal seals full raw tiles, all heads of the layer, and says of each whether it was refused (NaN,
// infinity, scales past float16): then it is to be read raw still. Threads are as in Shape.
func (t *Tiles) Seal(tiles []SealTile, threads int) ([]bool, error) {
	var d C.kvc_seal_desc
	if err := t.desc(&d); err != nil {
		return nil, err
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	view, err := t.view(&pins)
	if err != nil {
		return nil, err
	}
	list, refused := make([]C.kvc_seal_tile, len(tiles)), make([]C.uint32_t, len(tiles))
	for i, tile := range tiles {
		list[i] = C.kvc_seal_tile{slot: C.int32_t(tile.Slot), block: C.int32_t(tile.Block)}
	}
	if threads < 0 {
		d.threads = 0
	}
	d.tiles, d.count = view, C.uint32_t(len(tiles))
	d.list, d.refused = pin(&pins, list), pin(&pins, refused)
	if err := try(func() C.kvc_status { return C.kvc_seal(&d) }); err != nil {
		return nil, err
	}
	out := make([]bool, len(tiles))
	for i := range refused {
		out[i] = refused[i] != 0
	}
	return out, nil
}

// forAttend is the view of a call, with the raw tiles of each sequence.
func (t *Tiles) forAttend(pins *runtime.Pinner, s *Shape, raw [][]RawTile, seqs int) (*C.kvc_tile_view, error) {
	if len(raw) != seqs {
		return nil, invalid("raw tiles of %d sequences, the call has %d", len(raw), seqs)
	}
	if t.KVHeads != s.KVHeads || t.KDim != s.KDim || t.VDim != s.VDim || t.VInK != s.VInK ||
		t.Format != s.Format || t.BlockTokens != s.BlockTokens || t.NumBlocks != s.NumBlocks {
		return nil, invalid("the tiles have another shape or format than the call")
	}
	view, err := t.view(pins)
	if err != nil {
		return nil, err
	}
	indptr, blocks := make([]C.int32_t, 1, seqs+1), []C.kvc_raw_block{}
	for _, tiles := range raw {
		for _, tile := range tiles {
			blocks = append(blocks, C.kvc_raw_block{tile: C.int32_t(tile.Tile), slot: C.int32_t(tile.Slot)})
		}
		indptr = append(indptr, C.int32_t(len(blocks)))
	}
	view.raw_indptr, view.raw_blocks = pin(pins, indptr), pin(pins, blocks)
	return view, nil
}
