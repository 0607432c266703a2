// Package model is the small trained Llama model of examples/generate in plain Go: weights from
// safetensors, a forward pass without attention, which the caller supplies. It knows nothing of caches.
//
// Sums run in the order of the Rust example's, so that both choose the same tokens.
package model

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// Config is the model's dimensions, as config.json names them.
type Config struct {
	Layers    int     `json:"num_hidden_layers"`
	Hidden    int     `json:"hidden_size"`
	QHeads    int     `json:"num_attention_heads"`
	KVHeads   int     `json:"num_key_value_heads"`
	HeadDim   int     `json:"head_dim"`
	MLP       int     `json:"intermediate_size"`
	Vocab     int     `json:"vocab_size"`
	NormEps   float32 `json:"rms_norm_eps"`
	RopeTheta float32 `json:"rope_theta"`
	MaxTokens int     `json:"max_position_embeddings"`
}

// Attention rotates q and k, remembers k and v of the new rows, and writes attention's output. Rows are
// [token][head][head dim].
type Attention func(layer int, q, k, v, out []float32) error

// linear is a matrix kept as [input][output].
type linear struct {
	weight          []float32
	inputs, outputs int
}

type layer struct {
	attentionNorm, mlpNorm     []float32
	q, k, v, o, gate, up, down linear
}

// Model is the weights, read only: any number of goroutines may run it.
type Model struct {
	Config
	embedding, norm []float32
	layers          []layer
	head            linear
}

// Load reads config.json and model.safetensors of a folder.
func Load(folder string) (*Model, error) {
	text, err := os.ReadFile(filepath.Join(folder, "config.json"))
	if err != nil {
		return nil, err
	}
	m := &Model{}
	if err := json.Unmarshal(text, &m.Config); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(folder, "model.safetensors"))
	if err != nil {
		return nil, err
	}
	t, err := parse(data)
	if err != nil {
		return nil, err
	}
	m.embedding, m.norm = t.vector("model.embed_tokens"), t.vector("model.norm")
	m.head = t.linear("model.embed_tokens") // The head is tied to the embedding.
	for n := range m.Layers {
		part := func(name string) string { return fmt.Sprintf("model.layers.%d.%s", n, name) }
		m.layers = append(m.layers, layer{
			attentionNorm: t.vector(part("input_layernorm")), mlpNorm: t.vector(part("post_attention_layernorm")),
			q: t.linear(part("self_attn.q_proj")), k: t.linear(part("self_attn.k_proj")),
			v: t.linear(part("self_attn.v_proj")), o: t.linear(part("self_attn.o_proj")),
			gate: t.linear(part("mlp.gate_proj")), up: t.linear(part("mlp.up_proj")), down: t.linear(part("mlp.down_proj")),
		})
	}
	return m, t.err
}

// Forward runs all tokens and gives the logits [row][vocab] of the wanted rows.
func (m *Model) Forward(tokens []uint32, wanted []int, attend Attention) ([]float32, error) {
	x := make([]float32, 0, len(tokens)*m.Hidden)
	for _, token := range tokens {
		if int(token) >= m.Vocab {
			return nil, fmt.Errorf("token %d is past the vocabulary", token)
		}
		x = append(x, m.embedding[int(token)*m.Hidden:][:m.Hidden]...)
	}
	attended := make([]float32, len(tokens)*m.QHeads*m.HeadDim)
	for n := range m.layers {
		l := &m.layers[n]
		h := rmsNorm(x, l.attentionNorm, m.NormEps)
		if err := attend(n, l.q.apply(h), l.k.apply(h), l.v.apply(h), attended); err != nil {
			return nil, err
		}
		add(x, l.o.apply(attended))
		h = rmsNorm(x, l.mlpNorm, m.NormEps)
		gated, up := l.gate.apply(h), l.up.apply(h)
		for i, g := range gated {
			gated[i] = g / (1 + float32(math.Exp(float64(-g)))) * up[i]
		}
		add(x, l.down.apply(gated))
	}
	rows := make([]float32, 0, len(wanted)*m.Hidden)
	for _, row := range wanted {
		rows = append(rows, x[row*m.Hidden:][:m.Hidden]...)
	}
	return m.head.apply(rmsNorm(rows, m.norm, m.NormEps)), nil
}

// apply is [rows][inputs] to [rows][outputs], each row's sums in order, whatever stands beside it.
func (l *linear) apply(x []float32) []float32 {
	rows := len(x) / l.inputs
	y := make([]float32, rows*l.outputs)
	workers := min(runtime.GOMAXPROCS(0), max(rows, 1))
	var wait sync.WaitGroup
	for w := range workers {
		wait.Go(func() {
			// A few rows share each pass over the weights.
			for at := w * 4; at < rows; at += workers * 4 {
				l.rows(x, y, at, min(at+4, rows))
			}
		})
	}
	wait.Wait()
	return y
}

func (l *linear) rows(x, y []float32, from, to int) {
	for i := range l.inputs {
		weights := l.weight[i*l.outputs:][:l.outputs]
		for row := from; row < to; row++ {
			value, out := x[row*l.inputs+i], y[row*l.outputs:][:l.outputs]
			for o, w := range weights {
				// The conversion keeps a product apart from its sum, where a machine could fuse them.
				out[o] += float32(value * w)
			}
		}
	}
}

func rmsNorm(x, weight []float32, eps float32) []float32 {
	out := make([]float32, len(x))
	for at := 0; at < len(x); at += len(weight) {
		row, sum := x[at:][:len(weight)], float32(0)
		for _, v := range row {
			sum += float32(v * v)
		}
		scale := 1 / float32(math.Sqrt(float64(sum/float32(len(row))+eps)))
		for i, v := range row {
			out[at+i] = float32(v*scale) * weight[i]
		}
	}
	return out
}

func add(x, y []float32) {
	for i, v := range y {
		x[i] += v
	}
}

// tensors is a safetensors file; the first error stays.
type tensors struct {
	data   []byte
	header map[string]json.RawMessage
	err    error
}

func parse(file []byte) (*tensors, error) {
	if len(file) < 8 {
		return nil, fmt.Errorf("not a safetensors file")
	}
	n := binary.LittleEndian.Uint64(file)
	if n > uint64(len(file)-8) {
		return nil, fmt.Errorf("a safetensors header of %d bytes in a file of %d", n, len(file))
	}
	t := &tensors{data: file[8+n:]}
	return t, json.Unmarshal(file[8:8+n], &t.header)
}

func (t *tensors) read(name string) ([]float32, []int) {
	var tensor struct {
		DType   string `json:"dtype"`
		Shape   []int  `json:"shape"`
		Offsets [2]int `json:"data_offsets"`
	}
	if err := json.Unmarshal(t.header[name+".weight"], &tensor); err != nil {
		t.err = fmt.Errorf("%s: %w", name, err)
		return nil, nil
	}
	a, b := tensor.Offsets[0], tensor.Offsets[1]
	if tensor.DType != "F16" || a < 0 || b < a || b > len(t.data) {
		t.err = fmt.Errorf("%s is %s at %v", name, tensor.DType, tensor.Offsets)
		return nil, nil
	}
	out := make([]float32, (b-a)/2)
	for i := range out {
		out[i] = half(binary.LittleEndian.Uint16(t.data[a+2*i:]))
	}
	return out, tensor.Shape
}

func (t *tensors) vector(name string) []float32 {
	out, _ := t.read(name)
	return out
}

// linear transposes a stored [output][input].
func (t *tensors) linear(name string) linear {
	stored, shape := t.read(name)
	if len(shape) != 2 || shape[0]*shape[1] != len(stored) {
		t.err = fmt.Errorf("%s is no matrix", name)
		return linear{}
	}
	l := linear{make([]float32, len(stored)), shape[1], shape[0]}
	for o := range l.outputs {
		for i := range l.inputs {
			l.weight[i*l.outputs+o] = stored[o*l.inputs+i]
		}
	}
	return l
}

// half is an IEEE half as a float.
func half(bits uint16) float32 {
	sign, exponent, fraction := uint32(bits>>15)<<31, uint32(bits>>10&31), uint32(bits&1023)
	switch exponent {
	case 0:
		value := float32(fraction) / (1 << 24)
		return math.Float32frombits(math.Float32bits(value) | sign)
	case 31:
		return math.Float32frombits(sign | 0x7f800000 | fraction<<13)
	}
	return math.Float32frombits(sign | (exponent+112)<<23 | fraction<<13)
}
