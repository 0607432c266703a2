// Command generate serves a small language model from the cache, as the Rust example of the same name:
// the same prompts, options and tokens.
//
//	go run ./examples/generate -model ../../examples/generate/model
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"

	kvcache "github.com/libkvcache/libkvcache/bindings/go"
	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/engine"
	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/model"
)

type prompts []string

func (p *prompts) String() string     { return strings.Join(*p, ", ") }
func (p *prompts) Set(s string) error { *p = append(*p, s); return nil }

// written is one sequence of the output.
type written struct {
	Prompt string   `json:"prompt"`
	Text   string   `json:"text"`
	Tokens []uint32 `json:"tokens"`
}

var formats = map[string]kvcache.Format{"f32": kvcache.FormatF32, "f16": kvcache.FormatF16, "bf16": kvcache.FormatBF16}

func main() {
	log.SetFlags(0)
	log.SetPrefix("generate: ")
	folder := flag.String("model", "../../examples/generate/model", "the model's folder")
	batch := flag.Int("batch", 4, "sequences that run at once")
	maxTokens := flag.Int("max-tokens", 32, "tokens to generate for each prompt")
	dtype := flag.String("dtype", "bf16", "how K and V are stored: f32, f16 or bf16")
	temperature := flag.Float64("temperature", 0, "0 is greedy")
	seed := flag.Uint64("seed", 0, "seed of the draw where the temperature is not 0")
	asJSON := flag.Bool("json", false, "print one JSON object")
	var questions prompts
	flag.Var(&questions, "prompt", "a prompt after the system prompt; repeat for more")
	flag.Parse()

	format, known := formats[*dtype]
	if !known || *batch < 1 || *maxTokens < 1 {
		log.Fatal("-dtype is f32, f16 or bf16; -batch and -max-tokens at least 1")
	}
	out, e, err := run(*folder, questions, format, *batch, *maxTokens, model.Sampler{Temperature: float32(*temperature), State: *seed})
	if err != nil {
		log.Fatal(err)
	}
	if *asJSON {
		if err := json.NewEncoder(os.Stdout).Encode(map[string]any{
			"sequences": out, "prompt_tokens": e.PromptTokens, "prefill_tokens": e.PrefillTokens,
		}); err != nil {
			log.Fatal(err)
		}
		return
	}
	for _, w := range out {
		fmt.Printf("%s%s\n\n", w.Prompt, w.Text)
	}
	fmt.Printf("%d prompt tokens, %d computed\n", e.PromptTokens, e.PrefillTokens)
}

func run(folder string, questions []string, format kvcache.Format, batch, maxTokens int, sampler model.Sampler) ([]written, *engine.Engine, error) {
	m, err := model.Load(folder)
	if err != nil {
		return nil, nil, err
	}
	tokenizer, err := model.LoadTokenizer(folder)
	if err != nil {
		return nil, nil, err
	}
	system, err := os.ReadFile(filepath.Join(folder, "..", "system.txt"))
	if err != nil {
		return nil, nil, err
	}
	if len(questions) == 0 {
		text, err := os.ReadFile(filepath.Join(folder, "..", "prompts.txt"))
		if err != nil {
			return nil, nil, err
		}
		questions = strings.Split(strings.TrimSpace(string(text)), "\n")
	}
	e, err := engine.New(m, format, 1024, batch)
	if err != nil {
		return nil, nil, err
	}
	out := make([]written, len(questions))
	var failed error
	for i, question := range questions {
		w := &out[i]
		w.Prompt = question
		text := strings.TrimRight(string(system), " \t\r\n") + "\n\n" + question
		prompt := append([]uint32{model.End}, tokenizer.Encode(text)...)
		if len(prompt)+maxTokens > m.MaxTokens {
			return nil, nil, fmt.Errorf("%d tokens are past the model's %d", len(prompt)+maxTokens, m.MaxTokens)
		}
		e.Add(&engine.Sequence{
			Prompt: prompt, MaxTokens: maxTokens,
			// One draw after the other, whichever sequence it is for.
			Sampler: &sampler,
			Token:   func(token uint32) bool { w.Tokens = append(w.Tokens, token); return true },
			Done: func(err error) {
				if err != nil && failed == nil {
					failed = err
				}
				w.Text = tokenizer.Decode(w.Tokens)
			},
		})
	}
	for !e.Idle() && failed == nil {
		if err := e.Step(); err != nil {
			return nil, nil, err
		}
	}
	if failed == nil {
		failed = e.Cache.Audit()
	}
	return out, e, failed
}
