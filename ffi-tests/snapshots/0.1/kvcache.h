// libkvcache: the KV cache of a language model as a library. C ABI 0.1.
//
// Generated from src/capi by `cargo check --features generate-header`; do not edit.
//
// Conventions
//   Names    kvc_<noun>_<verb>. Types of the library end where their noun ends: kvc_pool.
//   Status   Every call that can fail returns kvc_status: KVC_OK (0) or a negative code.
//            kvc_last_error() gives the text. Bad input changes nothing.
//   Outputs  come last and are written only on success, unless a function says otherwise.
//   Handles  kvc_pool*, kvc_prefix*, kvc_cache*, kvc_step* are checked numbers: a NULL, stale or
//            foreign handle is answered with a code. A process has 4096. Each _create has its
//            _destroy, which accepts NULL.
//   Structs  that begin with struct_size only ever grow: call the _init function with the sizeof
//            of the struct, then set fields. Fields past an older caller's size have their
//            defaults; bytes past those the library knows must be 0.
//   Threads  thread-safe: any thread at any time. per-handle: one call at a time on a handle (two
//            at once: KVC_ERR_INVALID_STATE). init-only: before other threads use the library.
//   Memory   Pointers are used during the call only. The caller owns what it passes, the library
//            what a handle names. Nothing is allocated for the caller to free.
//   Units    are in the names: bytes, tokens, blocks, elements. Strides are in elements.
#ifndef KVCACHE_H
#define KVCACHE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ----------------------------------------------------------------------------------------------
// Status codes and the text of the last error
// ----------------------------------------------------------------------------------------------
// What a call answers: KVC_OK, or a negative code. Numbers are never reused.
typedef int32_t kvc_status;

// The call did what it says.
#define KVC_OK 0

// An argument has a value that the function does not accept.
#define KVC_ERR_INVALID_ARGUMENT -1

// A required pointer is NULL.
#define KVC_ERR_NULL_POINTER -2

// A pointer is not aligned for its element type.
#define KVC_ERR_MISALIGNED -3

// struct_size is too small, or bytes past the known fields are not zero.
#define KVC_ERR_STRUCT_SIZE -4

// A size or an address does not fit.
#define KVC_ERR_OVERFLOW -5

// Valid, but this build cannot do it.
#define KVC_ERR_UNSUPPORTED -6

// A handle or sequence id is not live, or belongs to another object.
#define KVC_ERR_STALE_HANDLE -7

// A buffer that the caller gave is smaller than the call needs.
#define KVC_ERR_BUFFER_TOO_SMALL -8

// A block id is outside the pool, or the block is not allocated.
#define KVC_ERR_BAD_BLOCK -9

// Not enough free or evictable blocks; nothing was taken. An ordinary answer.
#define KVC_ERR_OUT_OF_BLOCKS -100

// Every sequence slot is in use.
#define KVC_ERR_OUT_OF_SEQUENCES -101

// The system refused memory.
#define KVC_ERR_OUT_OF_MEMORY -102

// Every handle slot of the process is in use.
#define KVC_ERR_TOO_MANY_HANDLES -103

// The library was built without kernels for this device.
#define KVC_ERR_NO_KERNELS -200

// The device is not present.
#define KVC_ERR_NO_DEVICE -201

// The object is not in a state in which the call is allowed, or another call is using it.
#define KVC_ERR_INVALID_STATE -300

// The library panicked; the object involved is poisoned.
#define KVC_ERR_PANIC -900

// An earlier panic left the object unusable; only destroying it is allowed.
#define KVC_ERR_POISONED -901

// Copies a short English text of `status` as snprintf would, and returns the length of the whole
// text in bytes, the NUL not counted. `buf` may be NULL with a `len` of 0.
//
// Threads: thread-safe.
uint64_t kvc_status_text(kvc_status status, char *buf, uint64_t len);

// Copies the text of the last error of a call on this thread, as snprintf would, and returns the
// length of the whole text in bytes, the NUL not counted: it names the argument or the limit that
// was hit. `buf` may be NULL with a `len` of 0. A call that succeeds leaves the text as it was;
// before the first error it is empty.
//
// Threads: thread-safe; each thread has its own text.
uint64_t kvc_last_error(char *buf, uint64_t len);

// The blocks that were missing at the last KVC_ERR_OUT_OF_BLOCKS of this thread: how many must be
// freed before the same call can succeed. 0 before the first.
//
// Threads: thread-safe; each thread has its own number.
uint32_t kvc_last_missing_blocks(void);

// ----------------------------------------------------------------------------------------------
// Which library this is
// ----------------------------------------------------------------------------------------------
// The ABI that this header describes: 0x00MAJOR_00MINOR as 16 + 16 bits.
#define KVC_ABI_VERSION 1

// Element type of rows: 32-bit floats.
#define KVC_DTYPE_F32 1

// Element type of rows: IEEE half precision.
#define KVC_DTYPE_F16 2

// Element type of rows: bfloat16.
#define KVC_DTYPE_BF16 3

// Storage format of K and V: 32-bit floats.
#define KVC_FORMAT_F32 1

// Storage format of K and V: IEEE half precision.
#define KVC_FORMAT_F16 2

// Storage format of K and V: bfloat16.
#define KVC_FORMAT_BF16 3

// Exists in libraries of ABI 0.1 and no others: a program that refers to it does not link with a
// library of another ABI. Does nothing.
//
// Threads: thread-safe.
void kvc_abi_0_1(void);

// The KVC_ABI_VERSION that the library was built with, to compare at run time.
//
// Threads: thread-safe.
uint32_t kvc_abi_version(void);

// The library's version, "MAJOR.MINOR.PATCH". The text lives for ever.
//
// Threads: thread-safe.
const char *kvc_version(void);

// Copies one line about the build as snprintf would, and returns the length of the whole line,
// the NUL not counted: version, features, storage formats, the CPU level that kernels use (or
// why there is none), and whether GPU kernels are inside. `buf` may be NULL with a `len` of 0.
//
// Threads: thread-safe.
uint64_t kvc_build_info(char *buf, uint64_t len);

// ----------------------------------------------------------------------------------------------
// plan: how much memory a cache takes, and what fits
// ----------------------------------------------------------------------------------------------
// Layers of a model that share a geometry, a format and a window. A uniform model has one group.
// In an array all must have the same struct_size, which is the distance from one to the next.
typedef struct {
    // sizeof(kvc_group_spec); kvc_group_spec_init sets it.
    uint32_t struct_size;
    // Layers in the group.
    uint32_t layers;
    // KV heads of each layer: 1 for multi-query and latent attention.
    uint32_t kv_heads;
    // Channels of a key row: a multiple of 8, to 256 (576 with v_in_k).
    uint32_t k_dim;
    // Channels of a value row: a multiple of 8.
    uint32_t v_dim;
    // 1: values are the first v_dim channels of the keys and not stored (latent attention: k_dim
    // 576, v_dim 512 in DeepSeek-V3).
    uint32_t v_in_k;
    // KVC_FORMAT_* of K and V; KVC_FORMAT_BF16 by default.
    uint32_t format;
    // Sliding window in tokens, the query's own included; 0 for full attention.
    uint32_t window;
} kvc_group_spec;

// What to plan for.
typedef struct {
    // sizeof(kvc_plan_options); kvc_plan_options_init sets it.
    uint32_t struct_size;
    // Tokens of a block: a power of two, 16 to 256. 16 by default.
    uint32_t block_tokens;
    // Share of memory_bytes left to activations and the run time, in millionths. 100000 (a
    // tenth) by default.
    uint32_t reserve_ppm;
    // 0.
    uint32_t reserved;
    // Memory of the device.
    uint64_t memory_bytes;
    // What the model's weights take of it.
    uint64_t weight_bytes;
    // Tokens of each sequence, prompt and answer together.
    uint64_t context_tokens;
    // Sequences at the same time. 1 by default.
    uint64_t batch;
} kvc_plan_options;

// What a budget holds.
typedef struct {
    // Bytes left for keys and values.
    uint64_t kv_bytes;
    // Bytes that one more token takes, all groups, while no window is full.
    uint64_t token_bytes;
    // Bytes of one sequence of the context, in whole blocks.
    uint64_t sequence_bytes;
    // Bytes of the whole batch at the context.
    uint64_t batch_bytes;
    // The most sequences of the context that fit; 0 where one is too long.
    uint64_t max_batch;
    // The longest context at which the batch fits; UINT64_MAX where every layer has a window and
    // any length does.
    uint64_t max_context_tokens;
    // 1 where batch_bytes fits in kv_bytes.
    uint32_t fits;
    // 0.
    uint32_t reserved;
} kvc_plan_result;

// One layer group's part of a plan. This struct never grows.
typedef struct {
    // Bytes that a token takes in the group while it is held.
    uint64_t token_bytes;
    // Bytes of one block.
    uint64_t block_bytes;
    // Blocks that one sequence of the context holds.
    uint64_t sequence_blocks;
    // Blocks of the group's pool where the budget is split as sequences of the context need it.
    uint64_t blocks;
} kvc_plan_group;

// Fills a kvc_group_spec of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_group_spec_init(kvc_group_spec *spec, uint32_t struct_size);

// Fills a kvc_plan_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_plan_options_init(kvc_plan_options *options, uint32_t struct_size);

// Plans a cache of `groups[group_count]` (1 to 16) in the memory that `options` give. Writes the
// totals to `out`, `out_bytes` (its sizeof) at most, and each group's part to
// `out_groups[group_count]`, which may be NULL. A workload that does not fit is no error: see
// `fits`. KVC_ERR_OVERFLOW where a size leaves 64 bits.
//
// Threads: thread-safe.
kvc_status kvc_plan_compute(const kvc_plan_options *options,
                            const kvc_group_spec *groups,
                            uint32_t group_count,
                            kvc_plan_result *out,
                            uint64_t out_bytes,
                            kvc_plan_group *out_groups);

// ----------------------------------------------------------------------------------------------
// attend: the kernels alone, on the caller's own memory
// ----------------------------------------------------------------------------------------------
// One batched attention call over ragged sequences: decode, chunked prefill and multi-head latent
// attention alike.
//
// Sequence s has the query tokens `q_indptr[s]` to `q_indptr[s + 1]` of q, and `kv_lens[s]` cached
// tokens, those of its queries included: its last query is its last cached token. Query head h
// reads KV head h / (q_heads / kv_heads).
//
// Element (block, head, token, channel) of K lies block * k_block_stride + head * k_head_stride +
// token * k_token_stride + channel elements after k, so the library's own layout, NHD and HND are
// all of this form.
typedef struct {
    // sizeof(kvc_attend_desc); kvc_attend_desc_init sets it.
    uint32_t struct_size;
    // Query heads: a multiple of kv_heads.
    uint32_t q_heads;
    // KV heads.
    uint32_t kv_heads;
    // Channels of query and key rows: a multiple of 8, to 256 (576 with v_in_k).
    uint32_t k_dim;
    // Channels of value and output rows: a multiple of 8.
    uint32_t v_dim;
    // 1: values are the first v_dim channels of the keys (latent attention; kv_heads is 1).
    uint32_t v_in_k;
    // KVC_FORMAT_* of K and V.
    uint32_t format;
    // KVC_DTYPE_* of q.
    uint32_t q_dtype;
    // KVC_DTYPE_* of out.
    uint32_t out_dtype;
    // Tokens of a block.
    uint32_t block_tokens;
    // Blocks that k and v have.
    uint32_t num_blocks;
    // Sequences in the batch.
    uint32_t seqs;
    // 1 (the default): a query sees no key after its own position.
    uint32_t causal;
    // Keys that a query sees, its own included, counted back; 0 for all.
    uint32_t window;
    // Factor of the dot product; 0 for 1 / sqrt(k_dim).
    float scale;
    // Logit soft-cap; 0 for none.
    float softcap;
    // 1 (the default): the calling thread does the work alone. 0: a thread a core, which the
    // library keeps from the first such call on. The result does not depend on it.
    uint32_t threads;
    // 0.
    uint32_t reserved;
    // Keys.
    const void *k;
    // Elements from a block to the next. All three 0: `[block][kv_head][token][k_dim]`.
    int64_t k_block_stride;
    // Elements from a KV head to the next.
    int64_t k_head_stride;
    // Elements from a token to the next.
    int64_t k_token_stride;
    // Values. Ignored with v_in_k.
    const void *v;
    // Elements from a block to the next. All three 0: `[block][kv_head][token][v_dim]`.
    int64_t v_block_stride;
    // Elements from a KV head to the next.
    int64_t v_head_stride;
    // Elements from a token to the next.
    int64_t v_token_stride;
    // Block ids. Without table_indptr: `[seqs][table_stride]`; entry i of a sequence holds its
    // tokens i * block_tokens and on. Entries past its length are never read.
    const int32_t *table;
    // Entries from one sequence's row to the next. Ignored with table_indptr.
    int64_t table_stride;
    // NULL, or `[seqs + 1]` offsets into table: sequence s has the entries from `table_indptr[s]` to
    // `table_indptr[s + 1]`.
    const int32_t *table_indptr;
    // `[seqs + 1]` offsets of query tokens, from 0, never decreasing.
    const int32_t *q_indptr;
    // `[seqs]` cached tokens.
    const int32_t *kv_lens;
    // Queries `[query token][q_head][k_dim]`.
    const void *q;
    // Elements from a token to the next. Both 0: contiguous.
    int64_t q_token_stride;
    // Elements from a head to the next.
    int64_t q_head_stride;
    // Outputs `[query token][q_head][v_dim]`. Must overlap nothing else.
    void *out;
    // Elements from a token to the next. Both 0: contiguous.
    int64_t out_token_stride;
    // Elements from a head to the next.
    int64_t out_head_stride;
    // NULL, or `[query token][q_head]`: natural logarithm of each softmax denominator. A row that
    // sees no key has output 0 and -inf here.
    float *lse;
    // NULL, or `[q_heads]`: a logit that joins each head's denominator and has no value.
    const float *sinks;
    // NULL, or `[q_heads]`: ALiBi slopes.
    const float *alibi;
    // NULL, or a word that is set to 1 where a block table has an entry that is not a block;
    // the keys of such an entry are masked and never read.
    uint32_t *bad_block;
    // Memory for the call, of no consequence before and after. kvc_attend_workspace_size says how
    // much.
    void *workspace;
    // Its size.
    uint64_t workspace_bytes;
} kvc_attend_desc;

// Fills a kvc_attend_desc of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_attend_desc_init(kvc_attend_desc *desc, uint32_t struct_size);

// Writes an upper bound of the workspace of kvc_attend to `out_bytes`, for every call with the
// heads, dimensions and threads of `desc`, at most `desc->seqs` sequences, `max_q_tokens` query
// tokens in all and `max_kv_tokens` cached tokens a sequence. No pointer of `desc` is followed.
//
// Threads: thread-safe.
kvc_status kvc_attend_workspace_size(const kvc_attend_desc *desc,
                                     uint32_t max_q_tokens,
                                     uint32_t max_kv_tokens,
                                     uint64_t *out_bytes);

// Computes attention for the batch that `desc` describes, and writes its outputs. Allocates
// nothing and keeps nothing. Bad arguments are answered before anything is written.
//
// Threads: thread-safe, where calls share no outputs and no workspace.
kvc_status kvc_attend(const kvc_attend_desc *desc);

// Writes the name of the kernel that kvc_attend would run for a sequence with `q_tokens` query
// tokens to `buf`, with a NUL: operation, device, instruction set, storage format. `len` is the
// size of `buf`; KVC_ERR_BUFFER_TOO_SMALL where the name does not fit (64 bytes are enough). No
// pointer of `desc` is followed.
//
// Threads: thread-safe.
kvc_status kvc_attend_kernel(const kvc_attend_desc *desc,
                             uint32_t q_tokens,
                             char *buf,
                             uint64_t len);

// Merges attention over two disjoint sets of keys, row by row, into the first: `out` and `other`
// hold `rows` rows of `v_dim` outputs, `lse` and `other_lse` one value a row. A row with an LSE of
// -inf has seen no key. Sinks must have been given to one of the two only.
//
// Threads: thread-safe.
kvc_status kvc_merge_states(float *out,
                            float *lse,
                            const float *other,
                            const float *other_lse,
                            uint64_t rows,
                            uint32_t v_dim);

// ----------------------------------------------------------------------------------------------
// append: new keys and values into the caller's own memory
// ----------------------------------------------------------------------------------------------
// Pairs are channel i with i + rotary_dim / 2: Llama in Hugging Face's layout, GPT-NeoX, Qwen.
#define KVC_ROPE_HALVES 1

// Pairs are channel 2 i with 2 i + 1: the paper's layout, GPT-J, DeepSeek.
#define KVC_ROPE_INTERLEAVED 2

// A rotary position embedding: pairs of channels turned by an angle that grows with the position.
typedef struct {
    // sizeof(kvc_rope); kvc_rope_init sets it.
    uint32_t struct_size;
    // KVC_ROPE_HALVES (the default) or KVC_ROPE_INTERLEAVED.
    uint32_t style;
    // Channels that are rotated: even, 2 to 256.
    uint32_t rotary_dim;
    // The first of them; 0 by default (512 for the latent rows of DeepSeek).
    uint32_t first_channel;
    // Pair i turns by theta^(-2 i / rotary_dim) a token; 10000 by default.
    float theta;
    // Factor of rotated channels (YaRN's attention factor); 1 by default.
    float scale;
    // NULL, or `[rotary_dim / 2]` radians a token in place of theta: what long-context scalings
    // come down to.
    const float *frequencies;
} kvc_rope;

// New rows of one layer, and the blocks that they go to; the layouts are those of
// kvc_attend_desc.
typedef struct {
    // sizeof(kvc_append_desc); kvc_append_desc_init sets it.
    uint32_t struct_size;
    // KV heads.
    uint32_t kv_heads;
    // Channels of a key row.
    uint32_t k_dim;
    // Channels of a value row.
    uint32_t v_dim;
    // 1: values are the first v_dim channels of the keys; v and v_rows are ignored.
    uint32_t v_in_k;
    // KVC_FORMAT_* of the blocks. Rows are rounded to it, to nearest even.
    uint32_t format;
    // KVC_DTYPE_* of k_rows and v_rows.
    uint32_t dtype;
    // Tokens of a block.
    uint32_t block_tokens;
    // Blocks that k and v have.
    uint32_t num_blocks;
    // New tokens.
    uint32_t rows;
    // 1 (the default): the calling thread alone; 0: a thread a core.
    uint32_t threads;
    // 0.
    uint32_t reserved;
    // Keys of the cache. Written.
    void *k;
    // Elements from a block to the next. All three 0: `[block][kv_head][token][k_dim]`.
    int64_t k_block_stride;
    // Elements from a KV head to the next.
    int64_t k_head_stride;
    // Elements from a token to the next.
    int64_t k_token_stride;
    // Values of the cache. Written.
    void *v;
    // Elements from a block to the next. All three 0: `[block][kv_head][token][v_dim]`.
    int64_t v_block_stride;
    // Elements from a KV head to the next.
    int64_t v_head_stride;
    // Elements from a token to the next.
    int64_t v_token_stride;
    // `[rows]` slots, block * block_tokens + offset, no two alike; a row with slot -1 is skipped.
    const int64_t *slots;
    // New keys `[row][kv_head][k_dim]`.
    const void *k_rows;
    // Elements from a row to the next. Both 0: contiguous.
    int64_t k_rows_token_stride;
    // Elements from a head to the next.
    int64_t k_rows_head_stride;
    // New values `[row][kv_head][v_dim]`.
    const void *v_rows;
    // Elements from a row to the next. Both 0: contiguous.
    int64_t v_rows_token_stride;
    // Elements from a head to the next.
    int64_t v_rows_head_stride;
    // NULL, or how keys are rotated on the way.
    const kvc_rope *rope;
    // `[rows]` positions. Ignored without rope.
    const uint32_t *positions;
} kvc_append_desc;

// Fills a kvc_rope of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_rope_init(kvc_rope *rope, uint32_t struct_size);

// Rotates `rows[position_count][heads][head_dim]` in place, each to its position: for queries,
// where keys are rotated by the library.
//
// Threads: thread-safe.
kvc_status kvc_rope_rotate(const kvc_rope *rope,
                           float *rows,
                           uint32_t heads,
                           uint32_t head_dim,
                           const uint32_t *positions,
                           uint64_t position_count);

// Fills a kvc_append_desc of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_append_desc_init(kvc_append_desc *desc, uint32_t struct_size);

// Writes new keys and values to their slots. Allocates nothing. Bad arguments, slots outside the
// blocks among them, are answered before anything is written.
//
// Threads: thread-safe, where calls share no slots.
kvc_status kvc_append(const kvc_append_desc *desc);

// ----------------------------------------------------------------------------------------------
// pool: blocks, references, nothing else
// ----------------------------------------------------------------------------------------------
// Blocks 0 to n - 1, each free or held by as many holders as retained it. For engines that keep
// their own tables and tensors; a kvc_cache has pools of its own.
typedef struct kvc_pool kvc_pool;

// What a pool holds now. blocks = free_blocks + held_blocks.
typedef struct {
    // Blocks of the pool.
    uint32_t blocks;
    // Blocks that nobody holds.
    uint32_t free_blocks;
    // Blocks with at least one holder.
    uint32_t held_blocks;
    // 0.
    uint32_t reserved;
} kvc_pool_counts;

// Makes a pool of `blocks` free blocks, 1 to 2^31 - 1, 8 bytes of memory each. Later calls
// allocate nothing.
//
// Threads: thread-safe.
kvc_status kvc_pool_create(uint32_t blocks, kvc_pool **out);

// Ends a pool. NULL is accepted.
//
// Threads: per-handle.
kvc_status kvc_pool_destroy(kvc_pool *pool);

// Takes `n` free blocks, all or none, and writes their ids to `out[n]`. Each has one holder, the
// caller. KVC_ERR_OUT_OF_BLOCKS where fewer are free; kvc_last_missing_blocks() says how many
// were missing.
//
// Threads: per-handle.
kvc_status kvc_pool_allocate_n(kvc_pool *pool, uint32_t n, int32_t *out);

// Adds a holder to each of `n` blocks, all or none. A block may occur several times.
//
// Threads: per-handle.
kvc_status kvc_pool_retain_n(kvc_pool *pool, const int32_t *blocks, uint32_t n);

// Takes a holder from each of `n` blocks, all or none; a block without holders is free. A block
// may occur as often as it has holders. Writes how many became free to `out_freed`, which may be
// NULL.
//
// Threads: per-handle.
kvc_status kvc_pool_free_n(kvc_pool *pool, const int32_t *blocks, uint32_t n, uint32_t *out_freed);

// Writes how many hold `block` to `out_refs`: 0 where it is free or not a block of the pool.
//
// Threads: per-handle.
kvc_status kvc_pool_refs(const kvc_pool *pool, int32_t block, uint32_t *out_refs);

// Writes the pool's counts to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: per-handle.
kvc_status kvc_pool_stats(const kvc_pool *pool, kvc_pool_counts *out, uint64_t out_bytes);

// ----------------------------------------------------------------------------------------------
// prefix: which token sequences are cached in which blocks
// ----------------------------------------------------------------------------------------------
// An exact radix index over token ids: which token sequences are cached, in which blocks of the
// engine's own pools. Blocks are stored and evicted whole; matching is by token. It holds no
// blocks: the engine retains what it inserts and frees what is reported as evicted.
typedef struct kvc_prefix kvc_prefix;

// The end of a matched or inserted prefix, to lock it. Good until blocks at its end are evicted,
// then refused. Its fields mean nothing to the caller. This struct never grows.
typedef struct {
    // Private.
    uint32_t parts[3];
    // 0.
    uint32_t reserved;
} kvc_prefix_position;

// What a lookup found.
typedef struct {
    // Tokens covered by whole blocks.
    uint64_t tokens;
    // Ids of those blocks, written to out_blocks as `[block][group]`: blocks times groups.
    uint64_t block_ids;
    // How many tokens after those agree with one more cached block, for copying from: fewer than
    // a block has. Its ids, one a group, are in out_tail_blocks.
    uint64_t tail_tokens;
    // The end of the whole blocks.
    kvc_prefix_position at;
} kvc_prefix_hit;

// What an insertion did.
typedef struct {
    // Leading blocks that were cached already, under the ids in out_present: use those, and give
    // the duplicates up.
    uint64_t present_blocks;
    // Blocks after those that are cached now: retain their ids for the index. Fewer than the rest
    // where the index is full.
    uint64_t stored_blocks;
    // The end of both.
    kvc_prefix_position at;
} kvc_prefix_inserted;

// Sizes of an index.
typedef struct {
    // Block entries cached.
    uint64_t blocks;
    // Block entries that fit.
    uint64_t capacity_blocks;
    // Name spaces that have an entry.
    uint64_t name_spaces;
    // Nodes of the tree.
    uint64_t nodes;
    // Pins not yet unlocked.
    uint64_t pins;
    // Memory in use.
    uint64_t bytes;
} kvc_prefix_counts;

// Makes an empty index of blocks of `block_tokens` tokens (1 to 65536) with one block id for each
// of `groups` layer groups (1 to 65536), and room for `capacity_blocks` entries (1 to 2^30).
//
// Threads: thread-safe.
kvc_status kvc_prefix_create(uint32_t block_tokens,
                             uint32_t groups,
                             uint32_t capacity_blocks,
                             kvc_prefix **out);

// Ends an index. NULL is accepted.
//
// Threads: per-handle.
kvc_status kvc_prefix_destroy(kvc_prefix *prefix);

// Finds the longest cached prefix of the first `max_tokens` of `tokens[token_count]` in
// `name_space`. Give token_count - 1 as the maximum to leave the last token to be computed, whose
// logits sampling needs. Writes block ids to `out_blocks[capacity]`: groups for each whole block
// of tokens is always enough, and KVC_ERR_BUFFER_TOO_SMALL says what is not. `out_tail_blocks`
// takes one id a group, and may be NULL. Marks nothing as used: see kvc_prefix_lock.
//
// Threads: per-handle.
kvc_status kvc_prefix_lookup(kvc_prefix *prefix,
                             uint64_t name_space,
                             const uint32_t *tokens,
                             uint64_t token_count,
                             uint64_t max_tokens,
                             int32_t *out_blocks,
                             uint64_t capacity,
                             int32_t *out_tail_blocks,
                             kvc_prefix_hit *out);

// Caches `tokens[token_count]`, whole blocks, under `blocks[block][group]`, `block_ids` in all,
// and marks the sequence as used. Where a leading part was cached already, its ids go to
// `out_present[capacity]`, which needs room for as many as were present; `block_ids` is always
// enough. NULL with a capacity of 0 asks for none. -1 stands for a group that has no block.
//
// Threads: per-handle.
kvc_status kvc_prefix_insert(kvc_prefix *prefix,
                             uint64_t name_space,
                             const uint32_t *tokens,
                             uint64_t token_count,
                             const int32_t *blocks,
                             uint64_t block_ids,
                             int32_t *out_present,
                             uint64_t capacity,
                             kvc_prefix_inserted *out);

// Pins the prefix that ends at `at`, so that no eviction takes it, marks it as used, and writes
// the pin to `out_pin`. KVC_ERR_STALE_HANDLE where it is no longer cached.
//
// Threads: per-handle.
kvc_status kvc_prefix_lock(kvc_prefix *prefix, const kvc_prefix_position *at, uint64_t *out_pin);

// Ends a pin. KVC_ERR_STALE_HANDLE for one that is not live.
//
// Threads: per-handle.
kvc_status kvc_prefix_unlock(kvc_prefix *prefix, uint64_t pin);

// Evicts up to `want_blocks` entries, least recently used leaf first, pinned prefixes excepted.
// Writes their ids to `out_blocks[capacity]` as `[entry][group]`, for the caller to free, and how
// many entries went to `out_evicted`. `capacity` must be at least want_blocks * groups, or the
// ids of all that is cached.
//
// Threads: per-handle.
kvc_status kvc_prefix_evict(kvc_prefix *prefix,
                            uint64_t want_blocks,
                            int32_t *out_blocks,
                            uint64_t capacity,
                            uint64_t *out_evicted);

// Writes the index's sizes to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: per-handle.
kvc_status kvc_prefix_stats(const kvc_prefix *prefix, kvc_prefix_counts *out, uint64_t out_bytes);

// ----------------------------------------------------------------------------------------------
// cache: the whole KV cache
// ----------------------------------------------------------------------------------------------
// The whole cache: block pools, prefix index, storage of K and V, and kernels with threads of
// their own. Calls on it are thread-safe: one runs at a time and the others wait.
typedef struct kvc_cache kvc_cache;

// Sizes and policies of a cache.
typedef struct {
    // sizeof(kvc_cache_options); kvc_cache_options_init sets it.
    uint32_t struct_size;
    // Tokens of a block: a power of two, 16 to 256. 16 by default.
    uint32_t block_tokens;
    // Blocks of each layer group. 1024 by default.
    uint32_t blocks;
    // Sequences that may live at once, 1 to 65536. 256 by default.
    uint32_t max_seqs;
    // Threads for kernels; 0 (the default) for one a core.
    uint32_t threads;
    // 1 (the default): publish committed blocks to the prefix index and start sequences from it.
    uint32_t prefix_reuse;
} kvc_cache_options;

// What a cache holds now, and what happened since it was created. Block counts are of the first
// layer group; blocks = free_blocks + cached_blocks + referenced_blocks.
typedef struct {
    // Blocks of the pool.
    uint32_t blocks;
    // Blocks that hold nothing.
    uint32_t free_blocks;
    // Blocks that only the prefix index holds: reusable, and evictable.
    uint32_t cached_blocks;
    // Blocks that sequences use.
    uint32_t referenced_blocks;
    // Live sequences.
    uint32_t sequences;
    // 0.
    uint32_t reserved;
    // Tokens that the live sequences hold, shared ones counted for each.
    uint64_t sequence_tokens;
    // Unused slots in the last blocks of live sequences, in tokens.
    uint64_t waste_tokens;
    // Bytes of one block in all groups.
    uint64_t block_bytes;
    // Bytes of the whole pool in all groups.
    uint64_t pool_bytes;
    // Prompt tokens given to kvc_seq_start.
    uint64_t looked_up_tokens;
    // Those of them that were found.
    uint64_t hit_tokens;
    // Entries taken out of the prefix index to make room.
    uint64_t evicted_blocks;
    // Blocks copied on write or for a partial hit.
    uint64_t copied_blocks;
    // Blocks given back because the index had their tokens already.
    uint64_t merged_blocks;
} kvc_cache_counts;

// Fills a kvc_cache_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_cache_options_init(kvc_cache_options *options, uint32_t struct_size);

// Makes a cache of `groups[group_count]` (1 to 16) layer groups, and allocates its memory.
// `options` may be NULL for the defaults.
//
// Threads: thread-safe.
kvc_status kvc_cache_create(const kvc_cache_options *options,
                            const kvc_group_spec *groups,
                            uint32_t group_count,
                            kvc_cache **out);

// Ends a cache with all its sequences and gives its memory back. NULL is accepted.
// KVC_ERR_INVALID_STATE while another thread is inside it.
//
// Threads: thread-safe.
kvc_status kvc_cache_destroy(kvc_cache *cache);

// Drops everything from the prefix index that no sequence uses.
//
// Threads: thread-safe.
kvc_status kvc_cache_clear_prefix(kvc_cache *cache);

// Writes the cache's counts to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_cache_stats(const kvc_cache *cache, kvc_cache_counts *out, uint64_t out_bytes);

// ----------------------------------------------------------------------------------------------
// seq: the sequences of a cache
// ----------------------------------------------------------------------------------------------
// A sequence of a cache. The id of a sequence that has ended is refused, not reused at once.
typedef uint32_t kvc_seq;

// Starts a sequence for `prompt[prompt_tokens]` and writes its id to `out_seq`. It begins with
// what the prefix index has of the prompt in `name_space`; how many tokens that is goes to
// `out_cached_tokens`, and is less than `prompt_tokens`: the caller feeds the rest to its steps.
//
// `name_space` separates what may share prefixes from what may not (tenant, adapter); the server
// chooses it.
//
// Threads: thread-safe.
kvc_status kvc_seq_start(kvc_cache *cache,
                         const uint32_t *prompt,
                         uint64_t prompt_tokens,
                         uint64_t name_space,
                         kvc_seq *out_seq,
                         uint32_t *out_cached_tokens);

// Makes a second sequence with the same tokens, sharing every block, and writes its id to
// `out_seq`. Whichever of the two next writes to the last, partly full block gets a copy.
//
// Threads: thread-safe.
kvc_status kvc_seq_fork(kvc_cache *cache, kvc_seq seq, kvc_seq *out_seq);

// Forgets the tokens of a sequence from position `tokens` on (rejected speculation).
//
// Threads: thread-safe.
kvc_status kvc_seq_truncate(kvc_cache *cache, kvc_seq seq, uint32_t tokens);

// Ends a sequence. Its full blocks stay in the prefix index until they are evicted.
//
// Threads: thread-safe.
kvc_status kvc_seq_release(kvc_cache *cache, kvc_seq seq);

// Copies the tokens whose K and V the sequence holds to `out`, and writes how many there are to
// `out_count`. KVC_ERR_BUFFER_TOO_SMALL where there are more than `capacity`. With an `out` of
// NULL only the count is written.
//
// Threads: thread-safe.
kvc_status kvc_seq_tokens(const kvc_cache *cache,
                          kvc_seq seq,
                          uint32_t *out,
                          uint64_t capacity,
                          uint64_t *out_count);

// Copies the blocks that hold the sequence in layer group `group` to `out`, in order, and writes
// how many there are to `out_count`; otherwise as kvc_seq_tokens.
//
// Threads: thread-safe.
kvc_status kvc_seq_blocks(const kvc_cache *cache,
                          kvc_seq seq,
                          uint32_t group,
                          int32_t *out,
                          uint64_t capacity,
                          uint64_t *out_count);

// ----------------------------------------------------------------------------------------------
// step: one forward pass over a batch
// ----------------------------------------------------------------------------------------------
// A step: begin with the new tokens of each sequence; for each layer append their keys and values
// and attend; then commit, or cancel. Made once and reused: it keeps its buffers.
//
// The rows of a step are the new tokens of all its sequences, in the order of the work.
typedef struct kvc_step kvc_step;

// How scores are made from dot products.
typedef struct {
    // sizeof(kvc_scoring); kvc_scoring_init sets it.
    uint32_t struct_size;
    // 1 (the default): a query sees no key after its own position.
    uint32_t causal;
    // Keys that a query sees, its own included, counted back; 0 for the group's window.
    uint32_t window;
    // Factor of the dot product; 0 for 1 / sqrt(k_dim).
    float scale;
    // Logit soft-cap; 0 for none.
    float softcap;
    // 0.
    uint32_t reserved;
    // NULL, or `[q_heads]`: a logit that joins each head's denominator and has no value.
    const float *sinks;
    // NULL, or `[q_heads]`: ALiBi slopes.
    const float *alibi;
} kvc_scoring;

// New tokens of one sequence. This struct never grows.
typedef struct {
    // A live sequence, at most once in a step.
    kvc_seq seq;
    // At least 1.
    uint32_t token_count;
    // A chunk of the prompt, or what was sampled last.
    const uint32_t *tokens;
} kvc_work;

// Fills a kvc_scoring of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_scoring_init(kvc_scoring *scoring, uint32_t struct_size);

// Makes a step, for any number of passes over any caches.
//
// Threads: thread-safe.
kvc_status kvc_step_create(kvc_step **out);

// Ends a step. NULL is accepted. An open step is cancelled first, if its cache still lives.
//
// Threads: per-handle.
kvc_status kvc_step_destroy(kvc_step *step);

// Opens a step: reserves blocks in `cache` for the new tokens of the sequences that
// `work[work_count]` names, copying a shared last block before it is written. All or nothing:
// KVC_ERR_OUT_OF_BLOCKS says how many blocks were missing (kvc_last_missing_blocks).
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_begin(kvc_cache *cache,
                          kvc_step *step,
                          const kvc_work *work,
                          uint32_t work_count);

// Writes the rows of an open step to `out_rows`: the new tokens of all its sequences together. 0
// where the step is not open. With `out_positions`, which may be NULL, the position of each row
// in its sequence is written there; `capacity` is its length.
//
// Threads: per-handle.
kvc_status kvc_step_rows(const kvc_step *step,
                         uint32_t *out_positions,
                         uint64_t capacity,
                         uint32_t *out_rows);

// Writes the keys and values of the step's rows in layer `layer` of layer group `group`, rounding
// to the stored format. `k` is `[row][kv_head][k_dim]` and `v` `[row][kv_head][v_dim]`, both of
// KVC_DTYPE_* `dtype`; `v` is ignored where values lie in keys. With `rope`, which may be NULL,
// keys are rotated to their positions on the way.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_append(kvc_cache *cache,
                           const kvc_step *step,
                           uint32_t group,
                           uint32_t layer,
                           const void *k,
                           const void *v,
                           uint32_t dtype,
                           const kvc_rope *rope);

// Computes attention of the step's rows over all that their sequences hold in a layer, the rows'
// own tokens included. `q` is `[row][q_head][k_dim]` of `q_dtype`; `out`, of `out_dtype`, is
// `[row][q_head][v_dim]` and must not overlap `q`. `scoring` may be NULL for its defaults. `lse`
// may be NULL, or takes `[row][q_head]` natural logarithms of the softmax denominators.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_attend(kvc_cache *cache,
                           const kvc_step *step,
                           uint32_t group,
                           uint32_t layer,
                           uint32_t q_heads,
                           const void *q,
                           uint32_t q_dtype,
                           void *out,
                           uint32_t out_dtype,
                           const kvc_scoring *scoring,
                           float *lse);

// Makes the step's tokens part of their sequences, publishes the blocks they filled to the prefix
// index, and closes the step.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_commit(kvc_cache *cache, kvc_step *step);

// Closes the step without its tokens: the sequences are as before kvc_step_begin, and the blocks
// that it took are free again.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_cancel(kvc_cache *cache, kvc_step *step);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // KVCACHE_H
