//go:build cgo

package kvcache

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"
)

const (
	qDim, qTokens, qBlocks = 64, 32, 4
)

// naive is the attention of one query over rows [token][kv head][channel], in double.
func naive(q, keys, values []float32, n int) []float64 {
	out := make([]float64, qHeads*qDim)
	for h := range qHeads {
		row := func(rows []float32, t int) []float32 { return rows[(t*kvHeads+h*kvHeads/qHeads)*qDim:][:qDim] }
		weights, sum := make([]float64, n), 0.0
		for t := range weights {
			dot := 0.0
			for c, x := range row(keys, t) {
				dot += float64(q[h*qDim+c]) * float64(x)
			}
			weights[t] = math.Exp(dot / math.Sqrt(qDim))
			sum += weights[t]
		}
		for t, w := range weights {
			for c, x := range row(values, t) {
				out[h*qDim+c] += w * float64(x) / sum
			}
		}
	}
	return out
}

func noise(n int, seed uint64) []float32 {
	random, out := rand.New(rand.NewPCG(seed, 5)), make([]float32, n)
	for i := range out {
		out[i] = float32(random.NormFloat64())
	}
	return out
}

func near(t *testing.T, got []float32, want []float64, tolerance float64) {
	t.Helper()
	for i := range want {
		if math.Abs(float64(got[i])-want[i]) > tolerance {
			t.Fatalf("element %d: %v, want %v", i, got[i], want[i])
		}
	}
}

func TestCodesAreAppendedAndRead(t *testing.T) {
	const n = qTokens*2 + 7
	keys, values, q := noise(n*kvHeads*qDim, 1), noise(n*kvHeads*qDim, 2), noise(qHeads*qDim, 3)
	want := naive(q, keys, values, n)
	table, slots := []int32{2, 0, 3}, make([]int64, n)
	for i := range slots {
		slots[i] = int64(table[i/qTokens])*qTokens + int64(i%qTokens)
	}
	for _, c := range []struct {
		format    Format
		tolerance float64
		heads     []float32
	}{
		{FormatFP8E4M3, 0.06, []float32{0.02, 0.02}}, {FormatFP8E5M2, 0.12, nil}, {FormatInt8T, 0.02, nil},
		{FormatInt4T, 0.3, nil}, {FormatNVFP4, 0.4, []float32{0.02, 0.02}},
	} {
		width, side := c.format.RowElements(qDim), c.format.ScaleBytes(qDim, 1)
		// Scales behind the codes of each block and head; then codes token by token, scales apart.
		for _, apart := range []bool{false, true} {
			bytes, each := qBlocks*kvHeads*qTokens*(width+side), func(n int) []byte { return make([]byte, n) }
			scales := &Scales{KHeads: c.heads, VHeads: c.heads}
			strides := Blocks{}
			if apart {
				bytes = qBlocks * kvHeads * qTokens * width
				strides = Blocks{BlockStride: int64(qTokens * kvHeads * width), HeadStride: int64(width), TokenStride: int64(kvHeads * width)}
				if side > 0 {
					scales.K, scales.V = each(qBlocks*kvHeads*qTokens*side), each(qBlocks*kvHeads*qTokens*side)
					scales.KBlockStride, scales.KHeadStride, scales.KTokenStride = int64(qTokens*kvHeads*side), int64(side), int64(kvHeads*side)
					scales.VBlockStride, scales.VHeadStride, scales.VTokenStride = scales.KBlockStride, scales.KHeadStride, scales.KTokenStride
				}
			}
			k, v := strides, strides
			k.Rows, v.Rows = Codes(each(bytes)), Codes(each(bytes))
			rows := &NewRows{KVHeads: kvHeads, KDim: qDim, VDim: qDim, Format: c.format, BlockTokens: qTokens, NumBlocks: qBlocks,
				K: k, V: v, Scales: scales, Slots: slots, KRows: Float32s(keys), VRows: Float32s(values)}
			ok(t, Append(rows))
			out := make([]float32, qHeads*qDim)
			call := &Attention{
				Shape: Shape{QHeads: qHeads, KVHeads: kvHeads, KDim: qDim, VDim: qDim, Format: c.format, BlockTokens: qTokens, NumBlocks: qBlocks},
				Q:     Float32s(q), Out: Float32s(out), K: k, V: v, Scales: scales,
				Table: table, TableStride: 3, KVLens: []int32{n}, QIndptr: []int32{0, 1},
			}
			ok(t, Attend(call))
			near(t, out, want, c.tolerance)

			// Memory that is too small, of another kind, or for another number of heads.
			short := k
			short.Rows = Codes(each(bytes - 1))
			rows.K = short
			refused(t, Append(rows), ErrInvalidArgument)
			rows.K = Blocks{Rows: Float32s(make([]float32, bytes))}
			refused(t, Append(rows), ErrInvalidArgument)
			rows.K, rows.Scales = k, &Scales{KHeads: []float32{1}}
			refused(t, Append(rows), ErrInvalidArgument)
			if scales.K != nil {
				less := *scales
				less.K = less.K[1:]
				call.Scales = &less
				refused(t, Attend(call), ErrInvalidArgument)
			}
		}
	}
}

func TestTilesAreSealedAndRead(t *testing.T) {
	const n = qTokens*3 + 5
	q := noise(qHeads*qDim, 6)
	// bfloat16 by truncation: both sides see the same values.
	sides := [2][]float32{noise(qBlocks*qTokens*kvHeads*qDim, 7), noise(qBlocks*qTokens*kvHeads*qDim, 8)}
	staging := make([]uint16, 2*len(sides[0]))
	for side, rows := range sides {
		for i := range rows {
			bits := math.Float32bits(rows[i]) >> 16
			rows[i] = math.Float32frombits(bits << 16)
			token, head, channel := i/(kvHeads*qDim), i/qDim%kvHeads, i%qDim
			at := ((token/qTokens*2+side)*kvHeads+head)*qTokens + token%qTokens
			staging[at*qDim+channel] = uint16(bits)
		}
	}
	want := naive(q, sides[0], sides[1], n)
	for _, c := range []struct {
		format    Format
		tolerance float64
	}{{FormatKT8V8, 5e-3}, {FormatKT4V4, 0.15}, {FormatKT2V2, 0.9}} {
		tiles := &Tiles{KVHeads: kvHeads, KDim: qDim, VDim: qDim, Format: c.format, BlockTokens: qTokens, NumBlocks: qBlocks, Staging: staging}
		record := must[int](t)(tiles.RecordBytes())
		tiles.Records = aligned(qBlocks * kvHeads * record)
		sealed := must[[]bool](t)(tiles.Seal([]SealTile{{0, 2}, {1, 0}, {2, 3}}, 0))
		if slices.Contains(sealed, true) {
			t.Fatal(sealed)
		}
		out := make([]float32, qHeads*qDim)
		call := &Attention{
			Shape: Shape{QHeads: qHeads, KVHeads: kvHeads, KDim: qDim, VDim: qDim, Format: c.format, BlockTokens: qTokens, NumBlocks: qBlocks},
			Q:     Float32s(q), Out: Float32s(out), Tiles: tiles, Raw: [][]RawTile{{{3, 3}}},
			Table: []int32{2, 0, 3, 1}, TableStride: 4, KVLens: []int32{n}, QIndptr: []int32{0, 1},
		}
		ok(t, Attend(call))
		near(t, out, want, c.tolerance)

		// Rows that cannot be sealed are refused, and read raw.
		kept := staging[2*kvHeads*qTokens*qDim]
		staging[2*kvHeads*qTokens*qDim] = 0x7f80
		if got := must[[]bool](t)(tiles.Seal([]SealTile{{1, 0}}, 0)); !got[0] {
			t.Fatal("infinity was sealed")
		}
		staging[2*kvHeads*qTokens*qDim] = kept
		call.Raw = [][]RawTile{{{1, 1}, {3, 3}}}
		ok(t, Attend(call))
		near(t, out, want, c.tolerance)

		call.Raw = nil
		refused(t, Attend(call), ErrInvalidArgument)
		call.Raw, call.Tiles = [][]RawTile{{}}, nil
		refused(t, Attend(call), ErrInvalidArgument)
		_, err := tiles.Seal([]SealTile{{0, qBlocks}}, 0)
		refused(t, err, ErrBadBlock)
		// Slots past the staging's end are no memory.
		_, err = tiles.Seal([]SealTile{{qBlocks, 0}}, 0)
		refused(t, err, ErrBadBlock)
		tiles.Records = tiles.Records[:len(tiles.Records)-1]
		_, err = tiles.Seal(nil, 0)
		refused(t, err, ErrInvalidArgument)
		tiles.BlockTokens = 48
		_, err = tiles.RecordBytes()
		refused(t, err, ErrInvalidArgument)
	}
}

// aligned is memory at an address that 16 divides.
func aligned(n int) []byte {
	x := make([]byte, n+16)
	return x[(16-uintptr(unsafe.Pointer(&x[0]))%16)%16:][:n]
}
