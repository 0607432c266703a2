//go:build cgo

package kvcache_test

import (
	"errors"
	"fmt"
	"log"

	kvcache "github.com/libkvcache/libkvcache/bindings/go"
)

// A prompt goes through one attention layer, and a second request finds what the first has computed.
func Example() {
	group := kvcache.GroupSpec{Layers: 1, KVHeads: 2, KDim: 64, Format: kvcache.FormatF32}
	cache, err := kvcache.NewCache([]kvcache.GroupSpec{group}, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()
	step, err := kvcache.NewStep()
	if err != nil {
		log.Fatal(err)
	}
	defer step.Close()

	prompt := make([]uint32, 40)
	for range 2 {
		seq, cached, err := cache.Start(prompt, 0)
		if err != nil {
			log.Fatal(err)
		}
		rest := prompt[cached:]
		fmt.Println(cached, "tokens cached,", len(rest), "to compute")
		if err := step.Begin(cache, []kvcache.Work{{Seq: seq, Tokens: rest}}); err != nil {
			log.Fatal(err)
		}
		q, out := make([]float32, len(rest)*8*64), make([]float32, len(rest)*8*64)
		k, v := make([]float32, len(rest)*2*64), make([]float32, len(rest)*2*64)
		if err := step.Append(0, 0, kvcache.Float32s(k), kvcache.Float32s(v), nil); err != nil {
			log.Fatal(err)
		}
		if err := step.Attend(0, 0, 8, kvcache.Float32s(q), kvcache.Float32s(out), nil, nil); err != nil {
			log.Fatal(err)
		}
		if err := step.Commit(); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// 0 tokens cached, 40 to compute
	// 32 tokens cached, 8 to compute
}

// Running out of blocks is an ordinary answer: the error says how many were missing.
func ExampleError() {
	cache, _ := kvcache.NewCache([]kvcache.GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64}}, &kvcache.CacheOptions{Blocks: 2})
	defer cache.Close()
	step, _ := kvcache.NewStep()
	defer step.Close()
	seq, _, _ := cache.Start([]uint32{1}, 0)
	err := step.Begin(cache, []kvcache.Work{{Seq: seq, Tokens: make([]uint32, 100)}})
	var e *kvcache.Error
	if errors.Is(err, kvcache.ErrOutOfBlocks) && errors.As(err, &e) {
		fmt.Println(e.Missing, "blocks missing")
	}
	// Output: 5 blocks missing
}

// How much memory a model's cache takes, before anything is allocated.
func ExamplePlan() {
	llama := kvcache.GroupSpec{Layers: 32, KVHeads: 8, KDim: 128}
	plan, err := kvcache.Plan([]kvcache.GroupSpec{llama}, kvcache.PlanOptions{
		MemoryBytes: 80 << 30, WeightBytes: 16 << 30, ContextTokens: 8192,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(plan.TokenBytes, "bytes a token,", plan.MaxBatch, "sequences")
	// Output: 131072 bytes a token, 56 sequences
}
