// Prefix lookup on the device: the walk of src/prefix/lookup.rs over an image of the index, a warp a
// request. Tables are probed 32 places at a time and tokens compared 32 lanes wide, 256 a step.
//
// A match is a comparison of tokens: hashes only say where to look. Nothing in the image is trusted
// to stay inside it: every link is checked against what is in use, and the walk ends because a step
// down takes tokens of the request, or a fork that splits further into a block than the last. The
// image is written by patches before, in the stream's order, never during a lookup.
#pragma once
#include "kvc_params.h"
#include "page.cuh"

namespace kvc {

constexpr uint32_t kNoNode = ~0u;
constexpr uint32_t kRootNode = 1, kEdgeNode = 2, kForkNode = 3;
constexpr uint32_t kLookupThreads = 64, kPatchThreads = 256;

struct LookupNode {
    uint32_t kind, child, start, len, parent, token;
    uint64_t space;
};

// What of the image is in use, as its head says.
struct LookupImage {
    uint32_t nodes, branches, spaces, slots;
    uint64_t branch_seed, space_seed;
    bool whole;

    KVC_DEVICE explicit LookupImage(const kvc_lookup_params &p) {
        const Vec16 counts = load_stream(p.head), seeds = load_stream(p.head + 4);
        const Vec16 shape = load_stream(p.head + 8);
        nodes = counts.word[0];
        branches = counts.word[1];
        spaces = counts.word[2];
        slots = counts.word[3];
        branch_seed = static_cast<uint64_t>(seeds.word[1]) << 32 | seeds.word[0];
        space_seed = static_cast<uint64_t>(seeds.word[3]) << 32 | seeds.word[2];
        whole = nodes <= p.node_room && branches <= p.branch_room && spaces <= p.space_room &&
                slots <= p.slot_room && (branches & (branches - 1)) == 0 &&
                (spaces & (spaces - 1)) == 0 && shape.word[0] == p.block_tokens &&
                shape.word[1] == p.groups;
    }
};

// The node `at`, which is in use.
KVC_DEVICE LookupNode load_node(const kvc_lookup_params &p, uint32_t at) {
    const uint32_t *words = p.nodes + static_cast<int64_t>(at) * 8;
    const Vec16 a = load_stream(words), b = load_stream(words + 4);
    return {a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1],
            static_cast<uint64_t>(b.word[3]) << 32 | b.word[2]};
}

// The node under `key` for which `is` holds, as linear probing finds it. All lanes call and get it.
template <typename Is>
KVC_DEVICE uint32_t find_node(const uint32_t *table, uint32_t places, uint32_t nodes, uint64_t key,
                              uint64_t seed, const Is &is) {
    const uint64_t low = (key ^ seed) * 0x9e3779b97f4a7c15u;
    const uint64_t high = mul_high(key ^ seed, 0x9e3779b97f4a7c15u);
    const uint32_t tag = static_cast<uint32_t>(low ^ high);
    const uint64_t home = static_cast<uint64_t>(tag) * places >> 32;
    for (uint64_t probed = 0; probed < places; probed += 32) {
        const uint64_t step = probed + lane_id();
        uint32_t node = kNoNode;
        bool found = false;
        if (step < places) {
            const uint32_t *entry = table + ((home + step) & (places - 1)) * 2;
            node = entry[1];
            found = entry[0] == tag && node < nodes && is(node);
        }
        const uint32_t stops = ballot(kFullMask, found || node == kNoNode);
        if (stops != 0)
            return shfl(kFullMask, found ? node : kNoNode, find_first(stops));
    }
    return kNoNode;
}

// How many leading tokens two runs of `count` share. All lanes call and get it.
KVC_DEVICE uint32_t common_tokens(const uint32_t *a, const uint32_t *b, uint32_t count) {
    constexpr uint32_t kAhead = 8;
    for (uint32_t base = 0; base < count; base += 32 * kAhead) {
        uint32_t differs = 0;
KVC_UNROLL
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t at = base + i * 32 + lane_id();
            if (at < count && a[at] != b[at]) differs |= 1u << i;
        }
        uint32_t first = count;
        if (differs != 0) first = base + find_first(differs) * 32 + lane_id();
        if (ballot(kFullMask, differs != 0) == 0) continue;
        for (uint32_t by = 16; by > 0; by /= 2) {
            const uint32_t other = shfl_xor(kFullMask, first, by);
            first = other < first ? other : first;
        }
        return first;
    }
    return count;
}

// Where a walk has come to.
struct LookupWalk {
    uint32_t blocks; // matched
    uint32_t tail;   // tokens that one more block agrees in
    uint32_t slot;   // that block's
    bool broken;     // the image is not whole
};

KVC_DEVICE LookupWalk walk(const kvc_lookup_params &p, const LookupImage &image, uint64_t space,
                           const uint32_t *query, uint32_t count, int32_t *ids) {
    LookupWalk w = {0, 0, 0, false};
    if (!image.whole) {
        w.broken = true;
        return w;
    }
    uint32_t at = find_node(p.spaces, image.spaces, image.nodes, space, image.space_seed,
                            [&](uint32_t node) {
                                const LookupNode n = load_node(p, node);
                                return n.kind == kRootNode && n.space == space;
                            });
    if (at == kNoNode) return w;
    LookupNode node = load_node(p, at);
    while (count != 0) {
        at = node.child;
        if (at == kNoNode) return w;
        // Down the forks to the edge that agrees longest: by token as far as there is a branch,
        // then any way. Forks below forks split further and further into the block.
        uint32_t least = 0;
        bool by_token = true;
        for (;;) {
            w.broken = at >= image.nodes;
            if (w.broken) return w;
            node = load_node(p, at);
            if (node.kind != kForkNode) break;
            w.broken = node.start < least || node.start >= p.block_tokens;
            if (w.broken) return w;
            least = node.start + 1;
            uint32_t child = kNoNode;
            if (by_token && node.start < count) {
                const uint32_t token = query[node.start];
                const uint64_t key = static_cast<uint64_t>(at) << 32 | token;
                child = find_node(p.branches, image.branches, image.nodes, key, image.branch_seed,
                                  [&](uint32_t below) {
                                      const LookupNode n = load_node(p, below);
                                      return n.parent == at && n.token == token;
                                  });
            }
            if (child == kNoNode) {
                if (by_token && node.start == 0) return w;
                by_token = false;
                child = node.child;
            }
            at = child;
        }
        w.broken = node.kind != kEdgeNode || node.len == 0 || node.start >= image.slots ||
                   node.len > image.slots - node.start;
        if (w.broken) return w;
        const uint64_t held = static_cast<uint64_t>(node.len) * p.block_tokens;
        const uint32_t *tokens =
            p.slot_tokens + static_cast<int64_t>(node.start) * p.block_tokens;
        const uint32_t common =
            common_tokens(tokens, query, held < count ? static_cast<uint32_t>(held) : count);
        const uint32_t whole = common / p.block_tokens;
        w.tail = common % p.block_tokens;
        w.slot = node.start + whole;
        const uint32_t *from = p.slot_ids + static_cast<int64_t>(node.start) * p.groups;
        int32_t *to = ids + static_cast<int64_t>(w.blocks) * p.groups;
        const uint64_t words = static_cast<uint64_t>(whole) * p.groups;
        for (uint64_t i = lane_id(); i < words; i += 32) to[i] = static_cast<int32_t>(from[i]);
        w.blocks += whole;
        if (whole < node.len) return w;
        query += whole * p.block_tokens;
        count -= whole * p.block_tokens;
    }
    return w;
}

KVC_DEVICE void lookup(const kvc_lookup_params &p) {
    const uint32_t request = block_x() * (kLookupThreads / 32) + warp_id();
    if (request >= p.requests) return;
    const LookupImage image(p);
    const int64_t begin = p.indptr[request], end = p.indptr[request + 1];
    const bool sound = begin >= 0 && begin <= end;
    if (!sound && lane_id() == 0) raise(p.error_flag, kFlagPosition);
    const int64_t given = sound && end - begin > p.leave ? end - begin - p.leave : 0;
    const int64_t room = static_cast<int64_t>(p.max_blocks) * p.block_tokens;
    const uint32_t count = static_cast<uint32_t>(given < room ? given : room);
    const uint64_t space = p.namespaces != nullptr ? p.namespaces[request] : 0;
    const LookupWalk w = walk(p, image, space, p.tokens + (sound ? begin : 0), count,
                              p.blocks + request * p.block_stride);
    if (lane_id() == 0) {
        if (w.broken) raise(p.error_flag, kFlagImage);
        p.matched[request] = w.blocks * p.block_tokens;
        if (p.tail_tokens != nullptr) p.tail_tokens[request] = w.tail;
    }
    if (p.tail_blocks == nullptr) return;
    const uint32_t *ids = p.slot_ids + static_cast<int64_t>(w.slot) * p.groups;
    int32_t *to = p.tail_blocks + static_cast<int64_t>(request) * p.groups;
    for (uint32_t i = lane_id(); i < p.groups; i += 32)
        to[i] = w.tail != 0 ? static_cast<int32_t>(ids[i]) : -1;
}

// Writes uploaded words to their places in the image, a warp a run.
KVC_DEVICE void lookup_patch(const kvc_lookup_patch_params &p) {
    const uint32_t run = block_x() * (kPatchThreads / 32) + warp_id();
    if (run >= p.count) return;
    const kvc_lookup_patch_run patch = p.patches[run];
    const uint64_t to = static_cast<uint64_t>(patch.to);
    const uint64_t room = static_cast<uint64_t>(p.image_words);
    if (to > room || patch.words > room - to || patch.from > p.uploaded ||
        patch.words > p.uploaded - patch.from) {
        if (lane_id() == 0) raise(p.error_flag, kFlagImage);
        return;
    }
    for (uint32_t i = lane_id(); i < patch.words; i += 32) p.image[to + i] = p.words[patch.from + i];
}

} // namespace kvc
