package model

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// End is the token that ends a text.
const End = 256

// Tokenizer is the model's byte-level BPE: ids 0 to 255 are bytes, 256 ends a text, the rest are merges
// in rank order. The rule that cuts text into pieces is stated in the model's README.md.
type Tokenizer struct {
	ranks map[[2]uint32]uint32
	bytes [][]byte
}

// LoadTokenizer reads tokenizer.txt of a folder: one merge a line, the two ids it joins.
func LoadTokenizer(folder string) (*Tokenizer, error) {
	file, err := os.Open(filepath.Join(folder, "tokenizer.txt"))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	t := &Tokenizer{ranks: map[[2]uint32]uint32{}}
	for b := range 256 {
		t.bytes = append(t.bytes, []byte{byte(b)})
	}
	t.bytes = append(t.bytes, nil)
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var pair [2]uint32
		if _, err := fmt.Sscan(lines.Text(), &pair[0], &pair[1]); err != nil {
			return nil, fmt.Errorf("a merge is two ids: %w", err)
		}
		if int(max(pair[0], pair[1])) >= len(t.bytes) {
			return nil, fmt.Errorf("a merge names a later id: %v", pair)
		}
		t.ranks[pair] = uint32(len(t.bytes))
		t.bytes = append(t.bytes, append(append([]byte(nil), t.bytes[pair[0]]...), t.bytes[pair[1]]...))
	}
	return t, lines.Err()
}

// Encode is a text's tokens.
func (t *Tokenizer) Encode(text string) []uint32 {
	var out []uint32
	for len(text) > 0 {
		n := pieceLen(text)
		out = append(out, t.piece(text[:n])...)
		text = text[n:]
	}
	return out
}

// Decode is the text of tokens; bytes that are no UTF-8 become replacement characters.
func (t *Tokenizer) Decode(ids []uint32) string {
	var out []byte
	for _, id := range ids {
		if int(id) < len(t.bytes) {
			out = append(out, t.bytes[id]...)
		}
	}
	return strings.ToValidUTF8(string(out), "\uFFFD")
}

// piece joins the pair of the lowest rank until none is left.
func (t *Tokenizer) piece(text string) []uint32 {
	ids := make([]uint32, len(text))
	for i := range len(text) {
		ids[i] = uint32(text[i])
	}
	for {
		best, found := ^uint32(0), false
		for i := 1; i < len(ids); i++ {
			if rank, ok := t.ranks[[2]uint32{ids[i-1], ids[i]}]; ok && rank < best {
				best, found = rank, true
			}
		}
		if !found {
			return ids
		}
		joined := ids[:0]
		for i := 0; i < len(ids); i++ {
			if i+1 < len(ids) {
				if rank, ok := t.ranks[[2]uint32{ids[i], ids[i+1]}]; ok && rank == best {
					joined = append(joined, best)
					i++
					continue
				}
			}
			joined = append(joined, ids[i])
		}
		ids = joined
	}
}

// pieceLen is the length of the piece that text begins with: letters or other characters, either with
// one space before them, or white space, which leaves its last space to a piece that follows.
func pieceLen(text string) int {
	space := func(b byte) bool { return b == ' ' || b == '\t' || b == '\n' || b == '\r' }
	letter := func(b byte) bool { return b|32 >= 'a' && b|32 <= 'z' }
	other := func(b byte) bool { return !space(b) && !letter(b) }
	run := func(from int, class func(byte) bool) int {
		for from < len(text) && class(text[from]) {
			from++
		}
		return from
	}
	start := 0
	if text[0] == ' ' {
		start = 1
	}
	if start < len(text) && letter(text[start]) {
		return run(start, letter)
	}
	if start < len(text) && other(text[start]) {
		return run(start, other)
	}
	end := run(0, space)
	if end < len(text) && end > 1 && text[end-1] == ' ' {
		end--
	}
	return end
}
