// Written from src/kernels/params by the test `the_committed_header_is_current`.
// Do not edit: run it with KVCACHE_BLESS=1.
#pragma once
#include <stdint.h>

// Append: scatters the K and V rows of new tokens to cache slots, K and Q optionally rotated.
struct kvc_append_params {
    // New keys: row of token 0, head 0.
    const void *k;
    // New values, likewise; null where values lie in keys.
    const void *v;
    // Queries, likewise, rows of `k_dim`; null to leave them alone.
    const void *q;
    // Rotated queries; must not overlap `q`.
    void *q_out;
    // Keys of block 0, head 0, token 0.
    void *k_cache;
    // Values of block 0, head 0, token 0.
    void *v_cache;
    // Slot of each token: block * block_tokens + offset, or negative to skip the token, whose rows may
    // be read all the same.
    const int64_t *slots;
    // Position of each token; read only with a rotation.
    const uint32_t *positions;
    // Cosines `[rope_positions][rope_dim / 2]`; null for no rotation.
    const float *cosines;
    // Sines of the same shape.
    const float *sines;
    // Raised (bit 0: a slot past the pool, bit 1: a position past the tables), or null.
    uint32_t *error_flag;
    // Elements from a token to the next in `k`.
    int64_t k_token;
    // Elements from a head to the next in `k`.
    int64_t k_head;
    // Elements from a token to the next in `v`.
    int64_t v_token;
    // Elements from a head to the next in `v`.
    int64_t v_head;
    // Elements from a token to the next in `q`.
    int64_t q_token;
    // Elements from a head to the next in `q`.
    int64_t q_head;
    // Elements from a token to the next in `q_out`.
    int64_t q_out_token;
    // Elements from a head to the next in `q_out`.
    int64_t q_out_head;
    // Elements from a block to the next in `k_cache`.
    int64_t k_cache_block;
    // Elements from a head to the next in `k_cache`.
    int64_t k_cache_head;
    // Elements from a token to the next in `k_cache`.
    int64_t k_cache_token;
    // Elements from a block to the next in `v_cache`.
    int64_t v_cache_block;
    // Elements from a head to the next in `v_cache`.
    int64_t v_cache_head;
    // Elements from a token to the next in `v_cache`.
    int64_t v_cache_token;
    // Tokens of the call.
    uint32_t tokens;
    // Tokens that one thread block takes, a power of two.
    uint32_t tokens_per_block;
    // Query heads; 0 without `q`.
    uint32_t q_heads;
    // KV heads.
    uint32_t kv_heads;
    // Channels of a key, a multiple of 8.
    uint32_t k_dim;
    // Channels of a value, a multiple of 8; 0 where values lie in keys.
    uint32_t v_dim;
    // Tokens of a cache block.
    uint32_t block_tokens;
    // Blocks that exist.
    uint32_t num_blocks;
    // First channel that rotates, a multiple of 8.
    uint32_t rope_first;
    // Channels that rotate, even.
    uint32_t rope_dim;
    // Rows of the tables.
    uint32_t rope_positions;
    // 0: channel i pairs with i + rope_dim / 2; 1: 2i pairs with 2i + 1.
    uint32_t rope_interleaved;
    // Type id of the new rows and of `q_out`.
    uint32_t row_dtype;
    // Type id of the cache.
    uint32_t cache_dtype;
};
static_assert(sizeof(kvc_append_params) == 256, "layout of kvc_append_params");

// Appends rows of K and V as codes: FP8, INT8_T, INT4_T, NVFP4.
struct kvc_append_token_params {
    // The call. Strides of the caches are in bytes; `k_dim` is `v_dim`, or 576 with one head and
    // `v_dim` 0 (latents of 512 channels and 64 rotary ones); `cache_dtype` means nothing. The
    // error flag's bit 5 says that a row was not finite or outside its format's range, and not
    // written.
    kvc_append_params call;
    // Scales of the keys of block 0, head 0, token 0; null where the format has none.
    void *k_scales;
    // The same of values.
    void *v_scales;
    // A scale of all keys of each KV head (FP8, NVFP4), or null for 1.
    const float *k_heads;
    // A scale of all values of each KV head, or null.
    const float *v_heads;
    // Bytes from a block to the next in `k_scales`.
    int64_t k_scale_block;
    // Bytes from a head to the next in `k_scales`.
    int64_t k_scale_head;
    // Bytes from a token to the next in `k_scales`.
    int64_t k_scale_token;
    // Bytes from a block to the next in `v_scales`.
    int64_t v_scale_block;
    // Bytes from a head to the next in `v_scales`.
    int64_t v_scale_head;
    // Bytes from a token to the next in `v_scales`.
    int64_t v_scale_token;
    // Format id.
    uint32_t format;
    // 1 where keys are stored rotated (INT4_T rows always are). Else 0.
    uint32_t k_rotated;
};
static_assert(sizeof(kvc_append_token_params) == 344, "layout of kvc_append_token_params");

// Neighbouring sequences of a batch that share a prefix, or none of whose prefixes is used.
struct kvc_cascade_segment {
    // The first sequence.
    uint32_t first_seq;
    // How many; 0 in an entry that only fills the list up, whose `first_seq` is the batch.
    uint32_t seqs;
    // Blocks at the start of their tables that all of them share; 0 for none.
    uint32_t shared_blocks;
    // Keeps the size a power of two. Zero.
    uint32_t reserved;
};
static_assert(sizeof(kvc_cascade_segment) == 16, "layout of kvc_cascade_segment");

// Splits a batch for cascade attention: the shared prefix of each segment becomes a sequence
// whose queries are those of the whole segment, and what follows it stays a sequence each.
struct kvc_cascade_split_params {
    // `[segments]`, which cover the sequences in order.
    const kvc_cascade_segment *segments;
    // Tokens of each sequence, those of the queries included; below 1 is empty.
    const int32_t *seq_lens;
    // First row of each sequence and the end of the last, `[batch + 1]`; null for `q_len` each.
    const int32_t *q_indptr;
    // Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
    const int32_t *table;
    // Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
    const int32_t *table_indptr;
    // Tokens of each sequence past the shared prefix, `[batch]`.
    int32_t *own_lens;
    // Where their blocks begin in `table`, `[batch + 1]`.
    int32_t *own_indptr;
    // Tokens of each segment's shared prefix, `[segments]`.
    int32_t *shared_lens;
    // Where its blocks begin in `table`, `[segments + 1]`.
    int32_t *shared_indptr;
    // First row of each segment, `[segments + 1]`.
    int32_t *shared_rows;
    // Raised (bit 0: a table too short, bit 3: tables or lengths do not allow a prefix as long
    // as its segment says, and it was made shorter), or null.
    uint32_t *error_flag;
    // Entries from a sequence to the next in a dense table.
    int64_t table_stride;
    // Entries of `segments`.
    uint32_t count;
    // Sequences.
    uint32_t batch;
    // Query tokens of a sequence where `q_indptr` is null.
    uint32_t q_len;
    // Tokens of a cache block.
    uint32_t block_tokens;
};
static_assert(sizeof(kvc_cascade_split_params) == 112, "layout of kvc_cascade_split_params");

// Copies blocks of one pool to blocks of another (or the same), or fills blocks with zeros.
//
// A pool is one or more planes (an allocation of one layer, K or V of one layer), each with
// every block, all alike. In a plane a block is one or more runs. Whole blocks that lie in one
// piece are one run.
struct kvc_copy_params {
    // Block 0 of plane 0 of the pool that is read; not used for zeros.
    const void *from;
    // Block 0 of plane 0 of the pool that is written.
    void *to;
    // Address of block 0 of each plane, `[planes]`; null: `from_plane` bytes apart from `from`.
    const uint64_t *from_planes;
    // The same of the pool that is written.
    const uint64_t *to_planes;
    // `[count][2]` ids, from and to; for zeros `[count]` ids.
    const void *list;
    // Tokens of each entry, from the first of every run; null for whole runs.
    const uint32_t *tokens;
    // Raised (bit 0: an id outside its pool), or null.
    uint32_t *error_flag;
    // Bytes from a plane to the next.
    int64_t from_plane;
    // Bytes from a block to the next.
    int64_t from_block;
    // Bytes from a run of a block to the next.
    int64_t from_run;
    // Bytes from a plane to the next.
    int64_t to_plane;
    // Bytes from a block to the next.
    int64_t to_block;
    // Bytes from a run of a block to the next.
    int64_t to_run;
    // Entries of `list`.
    uint32_t count;
    // 1 where ids are int64, 0 where they are int32.
    uint32_t wide_ids;
    // Planes of a pool.
    uint32_t planes;
    // Runs that a block has in a plane.
    uint32_t runs;
    // Bytes of a run, a multiple of 16.
    uint32_t run_bytes;
    // Bytes of a token in a run; only with `tokens`.
    uint32_t token_bytes;
    // Blocks of the pool that is read.
    uint32_t from_blocks;
    // Blocks of the pool that is written.
    uint32_t to_blocks;
    // Slices of 4 KiB that a run is cut into; the launch fills it in.
    uint32_t slices;
    // Entries times planes, runs and slices; the launch fills it in.
    uint32_t items;
};
static_assert(sizeof(kvc_copy_params) == 144, "layout of kvc_copy_params");

// Where a range of work begins: what a thread block of the decode kernel works on at a time,
// once for each unit (a KV head and up to eight of its query columns). It ends where the next
// begins, perhaps several sequences later.
struct kvc_decode_range {
    // The sequence.
    uint32_t seq;
    // Tokens of its span before the range.
    uint32_t offset;
    // The range's first token.
    uint32_t begin;
    // One past the last token of the sequence.
    uint32_t end;
};
static_assert(sizeof(kvc_decode_range) == 16, "layout of kvc_decode_range");

// What a plan says of a sequence.
struct kvc_decode_span {
    // First token that any of its queries can see.
    uint32_t begin;
    // One past the last.
    uint32_t end;
    // The range that its first token lies in.
    uint32_t first;
    // The range that its last token lies in.
    uint32_t last;
};
static_assert(sizeof(kvc_decode_span) == 16, "layout of kvc_decode_span");

// What a plan says of all.
struct kvc_decode_head {
    // Ranges. One more is written: its sequence is the number of sequences.
    uint32_t ranges;
    // Partial results that a range can have: 1, or 2 where it can hold the end of a sequence
    // and the beginning of another.
    uint32_t slots;
    // Ranges that blocks have taken after their first; zero before a call, and after it.
    uint32_t taken;
    // Blocks that are done with a call; zero before it, and after it.
    uint32_t done;
};
static_assert(sizeof(kvc_decode_head) == 16, "layout of kvc_decode_head");

// Plans paged decode on the device: cuts the contexts into ranges.
struct kvc_decode_plan_params {
    // Tokens of each sequence, those of the queries included; below 1 is empty.
    const int32_t *seq_lens;
    // Written whole.
    kvc_decode_head *head;
    // `[max_ranges + 1]`, written from the first.
    kvc_decode_range *ranges;
    // `[batch]`.
    kvc_decode_span *spans;
    // `[max_ranges][units]` counters, zeroed as far as there are ranges.
    uint32_t *tickets;
    // Raised (bit 2) where fixed pieces did not fit the bounds and were made longer, or null.
    uint32_t *error_flag;
    // Sequences.
    uint32_t batch;
    // Query tokens of each sequence.
    uint32_t q_len;
    // Sliding window in tokens; 0 for none.
    uint32_t window;
    // Units of a range.
    uint32_t units;
    // Tokens of a piece in the deterministic mode, a multiple of 64; 0 to balance.
    uint32_t fixed_piece;
    // Tokens that ranges are multiples of when balancing, a multiple of 64.
    uint32_t granule;
    // Ranges that are there at the beginning when balancing, at least 1.
    uint32_t longs;
    // Sequences of rows at positions between two multiples of this: what their window hides
    // follows from its first; 0 for that of the first of `q_len` rows.
    uint32_t row_span;
    // Keeps the size a multiple of 8. Zero.
    uint32_t reserved;
    // Room in `ranges`: at least `2 * longs` when balancing, whose rest is for short ones,
    // else at least `batch`.
    uint32_t max_ranges;
};
static_assert(sizeof(kvc_decode_plan_params) == 88, "layout of kvc_decode_plan_params");

// Paged decode: attention of 1 to 8 query tokens of each sequence over its cached context.
struct kvc_decode_params {
    // Queries: row, then head, then `head_dim` channels; rounded to the cache's type.
    const void *q;
    // Keys of block 0, head 0, token 0.
    const void *k;
    // Values of block 0, head 0, token 0.
    const void *v;
    // Outputs, rows as in `q`.
    void *out;
    // Natural logarithms of the denominators `[row][q_heads]`, or null.
    float *lse;
    // Rows of each sequence, `[batch + 1]`, at most `q_len` each; null for `q_len` each.
    const int32_t *q_indptr;
    // For each row of `q` the tokens of its sequence's tail that it sees, or null; with it
    // `causal` means nothing. The tail is the last tokens of a sequence, those of its rows:
    // bit `j` is the token of its row `j`, bits past its rows mean nothing. All tokens before
    // the tail are seen. For a tree, a row has the bits of its path, its own included: its
    // position, and that of its token, for window and ALiBi is then that in its path (as many
    // places into the tail as it has bits, less one; the tail's first without any).
    const uint32_t *tail_mask;
    // Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
    const int32_t *table;
    // Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
    const int32_t *table_indptr;
    // Tokens of each sequence, those of the queries included; below 1 is empty.
    const int32_t *seq_lens;
    // A logit for each query head that joins the denominator, or null.
    const float *sinks;
    // ALiBi slope of each query head, or null.
    const float *slopes;
    // The plan's summary.
    kvc_decode_head *head;
    // The plan's ranges.
    const kvc_decode_range *ranges;
    // The plan's spans.
    const kvc_decode_span *spans;
    // The plan's counters: zero before the call, and after it.
    uint32_t *tickets;
    // Partial results: `[slot][unit][8][head_dim]`, then `[slot][unit][8]` of their LSE.
    float *partial;
    // Raised (bit 0: a block id outside the pool or a table too short, bit 1: a sequence of
    // more than `q_len` rows), or null.
    uint32_t *error_flag;
    // Elements from a row to the next in `q`.
    int64_t q_row;
    // Elements from a head to the next in `q`.
    int64_t q_head;
    // Elements from a row to the next in `out`.
    int64_t out_row;
    // Elements from a head to the next in `out`.
    int64_t out_head;
    // Elements from a block to the next in `k`.
    int64_t k_block;
    // Elements from a head to the next in `k`.
    int64_t k_head;
    // Elements from a token to the next in `k`.
    int64_t k_token;
    // Elements from a block to the next in `v`.
    int64_t v_block;
    // Elements from a head to the next in `v`.
    int64_t v_head;
    // Elements from a token to the next in `v`.
    int64_t v_token;
    // Entries from a sequence to the next in a dense table.
    int64_t table_stride;
    // Query tokens of a sequence, at most.
    uint32_t q_len;
    // 1 where a query sees no key after its own position, else 0.
    uint32_t causal;
    // Query heads.
    uint32_t q_heads;
    // KV heads.
    uint32_t kv_heads;
    // Units of a range: `kv_heads` times the column tiles of a KV head.
    uint32_t units;
    // Tokens of a cache block.
    uint32_t block_tokens;
    // Blocks that exist.
    uint32_t num_blocks;
    // Sliding window in tokens; 0 for none.
    uint32_t window;
    // Slots that `partial` has room for.
    uint32_t max_slots;
    // Stages of the pipeline, 1 to 3.
    uint32_t stages;
    // 1 where the rows of a head follow each other within a block of a multiple of 8 tokens,
    // so that eight are one run: devices that have bulk copies then use them. Else 0.
    uint32_t bulk;
    // Keeps the size a multiple of 8. Zero.
    uint32_t reserved;
    // Type id of `q`.
    uint32_t q_dtype;
    // Type id of `out`.
    uint32_t out_dtype;
    // Factor of the dot products.
    float scale;
    // Logit soft-cap; 0 for none.
    float softcap;
};
static_assert(sizeof(kvc_decode_params) == 296, "layout of kvc_decode_params");

// Paged decode over sealed tiles and the raw ones of the same sequences. Causal.
struct kvc_decode_tile_params {
    // The call. Its table and `num_blocks` are those of the records; `k`, `v` and their
    // strides, in elements, those of the staged raw rows, bf16. `block_tokens` is
    // `tile_tokens`; `bulk` is 1 to copy records in bulk where the device can.
    kvc_decode_params call;
    // Record of block 0, head 0.
    const void *records;
    // `[batch + 1]` offsets into `raw_blocks`, never decreasing.
    const int32_t *raw_indptr;
    // For each sequence of the call whose tables it reads, so that the rows of one can be
    // several; null for its own. Tables are then those of the owners.
    const int32_t *owners;
    // Tile of the sequence and raw slot, a pair each, tiles ascending: every tile that holds a
    // query, and every earlier one whose record is not sealed.
    const int32_t *raw_blocks;
    // Keys of raw slot `staging_blocks`, head 0, token 0, bf16; null without scratch blocks.
    const void *scratch_k;
    // Values, likewise.
    const void *scratch_v;
    // Bytes from a block to the next in `records`.
    int64_t record_block;
    // Bytes from a KV head to the next in `records`.
    int64_t record_head;
    // Elements from a block to the next in `scratch_k`.
    int64_t scratch_k_block;
    // Elements from a head to the next in `scratch_k`.
    int64_t scratch_k_head;
    // Elements from a token to the next in `scratch_k`.
    int64_t scratch_k_token;
    // Elements from a block to the next in `scratch_v`.
    int64_t scratch_v_block;
    // Elements from a head to the next in `scratch_v`.
    int64_t scratch_v_head;
    // Elements from a token to the next in `scratch_v`.
    int64_t scratch_v_token;
    // Raw slots in staging; those behind are in scratch.
    uint32_t staging_blocks;
    // Raw slots in scratch.
    uint32_t scratch_blocks;
    // Tokens of a tile: 64 or 128.
    uint32_t tile_tokens;
    // What the header of a sealed record says of its format and tokens: its third word.
    uint32_t identity;
    // Bytes of a record.
    uint32_t record_bytes;
    // Byte of a record from which the third bits of keys lie.
    uint32_t k_plane_at;
    // The codes of values.
    uint32_t v_codes_at;
    // The third bits of values.
    uint32_t v_plane_at;
    // The steps of key channels.
    uint32_t k_steps_at;
    // The middles of key channels.
    uint32_t k_mids_at;
    // The scales of value rows.
    uint32_t v_scales_at;
    // The header.
    uint32_t header_at;
    // 1 where sealed values are rotated. Else 0.
    uint32_t v_rotated;
    // Byte of shared memory from which the queries lie.
    uint32_t query_at;
    // Byte of shared memory from which the barriers lie.
    uint32_t barriers_at;
    // Keeps the size a multiple of 8. Zero.
    uint32_t reserved;
};
static_assert(sizeof(kvc_decode_tile_params) == 472, "layout of kvc_decode_tile_params");

// Paged decode over rows of codes, token by token: FP8, INT8_T, INT4_T, NVFP4.
struct kvc_decode_token_params {
    // The call. Strides of `k` and `v` are in bytes, multiples of 16. `bulk` is 1 where the rows
    // of a head and their scales follow each other within a block of a multiple of 16 tokens (8
    // where a row has more than 128 bytes), and scales begin at multiples of 16 bytes; `stages`,
    // 2 to 4, is then of tiles of 128 (64) tokens.
    kvc_decode_params call;
    // Scales of the keys of block 0, head 0, token 0: `KvFormat::row_scale_bytes` bytes, of
    // f16 at an even address; null where the format has none.
    const void *k_scales;
    // The same of values.
    const void *v_scales;
    // A scale of all keys of each KV head (FP8, NVFP4), or null for 1.
    const float *k_heads;
    // A scale of all values of each KV head, or null.
    const float *v_heads;
    // Bytes from a block to the next in `k_scales`.
    int64_t k_scale_block;
    // Bytes from a head to the next in `k_scales`.
    int64_t k_scale_head;
    // Bytes from a token to the next in `k_scales`.
    int64_t k_scale_token;
    // Bytes from a block to the next in `v_scales`.
    int64_t v_scale_block;
    // Bytes from a head to the next in `v_scales`.
    int64_t v_scale_head;
    // Bytes from a token to the next in `v_scales`.
    int64_t v_scale_token;
    // 1 where keys are stored rotated: queries are then rotated too. Else 0.
    uint32_t k_rotated;
    // 1 where values are stored rotated: outputs are then rotated back. Else 0.
    uint32_t v_rotated;
    // Byte of shared memory from which the queries lie.
    uint32_t query_at;
    // Stages of the pipeline without bulk copies, 2 to 4, in the same shared memory.
    uint32_t copy_stages;
};
static_assert(sizeof(kvc_decode_token_params) == 392, "layout of kvc_decode_token_params");

// A run of words to write into the image of a prefix index.
struct kvc_lookup_patch_run {
    // First word of the image that is written.
    int64_t to;
    // First word of the uploaded ones.
    uint32_t from;
    // How many, at most 1,024.
    uint32_t words;
};
static_assert(sizeof(kvc_lookup_patch_run) == 16, "layout of kvc_lookup_patch_run");

// Writes uploaded words to their places in the image of a prefix index.
struct kvc_lookup_patch_params {
    // `[count]` runs, no two of which overlap.
    const kvc_lookup_patch_run *patches;
    // The uploaded words.
    const uint32_t *words;
    // The image.
    uint32_t *image;
    // Raised (bit 4: a run outside the image or the uploaded words), or null.
    uint32_t *error_flag;
    // Words of the image.
    int64_t image_words;
    // How many words were uploaded.
    uint32_t uploaded;
    // Runs.
    uint32_t count;
};
static_assert(sizeof(kvc_lookup_patch_params) == 48, "layout of kvc_lookup_patch_params");

// Looks up a batch of token sequences in the image of a prefix index.
struct kvc_lookup_params {
    // The image's head: how much of each part is in use, and the seeds of its tables.
    const uint32_t *head;
    // The nodes, 8 words each.
    const uint32_t *nodes;
    // The table of branches, 2 words a place.
    const uint32_t *branches;
    // The table of namespaces, likewise.
    const uint32_t *spaces;
    // Tokens of every slot.
    const uint32_t *slot_tokens;
    // Block ids of every slot.
    const uint32_t *slot_ids;
    // Tokens of all requests.
    const uint32_t *tokens;
    // Where the tokens of each request begin, `[requests + 1]`.
    const int32_t *indptr;
    // Namespace of each request; null where all are in namespace 0.
    const uint64_t *namespaces;
    // Tokens of each request that whole cached blocks cover.
    uint32_t *matched;
    // Their block ids, `[block][group]`, in rows of `block_stride`.
    int32_t *blocks;
    // How many tokens after those agree with one more cached block, or null.
    uint32_t *tail_tokens;
    // The ids of that block, `[requests][groups]`, -1 where there is none; or null.
    int32_t *tail_blocks;
    // Raised (bit 1: row offsets that do not ascend, bit 4: an image that is not whole; the
    // request then matches no further), or null.
    uint32_t *error_flag;
    // Ids from a request to the next in `blocks`.
    int64_t block_stride;
    // Requests.
    uint32_t requests;
    // The most blocks that a request matches.
    uint32_t max_blocks;
    // Tokens at the end of each request that are not looked up.
    uint32_t leave;
    // Tokens of a block.
    uint32_t block_tokens;
    // Ids of a block.
    uint32_t groups;
    // Nodes that the image has room for.
    uint32_t node_room;
    // Places of the table of branches that it has room for.
    uint32_t branch_room;
    // Places of the table of namespaces that it has room for.
    uint32_t space_room;
    // Slots that it has room for.
    uint32_t slot_room;
    // Keeps the size a multiple of 8. Zero.
    uint32_t reserved;
};
static_assert(sizeof(kvc_lookup_params) == 160, "layout of kvc_lookup_params");

// Merges attention over disjoint sets of keys: the outputs of each set, normalised, with the
// logarithms of their denominators.
struct kvc_merge_params {
    // Output of part 0, row 0, head 0.
    const void *parts;
    // Its LSE (natural logarithm); a part that saw no key has -inf, and is not read.
    const float *lse;
    // Merged output of row 0, head 0; must not overlap `parts`.
    void *out;
    // Its LSE, or null; must not overlap `lse`.
    float *out_lse;
    // A logit for each head that joins the denominator, or null.
    const float *sinks;
    // Elements from a part to the next in `parts`. Of two parts that were allocated apart it is
    // the difference of their addresses.
    int64_t part;
    // Elements from a row to the next in `parts`.
    int64_t row;
    // Elements from a head to the next in `parts`.
    int64_t head;
    // Elements from a part to the next in `lse`.
    int64_t lse_part;
    // Elements from a row to the next in `lse`.
    int64_t lse_row;
    // Elements from a head to the next in `lse`.
    int64_t lse_head;
    // Elements from a row to the next in `out`.
    int64_t out_row;
    // Elements from a head to the next in `out`.
    int64_t out_head;
    // Elements from a row to the next in `out_lse`.
    int64_t out_lse_row;
    // Elements from a head to the next in `out_lse`.
    int64_t out_lse_head;
    // How many parts.
    uint32_t count;
    // Rows.
    uint32_t rows;
    // Heads of a row.
    uint32_t heads;
    // Channels of a head, a multiple of 8.
    uint32_t dim;
    // Type id of `parts`.
    uint32_t part_dtype;
    // Type id of `out`.
    uint32_t out_dtype;
};
static_assert(sizeof(kvc_merge_params) == 144, "layout of kvc_merge_params");

// Chunked prefill: attention of the query tokens of each sequence over its cached context,
// their own keys and values included.
struct kvc_prefill_params {
    // Queries: row, then head, then `head_dim` channels; rounded to the cache's type. Rows
    // of a head begin at multiples of 16 bytes.
    const void *q;
    // Keys of block 0, head 0, token 0.
    const void *k;
    // Values of block 0, head 0, token 0.
    const void *v;
    // Outputs, rows as in `q`.
    void *out;
    // Natural logarithms of the denominators `[row][q_heads]`, or null.
    float *lse;
    // First row of each sequence and the end of the last, `[batch + 1]`, ascending from 0.
    const int32_t *q_indptr;
    // Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
    const int32_t *table;
    // Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
    const int32_t *table_indptr;
    // Tokens of each sequence, those of the queries included; below 1 is empty.
    const int32_t *seq_lens;
    // A logit for each query head that joins the denominator, or null.
    const float *sinks;
    // ALiBi slope of each query head, or null.
    const float *slopes;
    // Raised (bit 0: a block id outside the pool or a table too short, bit 1: row offsets
    // that do not ascend or end past `q_tokens`), or null.
    uint32_t *error_flag;
    // Elements from a row to the next in `q`.
    int64_t q_row;
    // Elements from a head to the next in `q`.
    int64_t q_head;
    // Elements from a row to the next in `out`.
    int64_t out_row;
    // Elements from a head to the next in `out`.
    int64_t out_head;
    // Elements from a block to the next in `k`.
    int64_t k_block;
    // Elements from a head to the next in `k`.
    int64_t k_head;
    // Elements from a token to the next in `k`.
    int64_t k_token;
    // Elements from a block to the next in `v`.
    int64_t v_block;
    // Elements from a head to the next in `v`.
    int64_t v_head;
    // Elements from a token to the next in `v`.
    int64_t v_token;
    // Entries from a sequence to the next in a dense table.
    int64_t table_stride;
    // Sequences.
    uint32_t batch;
    // Rows of all sequences, at most.
    uint32_t q_tokens;
    // 1 where a query sees no key after its own position, else 0.
    uint32_t causal;
    // Query heads.
    uint32_t q_heads;
    // KV heads.
    uint32_t kv_heads;
    // Tokens of a cache block.
    uint32_t block_tokens;
    // Blocks that exist.
    uint32_t num_blocks;
    // Sliding window in tokens; 0 for none, which the kernel gets as 2^31 - 1.
    uint32_t window;
    // Type id of `q`.
    uint32_t q_dtype;
    // Type id of `out`.
    uint32_t out_dtype;
    // Factor of the dot products.
    float scale;
    // Logit soft-cap; 0 for none.
    float softcap;
    // What turns `scores` into powers of two. Set by the launch.
    float factor;
    // 1 where scores are more than dot products times a positive factor, else 0. Set by the
    // launch.
    uint32_t transform;
};
static_assert(sizeof(kvc_prefill_params) == 240, "layout of kvc_prefill_params");

// Chunked prefill over sealed tiles and the raw ones of the same sequences. Causal.
struct kvc_prefill_sealed_params {
    // The call. Its table and `num_blocks` are those of the records; `k`, `v` and their
    // strides, in elements, those of the staged raw rows, bf16. `block_tokens` is
    // `tile_tokens`.
    kvc_prefill_params call;
    // Record of block 0, head 0.
    const void *records;
    // `[batch + 1]` offsets into `raw_blocks`, never decreasing.
    const int32_t *raw_indptr;
    // Tile of the sequence and raw slot, a pair each, tiles ascending: every tile that holds a
    // query, and every earlier one whose record is not sealed.
    const int32_t *raw_blocks;
    // Keys of raw slot `staging_blocks`, head 0, token 0, bf16; null without scratch blocks.
    const void *scratch_k;
    // Values, likewise.
    const void *scratch_v;
    // Bytes from a block to the next in `records`.
    int64_t record_block;
    // Bytes from a KV head to the next in `records`.
    int64_t record_head;
    // Elements from a block to the next in `scratch_k`.
    int64_t scratch_k_block;
    // Elements from a head to the next in `scratch_k`.
    int64_t scratch_k_head;
    // Elements from a token to the next in `scratch_k`.
    int64_t scratch_k_token;
    // Elements from a block to the next in `scratch_v`.
    int64_t scratch_v_block;
    // Elements from a head to the next in `scratch_v`.
    int64_t scratch_v_head;
    // Elements from a token to the next in `scratch_v`.
    int64_t scratch_v_token;
    // Raw slots in staging; those behind are in scratch.
    uint32_t staging_blocks;
    // Raw slots in scratch.
    uint32_t scratch_blocks;
    // Tokens of a tile: 64 or 128.
    uint32_t tile_tokens;
    // What the header of a sealed record says of its format and tokens: its third word.
    uint32_t identity;
    // Bits of a key's code: 8, 4, 3 or 2.
    uint32_t k_bits;
    // Bits of a value's code.
    uint32_t v_bits;
    // Byte of a record from which the third bits of keys lie.
    uint32_t k_plane_at;
    // The codes of values.
    uint32_t v_codes_at;
    // The third bits of values.
    uint32_t v_plane_at;
    // The steps of key channels.
    uint32_t k_steps_at;
    // The middles of key channels.
    uint32_t k_mids_at;
    // The scales of value rows.
    uint32_t v_scales_at;
    // The header.
    uint32_t header_at;
    // 1 where sealed values are rotated. Else 0.
    uint32_t v_rotated;
};
static_assert(sizeof(kvc_prefill_sealed_params) == 400, "layout of kvc_prefill_sealed_params");

// Chunked prefill over rows of codes: FP8, INT8_T, INT4_T, NVFP4.
struct kvc_prefill_token_params {
    // The call. Strides of `k` and `v` are in bytes, multiples of 16.
    kvc_prefill_params call;
    // Scales of the keys of block 0, head 0, token 0; null where the format has none.
    const void *k_scales;
    // The same of values.
    const void *v_scales;
    // A scale of all keys of each KV head (FP8, NVFP4), or null for 1.
    const float *k_heads;
    // A scale of all values of each KV head, or null.
    const float *v_heads;
    // Bytes from a block to the next in `k_scales`.
    int64_t k_scale_block;
    // Bytes from a head to the next in `k_scales`.
    int64_t k_scale_head;
    // Bytes from a token to the next in `k_scales`.
    int64_t k_scale_token;
    // Bytes from a block to the next in `v_scales`.
    int64_t v_scale_block;
    // Bytes from a head to the next in `v_scales`.
    int64_t v_scale_head;
    // Bytes from a token to the next in `v_scales`.
    int64_t v_scale_token;
    // 1 where keys are stored rotated. Else 0.
    uint32_t k_rotated;
    // 1 where values are stored rotated. Else 0.
    uint32_t v_rotated;
};
static_assert(sizeof(kvc_prefill_token_params) == 328, "layout of kvc_prefill_token_params");

// Latent attention: 1 to 8 query tokens of each sequence over its cached latents of 576
// channels, whose first 512 are the values.
struct kvc_mla_params {
    // Queries: row, then head, then 576 channels; rounded to the cache's type.
    const void *q;
    // Latents of block 0, token 0.
    const void *k;
    // Outputs: row, then head, then 512 channels.
    void *out;
    // Natural logarithms of the denominators `[row][q_heads]`, or null.
    float *lse;
    // Rows of each sequence, `[batch + 1]`, at most `q_len` each; null for `q_len` each.
    const int32_t *q_indptr;
    // Block tables: `[seq][table_stride]`, or the indices of all sequences one after another.
    const int32_t *table;
    // Where the indices of each sequence begin, `[batch + 1]`; null for a dense table.
    const int32_t *table_indptr;
    // Tokens of each sequence, those of the queries included; below 1 is empty.
    const int32_t *seq_lens;
    // The plan's summary.
    kvc_decode_head *head;
    // The plan's ranges.
    const kvc_decode_range *ranges;
    // The plan's spans.
    const kvc_decode_span *spans;
    // The plan's counters: zero before the call, and after it.
    uint32_t *tickets;
    // Partial results: `[slot][unit][columns][512]`, then `[slot][unit][columns]` of their
    // logarithms to base two, with the columns of the kernel.
    float *partial;
    // Raised (bit 0: a block id outside the pool or a table too short, bit 1: a sequence of
    // more than `q_len` rows), or null.
    uint32_t *error_flag;
    // Elements from a row to the next in `q`.
    int64_t q_row;
    // Elements from a head to the next in `q`.
    int64_t q_head;
    // Elements from a row to the next in `out`.
    int64_t out_row;
    // Elements from a head to the next in `out`.
    int64_t out_head;
    // Elements from a block to the next in `k`.
    int64_t k_block;
    // Elements from a token to the next in `k`.
    int64_t k_token;
    // Entries from a sequence to the next in a dense table.
    int64_t table_stride;
    // Query tokens of a sequence, at most.
    uint32_t q_len;
    // 1 where a query sees no key after its own position, else 0.
    uint32_t causal;
    // Query heads.
    uint32_t q_heads;
    // Units of a range: query columns over the columns of the kernel, rounded up.
    uint32_t units;
    // Tokens of a cache block.
    uint32_t block_tokens;
    // Blocks that exist.
    uint32_t num_blocks;
    // Sliding window in tokens; 0 for none.
    uint32_t window;
    // Slots that `partial` has room for.
    uint32_t max_slots;
    // Type id of `q`.
    uint32_t q_dtype;
    // Type id of `out`.
    uint32_t out_dtype;
    // Factor of the dot products.
    float scale;
    // Keeps the size a multiple of 8. Zero.
    uint32_t reserved;
};
static_assert(sizeof(kvc_mla_params) == 216, "layout of kvc_mla_params");

// Latent attention over rows of codes: FP8, INT8_T, INT4_T.
struct kvc_mla_token_params {
    // The call. Strides of `k` are in bytes, multiples of 16; rows of `q` begin at multiples of
    // 16 bytes. Queries are rounded to f16.
    kvc_mla_params call;
    // Scales of the latents of block 0, token 0: `KvFormat::row_scale_bytes` bytes of f16 at an
    // even address, those of the 512 channels first; null where the format has none.
    const void *k_scales;
    // One scale of all latents (FP8), or null for 1.
    const float *k_heads;
    // Bytes from a block to the next in `k_scales`.
    int64_t k_scale_block;
    // Bytes from a token to the next in `k_scales`.
    int64_t k_scale_token;
    // 1 where latents are stored rotated: queries are then rotated too, and outputs back. Else 0.
    uint32_t k_rotated;
    // Keeps the size a multiple of 8. Zero.
    uint32_t reserved;
};
static_assert(sizeof(kvc_mla_token_params) == 256, "layout of kvc_mla_token_params");

// Seals full raw tiles: a block for each of the list and each KV head.
struct kvc_seal_params {
    // Keys of raw slot 0, head 0, token 0, bf16. Written in spare slots alone.
    void *k;
    // Values, likewise.
    void *v;
    // Keys of raw slot `staging_blocks`; null without scratch blocks.
    const void *scratch_k;
    // Values, likewise.
    const void *scratch_v;
    // Record of block 0, head 0.
    void *records;
    // Raw slot and block of the record, a pair for each tile; blocks are distinct.
    const int32_t *list;
    // For each tile, 0 before its first layer; else left as it is where all heads are sealed.
    // Where some head is not: 1; with bit 31, for a tile in scratch where there are spares, 2
    // and the number of the spare that keeps its rows, or 1 where none was left.
    uint32_t *refused;
    // Raw slots below `staging_blocks` for rows of scratch that cannot be sealed, or null.
    const int32_t *spares;
    // How many of them were asked for, 0 before the first layer; null without spares.
    uint32_t *spares_taken;
    // Raised (bit 0: a slot or a block that does not exist), or null.
    uint32_t *error_flag;
    // Elements from a block to the next in `k`.
    int64_t k_block;
    // Elements from a head to the next in `k`.
    int64_t k_head;
    // Elements from a token to the next in `k`.
    int64_t k_token;
    // Elements from a block to the next in `v`.
    int64_t v_block;
    // Elements from a head to the next in `v`.
    int64_t v_head;
    // Elements from a token to the next in `v`.
    int64_t v_token;
    // Elements from a block to the next in `scratch_k`.
    int64_t scratch_k_block;
    // Elements from a head to the next in `scratch_k`.
    int64_t scratch_k_head;
    // Elements from a token to the next in `scratch_k`.
    int64_t scratch_k_token;
    // Elements from a block to the next in `scratch_v`.
    int64_t scratch_v_block;
    // Elements from a head to the next in `scratch_v`.
    int64_t scratch_v_head;
    // Elements from a token to the next in `scratch_v`.
    int64_t scratch_v_token;
    // Bytes from a block to the next in `records`.
    int64_t record_block;
    // Bytes from a KV head to the next in `records`.
    int64_t record_head;
    // Raw slots in staging; those behind are in scratch.
    uint32_t staging_blocks;
    // Raw slots in scratch.
    uint32_t scratch_blocks;
    // Blocks of records.
    uint32_t num_blocks;
    // KV heads.
    uint32_t kv_heads;
    // Tokens of a tile.
    uint32_t tile_tokens;
    // Bits of a key's code.
    uint32_t k_bits;
    // Bits of a value's code.
    uint32_t v_bits;
    // The third word of the header of a sealed record.
    uint32_t identity;
    // Byte of a record from which the third bits of keys lie.
    uint32_t k_plane_at;
    // The codes of values.
    uint32_t v_codes_at;
    // The third bits of values.
    uint32_t v_plane_at;
    // The steps of key channels.
    uint32_t k_steps_at;
    // The middles of key channels.
    uint32_t k_mids_at;
    // The scales of value rows.
    uint32_t v_scales_at;
    // The header.
    uint32_t header_at;
    // Entries of `spares`.
    uint32_t spare_count;
};
static_assert(sizeof(kvc_seal_params) == 256, "layout of kvc_seal_params");

// Every kernel of the library with its parameter struct.
#define KVC_KERNELS(X) \
    X(kvc_append, kvc_append_params) \
    X(kvc_append_plain, kvc_append_params) \
    X(kvc_append_token_d64, kvc_append_token_params) \
    X(kvc_append_token_d80, kvc_append_token_params) \
    X(kvc_append_token_d96, kvc_append_token_params) \
    X(kvc_append_token_d128, kvc_append_token_params) \
    X(kvc_append_token_d192, kvc_append_token_params) \
    X(kvc_append_token_d256, kvc_append_token_params) \
    X(kvc_append_fp8_d64, kvc_append_token_params) \
    X(kvc_append_fp8_d80, kvc_append_token_params) \
    X(kvc_append_fp8_d96, kvc_append_token_params) \
    X(kvc_append_fp8_d128, kvc_append_token_params) \
    X(kvc_append_fp8_d192, kvc_append_token_params) \
    X(kvc_append_fp8_d256, kvc_append_token_params) \
    X(kvc_append_int8_d64, kvc_append_token_params) \
    X(kvc_append_int8_d80, kvc_append_token_params) \
    X(kvc_append_int8_d96, kvc_append_token_params) \
    X(kvc_append_int8_d128, kvc_append_token_params) \
    X(kvc_append_int8_d192, kvc_append_token_params) \
    X(kvc_append_int8_d256, kvc_append_token_params) \
    X(kvc_append_int4_d64, kvc_append_token_params) \
    X(kvc_append_int4_d80, kvc_append_token_params) \
    X(kvc_append_int4_d96, kvc_append_token_params) \
    X(kvc_append_int4_d128, kvc_append_token_params) \
    X(kvc_append_int4_d192, kvc_append_token_params) \
    X(kvc_append_int4_d256, kvc_append_token_params) \
    X(kvc_append_nvfp4_d64, kvc_append_token_params) \
    X(kvc_append_nvfp4_d80, kvc_append_token_params) \
    X(kvc_append_nvfp4_d96, kvc_append_token_params) \
    X(kvc_append_nvfp4_d128, kvc_append_token_params) \
    X(kvc_append_nvfp4_d192, kvc_append_token_params) \
    X(kvc_append_nvfp4_d256, kvc_append_token_params) \
    X(kvc_append_latent, kvc_append_token_params) \
    X(kvc_cascade_split, kvc_cascade_split_params) \
    X(kvc_copy, kvc_copy_params) \
    X(kvc_zero, kvc_copy_params) \
    X(kvc_decode_plan, kvc_decode_plan_params) \
    X(kvc_decode_f16_d64, kvc_decode_params) \
    X(kvc_decode_f16_d80, kvc_decode_params) \
    X(kvc_decode_f16_d96, kvc_decode_params) \
    X(kvc_decode_f16_d128, kvc_decode_params) \
    X(kvc_decode_f16_d192, kvc_decode_params) \
    X(kvc_decode_f16_d256, kvc_decode_params) \
    X(kvc_decode_bf16_d64, kvc_decode_params) \
    X(kvc_decode_bf16_d80, kvc_decode_params) \
    X(kvc_decode_bf16_d96, kvc_decode_params) \
    X(kvc_decode_bf16_d128, kvc_decode_params) \
    X(kvc_decode_bf16_d192, kvc_decode_params) \
    X(kvc_decode_bf16_d256, kvc_decode_params) \
    X(kvc_decode_kt8v8_d64, kvc_decode_tile_params) \
    X(kvc_decode_kt8v8_d128, kvc_decode_tile_params) \
    X(kvc_decode_kt4v4_d64, kvc_decode_tile_params) \
    X(kvc_decode_kt4v4_d128, kvc_decode_tile_params) \
    X(kvc_decode_kt3v3_d64, kvc_decode_tile_params) \
    X(kvc_decode_kt3v3_d128, kvc_decode_tile_params) \
    X(kvc_decode_kt4v2_d64, kvc_decode_tile_params) \
    X(kvc_decode_kt4v2_d128, kvc_decode_tile_params) \
    X(kvc_decode_kt2v2_d64, kvc_decode_tile_params) \
    X(kvc_decode_kt2v2_d128, kvc_decode_tile_params) \
    X(kvc_decode_fp8_e4m3_d64, kvc_decode_token_params) \
    X(kvc_decode_fp8_e4m3_d80, kvc_decode_token_params) \
    X(kvc_decode_fp8_e4m3_d96, kvc_decode_token_params) \
    X(kvc_decode_fp8_e4m3_d128, kvc_decode_token_params) \
    X(kvc_decode_fp8_e4m3_d192, kvc_decode_token_params) \
    X(kvc_decode_fp8_e4m3_d256, kvc_decode_token_params) \
    X(kvc_decode_fp8_e5m2_d64, kvc_decode_token_params) \
    X(kvc_decode_fp8_e5m2_d80, kvc_decode_token_params) \
    X(kvc_decode_fp8_e5m2_d96, kvc_decode_token_params) \
    X(kvc_decode_fp8_e5m2_d128, kvc_decode_token_params) \
    X(kvc_decode_fp8_e5m2_d192, kvc_decode_token_params) \
    X(kvc_decode_fp8_e5m2_d256, kvc_decode_token_params) \
    X(kvc_decode_int8_t_d64, kvc_decode_token_params) \
    X(kvc_decode_int8_t_d80, kvc_decode_token_params) \
    X(kvc_decode_int8_t_d96, kvc_decode_token_params) \
    X(kvc_decode_int8_t_d128, kvc_decode_token_params) \
    X(kvc_decode_int8_t_d192, kvc_decode_token_params) \
    X(kvc_decode_int8_t_d256, kvc_decode_token_params) \
    X(kvc_decode_int4_t_d64, kvc_decode_token_params) \
    X(kvc_decode_int4_t_d80, kvc_decode_token_params) \
    X(kvc_decode_int4_t_d96, kvc_decode_token_params) \
    X(kvc_decode_int4_t_d128, kvc_decode_token_params) \
    X(kvc_decode_int4_t_d192, kvc_decode_token_params) \
    X(kvc_decode_int4_t_d256, kvc_decode_token_params) \
    X(kvc_decode_nvfp4_d64, kvc_decode_token_params) \
    X(kvc_decode_nvfp4_d80, kvc_decode_token_params) \
    X(kvc_decode_nvfp4_d96, kvc_decode_token_params) \
    X(kvc_decode_nvfp4_d128, kvc_decode_token_params) \
    X(kvc_decode_nvfp4_d192, kvc_decode_token_params) \
    X(kvc_decode_nvfp4_d256, kvc_decode_token_params) \
    X(kvc_lookup, kvc_lookup_params) \
    X(kvc_lookup_patch, kvc_lookup_patch_params) \
    X(kvc_merge, kvc_merge_params) \
    X(kvc_mla_f16_c16, kvc_mla_params) \
    X(kvc_mla_f16_c32, kvc_mla_params) \
    X(kvc_mla_bf16_c16, kvc_mla_params) \
    X(kvc_mla_bf16_c32, kvc_mla_params) \
    X(kvc_mla_fp8_e4m3_c16, kvc_mla_token_params) \
    X(kvc_mla_fp8_e4m3_c32, kvc_mla_token_params) \
    X(kvc_mla_fp8_e5m2_c16, kvc_mla_token_params) \
    X(kvc_mla_fp8_e5m2_c32, kvc_mla_token_params) \
    X(kvc_mla_int8_t_c16, kvc_mla_token_params) \
    X(kvc_mla_int8_t_c32, kvc_mla_token_params) \
    X(kvc_mla_int4_t_c16, kvc_mla_token_params) \
    X(kvc_mla_int4_t_c32, kvc_mla_token_params) \
    X(kvc_prefill_f16_d64, kvc_prefill_params) \
    X(kvc_prefill_f16_d80, kvc_prefill_params) \
    X(kvc_prefill_f16_d96, kvc_prefill_params) \
    X(kvc_prefill_f16_d128, kvc_prefill_params) \
    X(kvc_prefill_f16_d192, kvc_prefill_params) \
    X(kvc_prefill_f16_d256, kvc_prefill_params) \
    X(kvc_prefill_bf16_d64, kvc_prefill_params) \
    X(kvc_prefill_bf16_d80, kvc_prefill_params) \
    X(kvc_prefill_bf16_d96, kvc_prefill_params) \
    X(kvc_prefill_bf16_d128, kvc_prefill_params) \
    X(kvc_prefill_bf16_d192, kvc_prefill_params) \
    X(kvc_prefill_bf16_d256, kvc_prefill_params) \
    X(kvc_prefill_sealed_d64, kvc_prefill_sealed_params) \
    X(kvc_prefill_sealed_d128, kvc_prefill_sealed_params) \
    X(kvc_prefill_fp8_e4m3_d64, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e4m3_d80, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e4m3_d96, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e4m3_d128, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e4m3_d192, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e4m3_d256, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e5m2_d64, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e5m2_d80, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e5m2_d96, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e5m2_d128, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e5m2_d192, kvc_prefill_token_params) \
    X(kvc_prefill_fp8_e5m2_d256, kvc_prefill_token_params) \
    X(kvc_prefill_int8_t_d64, kvc_prefill_token_params) \
    X(kvc_prefill_int8_t_d80, kvc_prefill_token_params) \
    X(kvc_prefill_int8_t_d96, kvc_prefill_token_params) \
    X(kvc_prefill_int8_t_d128, kvc_prefill_token_params) \
    X(kvc_prefill_int8_t_d192, kvc_prefill_token_params) \
    X(kvc_prefill_int8_t_d256, kvc_prefill_token_params) \
    X(kvc_prefill_int4_t_d64, kvc_prefill_token_params) \
    X(kvc_prefill_int4_t_d80, kvc_prefill_token_params) \
    X(kvc_prefill_int4_t_d96, kvc_prefill_token_params) \
    X(kvc_prefill_int4_t_d128, kvc_prefill_token_params) \
    X(kvc_prefill_int4_t_d192, kvc_prefill_token_params) \
    X(kvc_prefill_int4_t_d256, kvc_prefill_token_params) \
    X(kvc_prefill_nvfp4_d64, kvc_prefill_token_params) \
    X(kvc_prefill_nvfp4_d80, kvc_prefill_token_params) \
    X(kvc_prefill_nvfp4_d96, kvc_prefill_token_params) \
    X(kvc_prefill_nvfp4_d128, kvc_prefill_token_params) \
    X(kvc_prefill_nvfp4_d192, kvc_prefill_token_params) \
    X(kvc_prefill_nvfp4_d256, kvc_prefill_token_params) \
    X(kvc_seal_d64, kvc_seal_params) \
    X(kvc_seal_d128, kvc_seal_params)
