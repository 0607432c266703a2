//go:build cgo

package kvcache

import (
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

const (
	qHeads, kvHeads, dim = 4, 2, 64
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		ok(t, err)
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func refused(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || err.Error() == "" {
		t.Fatalf("%v, not %v", err, want)
	}
}

func random(r *rand.Rand, n int) []float32 {
	out := make([]float32, n)
	for i := range out {
		out[i] = float32(r.NormFloat64())
	}
	return out
}

// reference is causal attention of the last n rows of a sequence of m tokens, in f64.
func reference(q, k, v []float32, n, m, window int) []float64 {
	out := make([]float64, n*qHeads*dim)
	for i := range n {
		end := m - n + i + 1
		begin := 0
		if window > 0 {
			begin = max(0, end-window)
		}
		for h := range qHeads {
			g, sum := h/(qHeads/kvHeads), 0.0
			o := out[(i*qHeads+h)*dim:][:dim]
			for j := begin; j < end; j++ {
				s := 0.0
				for c := range dim {
					s += float64(q[(i*qHeads+h)*dim+c]) * float64(k[(j*kvHeads+g)*dim+c])
				}
				w := math.Exp(s / 8)
				sum += w
				for c := range dim {
					o[c] += w * float64(v[(j*kvHeads+g)*dim+c])
				}
			}
			for c := range dim {
				o[c] /= sum
			}
		}
	}
	return out
}

func close64(t testing.TB, got []float32, want []float64) {
	t.Helper()
	for i := range want {
		if !(math.Abs(float64(got[i])-want[i]) <= 1e-5) {
			t.Fatalf("element %d is %v, not %v", i, got[i], want[i])
		}
	}
}

// toy is one attention layer over random K and V, remembered outside.
type toy struct {
	t      testing.TB
	cache  *Cache
	step   *Step
	r      *rand.Rand
	k, v   map[uint32][]float32
	window int
}

func newToy(t testing.TB, o CacheOptions, window int) *toy {
	group := GroupSpec{Layers: 1, KVHeads: kvHeads, KDim: dim, Format: FormatF32, Window: uint32(window)}
	c := must[*Cache](t)(NewCache([]GroupSpec{group}, &o))
	return &toy{t, c, must[*Step](t)(NewStep()), rand.New(rand.NewPCG(1, 2)), map[uint32][]float32{}, map[uint32][]float32{}, window}
}

func (y *toy) run(work []Work) {
	t := y.t
	ok(t, y.step.Begin(y.cache, work))
	n := y.step.Rows()
	q, k, v := random(y.r, n*qHeads*dim), random(y.r, n*kvHeads*dim), random(y.r, n*kvHeads*dim)
	out := make([]float32, n*qHeads*dim)
	ok(t, y.step.Append(0, 0, Float32s(k), Float32s(v), nil))
	ok(t, y.step.Attend(0, 0, qHeads, Float32s(q), Float32s(out), nil, nil))
	row := 0
	for _, w := range work {
		id, m := w.Seq.ID, len(w.Tokens)
		y.k[id] = append(y.k[id], k[row*kvHeads*dim:][:m*kvHeads*dim]...)
		y.v[id] = append(y.v[id], v[row*kvHeads*dim:][:m*kvHeads*dim]...)
		want := reference(q[row*qHeads*dim:], y.k[id], y.v[id], m, len(y.k[id])/(kvHeads*dim), y.window)
		close64(t, out[row*qHeads*dim:], want)
		row += m
	}
	ok(t, y.step.Commit())
}

func sequence(n int) []uint32 {
	out := make([]uint32, n)
	for i := range out {
		out[i] = uint32(100 + i)
	}
	return out
}

func TestRaggedSteps(t *testing.T) {
	for _, window := range []int{0, 24} {
		y := newToy(t, CacheOptions{Blocks: 64, NoPrefixReuse: true}, window)
		var work []Work
		var seqs []Seq
		for _, n := range []int{3, 20, 41} {
			seq, cached, err := y.cache.Start(sequence(n), 0)
			ok(t, err)
			if cached != 0 {
				t.Fatal(cached)
			}
			seqs, work = append(seqs, seq), append(work, Work{seq, sequence(n)})
		}
		y.run(work)
		for range 20 {
			for i := range work {
				work[i].Tokens = []uint32{7}
			}
			y.run(work)
		}
		for i, n := range []int{23, 40, 61} {
			if got := must[int](t)(seqs[i].Len()); got != n {
				t.Fatal(got, n)
			}
			ok(t, seqs[i].Release())
		}
		ok(t, y.cache.Audit())
		if s := must[CacheCounts](t)(y.cache.Stats()); s.FreeBlocks != 64 || s.Sequences != 0 {
			t.Fatalf("%+v", s)
		}
		ok(t, y.cache.Close())
	}
}

func TestPrefixForkTruncate(t *testing.T) {
	y := newToy(t, CacheOptions{Blocks: 32, Eviction: EvictionSLRU}, 0)
	prompt := sequence(40)
	first, _, err := y.cache.Start(prompt, 0)
	ok(t, err)
	y.run([]Work{{first, prompt}})
	second, cached, err := y.cache.Start(prompt, 0)
	ok(t, err)
	if cached != 32 {
		t.Fatal(cached)
	}
	if other, cached, err := y.cache.Start(prompt, 1); err != nil || cached != 0 || other.Release() != nil {
		t.Fatal(cached, err)
	}
	third := must[Seq](t)(first.Fork())
	y.k[third.ID], y.v[third.ID] = slices.Clone(y.k[first.ID]), slices.Clone(y.v[first.ID])
	y.run([]Work{{third, []uint32{1}}, {first, []uint32{2}}})
	a, b := must[[]int32](t)(third.Blocks(0)), must[[]int32](t)(first.Blocks(0))
	if len(a) != 3 || a[0] != b[0] || a[2] == b[2] {
		t.Fatal(a, b)
	}
	if got := must[[]uint32](t)(third.Tokens()); !slices.Equal(got, append(slices.Clone(prompt), 1)) {
		t.Fatal(got)
	}
	ok(t, third.Truncate(10))
	ok(t, third.Hint(HintEnded, 0, 0))
	ok(t, first.Prioritize([]Retention{{0, End, 90, 10}}))
	for _, s := range []Seq{first, second, third} {
		ok(t, s.Release())
	}
	refused(t, first.Release(), ErrStaleHandle)
	ok(t, y.cache.Advance(5))
	ok(t, y.cache.Sync())
	ok(t, y.cache.ClearPrefix())
	ok(t, y.cache.Audit())
	ok(t, y.step.Close())
	ok(t, y.cache.Close())
	refused(t, y.cache.Close(), ErrStaleHandle)
}

func TestErrors(t *testing.T) {
	group := GroupSpec{Layers: 1, KVHeads: 1, KDim: 64}
	_, err := NewCache([]GroupSpec{group}, &CacheOptions{BlockTokens: 17})
	refused(t, err, ErrInvalidArgument)
	c := must[*Cache](t)(NewCache([]GroupSpec{group}, &CacheOptions{Blocks: 2}))
	s := must[*Step](t)(NewStep())
	seq, _, err := c.Start([]uint32{1}, 0)
	ok(t, err)
	err = s.Begin(c, []Work{{seq, make([]uint32, 100)}})
	refused(t, err, ErrOutOfBlocks)
	var e *Error
	if !errors.As(err, &e) || e.Missing != 5 || errors.Is(err, ErrNoDevice) {
		t.Fatalf("%+v", e)
	}
	refused(t, s.Commit(), ErrInvalidState)
	ok(t, s.Begin(c, []Work{{seq, []uint32{1}}}))
	rows := make([]float32, 64)
	refused(t, s.Append(0, 0, Float32s(rows[:63]), Float32s(rows), nil), ErrInvalidArgument)
	refused(t, s.Append(1, 0, Float32s(rows), Float32s(rows), nil), ErrInvalidArgument)
	refused(t, s.Append(0, 1, Float32s(rows), Float32s(rows), nil), ErrInvalidArgument)
	refused(t, s.Append(0, 0, Float32s(rows), Halves(make([]uint16, 64), BF16), nil), ErrInvalidArgument)
	refused(t, s.Attend(0, 0, 2, Float32s(rows), Float32s(rows), nil, nil), ErrInvalidArgument)
	refused(t, s.Positions(nil), ErrBufferTooSmall)
	ok(t, s.Cancel())
	other := must[*Cache](t)(NewCache([]GroupSpec{group}, &CacheOptions{Blocks: 2}))
	refused(t, s.Begin(other, []Work{{seq, []uint32{1}}}), ErrInvalidArgument)
	_, _, err = c.Start(nil, 0)
	refused(t, err, ErrInvalidArgument)
	_, err = NewBatch(nil)
	refused(t, err, ErrInvalidArgument)
	if StatusText(-100) == "" {
		t.Fatal("no text")
	}
	_, err = OpenDevice(DeviceCUDA, 0)
	if !errors.Is(err, ErrNoKernels) && !errors.Is(err, ErrNoDevice) && err != nil {
		t.Fatal(err)
	}
	ok(t, c.Close())
}

func TestBatchAndGoroutines(t *testing.T) {
	c := must[*Cache](t)(NewCache([]GroupSpec{{Layers: 1, KVHeads: kvHeads, KDim: dim, Format: FormatF32}}, &CacheOptions{Blocks: 256}))
	var wait sync.WaitGroup
	for n := range 4 {
		wait.Add(1)
		go func() {
			defer wait.Done()
			s := must[*Step](t)(NewStep())
			seqs := make([]Seq, 3)
			for i := range seqs {
				seqs[i], _, _ = c.Start([]uint32{uint32(n)}, uint64(n))
			}
			b := must[*Batch](t)(NewBatch(seqs))
			rows, out := make([]float32, 3*kvHeads*dim), make([]float32, 3*qHeads*dim)
			for i := range rows {
				rows[i] = float32(n)
			}
			for turn := range 40 {
				for i := range b.Tokens {
					b.Tokens[i] = uint32(turn + i)
				}
				ok(t, s.BeginBatch(c, b))
				ok(t, s.Append(0, 0, Float32s(rows), Float32s(rows), nil))
				ok(t, s.Attend(0, 0, qHeads, Float32s(random(rand.New(rand.NewPCG(1, 1)), len(out))), Float32s(out), nil, nil))
				ok(t, s.Commit())
				for _, x := range out {
					if math.Abs(float64(x)-float64(n)) > 1e-5 {
						t.Errorf("%v, not %d", x, n)
						return
					}
				}
			}
			for i, seq := range seqs {
				if tokens := must[[]uint32](t)(seq.Tokens()); tokens[39] != uint32(39+i) {
					t.Error(tokens)
				}
				ok(t, seq.Release())
			}
			b.Close()
			b.Close()
			ok(t, s.Close())
		}()
	}
	wait.Wait()
	ok(t, c.Audit())
	ok(t, c.Close())
}

func TestWhatIsDroppedEnds(t *testing.T) {
	// A process has 4096 handles: dropped ones come back.
	for n := range 6000 {
		_, err := NewStep()
		for tries := 0; errors.Is(err, ErrTooManyHandles) && tries < 200; tries++ {
			runtime.GC()
			time.Sleep(5 * time.Millisecond)
			_, err = NewStep()
		}
		if err != nil {
			t.Fatal(n, err)
		}
	}
}

func TestRopeScoring(t *testing.T) {
	y := newToy(t, CacheOptions{Blocks: 4}, 0)
	seq, _, err := y.cache.Start([]uint32{1}, 0)
	ok(t, err)
	const n = 3
	ok(t, y.step.Begin(y.cache, []Work{{seq, sequence(n)}}))
	k, v := random(y.r, n*kvHeads*dim), random(y.r, n*kvHeads*dim)
	q, out, lse := make([]float32, n*qHeads*dim), make([]float32, n*qHeads*dim), make([]float32, n*qHeads)
	rope := must[*Rope](t)(NewRope(RopeOptions{RotaryDim: dim, Theta: 500}))
	ok(t, y.step.Append(0, 0, Float32s(k), Float32s(v), rope))
	// A query of zeros sees all keys alike: the mean of the values, and log of the count.
	ok(t, y.step.Attend(0, 0, qHeads, Float32s(q), Float32s(out), nil, lse))
	if math.Abs(float64(lse[2*qHeads])-math.Log(3)) > 1e-5 {
		t.Fatal(lse)
	}
	one := must[*Scoring](t)(NewScoring(ScoringOptions{Window: 1}))
	ok(t, y.step.Attend(0, 0, qHeads, Float32s(q), Float32s(out), one, nil))
	if out[2*qHeads*dim] != v[2*kvHeads*dim] {
		t.Fatal("the window")
	}
	sinks := must[*Scoring](t)(NewScoring(ScoringOptions{Sinks: []float32{1e4, 1e4, 1e4, 1e4}}))
	ok(t, y.step.Attend(0, 0, qHeads, Float32s(q), Float32s(out), sinks, nil))
	if math.Abs(float64(out[0])) > 1e-6 {
		t.Fatal("the sinks")
	}
	few := must[*Scoring](t)(NewScoring(ScoringOptions{Alibi: []float32{1}}))
	refused(t, y.step.Attend(0, 0, qHeads, Float32s(q), Float32s(out), few, nil), ErrInvalidArgument)
	ok(t, y.step.Cancel())
	rows := random(y.r, 2*dim)
	turned := slices.Clone(rows)
	ok(t, rope.Rotate(turned, 1, dim, []uint32{0, 3}))
	cos, sin := math.Cos(3), math.Sin(3)
	if !slices.Equal(turned[:dim], rows[:dim]) || math.Abs(float64(turned[dim])-float64(rows[dim])*cos+float64(rows[dim+32])*sin) > 1e-5 {
		t.Fatal("the rotation")
	}
	refused(t, rope.Rotate(rows, 1, dim, []uint32{0}), ErrInvalidArgument)
}
