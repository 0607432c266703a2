//go:build cgo

package kvcache

import (
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
)

func TestPlan(t *testing.T) {
	p, err := Plan([]GroupSpec{{Layers: 32, KVHeads: 8, KDim: 128}}, PlanOptions{MemoryBytes: 80 << 30, WeightBytes: 16 << 30, ContextTokens: 8192})
	ok(t, err)
	if p.TokenBytes != 131072 || p.MaxBatch != 56 || !p.Fits || len(p.Groups) != 1 || p.Groups[0].BlockBytes != 16*131072 {
		t.Fatalf("%+v", p)
	}
	_, err = Plan(nil, PlanOptions{})
	refused(t, err, ErrInvalidArgument)
}

func TestPool(t *testing.T) {
	p := must[*Pool](t)(NewPool(8))
	blocks := make([]int32, 3)
	ok(t, p.Allocate(blocks))
	ok(t, p.Retain(blocks[:1]))
	if refs := must[uint32](t)(p.Refs(blocks[0])); refs != 2 {
		t.Fatal(refs)
	}
	if freed := must[uint32](t)(p.Free(blocks)); freed != 2 {
		t.Fatal(freed)
	}
	if s := must[PoolCounts](t)(p.Stats()); s != (PoolCounts{8, 7, 1}) {
		t.Fatal(s)
	}
	refused(t, p.Allocate(make([]int32, 9)), ErrOutOfBlocks)
	_, err := p.Free(blocks[1:2])
	refused(t, err, ErrBadBlock)
	ok(t, p.Close())
	refused(t, p.Close(), ErrStaleHandle)
}

func TestPrefix(t *testing.T) {
	p := must[*Prefix](t)(NewPrefix(PrefixOptions{BlockTokens: 4, Groups: 2, CapacityBlocks: 16, Eviction: EvictionLRU}))
	tokens := sequence(12)
	made := must[Inserted](t)(p.Insert(0, tokens, []int32{0, 10, 1, 11, 2, 12}))
	if made.StoredBlocks != 3 {
		t.Fatal(made)
	}
	again := must[Inserted](t)(p.Insert(0, tokens[:8], []int32{5, 15, 6, 16}))
	if !slices.Equal(again.Present, []int32{0, 10, 1, 11}) {
		t.Fatal(again)
	}
	hit := must[Hit](t)(p.Lookup(0, append(slices.Clone(tokens[:10]), 1), 10))
	if hit.Tokens != 8 || hit.TailTokens != 2 || !slices.Equal(hit.Blocks, []int32{0, 10, 1, 11}) || !slices.Equal(hit.TailBlocks, []int32{2, 12}) {
		t.Fatalf("%+v", hit)
	}
	lock := must[uint64](t)(p.Lock(made.At))
	if evicted := must[[]int32](t)(p.Evict(3)); len(evicted) != 0 {
		t.Fatal(evicted)
	}
	ok(t, p.Touch(made.At))
	ok(t, p.Prioritize(made.At, []Retention{{0, End, 50, 0}}))
	ok(t, p.Hint(made.At, 0, HintExpected, 50))
	ok(t, p.Advance(10))
	ok(t, p.ReleasePin(lock))
	refused(t, p.Unlock(lock), ErrStaleHandle)
	unlocked, committed, answers, err := p.Run([]uint64{lock},
		[]Commit{{Above: made.At, Tokens: []uint32{1, 2, 3, 4}, Blocks: []int32{3, 13}}, {Tokens: []uint32{1}, Blocks: []int32{1, 2}}},
		[]Query{{Tokens: append(slices.Clone(tokens), 1, 2, 3, 4, 5), MaxTokens: 16, Pin: true}, {Tokens: []uint32{9}}})
	ok(t, err)
	refused(t, unlocked[0], ErrStaleHandle)
	refused(t, committed[1].Err, ErrInvalidArgument)
	if committed[0].StoredBlocks != 1 || answers[0].Hit.Tokens != 16 || answers[0].Pin == 0 || answers[1].Hit.Tokens != 0 {
		t.Fatalf("%+v %+v", committed, answers)
	}
	ok(t, p.Unlock(answers[0].Pin))
	if evicted := must[[]int32](t)(p.Evict(100)); !slices.Equal(evicted, []int32{3, 13, 2, 12, 1, 11, 0, 10}) {
		t.Fatal(evicted)
	}
	if s := must[PrefixCounts](t)(p.Stats()); s.Blocks != 0 || s.CapacityBlocks != 16 {
		t.Fatal(s)
	}
	ok(t, p.Close())
	// The second group sees five tokens.
	h := must[*Prefix](t)(NewPrefix(PrefixOptions{BlockTokens: 4, Groups: 2, CapacityBlocks: 16, Eviction: EvictionLRU}))
	ok(t, h.SetWindows([]uint32{0, 5}))
	must[Inserted](t)(h.Insert(0, tokens, []int32{0, 10, 1, 11, 2, 12}))
	if gone := must[[]int32](t)(h.Forget(1, []int32{7, 11})); !slices.Equal(gone, []int32{11}) {
		t.Fatal(gone)
	}
	if hit := must[Hit](t)(h.Lookup(0, tokens, 12)); !slices.Equal(hit.Blocks, []int32{0, 10, 1, -1, 2, 12}) {
		t.Fatalf("%+v", hit)
	}
	refused(t, h.SetWindows([]uint32{0, 0}), ErrInvalidState)
	ok(t, h.Close())
}

func TestKernelsOnForeignMemory(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	const blocks, rows = 9, 57
	k, v := make([]float32, blocks*16*kvHeads*dim), make([]float32, blocks*16*kvHeads*dim)
	kRows, vRows := random(r, rows*kvHeads*dim), random(r, rows*kvHeads*dim)
	table := []int32{4, 0, 7, 2, 5, -1}
	var slots []int64
	for s, n := range []int{40, 17} {
		for i := range n {
			slots = append(slots, int64(table[s*3+i/16])*16+int64(i%16))
		}
	}
	// Tokens outside heads: [block][token][head][channel].
	nhd := func(x []float32) Blocks {
		return Blocks{Float32s(x), 16 * kvHeads * dim, dim, kvHeads * dim}
	}
	fresh := NewRows{
		KVHeads: kvHeads, KDim: dim, VDim: dim, Format: FormatF32, BlockTokens: 16, NumBlocks: blocks,
		K: nhd(k), V: nhd(v), Slots: slots, KRows: Float32s(kRows), VRows: Float32s(vRows),
	}
	ok(t, Append(&fresh))
	q, out := random(r, 5*qHeads*dim), make([]float32, 5*qHeads*dim)
	a := Attention{
		Shape: Shape{QHeads: qHeads, KVHeads: kvHeads, KDim: dim, VDim: dim, Format: FormatF32, BlockTokens: 16, NumBlocks: blocks},
		Q:     Float32s(q), Out: Float32s(out), K: nhd(k), V: nhd(v), Table: table, TableStride: 3,
		KVLens: []int32{40, 17}, QIndptr: []int32{0, 3, 5}, LSE: make([]float32, 5*qHeads),
	}
	ok(t, Attend(&a))
	close64(t, out, reference(q, kRows, vRows, 3, 40, 0))
	close64(t, out[3*qHeads*dim:], reference(q[3*qHeads*dim:], kRows[40*kvHeads*dim:], vRows[40*kvHeads*dim:], 2, 17, 0))
	for _, spoil := range []func(*Attention){
		func(a *Attention) { a.KVLens = []int32{400, 17} },
		func(a *Attention) { a.QIndptr = []int32{0, 3, 6} },
		func(a *Attention) { a.NumBlocks = 10 },
		func(a *Attention) { a.Out = Float32s(out[1:]) },
		func(a *Attention) { a.K = Blocks{Halves(make([]uint16, len(k)), F16), 0, 0, 0} },
		func(a *Attention) { a.LSE = a.LSE[1:] },
	} {
		bad := a
		spoil(&bad)
		refused(t, Attend(&bad), ErrInvalidArgument)
	}
	slots[0] = blocks * 16
	if Append(&fresh) == nil {
		t.Fatal("a slot past the blocks")
	}
	if name := must[string](t)(a.Kernel(1)); !strings.Contains(name, "f32") {
		t.Fatal(name)
	}
	one, two := []float32{1, 1}, []float32{3, 3}
	ok(t, MergeStates(one, []float32{0}, two, []float32{0}, 2))
	if one[0] != 2 {
		t.Fatal(one)
	}
	refused(t, MergeStates(one, []float32{0}, two, nil, 2), ErrInvalidArgument)
}

func TestDeviceQueries(t *testing.T) {
	a := DeviceAttention{Shape: Shape{QHeads: 8, KVHeads: 2, KDim: 64, VDim: 64, Format: FormatBF16, BlockTokens: 16, NumBlocks: 9}, MaxKVTokens: 4096, Multiprocessors: 132}
	var none *Device
	if bytes := must[uint64](t)(none.AttendWorkspaceSize(&a)); bytes == 0 {
		t.Fatal(bytes)
	}
	if name := must[string](t)(none.AttendKernel(&a)); !strings.Contains(name, "64") {
		t.Fatal(name)
	}
	plain := must[uint64](t)(none.AttendWorkspaceSize(&a))
	if bytes := must[uint64](t)(none.CascadeWorkspaceSize(&a, 3)); bytes <= plain {
		t.Fatal(bytes, plain)
	}
	refused(t, none.Cascade(&a, 0, 3, 0), ErrNullPointer)
	refused(t, none.Merge(&DeviceMerge{Count: 2}, 0), ErrNullPointer)
	a.QHeads = 7
	_, err := none.AttendKernel(&a)
	refused(t, err, ErrInvalidArgument)
	_, err = none.Rates()
	refused(t, err, ErrNullPointer)

	q := CascadeQuery{QHeads: 32, KVHeads: 8, HeadDim: 128, BlockTokens: 16, TokenBytes: 4096, Seqs: 128, KVTokens: 128 * 4352,
		MemoryBytes: 3e6, CacheBytes: 6e6, CacheSize: 50 << 20, Operations: 3e8, Launch: 2.5, Multiprocessors: 132}
	list, said, err := ChooseCascade(&q, []CascadePrefix{{0, 128, 256}}, 2)
	ok(t, err)
	if !said.Pays || said.Plain <= said.Cascade || list[0].SharedBlocks != 256 || list[1].FirstSeq != 128 {
		t.Fatal(list, said)
	}
	_, _, err = ChooseCascade(&q, []CascadePrefix{{0, 129, 256}}, 2)
	refused(t, err, ErrInvalidArgument)

	p := must[*Prefix](t)(NewPrefix(PrefixOptions{BlockTokens: 4, CapacityBlocks: 16}))
	if bytes := must[uint64](t)(p.DeviceCopyBytes()); bytes < 16*5*4 {
		t.Fatal(bytes)
	}
	_, err = none.NewDevicePrefix(p)
	refused(t, err, ErrNullPointer)
}

func TestDeviceUnderTheEmulator(t *testing.T) {
	d, err := OpenDevice(DeviceEmu, 0)
	if err != nil {
		t.Skip("this library has no emulator: ", err)
	}
	p := must[uintptr](t)(d.Alloc(4096))
	data := make([]byte, 4096)
	for i := range data {
		data[i] = byte(i * 7)
	}
	back := make([]byte, 4096)
	ok(t, d.Upload(p, data, 0))
	ok(t, d.Download(back, p, 0))
	if !slices.Equal(data, back) || must[string](t)(d.Name()) == "" {
		t.Fatal("the copy")
	}
	ok(t, d.Zero(p, 4096, 0))
	ok(t, d.Sync(0))
	if rates := must[DeviceRates](t)(d.Rates()); rates.MemoryBytes <= 0 {
		t.Fatal(rates)
	}

	// An index of one prompt, its copy, and a request that agrees for six tokens.
	index := must[*Prefix](t)(NewPrefix(PrefixOptions{BlockTokens: 4, CapacityBlocks: 16}))
	_, err = index.Insert(0, []uint32{1, 2, 3, 4, 5, 6, 7, 8}, []int32{11, 12})
	ok(t, err)
	copied := must[*DevicePrefix](t)(d.NewDevicePrefix(index))
	must[uint64](t)(copied.Sync(0))
	words := []uint32{1, 2, 3, 4, 5, 6, 9, 9, 0, 8}
	ok(t, d.Upload(p, unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), 40), 0))
	ok(t, copied.Lookup(&DeviceLookup{Requests: 1, MaxBlocks: 2, Tokens: p, Indptr: p + 32, Matched: p + 64, TailTokens: p + 68, Blocks: p + 72}, 0))
	var found [3]uint32
	ok(t, d.Download(unsafe.Slice((*byte)(unsafe.Pointer(&found[0])), 12), p+64, 0))
	if found != [3]uint32{4, 2, 11} {
		t.Fatal(found)
	}
	ok(t, copied.Close())
	ok(t, d.Free(p))
	ok(t, d.Close())
}

func TestEvents(t *testing.T) {
	c := must[*Cache](t)(NewCache([]GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64, Format: FormatF32}}, &CacheOptions{Blocks: 8}))
	ok(t, c.DescribeNamespace(3, "tenant", ""))
	var lock sync.Mutex
	var seen []Event
	e := must[*Events](t)(c.Publish(EventsOptions{Func: func(e Event) {
		lock.Lock()
		defer lock.Unlock()
		seen = append(seen, e)
	}}))
	prompt := sequence(39)
	seq, _, err := c.Start(prompt, 3)
	ok(t, err)
	s := must[*Step](t)(NewStep())
	ok(t, s.Begin(c, []Work{{seq, prompt}}))
	rows := make([]float32, 39*64)
	ok(t, s.Append(0, 0, Float32s(rows), Float32s(rows), nil))
	ok(t, s.Commit())
	ok(t, seq.Release())
	for {
		if s := must[EventsCounts](t)(e.Stats()); s.QueuedEvents == 0 && !s.Publishing {
			break
		}
		time.Sleep(time.Millisecond)
	}
	ok(t, e.Snapshot())
	if name := must[string](t)(e.Endpoint(false)); name != "" {
		t.Fatal(name)
	}
	ok(t, e.Close())
	if len(seen) < 3 || seen[0].Kind != EventCleared || seen[1].Kind != EventStored || seen[len(seen)-1].Kind != EventCleared {
		t.Fatalf("%+v", seen)
	}
	if !slices.Equal(seen[1].Tokens, prompt[:32]) || len(seen[1].Digests) != 2 || seen[1].NameSpace != 3 {
		t.Fatalf("%+v", seen[1])
	}
	_, err = c.Publish(EventsOptions{})
	refused(t, err, ErrInvalidArgument)
}

func TestMetrics(t *testing.T) {
	c := must[*Cache](t)(NewCache([]GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64, Format: FormatF32}}, nil))
	ok(t, c.Watch(2))
	ok(t, c.SetTime(5))
	_, _, err := c.Start([]uint32{1, 2}, 0)
	ok(t, err)
	m := must[Metrics](t)(c.Metrics())
	text := must[string](t)(c.MetricsText())
	if m.QueriesTokens != 2 || m.Sequences != 1 || m.WatchedEvery != 2 || !strings.Contains(text, "kvcache:") {
		t.Fatalf("%+v\n%s", m, text)
	}
}

func TestScales(t *testing.T) {
	c := must[*Cache](t)(NewCache([]GroupSpec{{Layers: 1, KVHeads: 2, KDim: 64, Format: FormatFP8E4M3}}, &CacheOptions{Blocks: 4}))
	ok(t, c.SetScales(0, 0, []float32{0.5, 0.5}, []float32{0.5, 0.5}))
	refused(t, c.SetScales(0, 0, []float32{0.5}, nil), ErrInvalidArgument)
	refused(t, c.SetDeviceRates(DeviceRates{Multiprocessors: 132}), ErrInvalidState)
	_, _, err := c.Start([]uint32{1}, 0)
	ok(t, err)
	refused(t, c.SetScales(0, 0, []float32{0.5, 0.5}, []float32{0.5, 0.5}), ErrInvalidState)
}

func TestBlocksMoveToAnotherCache(t *testing.T) {
	fresh := func(blockTokens uint32) *Cache {
		return must[*Cache](t)(NewCache([]GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64, Format: FormatF32}}, &CacheOptions{Blocks: 16, BlockTokens: blockTokens, Threads: 1}))
	}
	cache, other, prompt := fresh(16), fresh(32), sequence(4*16+3)
	seq, _, err := cache.Start(prompt, 0)
	ok(t, err)
	s := must[*Step](t)(NewStep())
	ok(t, s.Begin(cache, []Work{{seq, prompt}}))
	rows := noise(len(prompt)*64, 9)
	ok(t, s.Append(0, 0, Float32s(rows), Float32s(rows), nil))
	ok(t, s.Commit())
	ok(t, s.Close())
	file := must[*os.File](t)(os.CreateTemp(t.TempDir(), "stream"))
	defer file.Close()
	if tokens := must[uint64](t)(seq.ExportBlocks("toy", file.Fd(), nil)); tokens != 64 {
		t.Fatal(tokens)
	}
	rewind := func() { must[int64](t)(file.Seek(0, 0)) }
	rewind()
	_, err = other.ImportBlocks([]uintptr{file.Fd()}, "play", 0, nil)
	refused(t, err, ErrInvalidArgument)
	rewind()
	if tokens := must[uint64](t)(other.ImportBlocks([]uintptr{file.Fd()}, "toy", 0, []TierSlice{{0, 0}})); tokens != 64 {
		t.Fatal(tokens)
	}
	_, err = other.ImportBlocks([]uintptr{file.Fd()}, "toy", 0, nil)
	refused(t, err, ErrTierFailed)
	_, err = seq.ExportBlocks("t\x00y", file.Fd(), nil)
	refused(t, err, ErrInvalidArgument)
	_, err = seq.ExportBlocks("toy", ^uintptr(0), nil)
	refused(t, err, ErrInvalidArgument)
	_, cached, err := other.Start(prompt, 0)
	ok(t, err)
	if cached != 64 {
		t.Fatal(cached)
	}
	ok(t, cache.Close())
	ok(t, other.Close())
}

func TestTiers(t *testing.T) {
	dir, prompt := t.TempDir(), sequence(8*16+3)
	fresh := func() *Cache {
		c := must[*Cache](t)(NewCache([]GroupSpec{{Layers: 1, KVHeads: 1, KDim: 64, Format: FormatF32}}, &CacheOptions{Blocks: 12, Threads: 1}))
		if none := must[[]TierCounts](t)(c.TierStats()); len(none) != 0 {
			t.Fatal(none)
		}
		return c
	}
	options := &TierOptions{Model: "toy", DiskDir: dir, DiskBytes: 1 << 20, Slices: []TierSlice{{0, 0}}}
	serve := func(c *Cache) int {
		seq, cached, err := c.Start(prompt, 0)
		ok(t, err)
		s := must[*Step](t)(NewStep())
		ok(t, s.Begin(c, []Work{{seq, prompt[cached:]}}))
		rows := make([]float32, (len(prompt)-cached)*64)
		for i := range rows {
			rows[i] = float32(i)
		}
		ok(t, s.Append(0, 0, Float32s(rows), Float32s(rows), nil))
		ok(t, s.Commit())
		ok(t, s.Close())
		ok(t, seq.Release())
		return cached
	}
	c := fresh()
	ok(t, c.AttachTiers(options))
	refused(t, c.AttachTiers(options), ErrInvalidState)
	if cached := serve(c); cached != 0 || !must[bool](t)(c.FlushTiers(60000)) {
		t.Fatal(cached)
	}
	if s := must[[]TierCounts](t)(c.TierStats()); len(s) != 2 || s[0].Kind != TierHost || s[1].Kind != TierDisk || s[1].Objects != 8 {
		t.Fatalf("%+v", s)
	}
	other := fresh()
	refused(t, other.AttachTiers(options), ErrInvalidState)
	refused(t, other.AttachTiers(&TierOptions{Model: "toy", DiskDir: "/proc/nothing"}), ErrTierFailed)
	refused(t, other.AttachTiers(&TierOptions{Model: "t\x00y"}), ErrInvalidArgument)
	// An address that is none, or a build that has no remote stores.
	want := ErrUnsupported
	if strings.Contains(BuildInfo(), "remote") {
		want = ErrInvalidArgument
	}
	refused(t, other.AttachTiers(&TierOptions{Model: "toy", Remote: "nowhere", RemoteTimeoutMS: 100}), want)
	ok(t, other.Close())
	ok(t, c.Close())
	// A second cache finds what the first left, layer by layer.
	c = fresh()
	ok(t, c.AttachTiers(options))
	seq, cached, err := c.Onboard(prompt, nil, 0)
	if err != nil || cached != 8*16 {
		t.Fatal(cached, err)
	}
	if p := must[LoadProgress](t)(seq.LoadProgress()); p.Status != OnboardLoading || p.LoadingTokens != 8*16 || p.Why != 0 {
		t.Fatalf("%+v", p)
	}
	step := must[*Step](t)(NewStep())
	refused(t, second(step.WaitLayer(0, 0, 0)), ErrInvalidState)
	ok(t, step.Begin(c, []Work{{Seq: seq, Tokens: prompt[cached:]}}))
	refused(t, step.Commit(), ErrInvalidState)
	refused(t, second(seq.WaitLayer(0, 9, 0)), ErrInvalidArgument)
	if !must[bool](t)(step.WaitLayer(0, 0, 60000)) || !must[bool](t)(seq.WaitLayer(0, 0, 0)) {
		t.Fatal("the layer is not there")
	}
	if p := must[LoadProgress](t)(seq.LoadProgress()); p != (LoadProgress{Status: OnboardComplete}) {
		t.Fatalf("%+v", p)
	}
	ok(t, step.Commit())
	if held := must[int](t)(seq.CancelLoad()); held != len(prompt) {
		t.Fatal(held)
	}
	ok(t, step.Close())
	ok(t, seq.Release())
	ok(t, c.Close())
	// And as a whole.
	c = fresh()
	ok(t, c.AttachTiers(options))
	p := must[*Prefetch](t)(c.Prefetch(prompt, 0))
	if p.Decision.FoundBlocks != 8 || p.Decision.LoadBlocks != 8 || p.Decision.Why != WhyCostUnknown || !must[bool](t)(p.Wait(60000)) {
		t.Fatalf("%+v", p.Decision)
	}
	ok(t, p.Close())
	refused(t, p.Close(), ErrStaleHandle)
	if cached := serve(c); cached != 8*16 {
		t.Fatal(cached)
	}
	// With an image at 20, only what is before it.
	image := []Media{{Position: 20, Digest: [32]byte{1}}}
	p = must[*Prefetch](t)(c.PrefetchMedia(prompt, image, 0))
	if p.Decision.DeviceTokens != 16 || p.Decision.HostTokens != 0 {
		t.Fatalf("%+v", p.Decision)
	}
	ok(t, p.Close())
	if _, cached, err := c.StartMedia(prompt, image, 0); err != nil || cached != 20 {
		t.Fatal(cached, err)
	}
	image[0].Position = uint64(len(prompt))
	_, _, err = c.StartMedia(prompt, image, 0)
	refused(t, err, ErrInvalidArgument)
	ok(t, c.Close())
}

func second[T any](_ T, err error) error { return err }
