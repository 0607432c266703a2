// Package engine is continuous batching over one cache: what both examples run the model by. One
// goroutine owns cache and step; requests come and go between steps.
package engine

import (
	"errors"

	kvcache "github.com/libkvcache/libkvcache/bindings/go"
	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/model"
)

// Engine runs a model's sequences, all that are running in each step.
type Engine struct {
	Model *model.Model
	Cache *kvcache.Cache
	// PrefillTokens are prompt tokens that were computed, the rest came from the prefix index.
	PrefillTokens, PromptTokens int

	step    *kvcache.Step
	rope    *kvcache.Rope
	running []*Sequence
	waiting []*Sequence
	work    []kvcache.Work
	pos     []uint32
	batch   int
}

// Sequence is a request: its prompt, and what is to be done with each token.
type Sequence struct {
	Prompt    []uint32
	MaxTokens int
	Sampler   *model.Sampler
	// Token takes a token as it is chosen; false ends the sequence (the client hung up).
	Token func(token uint32) bool
	// Done is called once, with what went wrong, or nil.
	Done func(error)

	seq       kvcache.Seq
	next      []uint32
	generated int
}

// New makes an engine with a cache of its own for a model, of blocks blocks and batch sequences at once.
func New(m *model.Model, format kvcache.Format, blocks, batch int) (*Engine, error) {
	group := kvcache.GroupSpec{Layers: uint32(m.Layers), KVHeads: uint32(m.KVHeads), KDim: uint32(m.HeadDim), Format: format}
	cache, err := kvcache.NewCache([]kvcache.GroupSpec{group}, &kvcache.CacheOptions{Blocks: uint32(blocks), MaxSeqs: uint32(batch)})
	if err != nil {
		return nil, err
	}
	step, err := kvcache.NewStep()
	if err != nil {
		return nil, err
	}
	rope, err := kvcache.NewRope(kvcache.RopeOptions{Style: kvcache.RopeHalves, RotaryDim: uint32(m.HeadDim), Theta: m.RopeTheta})
	if err != nil {
		return nil, err
	}
	return &Engine{Model: m, Cache: cache, step: step, rope: rope, batch: batch}, nil
}

// Close ends the engine; sequences that are left end with err.
func (e *Engine) Close(err error) error {
	for _, s := range append(e.running, e.waiting...) {
		s.Done(err)
	}
	e.running, e.waiting = nil, nil
	return errors.Join(e.step.Close(), e.Cache.Close())
}

// Add puts a request in the queue.
func (e *Engine) Add(s *Sequence) { e.waiting = append(e.waiting, s) }

// Idle is true where there is nothing to do.
func (e *Engine) Idle() bool { return len(e.running)+len(e.waiting) == 0 }

// Step runs one forward pass: it admits one waiting request at most, so that the next finds its prompt
// in the prefix index, and gives each running sequence one more token.
func (e *Engine) Step() error {
	if len(e.waiting) > 0 && len(e.running) < e.batch {
		s := e.waiting[0]
		seq, cached, err := e.Cache.Start(s.Prompt, 0)
		e.waiting = e.waiting[1:]
		if err != nil {
			s.Done(err)
			return nil
		}
		s.seq, s.next = seq, s.Prompt[cached:]
		e.PromptTokens += len(s.Prompt)
		e.PrefillTokens += len(s.next)
		e.running = append(e.running, s)
	}
	if len(e.running) == 0 {
		return nil
	}
	e.work = e.work[:0]
	var tokens []uint32
	var last []int
	for _, s := range e.running {
		e.work = append(e.work, kvcache.Work{Seq: s.seq, Tokens: s.next})
		tokens = append(tokens, s.next...)
		last = append(last, len(tokens)-1)
	}
	err := e.step.Begin(e.Cache, e.work)
	if errors.Is(err, kvcache.ErrOutOfBlocks) {
		// The youngest gives way; what it computed stays in the index for its next turn.
		return e.preempt(err)
	}
	if err != nil {
		return err
	}
	e.pos = append(e.pos[:0], tokens...)
	if err := e.step.Positions(e.pos); err != nil {
		return errors.Join(err, e.step.Cancel())
	}
	logits, err := e.Model.Forward(tokens, last, e.attend)
	if err != nil {
		return errors.Join(err, e.step.Cancel())
	}
	if err := e.step.Commit(); err != nil {
		return err
	}
	still := e.running[:0]
	for i, s := range e.running {
		token := s.Sampler.Pick(logits[i*e.Model.Vocab:][:e.Model.Vocab])
		s.next, s.generated = []uint32{token}, s.generated+1
		if s.Token(token) && token != model.End && s.generated < s.MaxTokens {
			still = append(still, s)
			continue
		}
		s.Done(s.seq.Release())
	}
	clear(e.running[len(still):])
	e.running = still
	return nil
}

func (e *Engine) preempt(cause error) error {
	youngest := len(e.running) - 1
	s := e.running[youngest]
	e.running = e.running[:youngest]
	held, err := s.seq.Tokens()
	if err != nil {
		return err
	}
	if err := s.seq.Release(); err != nil {
		return err
	}
	if youngest == 0 {
		s.Done(cause)
		return nil
	}
	// The tokens it has, and those that it was about to feed, are its prompt when it comes again.
	s.Prompt = append(held, s.next...)
	e.waiting = append([]*Sequence{s}, e.waiting...)
	return nil
}

func (e *Engine) attend(layer int, q, k, v, out []float32) error {
	m := e.Model
	if err := e.rope.Rotate(q, m.QHeads, m.HeadDim, e.pos); err != nil {
		return err
	}
	if err := e.step.Append(0, layer, kvcache.Float32s(k), kvcache.Float32s(v), e.rope); err != nil {
		return err
	}
	return e.step.Attend(0, layer, m.QHeads, kvcache.Float32s(q), kvcache.Float32s(out), nil, nil)
}
