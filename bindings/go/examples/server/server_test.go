package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/model"
)

const folder = "../../../../examples/generate/model"

func start(t *testing.T, batch, blocks int) (*server, *httptest.Server) {
	m, err := model.Load(folder)
	if err != nil {
		t.Fatal(err)
	}
	tokenizer, err := model.LoadTokenizer(folder)
	if err != nil {
		t.Fatal(err)
	}
	system, err := os.ReadFile(filepath.Join(folder, "..", "system.txt"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := newServer(m, tokenizer, strings.TrimRight(string(system), " \t\r\n"), batch, blocks, "bf16")
	if err != nil {
		t.Fatal(err)
	}
	// On 127.0.0.1, a free port.
	return s, httptest.NewServer(s.handler())
}

// ask posts a prompt and reads its events, hanging up after some tokens where that is not negative.
func ask(url, prompt string, maxTokens, hangUpAfter int) ([]uint32, string, error) {
	body, _ := json.Marshal(map[string]any{"prompt": prompt, "max_tokens": maxTokens})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, "POST", url+"/generate", bytes.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, "", err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("status %d", response.StatusCode)
	}
	var tokens []uint32
	lines, name := bufio.NewScanner(response.Body), ""
	for lines.Scan() {
		line := lines.Text()
		if rest, ok := strings.CutPrefix(line, "event: "); ok {
			name = rest
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		var in struct {
			Token  uint32   `json:"token"`
			Tokens []uint32 `json:"tokens"`
			Text   string   `json:"text"`
			Error  string   `json:"error"`
		}
		if err := json.Unmarshal([]byte(data), &in); err != nil {
			return nil, "", err
		}
		switch name {
		case "token":
			if tokens = append(tokens, in.Token); len(tokens) == hangUpAfter {
				return tokens, "", nil
			}
		case "done":
			if !slices.Equal(tokens, in.Tokens) {
				return nil, "", fmt.Errorf("tokens %v, then %v", tokens, in.Tokens)
			}
			return tokens, in.Text, nil
		default:
			return nil, "", fmt.Errorf("%s: %s", name, in.Error)
		}
	}
	return nil, "", fmt.Errorf("no end: %v", lines.Err())
}

// expected is what the Rust example wrote, by prompt: its JSON, which the stage's script hands over, or
// without it what the server itself answers one request at a time.
func expected(t *testing.T, prompts []string, url string, maxTokens int) map[string][]uint32 {
	want := map[string][]uint32{}
	path := os.Getenv("KVCACHE_RUST_TOKENS")
	if path == "" {
		t.Log("KVCACHE_RUST_TOKENS is not set: answers are compared with those of a lone client")
		for _, prompt := range prompts {
			tokens, _, err := ask(url, prompt, maxTokens, -1)
			if err != nil {
				t.Fatal(err)
			}
			want[prompt] = tokens
		}
		return want
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var rust struct {
		Sequences []struct {
			Prompt string   `json:"prompt"`
			Tokens []uint32 `json:"tokens"`
		} `json:"sequences"`
	}
	if err := json.Unmarshal(text, &rust); err != nil {
		t.Fatal(err)
	}
	for _, s := range rust.Sequences {
		want[s.Prompt] = s.Tokens
	}
	return want
}

func TestManyClients(t *testing.T) {
	const clients, maxTokens = 64, 32
	text, err := os.ReadFile(filepath.Join(folder, "..", "prompts.txt"))
	if err != nil {
		t.Fatal(err)
	}
	prompts := strings.Split(strings.TrimSpace(string(text)), "\n")
	// Few blocks: sequences give way to each other, and cached prefixes are evicted.
	s, web := start(t, 16, 120)
	want := expected(t, prompts, web.URL, maxTokens)
	var wait sync.WaitGroup
	for n := range clients {
		wait.Add(1)
		go func() {
			defer wait.Done()
			prompt, tokens, hangUp := prompts[n%len(prompts)], maxTokens-n%5, -1
			if n%4 == 3 {
				hangUp = 1 + n%7
			}
			got, _, err := ask(web.URL, prompt, tokens, hangUp)
			if err != nil {
				t.Errorf("client %d: %v", n, err)
				return
			}
			if hangUp >= 0 {
				tokens = hangUp
			}
			answer := want[prompt]
			if answer = answer[:min(tokens, len(answer))]; !slices.Equal(got, answer) {
				t.Errorf("client %d, %q: %v, not %v", n, prompt, got, answer)
			}
		}()
	}
	wait.Wait()
	for _, body := range []string{"", "{", `{"prompt":"a","max_tokens":0}`, `{"prompt":"a","max_tokens":99999}`, `{"prompt":"` + strings.Repeat("a b ", 30000) + `"}`} {
		response, err := http.Post(web.URL+"/generate", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusBadRequest {
			t.Errorf("%.40q: %d", body, response.StatusCode)
		}
	}
	response, err := http.Get(web.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var metrics bytes.Buffer
	if _, err := metrics.ReadFrom(response.Body); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(metrics.String(), "kvcache:prefix_cache_hits") || !strings.Contains(metrics.String(), `{end="served"}`) {
		t.Error(metrics.String())
	}
	web.Close()
	if s.engine.PrefillTokens*2 > s.engine.PromptTokens {
		t.Errorf("%d of %d prompt tokens computed", s.engine.PrefillTokens, s.engine.PromptTokens)
	}
	// Audits: no sequence, no block is left.
	if err := s.close(); err != nil {
		t.Error(err)
	}
}
