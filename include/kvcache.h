// libkvcache: the KV cache of a language model as a library. C ABI 0.1.
//
// Generated from src/capi by `cargo check --features generate-header`; do not edit.
//
// Conventions
//   Names    kvc_<noun>_<verb>. Types of the library end where their noun ends: kvc_pool.
//   Status   Every call that can fail returns kvc_status: KVC_OK (0) or a negative code.
//            kvc_last_error() gives the text. Bad input changes nothing.
//   Outputs  come last and are written only on success, unless a function says otherwise.
//   Handles  kvc_pool*, kvc_prefix*, kvc_cache*, kvc_step*, kvc_device*, kvc_events* are checked
//            numbers: a NULL, stale or foreign handle is answered with a code. A process has 4096.
//            Each that is made has its _destroy or _close, which accepts NULL.
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

// The device or its driver reported an error.
#define KVC_ERR_DEVICE_FAILED -202

// A tier's files or store failed; the cache works on without it.
#define KVC_ERR_TIER_FAILED -203

// The object is not in a state in which the call is allowed, or another call is using it.
#define KVC_ERR_INVALID_STATE -300

// A layer of a sequence was to be loaded from a tier, and never will be: kvc_onboard_cancel, and its
// tokens are to be computed.
#define KVC_ERR_LAYER_MISSING -301

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

// Storage format: 8-bit floats, 4 exponent bits; one scale a layer and KV head. The planner knows
// this format and those below; kernels that lack one answer KVC_ERR_UNSUPPORTED.
#define KVC_FORMAT_FP8_E4M3 4

// Storage format: 8-bit floats, 5 exponent bits.
#define KVC_FORMAT_FP8_E5M2 5

// Storage format: symmetric 8-bit integers, one scale a token and head, keys rotated.
#define KVC_FORMAT_INT8_T 6

// Storage format: 4-bit integers, scale and minimum a token and head, rotated.
#define KVC_FORMAT_INT4_T 7

// Storage format: 4-bit floats with a scale for 16 channels.
#define KVC_FORMAT_NVFP4 8

// Storage format: sealed tiles of 32, 64 or 128 tokens, 8-bit keys and values.
#define KVC_FORMAT_KT8V8 16

// Storage format: sealed tiles, 4-bit keys and values.
#define KVC_FORMAT_KT4V4 17

// Storage format: sealed tiles, 3-bit keys and values.
#define KVC_FORMAT_KT3V3 18

// Storage format: sealed tiles, 4-bit keys and 2-bit values.
#define KVC_FORMAT_KT4V2 19

// Storage format: sealed tiles, 2-bit keys and values.
#define KVC_FORMAT_KT2V2 20

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
// why there is none), and which GPU kernels are inside. `buf` may be NULL with a `len` of 0.
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
    // Of sealed tiles, the first tokens of every sequence that stay raw in bf16: a multiple of the
    // tokens of a block, 0 (none) by default.
    uint32_t sink_tokens;
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
// attend, append: where the scales of quantised K and V lie
// ----------------------------------------------------------------------------------------------
// Where the scales of quantised rows lie. All strides are in bytes.
//
// Without this struct they lie as the library's own blocks have them: behind the codes of each
// block and head, a row's scales after those of the row before; and every head has the scale 1.
typedef struct {
    // sizeof(kvc_scales); kvc_scales_init sets it.
    uint32_t struct_size;
    // 1: keys of int8_t are not rotated. 0, the default: they are (kvc_append rotates them,
    // kvc_attend the queries).
    uint32_t k_unrotated;
    // Scales of key rows (f16 of int8_t, f16 scale and minimum of int4_t, an e4m3 for 16 channels
    // of nvfp4). NULL: behind the codes.
    const void *k;
    // Bytes from a block to the next. Ignored, as those below, where k is NULL.
    int64_t k_block_stride;
    // Bytes from a KV head to the next.
    int64_t k_head_stride;
    // Bytes from a token to the next.
    int64_t k_token_stride;
    // Scales of value rows. NULL: behind the codes. Ignored with v_in_k.
    const void *v;
    // Bytes from a block to the next. Ignored, as those below, where v is NULL.
    int64_t v_block_stride;
    // Bytes from a KV head to the next.
    int64_t v_head_stride;
    // Bytes from a token to the next.
    int64_t v_token_stride;
    // NULL for 1, or `[kv_heads]`: the scale of all keys of a head (fp8, nvfp4), positive and
    // finite.
    const float *k_heads;
    // The same of values. Ignored with v_in_k.
    const float *v_heads;
} kvc_scales;

// Fills a kvc_scales of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_scales_init(kvc_scales *scales, uint32_t struct_size);

// ----------------------------------------------------------------------------------------------
// attend: sealed tiles on the caller's own memory, and their sealing
// ----------------------------------------------------------------------------------------------
// Where the raw rows of one tile of a sequence lie.
typedef struct {
    // Which tile of the sequence: its tokens are tile * block_tokens and on.
    int32_t tile;
    // Raw slot.
    int32_t slot;
} kvc_raw_block;

// The sealed tiles of one layer (KVC_FORMAT_KT*), and the raw rows of those that are not sealed.
//
// A query at position p reads its own tile, p / block_tokens, raw, and every tile before it
// sealed. The record of block b and KV head h lies b * block_bytes + h * head_bytes after records.
// Raw slot s is block s of staging, or past its end block s - staging_blocks of scratch. A raw
// block is `[kv_head][token][k_dim]` keys and then `[kv_head][token][v_dim]` values (none with
// v_in_k), all bf16.
typedef struct {
    // sizeof(kvc_tile_view); kvc_tile_view_init sets it.
    uint32_t struct_size;
    // Raw blocks that staging has.
    uint32_t staging_blocks;
    // Raw blocks that scratch has; may be 0.
    uint32_t scratch_blocks;
    // 0.
    uint32_t reserved;
    // Records, 16-byte aligned.
    void *records;
    // Bytes from a block to the next, a multiple of 16; 0 for kv_heads * head_bytes.
    int64_t block_bytes;
    // Bytes from a KV head to the next, a multiple of 16; 0 for those of a record.
    int64_t head_bytes;
    // Raw rows that outlive a step.
    void *staging;
    // Bytes from a raw block of staging to the next; 0 for contiguous ones.
    int64_t staging_block_bytes;
    // Raw rows of tiles that a step fills from end to end.
    void *scratch;
    // Bytes from a raw block of scratch to the next; 0 for contiguous ones.
    int64_t scratch_block_bytes;
    // `[seqs + 1]` offsets into raw_blocks, from 0, never decreasing. Read by kvc_attend only.
    const int32_t *raw_indptr;
    // The raw tiles of each sequence, ascending: all that hold its queries, and every one before
    // whose record says that it is not sealed. Read by kvc_attend only.
    const kvc_raw_block *raw_blocks;
} kvc_tile_view;

// A full raw tile and the block that it is sealed into.
typedef struct {
    // Raw slot.
    int32_t slot;
    // Block of the records.
    int32_t block;
} kvc_seal_tile;

// Raw tiles that are to be sealed.
typedef struct {
    // sizeof(kvc_seal_desc); kvc_seal_desc_init sets it.
    uint32_t struct_size;
    // KV heads.
    uint32_t kv_heads;
    // Channels of a key: a multiple of 16, to 256 (576 with v_in_k).
    uint32_t k_dim;
    // Channels of a value: a multiple of 16.
    uint32_t v_dim;
    // 1: values are the first v_dim channels of the keys.
    uint32_t v_in_k;
    // KVC_FORMAT_KT*.
    uint32_t format;
    // Tokens of a tile: 32, 64 or 128.
    uint32_t block_tokens;
    // Blocks that the records have.
    uint32_t num_blocks;
    // Tiles to seal.
    uint32_t count;
    // As in kvc_attend_desc.
    uint32_t threads;
    // The layer.
    const kvc_tile_view *tiles;
    // `[count]` what to seal; blocks are distinct.
    const kvc_seal_tile *list;
    // `[count]`: set to 1 where rows of some head cannot be sealed (NaN, infinity, scales past
    // f16), else left as it is. The record of such a head says that it is not sealed, and its rows
    // are read raw as long as raw_blocks has them.
    uint32_t *refused;
} kvc_seal_desc;

// Fills a kvc_tile_view of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_tile_view_init(kvc_tile_view *view, uint32_t struct_size);

// Fills a kvc_seal_desc of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_seal_desc_init(kvc_seal_desc *desc, uint32_t struct_size);

// Writes the bytes of one record of `desc` to `out_bytes`. No pointer of `desc` is followed.
//
// Threads: thread-safe.
kvc_status kvc_seal_record_size(const kvc_seal_desc *desc, uint64_t *out_bytes);

// Seals full raw tiles, all heads of a layer: the same bits on every CPU and with any number of
// threads. Bad arguments are answered before anything is written.
//
// Threads: thread-safe, where calls share no records.
kvc_status kvc_seal(const kvc_seal_desc *desc);

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
    // Entries from one sequence's row to the next: kvc_attend refuses a kv_lens that needs more.
    // 0 where all sequences read the same row. Ignored with table_indptr.
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
    // NULL for the defaults, or where the scales of quantised K and V lie.
    const kvc_scales *scales;
    // The cache where the format is one of sealed tiles (KVC_FORMAT_KT*), in place of k and v,
    // which are ignored then; else NULL. Not for devices.
    const kvc_tile_view *tiles;
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
    // KVC_FORMAT_* of the blocks. Rows are rounded to it, to nearest even; for int8_t keys and
    // int4_t keys and values are rotated first (kvc_attend does what that asks of queries).
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
    // NULL for the defaults, or where the scales of quantised K and V lie. Row scales are written.
    const kvc_scales *scales;
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

// Ends an index. NULL is accepted. KVC_ERR_INVALID_STATE while another thread is inside it.
//
// Threads: thread-safe.
kvc_status kvc_prefix_destroy(kvc_prefix *prefix);

// Finds the longest cached prefix of the first `max_tokens` of `tokens[token_count]` in
// `name_space`. Give token_count - 1 as the maximum to leave the last token to be computed, whose
// logits sampling needs. Writes block ids to `out_blocks[capacity]`: groups for each whole block
// of tokens is always enough, and KVC_ERR_BUFFER_TOO_SMALL says what is not. `out_tail_blocks`
// takes one id a group, and may be NULL. Marks nothing as used: see kvc_prefix_lock. Where another
// thread may evict between the two, look up and pin in one call: kvc_prefix_run.
//
// Threads: thread-safe; lookups do not wait for each other.
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
// Threads: thread-safe.
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
// Threads: thread-safe.
kvc_status kvc_prefix_lock(kvc_prefix *prefix, const kvc_prefix_position *at, uint64_t *out_pin);

// Ends a pin, without marking the prefix as used (kvc_prefix_release does).
// KVC_ERR_STALE_HANDLE for one that is not live.
//
// Threads: thread-safe.
kvc_status kvc_prefix_unlock(kvc_prefix *prefix, uint64_t pin);

// Evicts up to `want_blocks` entries, leaves first, by priority and then in the order of the
// index's policy (least recently used by default), pinned prefixes excepted.
// Writes their ids to `out_blocks[capacity]` as `[entry][group]`, for the caller to free, and how
// many entries went to `out_evicted`. `capacity` must be at least want_blocks * groups, or the
// ids of all that is cached.
//
// Threads: thread-safe.
kvc_status kvc_prefix_evict(kvc_prefix *prefix,
                            uint64_t want_blocks,
                            int32_t *out_blocks,
                            uint64_t capacity,
                            uint64_t *out_evicted);

// Writes the index's sizes to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_prefix_stats(const kvc_prefix *prefix, kvc_prefix_counts *out, uint64_t out_bytes);

// ----------------------------------------------------------------------------------------------
// prefix: what a step wants of it, in one call
// ----------------------------------------------------------------------------------------------
// Blocks to cache: the arguments of kvc_prefix_insert, and where they hang. This struct never
// grows.
typedef struct {
    // The name space. Read only where `above` is all 0.
    uint64_t name_space;
    // All 0, or the position of an earlier hit or insertion: tokens and blocks are what follows
    // it, and it is not walked again.
    kvc_prefix_position above;
    // Token ids, whole blocks.
    const uint32_t *tokens;
    // How many.
    uint64_t token_count;
    // Block ids `[block][group]`.
    const int32_t *blocks;
    // How many.
    uint64_t block_ids;
    // NULL, or `[capacity]`: receives the ids of the leading blocks that were cached already.
    int32_t *out_present;
    // Room in out_present: block_ids, or 0 with NULL.
    uint64_t capacity;
} kvc_prefix_commit;

// What became of a commit. This struct never grows.
typedef struct {
    // KVC_OK, or why this commit failed; the rest is 0 then.
    kvc_status status;
    // 0.
    uint32_t reserved;
    // What was done.
    kvc_prefix_inserted inserted;
} kvc_prefix_committed;

// A sequence to look up: the arguments of kvc_prefix_lookup, and whether to pin what is found. This
// struct never grows.
typedef struct {
    // The name space.
    uint64_t name_space;
    // Token ids.
    const uint32_t *tokens;
    // How many.
    uint64_t token_count;
    // At most so many of them are matched.
    uint64_t max_tokens;
    // `[capacity]`: receives the ids of the whole blocks, `[block][group]`.
    int32_t *out_blocks;
    // Room in out_blocks.
    uint64_t capacity;
    // NULL, or room for one id a group: the block that agrees for a part of its tokens.
    int32_t *out_tail_blocks;
    // 1: pin the whole blocks that are found, as kvc_prefix_lock does.
    uint32_t pin;
    // 0.
    uint32_t reserved;
} kvc_prefix_query;

// What became of a query. This struct never grows.
typedef struct {
    // KVC_OK, or why this query failed; the rest is 0 then.
    kvc_status status;
    // 0.
    uint32_t reserved;
    // What was found.
    kvc_prefix_hit hit;
    // The pin that was asked for, else 0.
    uint64_t pin;
} kvc_prefix_answer;

// All that a step wants of an index.
typedef struct {
    // sizeof(kvc_prefix_batch); kvc_prefix_batch_init sets it.
    uint32_t struct_size;
    // Pins to end, first of all.
    uint32_t unlock_count;
    // `[unlock_count]`
    const uint64_t *unlocks;
    // NULL, or `[unlock_count]`: a status each.
    kvc_status *out_unlocked;
    // Blocks to cache, second.
    uint32_t commit_count;
    // Sequences to look up, last.
    uint32_t query_count;
    // `[commit_count]`
    const kvc_prefix_commit *commits;
    // `[commit_count]`
    kvc_prefix_committed *out_committed;
    // `[query_count]`
    const kvc_prefix_query *queries;
    // `[query_count]`
    kvc_prefix_answer *out_answers;
} kvc_prefix_batch;

// Fills `out` with nothing to do; `bytes` is its sizeof.
//
// Threads: thread-safe.
kvc_status kvc_prefix_batch_init(kvc_prefix_batch *out, uint32_t bytes);

// Ends pins, then caches blocks, then looks sequences up (and pins what was found where that is
// asked for), in one call: a step of an engine. Each item has a status of its own, and a failed one
// changes nothing and stops none of the others; the call fails only where the batch itself or an
// array cannot be read or written, and then does nothing.
//
// Threads: thread-safe.
kvc_status kvc_prefix_run(kvc_prefix *prefix, const kvc_prefix_batch *batch);

// ----------------------------------------------------------------------------------------------
// prefix: layer groups with a sliding window
// ----------------------------------------------------------------------------------------------
// Gives the layer groups of an empty index (KVC_ERR_INVALID_STATE) their sliding windows:
// `windows[groups]`, one for each of its groups, at most 16, in tokens, the query's own included; 0
// for a group that sees everything. From then on a hit ends where every group can serve it: one with
// a window needs the blocks that its window reaches, the others all. An id of -1 stands for the block
// that a group with a window has not, in what is looked up, inserted and evicted; who inserts such a
// block again puts it back.
//
// Threads: thread-safe.
kvc_status kvc_prefix_set_windows(kvc_prefix *prefix,
                                  const uint32_t *windows,
                                  uint32_t groups);

// Takes `blocks[count]` of a group with a window out of their entries, which stay for the other
// groups: for the caller to free, once no sequence's window reaches them. How many of them an entry
// had goes to `out_forgotten`, and those to the front of `blocks`; the rest is behind them.
//
// Threads: thread-safe.
kvc_status kvc_prefix_forget(kvc_prefix *prefix,
                             uint32_t group,
                             int32_t *blocks,
                             uint64_t count,
                             uint64_t *out_forgotten);

// ----------------------------------------------------------------------------------------------
// prefix: what stays in an index, and what goes
// ----------------------------------------------------------------------------------------------
// Order of eviction: the least recently used first.
#define KVC_EVICTION_LRU 0

// Order of eviction: the least often used first.
#define KVC_EVICTION_LFU 1

// Order of eviction: the first stored first.
#define KVC_EVICTION_FIFO 2

// Order of eviction: segmented LRU; what was used again outlives what was not.
#define KVC_EVICTION_SLRU 3

// Order of eviction: S3-FIFO; what is new waits in a small queue and has to prove itself.
#define KVC_EVICTION_S3FIFO 4

// Nothing is known of the next use: takes an earlier hint back.
#define KVC_HINT_NONE 0

// There will be no next use: the session ended, the branch was given up.
#define KVC_HINT_ENDED 1

// The next use is expected at a time.
#define KVC_HINT_EXPECTED 2

// A request that waits in the queue will make the next use.
#define KVC_HINT_WAITED 3

// Sizes and policy of a prefix index.
typedef struct {
    // sizeof(kvc_prefix_options); kvc_prefix_options_init sets it.
    uint32_t struct_size;
    // Tokens of a block, 1 to 65536. 16 by default.
    uint32_t block_tokens;
    // Layer groups, each with an id for every block: 1 to 65536. 1 by default.
    uint32_t groups;
    // Room for so many entries, 1 to 2^30. 1024 by default.
    uint32_t capacity_blocks;
    // KVC_EVICTION_*; KVC_EVICTION_LRU by default.
    uint32_t eviction;
    // 0.
    uint32_t reserved;
} kvc_prefix_options;

// A priority for the tokens from `start` to before `end`, UINT64_MAX for all to the end of the
// prefix. This struct never grows.
typedef struct {
    // The first token.
    uint64_t start;
    // The token after the last.
    uint64_t end;
    // 0 to 100. Blocks that were given none have 35.
    uint32_t priority;
    // For how many ms after the last release the priority holds; then it is 35 again. 0: until
    // another is given.
    uint32_t duration_ms;
} kvc_retention;

// Fills a kvc_prefix_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_prefix_options_init(kvc_prefix_options *options, uint32_t struct_size);

// kvc_prefix_create with a choice of policy. `options` may be NULL for the defaults.
//
// Threads: thread-safe.
kvc_status kvc_prefix_create_with(const kvc_prefix_options *options, kvc_prefix **out);

// Sets the time, in ms since whenever the caller likes, below 2^42, and ends the priorities and
// expectations that end by then. An earlier time than the last changes nothing.
//
// Threads: thread-safe.
kvc_status kvc_prefix_advance(kvc_prefix *prefix, uint64_t now_ms);

// Marks the prefix that ends at `at` as used. KVC_ERR_STALE_HANDLE where it is no longer cached.
//
// Threads: thread-safe.
kvc_status kvc_prefix_touch(kvc_prefix *prefix, const kvc_prefix_position *at);

// Ends a pin at the end of the request that used the prefix: as kvc_prefix_unlock, and the prefix
// is the most recently used one. Durations of priorities run from here.
//
// Threads: thread-safe.
kvc_status kvc_prefix_release(kvc_prefix *prefix, uint64_t pin);

// Gives priorities to the blocks of the prefix that ends at `at`. A range covers each block that
// it overlaps; of several the first in the list counts; blocks that none covers keep theirs. Of
// all leaves those of the lowest priority are evicted first.
//
// A later use of the prefix keeps the priority and ends its duration, unless it gives its own.
//
// Threads: thread-safe.
kvc_status kvc_prefix_prioritize(kvc_prefix *prefix,
                                 const kvc_prefix_position *at,
                                 const kvc_retention *ranges_in,
                                 uint32_t count);

// Says what is known of the next use of the prefix that ends at `at`, for its blocks from
// `from_block` on: KVC_HINT_*. The blocks before those may be others' too: hints for them are
// taken back. `when_ms`, on the clock of kvc_prefix_advance and less than 2^31 ms ahead of it, is
// read for KVC_HINT_EXPECTED alone. Any use ends the hint.
//
// What has ended goes before all priorities, what is expected goes after priority 35 and the
// latest first, what is waited for goes last.
//
// Threads: thread-safe.
kvc_status kvc_prefix_hint(kvc_prefix *prefix,
                           const kvc_prefix_position *at,
                           uint64_t from_block,
                           uint32_t hint_id,
                           uint64_t when_ms);

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
    // KVC_DEVICE_*: where blocks live and kernels run. KVC_DEVICE_CPU by default.
    uint32_t device;
    // The device's number among those of its kind.
    uint32_t device_ordinal;
    // The device's stream (a CUstream) that everything is enqueued on, for as long as the cache
    // lives; NULL (the default) for its default stream.
    void *stream;
    // 1: on a device, a sequence gets the same bits whatever else is in the batch, for some speed,
    // and with sealed tiles also however it was cut into steps and whatever was found of it; on the
    // CPU it always does. 0 by default.
    uint32_t deterministic;
    // KVC_EVICTION_*: which cached blocks go first. KVC_EVICTION_LRU by default.
    uint32_t eviction;
    // Raw blocks of each layer group whose format has sealed tiles; 0 (the default) for two a
    // sequence and its sinks, all that they can need unless tiles stay raw.
    uint32_t staging_blocks;
    // 1: zero the K and V of every block that becomes free, before anybody else can have it. 0 by
    // default. KVC_ERR_UNSUPPORTED with sealed tiles.
    uint32_t scrub;
    // `[group_count]`: blocks of each layer group where they differ; NULL (the default) for
    // `blocks` in each. A group with a window needs few: kvc_plan says how many.
    const uint32_t *group_blocks;
    // 1: on a device, a prefix that sequences of a step share is read once for all of
    // them (cascade attention) where the device's rates (kvc_device_rates_read) say that this is
    // faster: in steps of up to 8 new tokens a sequence, of sequences that are neighbours in the step's
    // work. Not where `deterministic`, in layer groups with a window or sealed tiles, with ALiBi, of
    // latents, nor while the stream is captured. 0 by default, as it has not run on a GPU yet.
    uint32_t cascade;
    // 0.
    uint32_t reserved;
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
    // Blocks of the staging pools, for raw rows of formats with sealed tiles; 0 without.
    uint32_t staging_blocks;
    // Those of them that are in use.
    uint32_t staged_blocks;
    // Bytes of the staging pools and of the scratch beside them, in all groups.
    uint64_t staging_bytes;
    // Full tiles that stay raw because their rows cannot be sealed (NaN, infinity, out of range).
    uint64_t unsealed_blocks;
    // Attention calls (one a layer and step) on a device that read a shared prefix once for all
    // sequences that have it.
    uint64_t cascades;
} kvc_cache_counts;

// Fills a kvc_cache_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_cache_options_init(kvc_cache_options *options, uint32_t struct_size);

// Makes a cache of `groups[group_count]` (1 to 16) layer groups, and allocates its memory.
// `options` may be NULL for the defaults. On a device: KVC_ERR_NO_KERNELS, KVC_ERR_NO_DEVICE, and
// KVC_ERR_UNSUPPORTED for a group that it has no kernels for.
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

// Waits for everything that the cache has enqueued on its device. KVC_ERR_DEVICE_FAILED where some
// of it has failed. Nothing is waited for on the CPU.
//
// Threads: thread-safe.
kvc_status kvc_cache_sync(kvc_cache *cache);

// Sets the time of the prefix index: as kvc_prefix_advance.
//
// Threads: thread-safe.
kvc_status kvc_cache_advance(kvc_cache *cache, uint64_t now_ms);

// Drops everything from the prefix index that no sequence uses.
//
// Threads: thread-safe.
kvc_status kvc_cache_clear_prefix(kvc_cache *cache);

// Checks that block pools, block tables and prefix index agree: every block is exactly one of free,
// cached and referenced, all counts add up, and the index has the tokens of the sequences that use
// its blocks. KVC_ERR_INVALID_STATE says, by its text, what does not hold; that is a bug in the
// library. Takes time in proportion to the cache: some 10 ns a block, for debugging.
//
// Threads: thread-safe.
kvc_status kvc_cache_audit(const kvc_cache *cache);

// Writes the cache's counts to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_cache_stats(const kvc_cache *cache, kvc_cache_counts *out, uint64_t out_bytes);

// ----------------------------------------------------------------------------------------------
// cache: the scales of fp8 and nvfp4
// ----------------------------------------------------------------------------------------------
// Sets the scales by which the keys and values of a layer's heads are divided when they are stored
// (fp8, nvfp4): `k[kv_heads]` and `v[kv_heads]`, positive and finite. Until then both are 1. `v` is
// NULL for latents. Engines that calibrate take the largest magnitude over 448 (e4m3).
// KVC_ERR_INVALID_STATE with a sequence alive or a block cached, which would be misread.
//
// Threads: thread-safe.
kvc_status kvc_cache_set_scales(kvc_cache *cache,
                                uint32_t group,
                                uint32_t layer,
                                const float *k,
                                const float *v,
                                uint32_t kv_heads);

// ----------------------------------------------------------------------------------------------
// seq: the sequences of a cache
// ----------------------------------------------------------------------------------------------
// A sequence of a cache. The id of a sequence that has ended is refused, not reused at once.
typedef uint32_t kvc_seq;

// Something in a prompt that its tokens do not name: an image, a clip, an embedding. This struct
// never grows.
typedef struct {
    // The position in the prompt of the first token that stands for it.
    uint64_t position;
    // SHA-256, or another 32 bytes, of its content, and of how it is processed where that may
    // differ. The server computes it: equal digests are taken for equal content.
    uint8_t digest[32];
} kvc_media;

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

// Starts a sequence as kvc_seq_start does, for a prompt in which tokens stand for
// `media_in[media_count]`, in the order of their positions: images, clips, embeddings, whose
// placeholder tokens do not say which they are. What is before the first of them is shared with all
// prompts of the name space; what comes from then on only with those that have the same digests at
// the same positions. What of them the sequence holds cannot be truncated, and a later turn that
// brings new media is a new sequence, whose prompt begins with this one.
//
// Threads: thread-safe.
kvc_status kvc_seq_start_media(kvc_cache *cache,
                               const uint32_t *prompt,
                               uint64_t prompt_tokens,
                               const kvc_media *media_in,
                               uint32_t media_count,
                               uint64_t name_space,
                               kvc_seq *out_seq,
                               uint32_t *out_cached_tokens);

// Makes a second sequence with the same tokens, sharing every block, and writes its id to
// `out_seq`. Whichever of the two next writes to the last, partly full block gets a copy.
//
// Threads: thread-safe.
kvc_status kvc_seq_fork(kvc_cache *cache, kvc_seq seq, kvc_seq *out_seq);

// Forgets the tokens of a sequence from position `tokens` on (rejected speculation). With a sliding
// window, to lengths that the window has not left behind (KVC_ERR_INVALID_STATE for others): those
// since the sequence's last kvc_step_begin, and as many more as its blocks allow.
//
// Threads: thread-safe.
kvc_status kvc_seq_truncate(kvc_cache *cache, kvc_seq seq, uint32_t tokens);

// Ends a sequence. Its full blocks stay in the prefix index until they are evicted.
//
// Threads: thread-safe.
kvc_status kvc_seq_release(kvc_cache *cache, kvc_seq seq);

// Gives priorities to the full blocks of a sequence in the prefix index: as kvc_prefix_prioritize.
// A duration runs from the last step or kvc_seq_release: give it right before the latter. Nothing
// happens to blocks that are not committed yet.
//
// Threads: thread-safe.
kvc_status kvc_seq_prioritize(kvc_cache *cache,
                              kvc_seq seq,
                              const kvc_retention *ranges_in,
                              uint32_t count);

// Says what is known of the next use of what a sequence holds, from its block `from_block` on: as
// kvc_prefix_hint. Before kvc_seq_release.
//
// Threads: thread-safe.
kvc_status kvc_seq_hint(kvc_cache *cache,
                        kvc_seq seq,
                        uint64_t from_block,
                        uint32_t hint_id,
                        uint64_t when_ms);

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
    // Keys that a query sees, its own included, counted back, no more than the group's window; 0 for
    // that.
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
// index, and closes the step. On a device, a step that filled sealed tiles is waited for, to learn
// which of them stay raw; KVC_ERR_OUT_OF_BLOCKS where one of those found no staging block: the step
// can only be cancelled then.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_commit(kvc_cache *cache, kvc_step *step);

// Closes the step without its tokens: the sequences are as before kvc_step_begin, and the blocks
// that it took are free again.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_cancel(kvc_cache *cache, kvc_step *step);

// ----------------------------------------------------------------------------------------------
// step: for rows in the memory of the cache's device
// ----------------------------------------------------------------------------------------------
// kvc_step_append for rows in the memory of the cache's device, aligned to 16 bytes: enqueues the
// work on the cache's stream. KVC_ERR_INVALID_STATE where the cache is on the CPU.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_append_device(kvc_cache *cache,
                                  const kvc_step *step,
                                  uint32_t group,
                                  uint32_t layer,
                                  const void *k,
                                  const void *v,
                                  uint32_t dtype,
                                  const kvc_rope *rope);

// kvc_step_attend for rows in the memory of the cache's device, aligned to 16 bytes (`lse` to 4):
// enqueues the work on the cache's stream. The lists of `scoring` are host memory, and copied.
// KVC_ERR_INVALID_STATE where the cache is on the CPU.
//
// Threads: thread-safe on the cache, per-handle on the step.
kvc_status kvc_step_attend_device(kvc_cache *cache,
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

// ----------------------------------------------------------------------------------------------
// device: where kernels run beside the CPU
// ----------------------------------------------------------------------------------------------
// The CPU: no device to open; a cache's default.
#define KVC_DEVICE_CPU 0

// An NVIDIA GPU.
#define KVC_DEVICE_CUDA 1

// The CUDA kernels on the host, under an emulator: for tests of builds that have it.
#define KVC_DEVICE_EMU 2

// A device that is open: its driver's primary context, with the library's kernels loaded. Calls
// on it are thread-safe. Addresses and streams of other libraries in the process are valid with it
// where they are of the primary context, as those of the CUDA runtime and PyTorch are.
typedef struct kvc_device kvc_device;

// What a device is.
typedef struct {
    // KVC_DEVICE_*.
    uint32_t kind;
    // Its number among those of its kind.
    uint32_t ordinal;
    // Multiprocessors: what work is divided by.
    uint32_t multiprocessors;
    // 0.
    uint32_t reserved;
} kvc_device_facts;

// Opens the device `ordinal` (from 0) of the kind KVC_DEVICE_CUDA or KVC_DEVICE_EMU.
// KVC_ERR_NO_KERNELS where the library was built without kernels for it, KVC_ERR_NO_DEVICE where
// it is not there.
//
// Threads: thread-safe.
kvc_status kvc_device_open(uint32_t kind, uint32_t ordinal, kvc_device **out);

// Closes a device. NULL is accepted. What was allocated on it stays until it is freed through
// another handle of the device; an emulator's memory goes with its last handle and cache.
//
// Threads: thread-safe.
kvc_status kvc_device_close(kvc_device *device);

// Writes what the device is to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_device_info(const kvc_device *device, kvc_device_facts *out, uint64_t out_bytes);

// Writes the device's name to `buf`, with a NUL. `len` is the size of `buf`;
// KVC_ERR_BUFFER_TOO_SMALL where it does not fit (128 bytes are enough).
//
// Threads: thread-safe.
kvc_status kvc_device_name(const kvc_device *device, char *buf, uint64_t len);

// Allocates `bytes` bytes of device memory, aligned to 256, of no particular content.
//
// Threads: thread-safe.
kvc_status kvc_device_alloc(const kvc_device *device, uint64_t bytes, void **out);

// Frees memory of kvc_device_alloc, after everything that is enqueued. NULL is accepted.
//
// Threads: thread-safe.
kvc_status kvc_device_free(const kvc_device *device, void *address);

// Copies `bytes` bytes from host memory to the device on `stream` (a CUstream; NULL for the default
// stream), and waits.
//
// Threads: thread-safe.
kvc_status kvc_device_upload(const kvc_device *device,
                             void *to,
                             const void *from,
                             uint64_t bytes,
                             void *stream);

// Copies `bytes` bytes from the device to host memory, after what is enqueued on `stream`, and
// waits.
//
// Threads: thread-safe.
kvc_status kvc_device_download(const kvc_device *device,
                               void *to,
                               const void *from,
                               uint64_t bytes,
                               void *stream);

// Enqueues the zeroing of `bytes` bytes on `stream`.
//
// Threads: thread-safe.
kvc_status kvc_device_zero(const kvc_device *device, void *at, uint64_t bytes, void *stream);

// Waits for everything that is enqueued on `stream`. KVC_ERR_DEVICE_FAILED where some of it has
// failed.
//
// Threads: thread-safe.
kvc_status kvc_device_sync(const kvc_device *device, void *stream);

// ----------------------------------------------------------------------------------------------
// device: what it does in a microsecond
// ----------------------------------------------------------------------------------------------
// What a device does in a microsecond, by which ways to compute the same are chosen. The fields are
// those that kvc_device_cascade_query has; none has a default.
typedef struct {
    // sizeof(kvc_device_rates); kvc_device_rates_init sets it.
    uint32_t struct_size;
    // Multiprocessors.
    uint32_t multiprocessors;
    // Bytes from memory in a microsecond.
    double memory_bytes;
    // Bytes from the second-level cache in a microsecond.
    double cache_bytes;
    // Size of that cache, in bytes.
    uint64_t cache_size;
    // Operations (two a multiplication and addition) of the prefill kernel in a microsecond.
    double operations;
    // Microseconds from one launch's end to the next one's work.
    double launch;
} kvc_device_rates;

// Fills a kvc_device_rates of `struct_size` bytes with zeros, which are no rates yet.
//
// Threads: thread-safe.
kvc_status kvc_device_rates_init(kvc_device_rates *rates, uint32_t struct_size);

// Writes the rates that caches on this device go by to `out`, `out_bytes` (its sizeof) at most. They
// follow from clocks and widths that the driver names and from shares of those that an H200 was
// measured at: of another GPU they are an estimate, which leans towards plain attention.
// KVC_ERR_UNSUPPORTED where the driver does not name them, and nothing is chosen by rates.
//
// Threads: thread-safe.
kvc_status kvc_device_rates_read(const kvc_device *device,
                                 kvc_device_rates *out,
                                 uint64_t out_bytes);

// Has the cache go by these rates from here on instead of by what its device says: whether a prefix
// that sequences share is read once for all of them (kvc_cache_options.cascade).
// KVC_ERR_INVALID_STATE where the cache is on the CPU.
//
// Threads: thread-safe.
kvc_status kvc_cache_set_device_rates(kvc_cache *cache, const kvc_device_rates *rates);

// ----------------------------------------------------------------------------------------------
// device: its kernels alone, on the caller's own memory and stream
// ----------------------------------------------------------------------------------------------
// What kvc_device_attend must know beside the call's description.
typedef struct {
    // sizeof(kvc_device_attend_options); kvc_device_attend_options_init sets it.
    uint32_t struct_size;
    // Most query tokens of one sequence; all have as many where q_indptr is NULL. 1 by default.
    uint32_t max_q_tokens;
    // Most cached tokens of one sequence.
    uint32_t max_kv_tokens;
    // 0 (the default): contexts are cut so that the whole device has work. A multiple of 64: in
    // pieces of so many tokens, and a sequence gets the same bits whatever else is in the batch.
    uint32_t piece_tokens;
    // Most query tokens of all sequences together; 0 (the default) for seqs times max_q_tokens.
    uint32_t total_q_tokens;
    // 1: the workspace holds the plan of an earlier call with the same lengths, window, heads and
    // options (another layer's): it is not made again. 0 by default.
    uint32_t planned;
    // Multiprocessors to divide the work by; 0 (the default) for those of the device.
    uint32_t multiprocessors;
    // Bytes of shared memory that a multiprocessor has; 0 (the default) for those of the device, or
    // of an H100 where there is no device.
    uint32_t multiprocessor_shared_bytes;
    // NULL, or `[query token]` on the device: which tokens of its sequence's tail (its last tokens,
    // those of its query tokens) a query token sees, bit j for the j-th. All tokens before the tail
    // are seen, and causal means nothing. For a tree of drafts, the bits of a path, its own
    // included. Up to 8 query tokens a sequence.
    const uint32_t *tail_mask;
} kvc_device_attend_options;

// What kvc_device_append can do beside the call's description: rotate, and write rotated queries.
typedef struct {
    // sizeof(kvc_device_append_options); kvc_device_append_options_init sets it.
    uint32_t struct_size;
    // KVC_ROPE_HALVES (the default) or KVC_ROPE_INTERLEAVED.
    uint32_t rope_style;
    // Channels that are rotated, even; 0 for no rotation.
    uint32_t rotary_dim;
    // The first of them, a multiple of 8.
    uint32_t first_channel;
    // Rows of cosines and sines: positions from 0 on.
    uint32_t table_positions;
    // Query heads; 0 without q.
    uint32_t q_heads;
    // `[table_positions][rotary_dim / 2]` cosines, any scale included.
    const float *cosines;
    // Sines of the same shape.
    const float *sines;
    // NULL, or queries `[row][q_head][k_dim]` of the description's dtype, to be rotated.
    const void *q;
    // Elements from a row to the next. Both 0: contiguous.
    int64_t q_token_stride;
    // Elements from a head to the next.
    int64_t q_head_stride;
    // Where rotated queries are written; must not overlap q.
    void *q_out;
    // Elements from a row to the next. Both 0: contiguous.
    int64_t q_out_token_stride;
    // Elements from a head to the next.
    int64_t q_out_head_stride;
    // NULL, or a word in which bit 0 is set where a slot is past the blocks, and bit 1 where a
    // position is past the tables; such rows are skipped.
    uint32_t *error_flag;
} kvc_device_append_options;

// Fills a kvc_device_attend_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_device_attend_options_init(kvc_device_attend_options *options, uint32_t struct_size);

// Writes an upper bound of the workspace of kvc_device_attend to `out_bytes`, for every call with
// the heads, dimensions and format of `desc`, at most `desc->seqs` sequences, and at most the maxima
// of `options`, which may be NULL for its defaults. No pointer of `desc` is followed. `device` may be
// NULL where the options say how many multiprocessors it has.
//
// Threads: thread-safe.
kvc_status kvc_device_attend_workspace_size(const kvc_device *device,
                                            const kvc_attend_desc *desc,
                                            const kvc_device_attend_options *options,
                                            uint64_t *out_bytes);

// Writes the name of the kernel that kvc_device_attend would run to `buf`, with a NUL. `len` is the
// size of `buf`; KVC_ERR_BUFFER_TOO_SMALL where the name does not fit (64 bytes are enough),
// KVC_ERR_UNSUPPORTED where there is no kernel. No pointer of `desc` is followed; `device` as for
// kvc_device_attend_workspace_size.
//
// Threads: thread-safe.
kvc_status kvc_device_attend_kernel(const kvc_device *device,
                                    const kvc_attend_desc *desc,
                                    const kvc_device_attend_options *options,
                                    char *buf,
                                    uint64_t len);

// Enqueues attention for the batch that `desc` describes on `stream` (a CUstream; NULL for the
// default stream). Every pointer of `desc` is a device address: rows of Q, K, V and out begin at
// multiples of 16 bytes, the workspace at one of 256. `q_indptr` may be NULL where all sequences
// have max_q_tokens query tokens, 8 at most; `threads` is ignored. `bad_block`, if given, is set to other than
// 0 where a table has an entry that is not a block: such keys are masked and never read.
//
// Heads have 64, 80, 96, 128, 192 or 256 channels, of which a default build for GPUs has 64, 128 and
// 256. fp8, int8_t, int4_t and nvfp4 are read as stored: products are of f16 then. `scales` itself is
// on the host, the addresses in it are the device's. More than 8 query tokens a sequence turn keys and
// values into f16, which ends at 65504.
//
// Latents (v_in_k) have 576 channels, 512 of them values, in f16, bf16, fp8, int8_t or int4_t, up to 128
// query heads, and at most 8 query tokens a sequence.
//
// Threads: thread-safe, where calls share no outputs and no workspace.
kvc_status kvc_device_attend(const kvc_device *device,
                             const kvc_attend_desc *desc,
                             const kvc_device_attend_options *options,
                             void *stream);

// Fills a kvc_device_append_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_device_append_options_init(kvc_device_append_options *options, uint32_t struct_size);

// Enqueues the writing of new keys and values to their slots on `stream` (a CUstream; NULL for the
// default stream). Every pointer of `desc` is a device address, rows begin at multiples of 16
// bytes, and `rope` is NULL: keys, and queries if given, are rotated by the tables of `options`,
// which may be NULL for none, to the positions of `desc`. A row with slot -1 stores nothing; its queries
// are rotated and written all the same. Slots past the blocks are skipped, and
// raise the error flag; so do rows that a quantised format cannot hold (bit 5), and are not written.
// `scales` itself is on the host, the addresses in it are the device's.
//
// Threads: thread-safe, where calls share no slots.
kvc_status kvc_device_append(const kvc_device *device,
                             const kvc_append_desc *desc,
                             const kvc_device_append_options *options,
                             void *stream);

// ----------------------------------------------------------------------------------------------
// device: a prefix that sequences share attended once for all of them
// ----------------------------------------------------------------------------------------------
// One layer's attention, and what the device does in a microsecond: what the cost model of
// kvc_device_cascade_choose goes by, from memory_bytes to multiprocessors as kvc_device_rates has
// it. Nothing but q_tokens has a default.
typedef struct {
    // sizeof(kvc_device_cascade_query); kvc_device_cascade_query_init sets it.
    uint32_t struct_size;
    // Query heads, a multiple of kv_heads.
    uint32_t q_heads;
    // KV heads.
    uint32_t kv_heads;
    // Channels of a head.
    uint32_t head_dim;
    // Tokens of a block.
    uint32_t block_tokens;
    // Bytes of one token's keys and values of all KV heads in a layer.
    uint32_t token_bytes;
    // Query tokens of a sequence. 1 by default.
    uint32_t q_tokens;
    // Sequences.
    uint32_t seqs;
    // Cached tokens of all sequences together, shared ones counted in each; an estimate will do.
    uint64_t kv_tokens;
    // Bytes from memory in a microsecond.
    double memory_bytes;
    // Bytes from the second-level cache in a microsecond.
    double cache_bytes;
    // Size of that cache, in bytes.
    uint64_t cache_size;
    // Operations (two a multiplication and addition) of the prefill kernel in a microsecond.
    double operations;
    // Microseconds from one launch's end to the next one's work.
    double launch;
    // Multiprocessors.
    uint32_t multiprocessors;
    // 0.
    uint32_t reserved;
} kvc_device_cascade_query;

// Neighbouring sequences whose tables begin with the same blocks. This struct never grows.
typedef struct {
    // The first sequence.
    uint32_t first_seq;
    // How many.
    uint32_t seqs;
    // Blocks that all of them begin with, whole ones before every query.
    uint32_t blocks;
    // 0.
    uint32_t reserved;
} kvc_device_cascade_prefix;

// Neighbouring sequences of a batch that share a prefix, or none of whose prefixes is used. This
// struct never grows.
typedef struct {
    // The first sequence.
    uint32_t first_seq;
    // How many; 0 in an entry that only fills the list up, whose first_seq is the batch.
    uint32_t seqs;
    // Blocks at the start of their tables that all of them share; 0 for none.
    uint32_t shared_blocks;
    // 0.
    uint32_t reserved;
} kvc_device_cascade_segment;

// What the cost model says of a batch, for one layer.
typedef struct {
    // 1: a cascade is faster, by a margin.
    uint32_t pays;
    // 0.
    uint32_t reserved;
    // Microseconds of kvc_device_attend, by the model.
    double plain;
    // Microseconds of kvc_device_cascade, by the model.
    double cascade;
} kvc_device_cascade_estimate;

// Fills a kvc_device_cascade_query of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_device_cascade_query_init(kvc_device_cascade_query *query, uint32_t struct_size);

// Chooses among `prefixes[prefix_count]`, in order and apart, those that a cascade should split off,
// by a model of what it saves (a prefix that several sequences share is read once) and what it costs
// (launches, partial results, arithmetic that may not fill the device). The model is no measurement,
// and leans towards plain attention. All of it is host memory; no device is needed.
//
// `out_segments[segment_count]` (at least 1) receives the list that kvc_device_cascade takes on the
// device, filled up to its length; where a cascade does not pay it splits nothing off, so a captured
// graph can be replayed with it. What was weighed goes to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_device_cascade_choose(const kvc_device_cascade_query *query,
                                     const kvc_device_cascade_prefix *prefixes,
                                     uint32_t prefix_count,
                                     kvc_device_cascade_segment *out_segments,
                                     uint32_t segment_count,
                                     kvc_device_cascade_estimate *out,
                                     uint64_t out_bytes);

// Writes an upper bound of the workspace of kvc_device_cascade to `out_bytes`, as
// kvc_device_attend_workspace_size does for plain attention; `segment_count` is the length of the
// list. KVC_ERR_UNSUPPORTED where a half has no kernel.
//
// Threads: thread-safe.
kvc_status kvc_device_cascade_workspace_size(const kvc_device *device,
                                             const kvc_attend_desc *desc,
                                             const kvc_device_attend_options *options,
                                             uint32_t segment_count,
                                             uint64_t *out_bytes);

// Enqueues what kvc_device_attend computes, on `stream` (a CUstream; NULL for the default stream),
// as a cascade: the prefix that the sequences of a segment share is attended once for the queries of
// all of them, then what follows it in each, and the two are merged. `segments` is a device address,
// of a list as kvc_device_cascade_choose writes it, which covers the sequences in order: what it
// leaves out has outputs without meaning. No claim is trusted: a prefix is used as far as the tables
// agree and before every query, and bit 3 of `bad_block` is set where that is less than its segment
// says. With q_indptr, total_q_tokens rows of out and lse are written; those past the last sequence's
// mean nothing.
//
// Allocates nothing and waits for nothing, so it can be captured in a CUDA graph and replayed with
// other lengths and another list of the same length. KVC_ERR_UNSUPPORTED with a window or ALiBi.
//
// Threads: thread-safe, where calls share no outputs and no workspace.
kvc_status kvc_device_cascade(const kvc_device *device,
                              const kvc_attend_desc *desc,
                              const kvc_device_attend_options *options,
                              const kvc_device_cascade_segment *segments,
                              uint32_t segment_count,
                              void *stream);

// ----------------------------------------------------------------------------------------------
// device: partial results of attention merged
// ----------------------------------------------------------------------------------------------
// Attention over `count` disjoint sets of keys, each with its outputs (normalised) and the natural
// logarithms of its denominators, to be made one. Every pointer is a device address, strides are in
// elements; rows of parts and out begin at multiples of 16 bytes and of 8 channels.
typedef struct {
    // sizeof(kvc_device_merge_desc); kvc_device_merge_desc_init sets it.
    uint32_t struct_size;
    // Parts, at least 1.
    uint32_t count;
    // Rows (query tokens).
    uint32_t rows;
    // Query heads of a row.
    uint32_t heads;
    // Channels of a head, a multiple of 8.
    uint32_t dim;
    // KVC_DTYPE_* of parts. KVC_DTYPE_F32 by default.
    uint32_t part_dtype;
    // KVC_DTYPE_* of out. KVC_DTYPE_F32 by default.
    uint32_t out_dtype;
    // 0.
    uint32_t reserved;
    // Outputs `[part][row][head][dim]`.
    const void *parts;
    // Elements from a part to the next; of two that were allocated apart the difference of their
    // addresses. All three 0: contiguous.
    int64_t part_stride;
    // Elements from a row to the next.
    int64_t row_stride;
    // Elements from a head to the next.
    int64_t head_stride;
    // Logarithms `[part][row][head]`, natural. A part that saw no key has -INFINITY, and its outputs
    // are not read.
    const float *lse;
    // Elements from a part to the next. All three 0: contiguous.
    int64_t lse_part_stride;
    // Elements from a row to the next.
    int64_t lse_row_stride;
    // Elements from a head to the next.
    int64_t lse_head_stride;
    // Merged outputs `[row][head][dim]`. Must not overlap parts.
    void *out;
    // Elements from a row to the next. Both 0: contiguous.
    int64_t out_row_stride;
    // Elements from a head to the next.
    int64_t out_head_stride;
    // NULL, or their logarithms `[row][head]`. Must not overlap lse.
    float *out_lse;
    // Elements from a row to the next. Both 0: contiguous.
    int64_t out_lse_row_stride;
    // Elements from a head to the next.
    int64_t out_lse_head_stride;
    // NULL, or `[heads]` logits that join the denominators: attention sinks, where no part had them.
    const float *sinks;
} kvc_device_merge_desc;

// Fills a kvc_device_merge_desc of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_device_merge_desc_init(kvc_device_merge_desc *desc, uint32_t struct_size);

// Enqueues the merge that `desc` describes on `stream` (a CUstream; NULL for the default stream).
// Allocates nothing and waits for nothing: it can be captured in a CUDA graph. kvc_merge_states is
// the same on the host.
//
// Threads: thread-safe, where calls share no outputs.
kvc_status kvc_device_merge(const kvc_device *device,
                            const kvc_device_merge_desc *desc,
                            void *stream);

// ----------------------------------------------------------------------------------------------
// device: blocks copied, swapped and zeroed
// ----------------------------------------------------------------------------------------------
// Blocks of one pool to blocks of another, or of the same. A pool is one or more planes (an
// allocation of one layer, or K or V of one layer), each with every block, all alike; in a plane a
// block is one or more runs of bytes. Blocks that lie in one piece are one plane and one run.
//
// The other pool may be in page-locked host memory that is mapped into the device's addresses:
// that is how blocks are swapped out and in. Addresses, strides and runs are multiples of 16
// bytes.
typedef struct {
    // sizeof(kvc_device_copy_desc); kvc_device_copy_desc_init sets it.
    uint32_t struct_size;
    // Entries of the list. They have no order: no block is written twice, and within one pool none
    // is read that another entry writes.
    uint32_t count;
    // 1: ids are int64; 0 (the default): int32.
    uint32_t wide_ids;
    // Planes of a pool. 1 by default.
    uint32_t planes;
    // Runs that a block has in a plane. 1 by default.
    uint32_t runs;
    // Bytes of a run.
    uint32_t run_bytes;
    // Bytes of a token in a run; only with tokens.
    uint32_t token_bytes;
    // Blocks of the pool that is read.
    uint32_t from_blocks;
    // Blocks of the pool that is written.
    uint32_t to_blocks;
    // 1: fill the blocks of the list with zeros; from is ignored. 0 by default.
    uint32_t zero;
    // `[count][2]` ids, from and to; `[count]` ids with zero. One outside its pool is skipped.
    const void *list;
    // NULL for whole runs, or the tokens of each entry that are copied, from the first of a run.
    const uint32_t *tokens;
    // Block 0 of plane 0 of the pool that is read.
    const void *from;
    // NULL, or the address of block 0 of each plane; else planes are from_plane_stride apart.
    const uint64_t *from_planes;
    // Bytes from a plane to the next.
    int64_t from_plane_stride;
    // Bytes from a block to the next.
    int64_t from_block_stride;
    // Bytes from a run of a block to the next.
    int64_t from_run_stride;
    // Block 0 of plane 0 of the pool that is written.
    void *to;
    // NULL, or the address of block 0 of each plane; else planes are to_plane_stride apart.
    const uint64_t *to_planes;
    // Bytes from a plane to the next.
    int64_t to_plane_stride;
    // Bytes from a block to the next.
    int64_t to_block_stride;
    // Bytes from a run of a block to the next.
    int64_t to_run_stride;
    // NULL, or a word that is set to other than 0 where an id is outside its pool.
    uint32_t *error_flag;
} kvc_device_copy_desc;

// Fills a kvc_device_copy_desc of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_device_copy_desc_init(kvc_device_copy_desc *desc, uint32_t struct_size);

// Enqueues the copies (or the zeroing) that `desc` describes on `stream` (a CUstream; NULL for the
// default stream). Every pointer of `desc` is a device address. Can be captured in a CUDA graph and
// replayed with another list of the same length; entries with an id below 0 are skipped.
//
// Threads: thread-safe, where calls share no blocks.
kvc_status kvc_device_copy(const kvc_device *device,
                           const kvc_device_copy_desc *desc,
                           void *stream);

// ----------------------------------------------------------------------------------------------
// device: a prefix index's copy there, and lookups in it
// ----------------------------------------------------------------------------------------------
// A device's copy of a prefix index. It is of the index as it was at its last
// kvc_device_prefix_sync: a block that has been evicted since can still be found there, so whoever
// acts on a result holds the evictions back, or takes references first.
typedef struct kvc_device_prefix kvc_device_prefix;

// A batch of lookups. Every pointer is a device address.
typedef struct {
    // sizeof(kvc_device_lookup_desc); kvc_device_lookup_desc_init sets it.
    uint32_t struct_size;
    // Requests.
    uint32_t requests;
    // Tokens at the end of each request that are not looked up. 1 by default, which leaves the last
    // one to be computed, whose logits sampling needs.
    uint32_t leave;
    // The most blocks that a request matches.
    uint32_t max_blocks;
    // Tokens of all requests.
    const uint32_t *tokens;
    // `[requests + 1]` offsets into tokens, ascending.
    const int32_t *indptr;
    // NULL for 0, or the name space of each request.
    const uint64_t *name_spaces;
    // `[requests]`: tokens that whole cached blocks cover.
    uint32_t *matched;
    // Their ids `[request][block][group]`; what follows a request's own is not written.
    int32_t *blocks;
    // Ids from a request to the next; 0 for max_blocks times the index's groups.
    int64_t block_stride;
    // NULL, or `[requests]`: how many tokens after those agree with one more cached block.
    uint32_t *tail_tokens;
    // NULL, or `[requests][group]`: the ids of that block, -1 where there is none.
    int32_t *tail_blocks;
    // NULL, or a word in which bit 1 is set where offsets do not ascend, and bit 4 where the copy
    // is not whole (it was never uploaded); such requests match nothing more.
    uint32_t *error_flag;
} kvc_device_lookup_desc;

// Writes the bytes of device memory that a copy of the index takes to `out_bytes`, beside what its
// uploads go through: room for the fullest that the index can become, so that addresses never change
// and a captured graph sees what was uploaded since.
//
// Threads: thread-safe.
kvc_status kvc_device_prefix_size(const kvc_prefix *prefix,
                                  uint64_t *out_bytes);

// Makes a copy of the index on a device, of nothing yet: kvc_device_prefix_sync fills it. From then
// on the index notes what changes in it. KVC_ERR_INVALID_STATE where it has a copy already,
// KVC_ERR_UNSUPPORTED where it has sliding windows.
//
// Threads: thread-safe.
kvc_status kvc_device_prefix_create(const kvc_device *device,
                                    kvc_prefix *prefix,
                                    kvc_device_prefix **out);

// Ends a copy; its index notes changes no more. NULL is accepted. KVC_ERR_INVALID_STATE while
// another thread is inside it.
//
// Threads: thread-safe.
kvc_status kvc_device_prefix_destroy(kvc_device_prefix *copy);

// Brings the copy up to what its index is now: enqueues the upload of what changed since the last
// call (of everything, the first time) on `stream` (a CUstream; NULL for the default stream), and
// writes how many bytes that was to `out_bytes`, which may be NULL. Waits for calls that change the
// index, and they for it; not for what it enqueues. The driver may wait for the stream while it takes
// the bytes, and so does the memory that they go through where it must grow. KVC_ERR_STALE_HANDLE
// where the index has been ended. Where the call fails the copy is as it was or in part newer, and
// the next call uploads everything.
//
// Syncs and lookups of one copy must be in one order on the device: on one stream, or by events. A
// sync cannot be captured in a graph.
//
// Threads: thread-safe.
kvc_status kvc_device_prefix_sync(kvc_device_prefix *copy,
                                  void *stream,
                                  uint64_t *out_bytes);

// Fills a kvc_device_lookup_desc of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_device_lookup_desc_init(kvc_device_lookup_desc *desc, uint32_t struct_size);

// Enqueues lookups in the copy on `stream` (a CUstream; NULL for the default stream): each request's
// longest cached prefix, by comparison of tokens, as kvc_prefix_lookup finds it. Allocates nothing
// and waits for nothing, so it can be captured in a CUDA graph and replayed over other tokens and
// later uploads. Marks nothing as used in the index.
//
// Threads: thread-safe, where calls share no outputs.
kvc_status kvc_device_prefix_lookup(const kvc_device_prefix *copy,
                                    const kvc_device_lookup_desc *desc,
                                    void *stream);

// ----------------------------------------------------------------------------------------------
// events: what becomes cached and what ceases to be, as it happens
// ----------------------------------------------------------------------------------------------
// Event: blocks that follow each other are cached now.
#define KVC_EVENT_STORED 1

// Event: blocks are not cached there any more.
#define KVC_EVENT_REMOVED 2

// Event: nothing is cached; whatever was said before is to be forgotten.
#define KVC_EVENT_CLEARED 3

// Medium: the pool that attention reads.
#define KVC_MEDIUM_GPU 1

// Medium: host memory behind it, KVC_TIER_HOST.
#define KVC_MEDIUM_CPU 2

// Medium: local files or devices, KVC_TIER_DISK.
#define KVC_MEDIUM_STORAGE 3

// Medium: another machine or the engine's own store, KVC_TIER_STORE.
#define KVC_MEDIUM_EXTERNAL 4

// Encoding of messages: events as maps, what current routers read.
#define KVC_ENCODING_MAP 0

// Encoding of messages: events as arrays, what older ones read.
#define KVC_ENCODING_ARRAY 1

// The publishing of a cache's events: a thread of its own.
typedef struct kvc_events kvc_events;

// One event. Digests are SHA-256 of the digest before and of the block's tokens, 32 bytes each;
// KV routers know a block by the last 8 bytes, big-endian. What it points to is gone when the
// callback returns.
typedef struct {
    // sizeof(kvc_event) of the library, which may be more than the caller knows.
    uint32_t struct_size;
    // KVC_EVENT_*. Of a KVC_EVENT_CLEARED the rest is 0.
    uint32_t kind;
    // KVC_MEDIUM_*.
    uint32_t medium;
    // The layer group.
    uint32_t group;
    // Number of the message: events that are published together have the same, and a number that
    // never comes says that events were lost there.
    uint64_t seq;
    // Stored: the name space. Else 0.
    uint64_t name_space;
    // The block before the first: 32 bytes; NULL where there is none or for other events.
    const uint8_t *parent;
    // 32 bytes for each block.
    const uint8_t *digests;
    // Blocks.
    uint64_t block_count;
    // Stored: the tokens of all blocks. Else NULL.
    const uint32_t *tokens;
    // How many those are.
    uint64_t token_count;
} kvc_event;

// Takes an event. Called from the publishing thread, one event at a time; it may call the cache,
// but not end the kvc_events, and what it takes long for delays further events and nothing else.
typedef void (*kvc_events_fn)(void *user, const kvc_event *event);

// Where the events go: to a callback, to ZeroMQ sockets, or both.
typedef struct {
    // sizeof(kvc_events_options); kvc_events_options_init sets it.
    uint32_t struct_size;
    // KVC_ENCODING_*, for ZeroMQ. KVC_ENCODING_MAP by default.
    uint32_t encoding;
    // Blocks of events that may wait, at least the device's blocks of all layer groups; 0 (the
    // default) for twice those, and no less than 65536. Where more wait, all are dropped, and the
    // stream begins anew. The blocks of tiers need no room of their own: they are told in turn.
    uint64_t capacity_blocks;
    // NULL (the default) for none.
    kvc_events_fn callback;
    // Handed to the callback.
    void *user;
    // Where a PUB socket binds, as "tcp://127.0.0.1:5557" or "ipc:///path"; NULL (the default) for
    // none. Needs a library with the feature zmq: KVC_ERR_UNSUPPORTED.
    const char *endpoint;
    // Where a ROUTER socket binds that repeats messages; NULL (the default) for none.
    const char *replay_endpoint;
    // The topic of all messages; NULL (the default) for the empty one.
    const char *topic;
    // Messages that are kept for replay and for slow subscribers. 10000 by default.
    uint64_t keep_messages;
    // Bytes of those, at most. 64 MiB by default.
    uint64_t keep_bytes;
    // The data-parallel rank that messages carry. 0 by default.
    uint32_t rank;
    // 1: addresses that other machines can reach are allowed. Events carry the tokens of all
    // prompts, to whoever connects. 0 by default.
    uint32_t remote;
} kvc_events_options;

// What a publisher has done.
typedef struct {
    // Number of the next message.
    uint64_t next_seq;
    // Events that wait.
    uint64_t queued_events;
    // Their blocks.
    uint64_t queued_blocks;
    // The most blocks that may wait.
    uint64_t capacity_blocks;
    // Events that were dropped because too many waited.
    uint64_t dropped_events;
    // How often events began to be dropped.
    uint64_t losses;
    // Subscribers of the PUB socket.
    uint32_t subscribers;
    // 1 while events that were taken from the queue are being published.
    uint32_t publishing;
} kvc_events_counts;

// Fills a kvc_events_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_events_options_init(kvc_events_options *options, uint32_t struct_size);

// Says what a name space is in the server's words, before anything is cached in it
// (KVC_ERR_INVALID_STATE): its digests are then the same in every process that says the same, and
// events carry salt and adapter, so that routers tell its blocks from those of others. Texts of at
// most 255 bytes; NULL for none. Without this call a name space is its number.
//
// Threads: thread-safe.
kvc_status kvc_events_describe(kvc_cache *cache,
                               uint64_t name_space,
                               const char *salt,
                               const char *lora);

// Publishes the events of a cache from now on: first KVC_EVENT_CLEARED and all that is resident,
// then what happens. One kvc_events at a time on a cache (KVC_ERR_INVALID_STATE), which must reuse
// prefixes. `options` names at least a callback or an endpoint.
//
// Of a cache with tiers the blocks of each are told, with the medium that it is: one that moves from
// the device to the host is stored there and then removed here. What the disk holds from before is
// told at the beginning, but for name spaces that were not described yet: those when they are. Of
// stores that say nothing by themselves (remote ones, a kvc_tier_store) is told what this cache put
// or found there, until it misses it. Takes a few hundred bytes and the
// tokens of each block in a tier.
//
// Threads: thread-safe.
kvc_status kvc_events_create(kvc_cache *cache,
                             const kvc_events_options *options,
                             kvc_events **out);

// Publishes what still waits, then KVC_EVENT_CLEARED, and ends the thread and its sockets. NULL is
// accepted. The cache may have ended before. KVC_ERR_INVALID_STATE from the callback.
//
// Threads: thread-safe.
kvc_status kvc_events_destroy(kvc_events *events);

// Publishes KVC_EVENT_CLEARED and then everything resident as stored, in place of all that still
// waits: for readers that come late or have lost track.
//
// Threads: thread-safe.
kvc_status kvc_events_snapshot(kvc_events *events);

// Writes what was published and what waits to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_events_stats(const kvc_events *events, kvc_events_counts *out, uint64_t out_bytes);

// Copies the address of the PUB socket (`replay` 0) or of the ROUTER socket (1) to `buf` as
// snprintf would, with the port that was taken where 0 was asked for, and the length of the whole
// text in bytes, the NUL not counted, to `out_len`. Empty where there is no such socket.
//
// Threads: thread-safe.
kvc_status kvc_events_endpoint(const kvc_events *events,
                               uint32_t replay,
                               char *buf,
                               uint64_t len,
                               uint64_t *out_len);

// ----------------------------------------------------------------------------------------------
// metrics: what a cache counts and times
// ----------------------------------------------------------------------------------------------
// How often times fell into which bucket. The upper bounds, in milliseconds: 1, 2, 5, 10, 20, 50,
// 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 30000, 60000, 120000, 300000, 600000, 1200000,
// 1800000; the last bucket has what is above them all. This struct never grows.
typedef struct {
    // Times in each bucket.
    uint64_t counts[22];
    // All times together, in milliseconds.
    uint64_t sum_ms;
} kvc_histogram;

// Everything that a cache counts and times. Block counts are of the first layer group.
typedef struct {
    // Blocks of the pool.
    uint32_t blocks;
    // Blocks that sequences use.
    uint32_t referenced_blocks;
    // Blocks that only the prefix index holds.
    uint32_t cached_blocks;
    // Live sequences.
    uint32_t sequences;
    // Prompt tokens given to kvc_seq_start.
    uint64_t queries_tokens;
    // Those of them that were found.
    uint64_t hits_tokens;
    // Entries that left the prefix index because their room was needed.
    uint64_t evicted_capacity_blocks;
    // Entries that left it by kvc_cache_clear_prefix.
    uint64_t evicted_cleared_blocks;
    // Calls that found too few blocks.
    uint64_t out_of_blocks;
    // How many they lacked, all together.
    uint64_t missing_blocks;
    // Calls that found every sequence in use.
    uint64_t out_of_sequences;
    // KV events that were dropped because nobody took them in time.
    uint64_t dropped_events;
    // Times are kept for one block in this many: what kvc_metrics_watch set; 0 for none.
    uint32_t watched_every;
    // 0.
    uint32_t reserved;
    // From becoming cached to being evicted, of watched blocks.
    kvc_histogram lifetime;
    // From the last use to being evicted, of watched blocks.
    kvc_histogram idle_before_evict;
    // From a use to the next, of watched blocks.
    kvc_histogram reuse_gap;
    // Blocks of layer groups with a window that were given up alone; their entries stayed.
    uint64_t evicted_window_blocks;
} kvc_metrics;

// Writes the cache's metrics to `out`, `out_bytes` (its sizeof) at most.
//
// Threads: thread-safe.
kvc_status kvc_metrics_read(const kvc_cache *cache, kvc_metrics *out, uint64_t out_bytes);

// Writes the cache's metrics as Prometheus reads them (text format 0.0.4, vLLM's names with the
// prefix "kvcache:") to `buf` as snprintf would, and the length of the whole text in bytes, the
// NUL not counted, to `out_len`. `buf` may be NULL with a `len` of 0; 8 KiB are enough,
// and 16 KiB for a cache with tiers.
//
// Threads: thread-safe.
kvc_status kvc_metrics_text(const kvc_cache *cache, char *buf, uint64_t len, uint64_t *out_len);

// Keeps the times of every `every`-th block from now on, for the histograms, which begin anew; 0
// (how a cache begins) for none. The clock is read once in each kvc_step_begin and kvc_seq_start,
// or never after kvc_metrics_set_time.
//
// Threads: thread-safe.
kvc_status kvc_metrics_watch(kvc_cache *cache, uint32_t every);

// Sets the time, in milliseconds since whenever the caller likes; the system's clock is not read
// from now on. Earlier than before counts as no time passed.
//
// Threads: thread-safe.
kvc_status kvc_metrics_set_time(kvc_cache *cache, uint64_t now_ms);

// ----------------------------------------------------------------------------------------------
// tier: a store of the engine's own
// ----------------------------------------------------------------------------------------------
// Finds out which of `count` keys (32 bytes each) the store has: `found[i]` 1 or 0. 0 for success.
typedef int32_t (*kvc_tier_exists_fn)(void *user,
                                      const uint8_t *keys,
                                      uint64_t count,
                                      uint8_t *found);

// An object that a store is given or asked for. The library verifies what it gets: a store that
// gives something else costs a miss. This struct never grows.
typedef struct {
    // Its name: 32 bytes.
    const uint8_t *key;
    // Its bytes: to be read in a put, to be written in a get.
    void *bytes;
    // How many; all objects of a cache have the same length.
    uint64_t length;
} kvc_tier_object;

// Puts or gets objects; writes an outcome for each: KVC_OK, KVC_ERR_TIER_FAILED, in a get
// KVC_ERR_BAD_BLOCK for what the store does not have, in a put KVC_ERR_OUT_OF_MEMORY where it is
// full. A get writes all bytes of an object whose outcome is KVC_OK.
typedef void (*kvc_tier_move_fn)(void *user,
                                 const kvc_tier_object *objects,
                                 uint64_t count,
                                 kvc_status *outcomes);

// Removes objects by `count` keys of 32 bytes; what is not there is no failure.
typedef void (*kvc_tier_remove_fn)(void *user, const uint8_t *keys, uint64_t count);

// A store of the engine's own: functions that the tier's threads call, several at a time, and that
// block until they are done. What they point to lives for the call.
typedef struct {
    // sizeof(kvc_tier_store); kvc_tier_store_init sets it.
    uint32_t struct_size;
    // 0.
    uint32_t reserved;
    // Handed to each function.
    void *user;
    // Which objects it has.
    kvc_tier_exists_fn exists;
    // Keeps objects.
    kvc_tier_move_fn put;
    // Gives objects.
    kvc_tier_move_fn get;
    // Forgets objects.
    kvc_tier_remove_fn remove;
} kvc_tier_store;

// Fills a kvc_tier_store of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_tier_store_init(kvc_tier_store *store, uint32_t struct_size);

// ----------------------------------------------------------------------------------------------
// tier: where blocks go that the device has no room for, and come back from
// ----------------------------------------------------------------------------------------------
// Tier: memory of the host.
#define KVC_TIER_HOST 1

// Tier: files on a local disk.
#define KVC_TIER_DISK 2

// Tier: the engine's own store, or a remote one.
#define KVC_TIER_STORE 3

// The part of a layer group that a cache holds. This struct never grows.
typedef struct {
    // The first of its layers, counted within the group of the whole model.
    uint32_t first_layer;
    // The first of its KV heads.
    uint32_t first_head;
} kvc_tier_slice;

// The tiers of a cache.
typedef struct {
    // sizeof(kvc_tier_options); kvc_tier_options_init sets it.
    uint32_t struct_size;
    // Blocks of a lower priority (0 to 100, 35 where none was given) are not demoted. 30 by default.
    uint32_t least_priority;
    // What the model is called, at most 1024 bytes; changes whenever its weights do. Not NULL.
    const char *model;
    // Blocks of host memory that stay there after they were evicted from the device. 0 by default. A block
    // with raw rows (sink_tokens) takes several: as many as hold those, 8 at most. So do counts of blocks.
    uint64_t host_blocks;
    // Blocks of host memory for what is on its way, and is not kept. 64 by default.
    uint64_t transit_blocks;
    // A directory for the disk tier; NULL (the default) for none.
    const char *disk_dir;
    // The most bytes of the disk tier's objects. 64 GiB by default.
    uint64_t disk_bytes;
    // The engine's own store, below host and disk; NULL (the default) for none.
    const kvc_tier_store *store;
    // Where in the model the cache's layer groups lie, one for each; NULL (the default) for a cache
    // of the whole model.
    const kvc_tier_slice *slices;
    // How many those are: the cache's layer groups, or 0 for NULL.
    uint32_t slice_count;
    // Blocks that fewer prompts have found are not demoted. 0 by default.
    uint32_t least_uses;
    // 1: blocks go to disk and store when they are committed, not only when they are evicted. 0 by
    // default.
    uint32_t on_commit;
    // 1 (the default): the disk is read and written past the page cache, where it can be.
    uint32_t direct;
    // Threads that read, of each lower tier. 2 by default.
    uint32_t readers;
    // Demotions that may wait, of each lower tier; more are dropped. 256 by default.
    uint32_t queued_blocks;
    // Seconds that the engine takes to compute a token of a prompt. Loading that takes longer than
    // computing is left; 0 (the default): not known, everything is loaded.
    double prefill_seconds;
    // The address of a remote store, below host and disk, at most 4096 bytes; NULL (the default) for
    // none. `redis://[[USER:]PASSWORD@]HOST[:PORT][/DB]`, `rediss://...` over TLS, `redis+unix:///PATH`,
    // `s3+http://HOST[:PORT]/BUCKET`, `s3+https://HOST[:PORT]/BUCKET` or `s3://BUCKET`, with the
    // environment's AWS_* credentials; through NIXL `nixl+posix:/DIR`, a directory that machines share, or
    // `nixl+` before one of the last three. Nothing is connected to yet: a store that is down is found to
    // be when it is used. KVC_ERR_UNSUPPORTED in a build without the feature remote, or remote-tls
    // for TLS (certificates of Mozilla's authorities, or of those that SSL_CERT_FILE in the environment
    // names); KVC_ERR_TIER_FAILED where the system does not find NIXL's libnixl_capi.so, and
    // KVCACHE_NIXL in the environment does not name it.
    const char *remote;
    // How many milliseconds a call of the remote store may take, connecting included: 1 to 3,600,000.
    // 5,000 by default.
    uint32_t remote_timeout_ms;
    // For a cache on a GPU, whose blocks of host memory are page-locked, so that they are copied without
    // a detour and beside the kernels; all of that memory is taken by kvc_tier_attach. 1: plain memory
    // instead, where the system refuses so much page-locked memory (KVC_ERR_OUT_OF_MEMORY); copies are
    // slower then, and calls may wait for them. 0 by default; without a GPU all memory is plain.
    uint32_t plain_memory;
    // For a cache on a GPU: so many blocks are left free when a step has begun, so that what the next
    // one takes was copied beside the kernels of this one; about as many as a step takes. 0 by default:
    // a step evicts what it needs, and its kernels wait until that was copied.
    uint32_t ahead_blocks;
    // 0.
    uint32_t reserved;
} kvc_tier_options;

// What a tier counted since kvc_tier_attach, in blocks where it says nothing else.
typedef struct {
    // KVC_TIER_*.
    uint32_t kind;
    // 1: the store failed, and is being left alone for a while.
    uint32_t down;
    // Demoted to it.
    uint64_t stored;
    // Bytes of those.
    uint64_t stored_bytes;
    // Demotions for which nothing was copied, since it had the block.
    uint64_t present;
    // Demotions dropped, since too many waited or the store was being left alone.
    uint64_t dropped;
    // Demotions that it had no room for.
    uint64_t full;
    // Loaded from it.
    uint64_t loaded;
    // Bytes of those.
    uint64_t loaded_bytes;
    // Asked for, and not there.
    uint64_t missed;
    // Damaged, or another block's; removed, and missed.
    uint64_t bad;
    // Calls of the store that failed; of the host, copies that a device could not make.
    uint64_t failures;
    // Loads that somebody stopped waiting for.
    uint64_t timeouts;
    // Evicted from it.
    uint64_t evicted;
    // Waiting to be stored or loaded.
    uint64_t queued;
    // Held, where that is known.
    uint64_t objects;
    // Bytes held, where that is known.
    uint64_t bytes;
    // Seconds before the first byte of a load comes; 0 before the first load.
    double load_latency;
    // Bytes a second of loads; 0 before the first load.
    double load_bandwidth;
    // 1: its memory is page-locked, so that a GPU copies from and to it by itself. Of the host alone.
    uint32_t page_locked;
    // 0.
    uint32_t reserved;
} kvc_tier_counts;

// Fills a kvc_tier_options of `struct_size` bytes with its defaults.
//
// Threads: thread-safe.
kvc_status kvc_tier_options_init(kvc_tier_options *options, uint32_t struct_size);

// Gives a cache tiers, before anything is cached in it (KVC_ERR_INVALID_STATE); it must reuse
// prefixes. KVC_ERR_TIER_FAILED where the disk's directory cannot be used, KVC_ERR_INVALID_STATE
// where another process uses it or it is of another version: the cache works on without tiers.
//
// Threads: thread-safe.
kvc_status kvc_tier_attach(kvc_cache *cache, const kvc_tier_options *options);

// Copies everything that is cached to disk and store, as far as it is to be demoted, and waits at
// most `wait_ms` milliseconds, during which the cache is in use; writes 1 to `out_done` where all
// is there, else 0. What waits in queues is written in any case, before the cache ends.
// KVC_ERR_TIER_FAILED while a remote store refuses the password, key or bucket, or has a certificate that
// is not trusted; kvc_last_error says which, and names no secret.
//
// Threads: thread-safe.
kvc_status kvc_tier_flush(kvc_cache *cache,
                          uint32_t wait_ms,
                          uint32_t *out_done);

// Writes what tier `index` of a cache counted to `out`, `out_bytes` (its sizeof) at most: 0 is the
// host, then disk, store and remote store as far as they are there. KVC_ERR_INVALID_ARGUMENT past the last.
//
// Threads: thread-safe.
kvc_status kvc_tier_stats(const kvc_cache *cache,
                          uint32_t index,
                          kvc_tier_counts *out,
                          uint64_t out_bytes);

// ----------------------------------------------------------------------------------------------
// onboard: a sequence starts before its blocks are there
// ----------------------------------------------------------------------------------------------
// A load: nothing is loaded, or all of it is there.
#define KVC_ONBOARD_COMPLETE 1

// A load: layers are on their way.
#define KVC_ONBOARD_LOADING 2

// A load: it failed; kvc_onboard_cancel before the sequence's next step.
#define KVC_ONBOARD_FAILED 3

// Why a load failed: the tier does not have a block of it any more.
#define KVC_MISSED_ABSENT 1

// Why a load failed: a block of it was damaged, or another block. It was removed from the tier.
#define KVC_MISSED_BAD 2

// Why a load failed: the tier or the device failed, or the tier is being left alone since it did.
#define KVC_MISSED_DOWN 3

// Why a load failed: it was cancelled.
#define KVC_MISSED_CANCELLED 4

// How the load of a sequence stands.
typedef struct {
    // KVC_ONBOARD_*. Where it is KVC_ONBOARD_COMPLETE all else is 0.
    uint32_t state;
    // Layers that are there, in all groups.
    uint32_t ready_layers;
    // Tokens that the sequence held on the device before.
    uint64_t device_tokens;
    // Tokens that come.
    uint64_t loading_tokens;
    // The layer group of the first layer, in the order in which they come, that is not there.
    uint32_t missing_group;
    // That layer, counted within the group.
    uint32_t missing_layer;
    // KVC_MISSED_*: why it never will be; 0 while it is on its way.
    uint32_t why;
    // 0.
    uint32_t reserved;
} kvc_onboard_progress;

// Starts a sequence as kvc_seq_start_media does (`media_in` may be NULL for 0 media), for an engine
// that begins before all of its blocks are on the device: what tiers have of the prompt, as far as
// loading is worth it, is counted in `out_cached_tokens`, and comes layer by layer. Before a layer is
// attended it must be there (kvc_onboard_wait_step, kvc_onboard_wait; kvc_step_attend refuses it with
// KVC_ERR_INVALID_STATE before), and all of them before the step is committed; other sequences find
// these blocks only then. Till then the sequence can be neither forked nor truncated. Waits for
// nothing. KVC_ERR_INVALID_STATE for a cache without tiers.
//
// Of a store that has to be asked (a remote one, or the engine's own) only blocks are counted that it
// was seen to have, and all layers of a block come at once: kvc_prefetch_create fetches the others.
//
// Threads: thread-safe.
kvc_status kvc_onboard_start(kvc_cache *cache,
                             const uint32_t *prompt,
                             uint64_t prompt_tokens,
                             const kvc_media *media_in,
                             uint32_t media_count,
                             uint64_t name_space,
                             kvc_seq *out_seq,
                             uint32_t *out_cached_tokens);

// Waits at most `wait_ms` milliseconds (0: not at all), during which other threads may use the cache,
// for layer `layer` of group `group` of all blocks of a sequence; writes 1 to `out_there` where it is
// there, else 0. What has arrived is copied to the blocks in this call; on a device the cache's stream
// waits for the copy. 1 for a sequence that loads nothing.
//
// KVC_ERR_LAYER_MISSING where it never will be there; kvc_last_error names the first layer that is not,
// and why. Cancel the step that the sequence is in, then kvc_onboard_cancel, and compute its tokens.
//
// Threads: thread-safe.
kvc_status kvc_onboard_wait(kvc_cache *cache,
                            kvc_seq seq,
                            uint32_t group,
                            uint32_t layer,
                            uint32_t wait_ms,
                            uint32_t *out_there);

// The same for all sequences of an open step at once: 1 where the layer of all of them is there. One
// call a layer, between kvc_step_append and kvc_step_attend.
//
// Threads: per-handle for the step, thread-safe for the cache.
kvc_status kvc_onboard_wait_step(kvc_cache *cache,
                                 kvc_step *step,
                                 uint32_t group,
                                 uint32_t layer,
                                 uint32_t wait_ms,
                                 uint32_t *out_there);

// Writes how the load of a sequence stands to `out`, `out_bytes` (its sizeof) at most. Copies nothing
// and waits for nothing.
//
// Threads: thread-safe.
kvc_status kvc_onboard_state(const kvc_cache *cache,
                             kvc_seq seq,
                             kvc_onboard_progress *out,
                             uint64_t out_bytes);

// Gives up what has not come of a sequence, and writes how many tokens it holds then to `out_tokens`:
// those that were on the device before, or all where the load is complete. The tokens after those are
// to be computed. KVC_ERR_INVALID_STATE while a step holds the sequence.
//
// Threads: thread-safe.
kvc_status kvc_onboard_cancel(kvc_cache *cache,
                              kvc_seq seq,
                              uint32_t *out_tokens);

// ----------------------------------------------------------------------------------------------
// prefetch: a prompt's blocks on their way back
// ----------------------------------------------------------------------------------------------
// Why so much is loaded: no tier has the next block.
#define KVC_WHY_NOTHING_FOUND 1

// Why so much is loaded: what prefill costs is not known, so all of it is.
#define KVC_WHY_COST_UNKNOWN 2

// Why so much is loaded: no load from this tier was timed yet, so all of it is.
#define KVC_WHY_RATE_UNKNOWN 3

// Why so much is loaded: loading is faster than computing.
#define KVC_WHY_LOAD_IS_FASTER 4

// Why so much is loaded: loading is faster up to here, and computing from here on.
#define KVC_WHY_LOAD_IS_FASTER_AT_FIRST 5

// Why so much is loaded: computing is faster.
#define KVC_WHY_COMPUTE_IS_FASTER 6

// A prompt whose blocks are on their way from lower tiers.
typedef struct kvc_prefetch kvc_prefetch;

// What tiers have of a prompt, and what was done about it. This struct never grows.
typedef struct {
    // Leading tokens on the device.
    uint64_t device_tokens;
    // Tokens after those that are in host memory.
    uint64_t host_tokens;
    // Blocks after those on the device that tiers have; the engine's own store is asked later, and
    // taken to have the rest.
    uint64_t found_blocks;
    // Leading blocks of those that are worth loading.
    uint64_t load_blocks;
    // Seconds that loading those takes; 0 where it is not known.
    double load_seconds;
    // Seconds that computing the same takes; 0 where it is not known.
    double compute_seconds;
    // KVC_WHY_*.
    uint32_t why;
    // 0.
    uint32_t reserved;
} kvc_tier_decision;

// Begins to load what lower tiers have of a prompt into host memory, from where kvc_seq_start takes
// it; writes what was found and decided to `out_decision` where that is not NULL. Waits for
// nothing. End it with kvc_prefetch_destroy.
//
// Threads: thread-safe.
kvc_status kvc_prefetch_create(kvc_cache *cache,
                               const uint32_t *tokens,
                               uint32_t token_count,
                               uint64_t name_space,
                               kvc_prefetch **out,
                               kvc_tier_decision *out_decision);

// The same for a prompt with media, which kvc_seq_start_media takes: see there.
//
// Threads: thread-safe.
kvc_status kvc_prefetch_create_media(kvc_cache *cache,
                                     const uint32_t *tokens,
                                     uint32_t token_count,
                                     const kvc_media *media_in,
                                     uint32_t media_count,
                                     uint64_t name_space,
                                     kvc_prefetch **out,
                                     kvc_tier_decision *out_decision);

// Takes what has arrived for `cache`, after at most `wait_ms` milliseconds of waiting for the rest
// (0: none), during which other threads may use the cache; writes 1 to `out_done` where nothing
// more comes, else 0. The cache is the one that the prefetch was made for.
//
// Threads: thread-safe.
kvc_status kvc_prefetch_wait(kvc_cache *cache,
                             kvc_prefetch *prefetch,
                             uint32_t wait_ms,
                             uint32_t *out_done);

// Ends a prefetch; what has not arrived is given up. NULL is accepted.
//
// Threads: thread-safe.
kvc_status kvc_prefetch_destroy(kvc_prefetch *prefetch);

// ----------------------------------------------------------------------------------------------
// transfer: a sequence's blocks from one cache to another
// ----------------------------------------------------------------------------------------------
// Writes the full blocks of a sequence to the descriptor `fd`, which must block and is not closed; how
// many tokens those are goes to `out_tokens`. `model` is what the reader calls the model too, at most
// 1024 bytes; `slices[slice_count]` say where in it the cache's layer groups lie, NULL for a cache of
// the whole model. The cache is in use until all is written: where the other side may be slow, write
// to memory or a file first. KVC_ERR_TIER_FAILED where writing fails, also because nobody reads any
// more (there is no SIGPIPE); what was written by then is no stream.
//
// Threads: thread-safe.
kvc_status kvc_transfer_export(kvc_cache *cache,
                               kvc_seq seq,
                               const char *model,
                               const kvc_tier_slice *slices,
                               uint32_t slice_count,
                               int32_t fd,
                               uint64_t *out_tokens);

// Reads the blocks of a sequence from streams that kvc_transfer_export wrote, into the prefix index of
// `name_space`, where sequences that are started find them; how many tokens are there then goes to
// `out_tokens`. The `fd_count` descriptors block, are not closed, and are read to the ends of their
// streams and no further. Several streams are parts of one: of the same tokens, and together with all
// layers and heads that this cache holds. The cache is in use until all is read.
//
// KVC_ERR_INVALID_ARGUMENT for streams that are damaged, of another model, namespace or format, or do
// not cover the cache's part; KVC_ERR_TIER_FAILED where one fails or ends early; KVC_ERR_UNSUPPORTED
// for sealed tiles that would have to be cut, or beside other sink_tokens. Nothing is cached then.
//
// Threads: thread-safe.
kvc_status kvc_transfer_import(kvc_cache *cache,
                               uint64_t name_space,
                               const char *model,
                               const kvc_tier_slice *slices,
                               uint32_t slice_count,
                               const int32_t *fds,
                               uint32_t fd_count,
                               uint64_t *out_tokens);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // KVCACHE_H
