// Command server serves a small language model over HTTP from the cache: POST /generate with
// {"prompt": "...", "max_tokens": 32} answers server-sent events, one a token, then "done". Requests
// share their common prefixes; GET /metrics is what the cache counts, as Prometheus reads it.
//
//	go run ./examples/server -model ../../examples/generate/model
//
// It listens on the loopback address only and ends cleanly on SIGINT or SIGTERM: running requests end,
// the cache is audited, its memory given back.
package main

import (
	"context"
	"errors"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/libkvcache/libkvcache/bindings/go/examples/internal/model"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("server: ")
	folder := flag.String("model", "../../examples/generate/model", "the model's folder")
	port := flag.Int("port", 0, "the port on 127.0.0.1; 0 for a free one")
	batch := flag.Int("batch", 16, "sequences that run at once")
	blocks := flag.Int("blocks", 1024, "blocks of the cache")
	dtype := flag.String("dtype", "bf16", "how K and V are stored: f32, f16 or bf16")
	flag.Parse()
	if err := run(*folder, *port, *batch, *blocks, *dtype); err != nil {
		log.Fatal(err)
	}
}

func run(folder string, port, batch, blocks int, dtype string) error {
	m, err := model.Load(folder)
	if err != nil {
		return err
	}
	tokenizer, err := model.LoadTokenizer(folder)
	if err != nil {
		return err
	}
	system, err := os.ReadFile(filepath.Join(folder, "..", "system.txt"))
	if err != nil {
		return err
	}
	s, err := newServer(m, tokenizer, strings.TrimRight(string(system), " \t\r\n"), batch, blocks, dtype)
	if err != nil {
		return err
	}
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		return err
	}
	log.Printf("http://%s", listener.Addr())
	stop, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	web := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	served := make(chan error, 1)
	go func() { served <- web.Serve(listener) }()
	select {
	case err := <-served:
		return errors.Join(err, s.close())
	case <-stop.Done():
	}
	ending, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return errors.Join(web.Shutdown(ending), s.close())
}
