//go:build cgo

package kvcache

import (
	"testing"

	"github.com/libkvcache/libkvcache/bindings/go/internal/crossing"
)

// What a crossing costs: the cheapest call of the library from C in a loop, and from Go.
func BenchmarkRefsFromC(b *testing.B) {
	ok(b, crossing.Refs(b.N))
}

func BenchmarkRefsFromGo(b *testing.B) {
	p := must[*Pool](b)(NewPool(64))
	block := make([]int32, 1)
	ok(b, p.Allocate(block))
	b.ResetTimer()
	for b.Loop() {
		if refs, err := p.Refs(block[0]); err != nil || refs != 1 {
			b.Fatal(refs, err)
		}
	}
}

// A step of 32 sequences without its kernels: begin and cancel, two crossings.
func BenchmarkBatchedStep(b *testing.B) {
	c := must[*Cache](b)(NewCache([]GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64}}, nil))
	seqs := make([]Seq, 32)
	for i := range seqs {
		seqs[i], _, _ = c.Start([]uint32{uint32(i)}, 0)
	}
	batch, s := must[*Batch](b)(NewBatch(seqs)), must[*Step](b)(NewStep())
	b.ResetTimer()
	for b.Loop() {
		if s.BeginBatch(c, batch) != nil || s.Cancel() != nil {
			b.Fatal("the step")
		}
	}
}
