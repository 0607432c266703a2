package main

// The requests' side: handlers hand requests to the one goroutine that owns the engine, and take tokens
// from it. A client that hangs up ends its sequence at its next token.

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"

	kvcache "github.com/libkvcache/libkvcache/bindings/go"
	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/engine"
	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/model"
)

const maxBody = 64 << 10

var (
	formats    = map[string]kvcache.Format{"f32": kvcache.FormatF32, "f16": kvcache.FormatF16, "bf16": kvcache.FormatBF16}
	errStopped = errors.New("the server is stopping")
)

type server struct {
	engine    *engine.Engine
	tokenizer *model.Tokenizer
	system    string
	requests  chan *engine.Sequence
	stop      chan struct{}
	stopped   chan struct{}
	// What the engine ended with, once stopped is closed.
	err    error
	served atomic.Uint64
	hungUp atomic.Uint64
}

// request is the body of POST /generate.
type request struct {
	Prompt      string  `json:"prompt"`
	MaxTokens   int     `json:"max_tokens"`
	Temperature float32 `json:"temperature"`
	Seed        uint64  `json:"seed"`
}

func newServer(m *model.Model, t *model.Tokenizer, system string, batch, blocks int, dtype string) (*server, error) {
	format, known := formats[dtype]
	if !known {
		return nil, fmt.Errorf("dtype cannot be %q", dtype)
	}
	e, err := engine.New(m, format, blocks, batch)
	if err != nil {
		return nil, err
	}
	s := &server{
		engine: e, tokenizer: t, system: system,
		requests: make(chan *engine.Sequence), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	go s.loop()
	return s, nil
}

// loop owns the engine: it takes requests between steps, and waits for one where there is nothing to do.
func (s *server) loop() {
	err := s.turns()
	if err == nil {
		// Nothing runs any more: each block is free or cached, and all counts add up.
		err = s.engine.Cache.Audit()
		if stats, e := s.engine.Cache.Stats(); e != nil || stats.Sequences != 0 || stats.ReferencedBlocks != 0 {
			err = errors.Join(err, e, fmt.Errorf("%d sequences and %d blocks are left", stats.Sequences, stats.ReferencedBlocks))
		}
	}
	s.err = errors.Join(err, s.engine.Close(errStopped))
	close(s.stopped)
}

func (s *server) turns() error {
	for {
		if s.engine.Idle() {
			select {
			case r := <-s.requests:
				s.engine.Add(r)
			case <-s.stop:
				return nil
			}
		}
		for more := true; more; {
			select {
			case r := <-s.requests:
				s.engine.Add(r)
			default:
				more = false
			}
		}
		if err := s.engine.Step(); err != nil {
			return err
		}
	}
}

// close ends the engine once its sequences are done, and tells what it found.
func (s *server) close() error {
	close(s.stop)
	<-s.stopped
	return s.err
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /generate", s.generate)
	mux.HandleFunc("GET /metrics", s.metrics)
	return mux
}

func (s *server) generate(w http.ResponseWriter, r *http.Request) {
	in := request{MaxTokens: 32}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	prompt := append([]uint32{model.End}, s.tokenizer.Encode(s.system+"\n\n"+in.Prompt)...)
	limit := s.engine.Model.MaxTokens
	if in.MaxTokens < 1 || in.MaxTokens > limit || len(prompt)+in.MaxTokens > limit || !(in.Temperature >= 0) {
		http.Error(w, fmt.Sprintf("%d prompt tokens and %d more; the model has %d", len(prompt), in.MaxTokens, limit), http.StatusBadRequest)
		return
	}
	// Room for the whole answer: the engine never waits for a client.
	tokens, done := make(chan uint32, in.MaxTokens), make(chan error, 1)
	gone := r.Context().Done()
	seq := &engine.Sequence{
		Prompt: prompt, MaxTokens: in.MaxTokens,
		Sampler: &model.Sampler{Temperature: in.Temperature, State: in.Seed},
		Token: func(token uint32) bool {
			tokens <- token
			select {
			case <-gone:
				return false
			default:
				return true
			}
		},
		Done: func(err error) { done <- err; close(tokens) },
	}
	select {
	case s.requests <- seq:
	case <-s.stopped:
		http.Error(w, errStopped.Error(), http.StatusServiceUnavailable)
		return
	case <-gone:
		s.hungUp.Add(1)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	out := http.NewResponseController(w)
	var all []uint32
	for token := range tokens {
		all = append(all, token)
		if err := event(w, "token", map[string]any{"token": token}); err != nil || out.Flush() != nil {
			break
		}
	}
	// Drained by the engine's last word in any case.
	err := <-done
	switch {
	case r.Context().Err() != nil:
		s.hungUp.Add(1)
	case err != nil:
		_ = event(w, "error", map[string]any{"error": err.Error()})
	default:
		s.served.Add(1)
		_ = event(w, "done", map[string]any{"text": s.tokenizer.Decode(all), "tokens": all})
	}
}

// event writes one server-sent event.
func event(w http.ResponseWriter, name string, data any) error {
	text, err := json.Marshal(data)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", name, text)
	return err
}

func (s *server) metrics(w http.ResponseWriter, _ *http.Request) {
	text, err := s.engine.Cache.MetricsText()
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	fmt.Fprint(w, text)
	fmt.Fprintf(w, "# TYPE server_requests_total counter\nserver_requests_total{end=\"served\"} %d\nserver_requests_total{end=\"hung_up\"} %d\n", s.served.Load(), s.hungUp.Load())
}
