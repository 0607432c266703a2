// The wrapper without exceptions: each noun does its work, and each way to be wrong is an error
// value with its code and text.
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include <stdio.h>
#include <unistd.h>

#include "../../../ffi-tests/c/check.h"
#include "kvcache.hpp"

namespace kvc = kvcache;

template <class T>
constexpr bool movable_only = !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> &&
                              std::is_nothrow_move_constructible_v<T> &&
                              std::is_nothrow_move_assignable_v<T>;
static_assert(movable_only<kvc::pool> && movable_only<kvc::prefix> && movable_only<kvc::pin>);
static_assert(movable_only<kvc::cache> && movable_only<kvc::sequence> && movable_only<kvc::step>);
static_assert(movable_only<kvc::device> && movable_only<kvc::device_memory> &&
              movable_only<kvc::device_prefix>);
static_assert(movable_only<kvc::events> && movable_only<kvc::prefetch>);

// A failure with this code, whose text has `part`.
template <class R>
static void fails(int line, const R &result, kvc_status code, const char *part) {
    if (result || result.error().code() != code) {
        check_fail(__FILE__, line, "result", std::to_string(result.code()).c_str());
    } else if (result.error().message().find(part) == std::string::npos) {
        check_fail(__FILE__, line, "text", result.error().message().c_str());
    }
}
#define REFUSED(result, code, part) fails(__LINE__, (result), (code), (part))

static void info() {
    CHECK(kvc::abi_version() == KVC_ABI_VERSION);
    CHECK(std::string(kvc::version()).find('.') != std::string::npos);
    CHECK(kvc::build_info().find(kvc::version()) != std::string::npos);
    CHECK(!kvc::status_text(kvc::status::out_of_blocks).empty());
}

static void plan() {
    std::array<kvc::group_spec, 2> groups;
    for (auto &group : groups) group.layers = 2, group.kv_heads = 2, group.k_dim = group.v_dim = 64;
    groups[1].format = kvc::format::f32;
    kvc::plan_options options;
    options.memory_bytes = 1 << 24;
    options.context_tokens = 64;
    std::array<kvc::plan_group, 2> parts{};
    const auto plan = kvc::compute_plan(options, groups, parts);
    CHECK(plan && plan->fits == 1);
    CHECK(parts[1].token_bytes == 2 * parts[0].token_bytes);
    CHECK(kvc::compute_plan(options, groups).value().token_bytes == plan->token_bytes);
    REFUSED(kvc::compute_plan(options, groups, kvc::span<kvc::plan_group>(parts.data(), 1)),
            kvc::status::invalid_argument, "as long as groups");
    groups[0].k_dim = 7;
    REFUSED(kvc::compute_plan(options, groups), kvc::status::invalid_argument, "k_dim");
}

static void pool() {
    kvc::pool pool = kvc::pool::create(4).value();
    std::vector<int32_t> blocks(3);
    CHECK(pool.allocate(blocks));
    const auto refused = pool.allocate(blocks);
    REFUSED(refused, kvc::status::out_of_blocks, "");
    CHECK(refused.error().missing_blocks() == 2);
    CHECK(pool.retain(blocks) && pool.refs(blocks[0]).value() == 2);
    CHECK(pool.free(blocks).value() == 0 && pool.free(blocks).value() == 3);
    REFUSED(pool.free(blocks), kvc::status::bad_block, "");

    kvc::pool moved = std::move(pool);
    CHECK(!pool && moved.stats()->free_blocks == 4);
    // A moved-from handle is NULL, which the library answers.
    REFUSED(pool.stats(), kvc::status::null_pointer, "");
    CHECK(moved.close() && !moved);
    kvc::pool other = kvc::pool::create(2).value();
    other = kvc::pool::create(3).value();
    CHECK(other.stats()->blocks == 3);
    kvc_pool *raw = other.release();
    CHECK(kvc::pool(raw).stats()->blocks == 3);
}

static void prefix() {
    kvc::prefix_options options;
    options.capacity_blocks = 8;
    options.eviction = kvc::eviction::s3fifo;
    kvc::prefix prefix = kvc::prefix::create(options).value();
    CHECK(kvc::prefix::create(16, 1, 8).has_value());
    std::vector<uint32_t> tokens(40, 7);
    const std::vector<int32_t> blocks{5, 6};
    const kvc::span<const uint32_t> whole(tokens.data(), 32);
    CHECK(prefix.advance(1));
    const auto inserted = prefix.insert(1, whole, blocks);
    CHECK(inserted && inserted->stored_blocks == 2);
    std::array<int32_t, 4> found{}, tail{};
    const auto hit = prefix.lookup(1, tokens, 39, found, tail);
    CHECK(hit && hit->tokens == 32 && found[0] == 5 && found[1] == 6);
    CHECK(prefix.lookup(2, tokens, 39, found)->tokens == 0);
    REFUSED(prefix.lookup(1, tokens, 39, {}), kvc::status::buffer_too_small, "");
    {
        kvc::pin pin = prefix.lock(hit->at).value();
        CHECK(pin && prefix.stats()->pins == 1);
        CHECK(prefix.evict(2, found).value() == 0);
        kvc::pin other = std::move(pin);
        CHECK(!pin && other && other.release() && prefix.stats()->pins == 0);
        const kvc::pin dropped = prefix.lock(hit->at).value();
    }
    CHECK(prefix.stats()->pins == 0);
    const std::array<kvc::retention, 1> ranges{{{0, 16, 90, 0}}};
    CHECK(prefix.touch(hit->at) && prefix.prioritize(hit->at, ranges));
    CHECK(prefix.hint(hit->at, 1, kvc::next_use::ended));

    // One crossing for a step: a commit below the hit, and a query that pins.
    const std::vector<int32_t> more{9};
    kvc::prefix_commit commit{};
    commit.above = hit->at;
    commit.tokens = tokens.data(), commit.token_count = 16;
    commit.blocks = more.data(), commit.block_ids = 1;
    kvc::prefix_committed committed{};
    std::vector<uint32_t> longer(49, 7);
    kvc::prefix_query query{};
    query.name_space = 1;
    query.tokens = longer.data(), query.token_count = 49, query.max_tokens = 48;
    query.out_blocks = found.data(), query.capacity = 4, query.pin = 1;
    kvc::prefix_answer answer{};
    kvc::prefix_batch batch;
    batch.commit_count = batch.query_count = 1;
    batch.commits = &commit, batch.out_committed = &committed;
    batch.queries = &query, batch.out_answers = &answer;
    CHECK(prefix.run(batch) && committed.status == KVC_OK && answer.hit.tokens == 48);
    { const kvc::pin pin(prefix.get(), answer.pin); }
    CHECK(prefix.stats()->pins == 0);
    CHECK(prefix.evict(3, found).value() == 3);
    REFUSED(prefix.lock(hit->at), kvc::status::stale_handle, "");
    const std::array<uint32_t, 1> windows{20};
    std::array<int32_t, 2> gone{99, 100};
    CHECK(prefix.set_windows(windows) && prefix.forget(0, gone).value() == 0);
    REFUSED(prefix.forget(1, gone), kvc::status::invalid_argument, "group");
}

static void cache() {
    kvc::group_spec group;
    group.layers = 1, group.kv_heads = 1, group.k_dim = group.v_dim = 8;
    group.format = kvc::format::f32;
    kvc::cache_options options;
    options.blocks = 16;
    options.threads = 1;
    kvc::cache cache = kvc::cache::create(group, options).value();
    CHECK(kvc::cache::create(kvc::span<const kvc::group_spec>(&group, 1)).has_value());
    CHECK(cache.describe(9, "tenant", nullptr));
    const std::array<float, 1> one{1.0f};
    const std::array<float, 2> two{1.0f, 1.0f};
    REFUSED(cache.set_scales(0, one, two), kvc::status::invalid_argument, "a scale a KV head");
    REFUSED(cache.set_scales({9, 0}, one, one), kvc::status::invalid_argument, "");
    REFUSED(cache.set_device_rates(kvc::device_rates()), kvc::status::invalid_state, "");
    CHECK(cache.watch_metrics(1) && cache.set_metrics_time(1) && cache.advance(1));

    std::atomic<uint64_t> stored{0};
    auto count = [&](const kvc::event &event) {
        if (event.kind == kvc::event_kind::stored) stored += event.block_count;
    };
    kvc::events events = kvc::events::create(cache, kvc::events_options(), count).value();
    kvc::step step = kvc::step::create().value();
    std::vector<uint32_t> prompt(50, 3);
    kvc::sequence first;
    for (const uint32_t expected : {0u, 48u}) {
        kvc::started started = cache.start(prompt, 9).value();
        CHECK(started.cached_tokens == expected);
        const uint32_t rows = 50 - expected;
        const auto work = started.seq.work(kvc::span<const uint32_t>(prompt).subspan(expected));
        CHECK(step.begin(cache, kvc::span<const kvc::work>(&work, 1)));
        std::vector<uint32_t> positions(rows);
        CHECK(step.row_positions(positions).value() == rows && positions[0] == expected);
        std::vector<float> kv(rows * 8, 1.0f), q(rows * 16, 1.0f), out(rows * 16), lse(rows * 2);
        kvc::rope rope;
        rope.rotary_dim = 8;
        CHECK(rope.rotate(q, 2, 8, positions));
        REFUSED(rope.rotate(q, 2, 9, positions), kvc::status::invalid_argument, "head_dim");
        CHECK(step.append(0, kv, kv, &rope));
        REFUSED(step.append({0, 1}, kv, kv), kvc::status::invalid_argument, "group");
        REFUSED(step.append(0, kv, kvc::rows::f16(kv.data())), kvc::status::invalid_argument,
                "one element type");
        const kvc::scoring scoring;
        CHECK(step.attend(0, 2, q, out, &scoring, lse.data()));
        // All values are 1, and so is their mean.
        for (const float x : out) CHECK(check_close(x, 1.0f, 1e-6f));
        std::vector<uint16_t> half(rows * 16);
        CHECK(step.attend(0, 2, q, kvc::out_rows::f16(half.data())));
        CHECK(half[0] == 0x3c00);
        REFUSED(step.append_device(0, kv, kv), kvc::status::invalid_state, "");
        REFUSED(step.attend_device(0, 2, q, out), kvc::status::invalid_state, "");
        CHECK(step.commit());
        if (expected == 0) first = std::move(started.seq);
    }
    // The second has been released where its scope ended.
    CHECK(cache.stats()->sequences == 1);
    {
        kvc::sequence forked = first.fork().value();
        CHECK(cache.stats()->sequences == 2 && forked.tokens().value() == 50);
        CHECK(forked.truncate(20) && forked.tokens().value() == 20);
        std::vector<int32_t> blocks(4);
        CHECK(forked.blocks(0, blocks).value() == 2 && first.blocks(0).value() == 4);
        std::vector<uint32_t> tokens(50);
        CHECK(first.tokens(tokens).value() == 50 && tokens == prompt);
        const std::array<kvc::retention, 1> ranges{{{0, UINT64_MAX, 80, 0}}};
        CHECK(first.prioritize(ranges) && first.hint(0, kvc::next_use::expected, 100));
        const auto work = forked.work(kvc::span<const uint32_t>(prompt.data(), 1));
        CHECK(step.begin(cache, kvc::span<const kvc::work>(&work, 1)) && step.cancel());
        CHECK(forked.release() && !forked);
    }
    CHECK(first.release());
    REFUSED(first.release(), kvc::status::null_pointer, "");
    CHECK(cache.audit() && cache.sync());
    const kvc::cache_counts counts = cache.stats().value();
    CHECK(counts.sequences == 0 && counts.hit_tokens == 48);
    CHECK(cache.metrics()->hits_tokens == 48);
    CHECK(cache.metrics_text()->find("kvcache:") != std::string::npos);
    // The publishing thread comes when it comes: a minute is for ever.
    for (int ms = 0; ms < 60000 && stored < 3; ms++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(stored == 3);
    CHECK(events.snapshot() && events.stats()->dropped_events == 0);
    CHECK(events.endpoint().value().empty() && events.endpoint(true).value().empty());
    CHECK(cache.clear_prefix() && cache.stats()->free_blocks == 16);
    CHECK(events.close());
    // A sequence may outlive its cache: the library refuses its id.
    kvc::sequence late = cache.start(prompt)->seq.fork().value();
    CHECK(cache.close());
    REFUSED(late.tokens(), kvc::status::stale_handle, "");
}

// A store in a map.
class shelf {
  public:
    bool exists(const uint8_t *keys, kvc::span<uint8_t> found) {
        const std::lock_guard<std::mutex> guard(lock_);
        for (std::size_t i = 0; i < found.size(); i++) found[i] = held_.count(key(keys + 32 * i));
        return true;
    }
    void put(kvc::span<const kvc::tier_object> objects, kvc::span<kvc_status> outcomes) {
        const std::lock_guard<std::mutex> guard(lock_);
        for (std::size_t i = 0; i < objects.size(); i++) {
            const auto *bytes = static_cast<const uint8_t *>(objects[i].bytes);
            held_[key(objects[i].key)].assign(bytes, bytes + objects[i].length);
            outcomes[i] = kvc::status::ok;
        }
    }
    void get(kvc::span<const kvc::tier_object> objects, kvc::span<kvc_status> outcomes) {
        const std::lock_guard<std::mutex> guard(lock_);
        for (std::size_t i = 0; i < objects.size(); i++) {
            const auto found = held_.find(key(objects[i].key));
            outcomes[i] = kvc::status::bad_block;
            if (found == held_.end() || found->second.size() != objects[i].length) continue;
            std::memcpy(objects[i].bytes, found->second.data(), found->second.size());
            outcomes[i] = kvc::status::ok;
        }
    }
    void remove(const uint8_t *keys, uint64_t count) {
        const std::lock_guard<std::mutex> guard(lock_);
        for (uint64_t i = 0; i < count; i++) held_.erase(key(keys + 32 * i));
    }
    std::size_t size() {
        const std::lock_guard<std::mutex> guard(lock_);
        return held_.size();
    }

  private:
    static std::string key(const uint8_t *bytes) {
        return std::string(reinterpret_cast<const char *>(bytes), 32);
    }
    std::mutex lock_;
    std::map<std::string, std::vector<uint8_t>> held_;
};

static void tiers() {
    kvc::group_spec group;
    group.layers = 1, group.kv_heads = 1, group.k_dim = group.v_dim = 8;
    group.format = kvc::format::f32;
    kvc::cache_options sizes;
    sizes.blocks = 8;
    sizes.threads = 1;
    shelf shelf;
    const kvc::tier_store store = kvc::store_of(shelf);
    kvc::tier_options options;
    options.model = "toy", options.store = &store;
    const std::vector<uint32_t> prompt(50, 3);
    // What the first cache stores, the second loads, with its bytes.
    for (const bool again : {false, true}) {
        kvc::cache cache = kvc::cache::create(group, sizes).value();
        REFUSED(cache.attach_tiers(kvc::tier_options()), kvc::status::null_pointer, "model");
        REFUSED(cache.tier_stats(0), kvc::status::invalid_argument, "");
        CHECK(cache.attach_tiers(options));
        REFUSED(cache.attach_tiers(options), kvc::status::invalid_state, "tiers already");
        CHECK(cache.tier_stats(0)->kind == kvc::tier_kind::host);
        CHECK(cache.tier_stats(1)->kind == kvc::tier_kind::store);
        kvc::tier_decision decision{};
        kvc::prefetch prefetch = kvc::prefetch::create(cache, prompt, 0, &decision).value();
        kvc::prefetch moved = std::move(prefetch);
        CHECK(!prefetch && moved.wait(60000).value() && moved.close() && !moved);
        REFUSED(prefetch.wait(), kvc::status::null_pointer, "");
        // A store is asked after the decision, by a thread of the tier.
        CHECK(decision.load_blocks == 3 && decision.why == kvc::load_reason::cost_unknown);
        CHECK(cache.tier_stats(1)->missed == (again ? 0u : 3u));
        kvc::started started = cache.start(prompt).value();
        CHECK(started.cached_tokens == (again ? 48u : 0u));
        const uint32_t rows = 50 - started.cached_tokens;
        kvc::step step = kvc::step::create().value();
        const auto work = started.seq.work(kvc::span<const uint32_t>(prompt.data(), rows));
        CHECK(step.begin(cache, kvc::span<const kvc::work>(&work, 1)));
        // Loaded: 48 rows of 1, and 2 of 26.
        const std::vector<float> kv(rows * 8, again ? 26.0f : 1.0f), q(rows * 8, 0.0f);
        std::vector<float> out(rows * 8);
        CHECK(step.append(0, kv, kv) && step.attend(0, 1, q, out) && step.commit());
        CHECK(check_close(out[rows * 8 - 1], again ? 2.0f : 1.0f, 1e-5f));
        // Its blocks through a file into another cache.
        std::FILE *const kept = std::tmpfile();
        CHECK(kept != nullptr);
        const int file = fileno(kept);
        CHECK(cache.export_blocks(started.seq.id(), "toy", file).value() == 48);
        kvc::cache next = kvc::cache::create(group, sizes).value();
        const kvc_tier_slice part{0, 0};
        const std::array<int32_t, 1> files{file};
        REFUSED(next.import_blocks(files, "toy"), kvc::status::tier_failed, "stream");
        CHECK(lseek(file, 0, SEEK_SET) == 0);
        CHECK(next.import_blocks(files, "toy", 0, kvc::span<const kvc_tier_slice>(&part, 1)).value() == 48);
        CHECK(next.start(prompt).value().cached_tokens == 48);
        std::fclose(kept);
        CHECK(started.seq.release() && cache.flush_tiers(60000).value());
        CHECK(shelf.size() == 3 && cache.tier_stats(1)->down == 0);
        CHECK(kvc::prefetch::create(cache, prompt).has_value());
        // From the store again, as an engine does that waits for each layer.
        CHECK(cache.clear_prefix());
        {
            kvc::started loading = cache.onboard(prompt).value();
            CHECK(loading.cached_tokens == 48);
            CHECK(loading.seq.load_progress()->state == kvc::load_state::loading);
            REFUSED(loading.seq.fork(), kvc::status::invalid_state, "loaded");
            REFUSED(loading.seq.wait_layer(1), kvc::status::invalid_argument, "layer");
            const auto rest = loading.seq.work(kvc::span<const uint32_t>(prompt.data(), 2));
            CHECK(step.begin(cache, kvc::span<const kvc::work>(&rest, 1)));
            REFUSED(step.commit(), kvc::status::invalid_state, "loaded");
            CHECK(step.wait_layer(0, 60000).value() && loading.seq.wait_layer(0).value());
            CHECK(loading.seq.load_progress()->state == kvc::load_state::complete);
            CHECK(step.commit() && loading.seq.cancel_load().value() == 50);
        }
        // With an image at 20, only what is before it.
        kvc::media image{};
        image.position = 20;
        const kvc::span<const kvc::media> images(&image, 1);
        CHECK(kvc::prefetch::create(cache, prompt, images, 0, &decision)->wait(60000).value());
        CHECK(decision.device_tokens == 16 && decision.host_tokens == 0);
        CHECK(cache.start(prompt, images).value().cached_tokens == 20);
        CHECK(cache.close());
    }
}

static void kernels() {
    // One sequence of three tokens in one block, by the calls that an engine with tensors makes.
    std::vector<float> k(16 * 8), v(16 * 8), rows(3 * 8, 0.5f), q(8, 1.0f), out(8), lse(1);
    const std::vector<int64_t> slots{0, 1, 2};
    kvc::append_desc append;
    append.kv_heads = 1, append.k_dim = append.v_dim = 8, append.format = kvc::format::f32;
    append.dtype = kvc::dtype::f32, append.block_tokens = 16, append.num_blocks = 1;
    append.rows = 3, append.k = k.data(), append.v = v.data(), append.slots = slots.data();
    append.k_rows = append.v_rows = rows.data();
    CHECK(kvc::append(append));
    const int32_t table = 0, indptr[2] = {0, 1}, length = 3;
    kvc::attend_desc attend;
    attend.q_heads = attend.kv_heads = 1, attend.k_dim = attend.v_dim = 8;
    attend.format = kvc::format::f32, attend.q_dtype = attend.out_dtype = kvc::dtype::f32;
    attend.block_tokens = 16, attend.num_blocks = attend.seqs = 1;
    attend.k = k.data(), attend.v = v.data(), attend.table = &table, attend.table_stride = 1;
    attend.q_indptr = indptr, attend.kv_lens = &length, attend.q = q.data();
    attend.out = out.data(), attend.lse = lse.data();
    std::vector<uint64_t> workspace(kvc::attend_workspace_size(attend, 1, 16).value() / 8 + 1);
    attend.workspace = workspace.data(), attend.workspace_bytes = workspace.size() * 8;
    CHECK(kvc::attend_kernel(attend, 1)->find("cpu") != std::string::npos);
    CHECK(kvc::attend(attend));
    for (const float x : out) CHECK(check_close(x, 0.5f, 1e-6f));
    // Merged with itself, a state keeps its outputs and doubles its weight.
    const std::vector<float> other = out, other_lse = lse;
    CHECK(kvc::merge_states(out, lse, other, other_lse, 8));
    CHECK(check_close(lse[0], other_lse[0] + 0.6931472f, 1e-5f));
    CHECK(check_close(out[0], 0.5f, 1e-6f));
    REFUSED(kvc::merge_states(out, lse, other, other_lse, 9), kvc::status::invalid_argument,
            "v_dim");

    kvc::seal_desc seal;
    seal.kv_heads = 1, seal.k_dim = seal.v_dim = 64, seal.block_tokens = 32;
    seal.format = kvc::format::kt4v4;
    CHECK(kvc::seal_record_size(seal).value() > 0);
    REFUSED(kvc::seal(seal), kvc::status::null_pointer, "");

    // Without a device, questions about one are answered from the options.
    const kvc::device none;
    kvc::device_attend_options options;
    options.max_kv_tokens = 16, options.multiprocessors = 132;
    attend.format = kvc::format::bf16, attend.q_dtype = attend.out_dtype = kvc::dtype::bf16;
    attend.k_dim = attend.v_dim = 64;
    CHECK(none.attend_workspace_size(attend, options).value() > 0);
    CHECK(!none.attend_kernel(attend, options)->empty());
    REFUSED(none.attend(attend, options), kvc::status::null_pointer, "");
    attend.seqs = 64;
    CHECK(none.cascade_workspace_size(attend, options, 4).value() >
          none.attend_workspace_size(attend, options).value());
    REFUSED(none.cascade(attend, options, nullptr, 4), kvc::status::null_pointer, "");
    REFUSED(none.merge(kvc::device_merge_desc()), kvc::status::null_pointer, "");

    kvc::device_cascade_query query;
    query.q_heads = 32, query.kv_heads = 8, query.head_dim = 128, query.block_tokens = 16;
    query.token_bytes = 4096, query.seqs = 128, query.kv_tokens = 128 * 4352;
    const std::array<kvc::device_cascade_prefix, 1> shared{{{0, 128, 256, 0}}};
    std::array<kvc::device_cascade_segment, 2> list{};
    REFUSED(kvc::choose_cascade(query, shared, list), kvc::status::invalid_argument, "rates");
    query.memory_bytes = 3e6, query.cache_bytes = 6e6, query.cache_size = 50u << 20;
    query.operations = 3e8, query.launch = 2.5, query.multiprocessors = 132;
    CHECK(kvc::choose_cascade(query, shared, list)->pays == 1 && list[0].shared_blocks == 256);
}

static void device() {
    const auto opened = kvc::device::open(kvc::device_kind::emu);
    if (!opened) {
        CHECK(opened.error().code() == kvc::status::no_kernels);
        // What a program without a device is answered.
        const kvc::device none;
        int32_t word = 0;
        REFUSED(none.info(), kvc::status::null_pointer, "");
        REFUSED(none.name(), kvc::status::null_pointer, "");
        REFUSED(none.rates(), kvc::status::null_pointer, "");
        REFUSED(none.alloc(64), kvc::status::null_pointer, "");
        REFUSED(none.upload(&word, &word, 4), kvc::status::null_pointer, "");
        REFUSED(none.download(&word, &word, 4), kvc::status::null_pointer, "");
        REFUSED(none.zero(&word, 4), kvc::status::null_pointer, "");
        REFUSED(none.sync(), kvc::status::null_pointer, "");
        REFUSED(none.append(kvc::append_desc(), nullptr), kvc::status::null_pointer, "");
        REFUSED(none.copy(kvc::device_copy_desc()), kvc::status::null_pointer, "");
        const kvc::prefix index = kvc::prefix::create(4, 1, 16).value();
        CHECK(kvc::device_prefix::size(index).value() > 16 * 5 * 4);
        REFUSED(kvc::device_prefix::create(none, index), kvc::status::null_pointer, "device");
        kvc::device_prefix copy;
        REFUSED(copy.sync(), kvc::status::null_pointer, "device_prefix");
        REFUSED(copy.lookup(kvc::device_lookup_desc()), kvc::status::null_pointer, "");
        return;
    }
    const kvc::device &device = *opened;
    CHECK(device.info()->kind == kvc::device_kind::emu && !device.name()->empty());
    CHECK(device.rates()->memory_bytes > 0);
    const kvc::device_memory from = device.alloc(512).value(), to = device.alloc(512).value();
    std::vector<uint32_t> sent(128), got(128);
    for (uint32_t i = 0; i < 128; i++) sent[i] = i * 77;
    CHECK(device.upload(from, kvc::span<const uint32_t>(sent)));
    const std::vector<uint64_t> many(65);
    REFUSED(device.upload(from, kvc::span<const uint64_t>(many)), kvc::status::buffer_too_small,
            "more than");
    // Block 1 of 256 bytes to block 0.
    const std::array<int32_t, 2> pair{1, 0};
    const kvc::device_memory list = device.alloc(16).value();
    CHECK(device.upload(list, kvc::span<const int32_t>(pair)));
    kvc::device_copy_desc copy;
    copy.count = 1, copy.run_bytes = 256, copy.from_blocks = copy.to_blocks = 2;
    copy.list = list.get(), copy.from = from.get(), copy.to = to.get();
    copy.from_block_stride = copy.to_block_stride = 256;
    CHECK(device.zero(to.get(), 512) && device.copy(copy) && device.sync());
    CHECK(device.download(kvc::span<uint32_t>(got), to));
    for (uint32_t i = 0; i < 128; i++) CHECK(got[i] == (i < 64 ? sent[i + 64] : 0));

    // An index of one prompt, its copy, and a request that agrees for six tokens.
    kvc::prefix index = kvc::prefix::create(4, 1, 16).value();
    const std::array<uint32_t, 8> tokens{1, 2, 3, 4, 5, 6, 7, 8}, request{1, 2, 3, 4, 5, 6, 9, 9};
    const std::array<int32_t, 2> blocks{11, 12}, offsets{0, 8};
    CHECK(index.insert(0, tokens, blocks));
    auto mirror = kvc::device_prefix::create(device, index);
    CHECK(mirror && mirror->sync().value() > 0);
    REFUSED(kvc::device_prefix::create(device, index), kvc::status::invalid_state, "a copy");
    const auto tokens_at = device.alloc(32).value(), offsets_at = device.alloc(8).value();
    const auto found = device.alloc(16).value();
    CHECK(device.upload(tokens_at, kvc::span<const uint32_t>(request)));
    CHECK(device.upload(offsets_at, kvc::span<const int32_t>(offsets)));
    kvc::device_lookup_desc lookup;
    auto *const words = static_cast<uint32_t *>(found.get());
    lookup.requests = 1, lookup.max_blocks = 2;
    lookup.tokens = static_cast<const uint32_t *>(tokens_at.get());
    lookup.indptr = static_cast<const int32_t *>(offsets_at.get());
    lookup.matched = words, lookup.blocks = static_cast<int32_t *>(found.get()) + 2;
    lookup.tail_tokens = words + 1;
    CHECK(mirror->lookup(lookup));
    std::array<uint32_t, 3> answer{};
    CHECK(device.download(kvc::span<uint32_t>(answer), found));
    CHECK(answer[0] == 4 && answer[1] == 2 && answer[2] == 11);
}

static void chains() {
    const auto blocks = kvc::pool::create(4).and_then([](kvc::pool pool) { return pool.stats(); });
    CHECK(blocks->free_blocks == 4);
    const auto none = kvc::pool::create(0).and_then([](kvc::pool pool) { return pool.stats(); });
    REFUSED(none, kvc::status::invalid_argument, "blocks");
    auto refs = kvc::pool::create(0).and_then([](kvc::pool pool) { return pool.refs(0); });
    CHECK(std::move(refs).value_or(7u) == 7);
}

int main() {
    info();
    plan();
    pool();
    prefix();
    cache();
    tiers();
    kernels();
    device();
    chains();
    return check_result();
}
