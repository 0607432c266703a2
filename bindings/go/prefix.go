//go:build cgo

package kvcache

// The prefix index alone.

// #include <kvcache.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Prefix is an exact radix index over token ids: which token sequences are cached in which blocks of
// the engine's own pools, one id a layer group. Safe for goroutines.
type Prefix struct {
	h                   *C.kvc_prefix
	cleanup             runtime.Cleanup
	blockTokens, groups int
}

// PrefixOptions are sizes and policy of an index; zero fields are the library's defaults.
type PrefixOptions struct {
	BlockTokens, Groups, CapacityBlocks uint32
	Eviction                            Eviction
}

// Position is the end of a matched or inserted prefix, good until blocks at its end are evicted.
type Position struct{ c C.kvc_prefix_position }

// Hit is what a lookup found: whole blocks [block][group], and how many tokens more agree with
// TailBlocks.
type Hit struct {
	Tokens, TailTokens uint64
	Blocks, TailBlocks []int32
	At                 Position
}

// Inserted is what an insertion did. Present are the ids of the leading blocks that were cached already;
// StoredBlocks after them are cached now.
type Inserted struct {
	PresentBlocks, StoredBlocks uint64
	Present                     []int32
	At                          Position
}

// PrefixCounts are sizes of an index.
type PrefixCounts struct{ Blocks, CapacityBlocks, NameSpaces, Nodes, Pins, Bytes uint64 }

// End, as the end of a Retention, is the end of the prefix.
const End = 1<<64 - 1

// Retention is a priority, 0 to 100, for the tokens from Start to before End, for DurationMS after the
// last release, or until another is given.
type Retention struct {
	Start, End           uint64
	Priority, DurationMS uint32
}

func retentions(ranges []Retention) []C.kvc_retention {
	out := make([]C.kvc_retention, len(ranges))
	for i, r := range ranges {
		out[i] = C.kvc_retention{
			start: C.uint64_t(r.Start), end: C.uint64_t(r.End),
			priority: C.uint32_t(r.Priority), duration_ms: C.uint32_t(r.DurationMS),
		}
	}
	return out
}

// NewPrefix makes an empty index.
func NewPrefix(options PrefixOptions) (*Prefix, error) {
	var o C.kvc_prefix_options
	if err := try(func() C.kvc_status { return C.kvc_prefix_options_init(&o, C.uint32_t(unsafe.Sizeof(o))) }); err != nil {
		return nil, err
	}
	if options.BlockTokens != 0 {
		o.block_tokens = C.uint32_t(options.BlockTokens)
	}
	if options.Groups != 0 {
		o.groups = C.uint32_t(options.Groups)
	}
	if options.CapacityBlocks != 0 {
		o.capacity_blocks = C.uint32_t(options.CapacityBlocks)
	}
	o.eviction = C.uint32_t(options.Eviction)
	p := &Prefix{blockTokens: int(o.block_tokens), groups: int(o.groups)}
	var h *C.kvc_prefix
	if err := try(func() C.kvc_status { return C.kvc_prefix_create_with(&o, &h) }); err != nil {
		return nil, err
	}
	p.h = h
	p.cleanup = runtime.AddCleanup(p, func(h *C.kvc_prefix) { C.kvc_prefix_destroy(h) }, h)
	return p, nil
}

// Close ends the index; again it answers ErrStaleHandle.
func (p *Prefix) Close() error {
	defer runtime.KeepAlive(p)
	p.cleanup.Stop()
	return try(func() C.kvc_status { return C.kvc_prefix_destroy(p.h) })
}

func (p *Prefix) room(tokens int) int {
	return (tokens + p.blockTokens - 1) / p.blockTokens * p.groups
}

func (p *Prefix) hit(c *C.kvc_prefix_hit, blocks, tail []int32) Hit {
	h := Hit{Tokens: uint64(c.tokens), TailTokens: uint64(c.tail_tokens), Blocks: blocks[:c.block_ids], At: Position{c.at}}
	if h.TailTokens != 0 {
		h.TailBlocks = tail
	}
	return h
}

// Lookup finds the longest cached prefix of the first maxTokens tokens: len(tokens) - 1 leaves the last
// one to be computed, whose logits sampling needs. Marks nothing as used: see Lock.
func (p *Prefix) Lookup(namespace uint64, tokens []uint32, maxTokens int) (Hit, error) {
	defer runtime.KeepAlive(p)
	blocks, tail := make([]int32, p.room(len(tokens))), make([]int32, p.groups)
	var out C.kvc_prefix_hit
	err := try(func() C.kvc_status {
		return C.kvc_prefix_lookup(p.h, C.uint64_t(namespace), (*C.uint32_t)(at(tokens)), C.uint64_t(len(tokens)),
			C.uint64_t(max(maxTokens, 0)), (*C.int32_t)(at(blocks)), C.uint64_t(len(blocks)), (*C.int32_t)(at(tail)), &out)
	})
	if err != nil {
		return Hit{}, err
	}
	return p.hit(&out, blocks, tail), nil
}

// Insert caches whole blocks of tokens under blocks [block][group]; -1 for a group that has none.
func (p *Prefix) Insert(namespace uint64, tokens []uint32, blocks []int32) (Inserted, error) {
	defer runtime.KeepAlive(p)
	present := make([]int32, len(blocks))
	var out C.kvc_prefix_inserted
	err := try(func() C.kvc_status {
		return C.kvc_prefix_insert(p.h, C.uint64_t(namespace), (*C.uint32_t)(at(tokens)), C.uint64_t(len(tokens)),
			(*C.int32_t)(at(blocks)), C.uint64_t(len(blocks)), (*C.int32_t)(at(present)), C.uint64_t(len(present)), &out)
	})
	if err != nil {
		return Inserted{}, err
	}
	return p.inserted(&out, present), nil
}

func (p *Prefix) inserted(c *C.kvc_prefix_inserted, present []int32) Inserted {
	n := uint64(c.present_blocks)
	return Inserted{n, uint64(c.stored_blocks), present[:n*uint64(p.groups)], Position{c.at}}
}

// Lock pins the prefix that ends at a position against eviction, marks it as used, and returns the pin.
func (p *Prefix) Lock(where Position) (uint64, error) {
	defer runtime.KeepAlive(p)
	var pin C.uint64_t
	err := try(func() C.kvc_status { return C.kvc_prefix_lock(p.h, &where.c, &pin) })
	return uint64(pin), err
}

// Unlock ends a pin without marking the prefix as used.
func (p *Prefix) Unlock(pin uint64) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status { return C.kvc_prefix_unlock(p.h, C.uint64_t(pin)) })
}

// ReleasePin ends a pin at the end of the request: the prefix is the most recently used one.
func (p *Prefix) ReleasePin(pin uint64) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status { return C.kvc_prefix_release(p.h, C.uint64_t(pin)) })
}

// Touch marks the prefix that ends at a position as used.
func (p *Prefix) Touch(where Position) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status { return C.kvc_prefix_touch(p.h, &where.c) })
}

// Evict evicts up to want entries and returns their ids [entry][group], for the caller to free.
func (p *Prefix) Evict(want int) ([]int32, error) {
	defer runtime.KeepAlive(p)
	counts, err := p.Stats()
	if err != nil {
		return nil, err
	}
	want = max(min(want, int(counts.Blocks)), 0)
	out := make([]int32, want*p.groups)
	var evicted C.uint64_t
	err = try(func() C.kvc_status {
		return C.kvc_prefix_evict(p.h, C.uint64_t(want), (*C.int32_t)(at(out)), C.uint64_t(len(out)), &evicted)
	})
	return out[:int(evicted)*p.groups], err
}

// SetWindows gives the groups of an empty index their sliding windows, in tokens; 0 for none. An id of
// -1 stands for a block that a group with a window has not.
func (p *Prefix) SetWindows(windows []uint32) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status {
		return C.kvc_prefix_set_windows(p.h, (*C.uint32_t)(at(windows)), C.uint32_t(len(windows)))
	})
}

// Forget takes blocks of a group with a window out of their entries, which stay for the other groups,
// and returns those that an entry had, for the caller to free. It reorders blocks.
func (p *Prefix) Forget(group uint32, blocks []int32) ([]int32, error) {
	defer runtime.KeepAlive(p)
	var forgotten C.uint64_t
	err := try(func() C.kvc_status {
		return C.kvc_prefix_forget(p.h, C.uint32_t(group), (*C.int32_t)(at(blocks)), C.uint64_t(len(blocks)), &forgotten)
	})
	return blocks[:int(forgotten)], err
}

// Advance sets the time in ms, and ends the priorities and expectations that end by then.
func (p *Prefix) Advance(nowMS uint64) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status { return C.kvc_prefix_advance(p.h, C.uint64_t(nowMS)) })
}

// Prioritize gives priorities to the blocks of the prefix that ends at a position.
func (p *Prefix) Prioritize(where Position, ranges []Retention) error {
	defer runtime.KeepAlive(p)
	list := retentions(ranges)
	return try(func() C.kvc_status {
		return C.kvc_prefix_prioritize(p.h, &where.c, at(list), C.uint32_t(len(list)))
	})
}

// Hint says what is known of the next use of the prefix that ends at a position, from a block on.
func (p *Prefix) Hint(where Position, fromBlock uint64, hint Hint, whenMS uint64) error {
	defer runtime.KeepAlive(p)
	return try(func() C.kvc_status {
		return C.kvc_prefix_hint(p.h, &where.c, C.uint64_t(fromBlock), C.uint32_t(hint), C.uint64_t(whenMS))
	})
}

// Stats are the index's sizes.
func (p *Prefix) Stats() (PrefixCounts, error) {
	defer runtime.KeepAlive(p)
	var c C.kvc_prefix_counts
	err := try(func() C.kvc_status { return C.kvc_prefix_stats(p.h, &c, C.uint64_t(unsafe.Sizeof(c))) })
	return PrefixCounts{
		uint64(c.blocks), uint64(c.capacity_blocks), uint64(c.name_spaces), uint64(c.nodes), uint64(c.pins), uint64(c.bytes),
	}, err
}

// Commit is blocks to cache, in a Run; Above is the position they follow, or the zero Position.
type Commit struct {
	NameSpace uint64
	Above     Position
	Tokens    []uint32
	Blocks    []int32
}

// Query is a sequence to look up, in a Run, and whether to pin what is found.
type Query struct {
	NameSpace uint64
	Tokens    []uint32
	MaxTokens int
	Pin       bool
}

// Committed is what became of a commit.
type Committed struct {
	Inserted
	Err error
}

// Answer is what became of a query; Pin is 0 where none was asked for.
type Answer struct {
	Hit
	Pin uint64
	Err error
}

// Run ends pins, then caches blocks, then looks sequences up, in one crossing: all that a step wants of
// an index. A failed item changes nothing and stops none of the others.
func (p *Prefix) Run(unlocks []uint64, commits []Commit, queries []Query) ([]error, []Committed, []Answer, error) {
	defer runtime.KeepAlive(p)
	var pins runtime.Pinner
	defer pins.Unpin()
	var b C.kvc_prefix_batch
	if err := try(func() C.kvc_status { return C.kvc_prefix_batch_init(&b, C.uint32_t(unsafe.Sizeof(b))) }); err != nil {
		return nil, nil, nil, err
	}
	statuses := make([]C.kvc_status, len(unlocks))
	cs, committed := make([]C.kvc_prefix_commit, len(commits)), make([]C.kvc_prefix_committed, len(commits))
	qs, answered := make([]C.kvc_prefix_query, len(queries)), make([]C.kvc_prefix_answer, len(queries))
	present, found, tails := make([][]int32, len(commits)), make([][]int32, len(queries)), make([][]int32, len(queries))
	for i, c := range commits {
		present[i] = make([]int32, len(c.Blocks))
		cs[i] = C.kvc_prefix_commit{
			name_space: C.uint64_t(c.NameSpace), above: c.Above.c,
			tokens: (*C.uint32_t)(pin(&pins, c.Tokens)), token_count: C.uint64_t(len(c.Tokens)),
			blocks: (*C.int32_t)(pin(&pins, c.Blocks)), block_ids: C.uint64_t(len(c.Blocks)),
			out_present: (*C.int32_t)(pin(&pins, present[i])), capacity: C.uint64_t(len(c.Blocks)),
		}
	}
	for i, q := range queries {
		found[i], tails[i] = make([]int32, p.room(len(q.Tokens))), make([]int32, p.groups)
		qs[i] = C.kvc_prefix_query{
			name_space: C.uint64_t(q.NameSpace),
			tokens:     (*C.uint32_t)(pin(&pins, q.Tokens)), token_count: C.uint64_t(len(q.Tokens)),
			max_tokens: C.uint64_t(max(q.MaxTokens, 0)), pin: flag(q.Pin),
			out_blocks: (*C.int32_t)(pin(&pins, found[i])), capacity: C.uint64_t(len(found[i])),
			out_tail_blocks: (*C.int32_t)(pin(&pins, tails[i])),
		}
	}
	b.unlock_count, b.unlocks = C.uint32_t(len(unlocks)), (*C.uint64_t)(pin(&pins, unlocks))
	b.out_unlocked = pin(&pins, statuses)
	b.commit_count, b.commits, b.out_committed = C.uint32_t(len(cs)), pin(&pins, cs), pin(&pins, committed)
	b.query_count, b.queries, b.out_answers = C.uint32_t(len(qs)), pin(&pins, qs), pin(&pins, answered)
	if err := try(func() C.kvc_status { return C.kvc_prefix_run(p.h, &b) }); err != nil {
		return nil, nil, nil, err
	}
	unlocked, done, answers := make([]error, len(unlocks)), make([]Committed, len(commits)), make([]Answer, len(queries))
	for i, status := range statuses {
		unlocked[i] = itemFailed(status)
	}
	for i := range committed {
		if done[i].Err = itemFailed(committed[i].status); done[i].Err == nil {
			done[i].Inserted = p.inserted(&committed[i].inserted, present[i])
		}
	}
	for i := range answered {
		a := &answered[i]
		if answers[i].Err = itemFailed(a.status); answers[i].Err == nil {
			answers[i].Hit, answers[i].Pin = p.hit(&a.hit, found[i], tails[i]), uint64(a.pin)
		}
	}
	return unlocked, done, answers, nil
}

// pin is a slice's address for a struct that goes to C.
func pin[T any](pins *runtime.Pinner, s []T) *T {
	p := at(s)
	if p != nil {
		pins.Pin(p)
	}
	return p
}
