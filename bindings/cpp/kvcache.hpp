// libkvcache from C++17 and newer, in one header over kvcache.h.
//
//   #define KVCACHE_EXCEPTIONS 1    before the include: calls return their value and throw
//                                   kvcache::error. Without it they throw nothing and return a
//                                   kvcache::result, which is like std::expected<T, error>.
//
// Handles are movable and not copyable, and end what they hold. Spans are std::span from C++20 on,
// else kvcache::span, which takes the same arguments. Device addresses and streams are raw: a
// CUdeviceptr or cudaMalloc's pointer as void*, a cudaStream_t as void*. Nothing here allocates
// except where a std::string is returned, and nothing here locks: which threads may call what, and
// the shapes behind pointers, are what kvcache.h says of the C function of the same name.
//
// Each function of kvcache.h is called here and each KVC_ constant has its name here; a test
// (ffi-tests/tests/wrapper.rs) finds what is missing. This file knows no policy of its own.
#ifndef KVCACHE_HPP
#define KVCACHE_HPP

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "kvcache.h"

#if __cplusplus >= 202002L
#include <span>
#endif

#ifndef KVCACHE_EXCEPTIONS
#define KVCACHE_EXCEPTIONS 0
#endif

static_assert(KVC_ABI_VERSION == 1, "kvcache.hpp is for the kvcache.h of ABI 0.1");

namespace kvcache {

// The two ways to report errors are different types, so that both can be used in one program.
#if KVCACHE_EXCEPTIONS
inline namespace throwing {
#else
inline namespace results {
#endif

// ----------------------------------------------------------------------------------------------
// Spans
// ----------------------------------------------------------------------------------------------
#if __cplusplus >= 202002L
template <class T>
using span = std::span<T>;
#else
// A pointer and a length: of an array, or of anything contiguous that has data() and size().
template <class T>
class span {
  public:
    constexpr span() noexcept = default;
    constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    template <std::size_t N>
    constexpr span(T (&array)[N]) noexcept : data_(array), size_(N) {}
    template <class C, class = std::enable_if_t<std::is_convertible_v<
                           std::remove_pointer_t<decltype(std::declval<C &>().data())> (*)[],
                           T (*)[]>>>
    constexpr span(C &&c) noexcept : data_(c.data()), size_(c.size()) {}

    constexpr T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T *begin() const noexcept { return data_; }
    constexpr T *end() const noexcept { return data_ + size_; }
    constexpr T &operator[](std::size_t i) const noexcept { return data_[i]; }
    constexpr span first(std::size_t n) const noexcept { return {data_, n}; }
    constexpr span subspan(std::size_t at) const noexcept { return {data_ + at, size_ - at}; }
    constexpr span subspan(std::size_t at, std::size_t n) const noexcept { return {data_ + at, n}; }

  private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};
#endif

namespace detail {

// The text of a function that copies as snprintf would.
template <class F>
std::string text(F copy) {
    char first[256];
    const uint64_t length = copy(first, sizeof first);
    if (length < sizeof first) return std::string(first, static_cast<std::size_t>(length));
    std::string all(static_cast<std::size_t>(length) + 1, '\0');
    // What grew meanwhile is cut.
    const uint64_t again = copy(&all[0], all.size());
    all.resize(static_cast<std::size_t>(again < length ? again : length));
    return all;
}

// A length that the C function takes in 32 bits. More than those is more than any of them accepts.
constexpr uint32_t count32(std::size_t n) noexcept {
    return n > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(n);
}

}  // namespace detail

// ----------------------------------------------------------------------------------------------
// Constants, of the types that the structs' fields have
// ----------------------------------------------------------------------------------------------
namespace status {
inline constexpr kvc_status ok = KVC_OK, invalid_argument = KVC_ERR_INVALID_ARGUMENT,
                            null_pointer = KVC_ERR_NULL_POINTER, misaligned = KVC_ERR_MISALIGNED,
                            struct_size = KVC_ERR_STRUCT_SIZE, overflow = KVC_ERR_OVERFLOW,
                            unsupported = KVC_ERR_UNSUPPORTED, stale_handle = KVC_ERR_STALE_HANDLE,
                            buffer_too_small = KVC_ERR_BUFFER_TOO_SMALL,
                            bad_block = KVC_ERR_BAD_BLOCK, out_of_blocks = KVC_ERR_OUT_OF_BLOCKS,
                            out_of_sequences = KVC_ERR_OUT_OF_SEQUENCES,
                            out_of_memory = KVC_ERR_OUT_OF_MEMORY,
                            too_many_handles = KVC_ERR_TOO_MANY_HANDLES,
                            no_kernels = KVC_ERR_NO_KERNELS, no_device = KVC_ERR_NO_DEVICE,
                            device_failed = KVC_ERR_DEVICE_FAILED,
                            tier_failed = KVC_ERR_TIER_FAILED,
                            invalid_state = KVC_ERR_INVALID_STATE,
                            layer_missing = KVC_ERR_LAYER_MISSING, panic = KVC_ERR_PANIC,
                            poisoned = KVC_ERR_POISONED;
}
namespace dtype {
inline constexpr uint32_t f32 = KVC_DTYPE_F32, f16 = KVC_DTYPE_F16, bf16 = KVC_DTYPE_BF16;
}
namespace format {
inline constexpr uint32_t f32 = KVC_FORMAT_F32, f16 = KVC_FORMAT_F16, bf16 = KVC_FORMAT_BF16,
                          fp8_e4m3 = KVC_FORMAT_FP8_E4M3, fp8_e5m2 = KVC_FORMAT_FP8_E5M2,
                          int8 = KVC_FORMAT_INT8_T, int4 = KVC_FORMAT_INT4_T,
                          nvfp4 = KVC_FORMAT_NVFP4, kt8v8 = KVC_FORMAT_KT8V8,
                          kt4v4 = KVC_FORMAT_KT4V4, kt3v3 = KVC_FORMAT_KT3V3,
                          kt4v2 = KVC_FORMAT_KT4V2, kt2v2 = KVC_FORMAT_KT2V2;
}
namespace rope_style {
inline constexpr uint32_t halves = KVC_ROPE_HALVES, interleaved = KVC_ROPE_INTERLEAVED;
}
namespace eviction {
inline constexpr uint32_t lru = KVC_EVICTION_LRU, lfu = KVC_EVICTION_LFU,
                          fifo = KVC_EVICTION_FIFO, slru = KVC_EVICTION_SLRU,
                          s3fifo = KVC_EVICTION_S3FIFO;
}
namespace next_use {
inline constexpr uint32_t none = KVC_HINT_NONE, ended = KVC_HINT_ENDED,
                          expected = KVC_HINT_EXPECTED, waited = KVC_HINT_WAITED;
}
namespace device_kind {
inline constexpr uint32_t cpu = KVC_DEVICE_CPU, cuda = KVC_DEVICE_CUDA, emu = KVC_DEVICE_EMU;
}
namespace event_kind {
inline constexpr uint32_t stored = KVC_EVENT_STORED, removed = KVC_EVENT_REMOVED,
                          cleared = KVC_EVENT_CLEARED;
}
namespace medium {
inline constexpr uint32_t gpu = KVC_MEDIUM_GPU, cpu = KVC_MEDIUM_CPU,
                          storage = KVC_MEDIUM_STORAGE, external = KVC_MEDIUM_EXTERNAL;
}
namespace encoding {
inline constexpr uint32_t map = KVC_ENCODING_MAP, array = KVC_ENCODING_ARRAY;
}
namespace tier_kind {
inline constexpr uint32_t host = KVC_TIER_HOST, disk = KVC_TIER_DISK, store = KVC_TIER_STORE;
}
namespace load_state {
inline constexpr uint32_t complete = KVC_ONBOARD_COMPLETE, loading = KVC_ONBOARD_LOADING,
                          failed = KVC_ONBOARD_FAILED;
}
namespace missed {
inline constexpr uint32_t absent = KVC_MISSED_ABSENT, bad = KVC_MISSED_BAD,
                          down = KVC_MISSED_DOWN, cancelled = KVC_MISSED_CANCELLED;
}
namespace load_reason {
inline constexpr uint32_t nothing_found = KVC_WHY_NOTHING_FOUND,
                          cost_unknown = KVC_WHY_COST_UNKNOWN, rate_unknown = KVC_WHY_RATE_UNKNOWN,
                          load_is_faster = KVC_WHY_LOAD_IS_FASTER,
                          load_is_faster_at_first = KVC_WHY_LOAD_IS_FASTER_AT_FIRST,
                          compute_is_faster = KVC_WHY_COMPUTE_IS_FASTER;
}

// ----------------------------------------------------------------------------------------------
// Which library this is
// ----------------------------------------------------------------------------------------------
namespace detail {
// A program that includes this header does not link with a library of another ABI.
#if defined(__GNUC__)
__attribute__((used))
#endif
inline void (*const abi)() = kvc_abi_0_1;
}  // namespace detail

// 0x00MAJOR_00MINOR of the loaded library; KVC_ABI_VERSION is the header's.
inline uint32_t abi_version() noexcept { return kvc_abi_version(); }
inline const char *version() noexcept { return kvc_version(); }
inline std::string build_info() {
    return detail::text([](char *buf, uint64_t len) { return kvc_build_info(buf, len); });
}

// ----------------------------------------------------------------------------------------------
// Errors and results
// ----------------------------------------------------------------------------------------------
inline std::string status_text(kvc_status code) {
    return detail::text([=](char *buf, uint64_t len) { return kvc_status_text(code, buf, len); });
}

// The text of this thread's last error.
inline std::string last_error() {
    return detail::text([](char *buf, uint64_t len) { return kvc_last_error(buf, len); });
}

#if KVCACHE_EXCEPTIONS
// What a call that failed throws. Holds its text.
class error final : public std::exception {
  public:
    // `said` where this header found the fault; else the library's text of this thread is taken.
    explicit error(kvc_status code, const char *said = nullptr) noexcept
        : code_(code), missing_(code == KVC_ERR_OUT_OF_BLOCKS ? kvc_last_missing_blocks() : 0) {
        if (said != nullptr) {
            std::snprintf(text_, sizeof text_, "%s", said);
        } else {
            kvc_last_error(text_, sizeof text_);
        }
    }
    kvc_status code() const noexcept { return code_; }
    // Of status::out_of_blocks: how many were missing.
    uint32_t missing_blocks() const noexcept { return missing_; }
    const char *what() const noexcept override { return text_; }
    std::string message() const { return text_; }

  private:
    kvc_status code_;
    uint32_t missing_;
    char text_[240] = {};
};

template <class T>
using result = T;

namespace detail {

inline void done(kvc_status code, const char *said = nullptr) {
    if (code != KVC_OK) throw error(code, said);
}
template <class T>
std::decay_t<T> answer(kvc_status code, T &&value) {
    done(code);
    return std::forward<T>(value);
}
template <class T>
T refuse(const char *said) {
    throw error(KVC_ERR_INVALID_ARGUMENT, said);
}

}  // namespace detail
#else
// Why a call failed: its code. The text is the thread's last one, to be asked for before the thread
// fails again.
class error final {
  public:
    explicit error(kvc_status code, const char *said = nullptr) noexcept
        : said_(said),
          code_(code),
          missing_(code == KVC_ERR_OUT_OF_BLOCKS ? kvc_last_missing_blocks() : 0) {}
    kvc_status code() const noexcept { return code_; }
    // Of status::out_of_blocks: how many were missing.
    uint32_t missing_blocks() const noexcept { return missing_; }
    std::string message() const { return said_ != nullptr ? said_ : last_error(); }

  private:
    // Where this header found the fault.
    const char *said_;
    kvc_status code_;
    uint32_t missing_;
};

namespace detail {

// value() and * of a result that is an error: a fault of the program, which ends.
[[noreturn]] inline void no_value(const error &why) {
    std::fprintf(stderr, "kvcache: no value: %d (%s)\n", static_cast<int>(why.code()),
                 why.message().c_str());
    std::abort();
}

}  // namespace detail

// A value, or the error in its place.
template <class T>
class [[nodiscard]] result {
  public:
    using value_type = T;
    result(T value) noexcept : value_(std::move(value)), error_(KVC_OK) {}
    result(kvcache::error why) noexcept : error_(why) {}

    bool has_value() const noexcept { return value_.has_value(); }
    explicit operator bool() const noexcept { return has_value(); }
    T &value() & { return held(), *value_; }
    const T &value() const & { return held(), *value_; }
    T &&value() && { return held(), *std::move(value_); }
    T &operator*() & { return value(); }
    const T &operator*() const & { return value(); }
    T &&operator*() && { return std::move(*this).value(); }
    T *operator->() { return &value(); }
    const T *operator->() const { return &value(); }
    template <class U>
    T value_or(U &&other) && {
        return value_ ? *std::move(value_) : static_cast<T>(std::forward<U>(other));
    }
    // status::ok where there is a value.
    kvc_status code() const noexcept { return error_.code(); }
    const kvcache::error &error() const noexcept { return error_; }
    // `next(value)`, itself a result, or the error.
    template <class F>
    auto and_then(F &&next) && -> std::invoke_result_t<F, T &&> {
        if (!value_) return error_;
        return std::forward<F>(next)(*std::move(value_));
    }

  private:
    void held() const {
        if (!value_) detail::no_value(error_);
    }
    std::optional<T> value_;
    kvcache::error error_;
};

// Success, or an error.
template <>
class [[nodiscard]] result<void> {
  public:
    using value_type = void;
    result() noexcept : error_(KVC_OK) {}
    result(kvcache::error why) noexcept : error_(why) {}

    bool has_value() const noexcept { return code() == KVC_OK; }
    explicit operator bool() const noexcept { return has_value(); }
    void value() const {
        if (!has_value()) detail::no_value(error_);
    }
    kvc_status code() const noexcept { return error_.code(); }
    const kvcache::error &error() const noexcept { return error_; }
    template <class F>
    auto and_then(F &&next) const -> std::invoke_result_t<F> {
        if (!has_value()) return error_;
        return std::forward<F>(next)();
    }

  private:
    kvcache::error error_;
};

namespace detail {

inline result<void> done(kvc_status code, const char *said = nullptr) noexcept {
    return error(code, said);
}
template <class T>
result<std::decay_t<T>> answer(kvc_status code, T &&value) noexcept {
    if (code != KVC_OK) return error(code);
    return std::forward<T>(value);
}
template <class T>
result<T> refuse(const char *said) noexcept {
    return error(KVC_ERR_INVALID_ARGUMENT, said);
}

}  // namespace detail
#endif

namespace detail {

// A handle of the library: one owner, ended with it.
template <class T, kvc_status (*End)(T *)>
class handle {
  public:
    handle() noexcept = default;
    // Takes over a handle of the C interface.
    explicit handle(T *raw) noexcept : raw_(raw) {}
    handle(handle &&other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
    handle &operator=(handle &&other) noexcept {
        if (this != &other) {
            if (raw_ != nullptr) End(raw_);
            raw_ = std::exchange(other.raw_, nullptr);
        }
        return *this;
    }
    ~handle() {
        if (raw_ != nullptr) End(raw_);
    }

    // For calls of the C interface.
    T *get() const noexcept { return raw_; }
    explicit operator bool() const noexcept { return raw_ != nullptr; }
    // Gives the handle up without ending it.
    [[nodiscard]] T *release() noexcept { return std::exchange(raw_, nullptr); }
    // Ends it now and says whether that worked: where it did not, it is still held.
    result<void> close() {
        const kvc_status code = End(raw_);
        if (code == KVC_OK) raw_ = nullptr;
        return done(code);
    }

  private:
    T *raw_ = nullptr;
};

// An option struct that begins with its defaults.
template <class C, kvc_status (*Init)(C *, uint32_t)>
struct with_defaults : C {
    // Fails where the library is older than the header; every call then refuses the struct.
    with_defaults() noexcept : C() { Init(this, sizeof(C)); }
};

}  // namespace detail

// ----------------------------------------------------------------------------------------------
// plan
// ----------------------------------------------------------------------------------------------
using group_spec = detail::with_defaults<kvc_group_spec, kvc_group_spec_init>;
using plan_options = detail::with_defaults<kvc_plan_options, kvc_plan_options_init>;
using plan_result = kvc_plan_result;
using plan_group = kvc_plan_group;
static_assert(sizeof(group_spec) == sizeof(kvc_group_spec), "an array of one is one of the other");

// `out_groups` is empty, or has a place for each of `groups`.
inline result<plan_result> compute_plan(const kvc_plan_options &options,
                                        span<const group_spec> groups,
                                        span<plan_group> out_groups = {}) {
    if (!out_groups.empty() && out_groups.size() != groups.size()) {
        return detail::refuse<plan_result>("out_groups must be as long as groups");
    }
    plan_result out{};
    const kvc_status code =
        kvc_plan_compute(&options, groups.data(), detail::count32(groups.size()), &out, sizeof out,
                         out_groups.empty() ? nullptr : out_groups.data());
    return detail::answer(code, out);
}

// ----------------------------------------------------------------------------------------------
// attend and append: the kernels alone
// ----------------------------------------------------------------------------------------------
using attend_desc = detail::with_defaults<kvc_attend_desc, kvc_attend_desc_init>;
using append_desc = detail::with_defaults<kvc_append_desc, kvc_append_desc_init>;

// Where codes, scales and sealed tiles lie, for the two above and for seal().
using scales = detail::with_defaults<kvc_scales, kvc_scales_init>;
using tile_view = detail::with_defaults<kvc_tile_view, kvc_tile_view_init>;
using seal_desc = detail::with_defaults<kvc_seal_desc, kvc_seal_desc_init>;
using raw_block = kvc_raw_block;
using seal_tile = kvc_seal_tile;

// How keys and queries are rotated.
struct rope : detail::with_defaults<kvc_rope, kvc_rope_init> {
    // Rotates `[position][heads][head_dim]` rows in place.
    result<void> rotate(span<float> rows, uint32_t heads, uint32_t head_dim,
                        span<const uint32_t> positions) const {
        if (rows.size() / (heads | !heads) / (head_dim | !head_dim) != positions.size() ||
            rows.size() != positions.size() * heads * head_dim) {
            return detail::done(KVC_ERR_INVALID_ARGUMENT,
                                "rows must be positions times heads times head_dim");
        }
        return detail::done(kvc_rope_rotate(this, rows.data(), heads, head_dim, positions.data(),
                                            positions.size()));
    }
};

inline result<void> attend(const kvc_attend_desc &desc) { return detail::done(kvc_attend(&desc)); }
inline result<void> append(const kvc_append_desc &desc) { return detail::done(kvc_append(&desc)); }

inline result<void> seal(const kvc_seal_desc &desc) { return detail::done(kvc_seal(&desc)); }

// Bytes of one record.
inline result<uint64_t> seal_record_size(const kvc_seal_desc &desc) {
    uint64_t bytes = 0;
    const auto code = kvc_seal_record_size(&desc, &bytes);
    return detail::answer(code, bytes);
}

inline result<uint64_t> attend_workspace_size(const kvc_attend_desc &desc, uint32_t max_q_tokens,
                                              uint32_t max_kv_tokens) {
    uint64_t bytes = 0;
    const auto code = kvc_attend_workspace_size(&desc, max_q_tokens, max_kv_tokens, &bytes);
    return detail::answer(code, bytes);
}

// The name of the kernel that attend() would run.
inline result<std::string> attend_kernel(const kvc_attend_desc &desc, uint32_t q_tokens) {
    char name[128] = {};
    const auto code = kvc_attend_kernel(&desc, q_tokens, name, sizeof name);
    return detail::answer(code, std::string(name));
}

// Merges rows of `v_dim` outputs, and their LSEs, into the first two.
inline result<void> merge_states(span<float> out, span<float> lse, span<const float> other,
                                 span<const float> other_lse, uint32_t v_dim) {
    if (lse.size() != other_lse.size() || out.size() != other.size() ||
        out.size() / (v_dim | !v_dim) != lse.size() || out.size() != lse.size() * v_dim) {
        return detail::done(KVC_ERR_INVALID_ARGUMENT,
                            "out and other must be v_dim values for each of lse and other_lse");
    }
    return detail::done(kvc_merge_states(out.data(), lse.data(), other.data(), other_lse.data(),
                                         lse.size(), v_dim));
}

// ----------------------------------------------------------------------------------------------
// pool
// ----------------------------------------------------------------------------------------------
using pool_counts = kvc_pool_counts;

class pool : public detail::handle<kvc_pool, kvc_pool_destroy> {
  public:
    using handle::handle;
    static result<pool> create(uint32_t blocks) {
        kvc_pool *raw = nullptr;
        const auto code = kvc_pool_create(blocks, &raw);
        return detail::answer(code, pool(raw));
    }

    // Fills `out` with free blocks, all or none.
    result<void> allocate(span<int32_t> out) {
        return detail::done(kvc_pool_allocate_n(get(), detail::count32(out.size()), out.data()));
    }
    result<void> retain(span<const int32_t> blocks) {
        return detail::done(
            kvc_pool_retain_n(get(), blocks.data(), detail::count32(blocks.size())));
    }
    // How many of them became free.
    result<uint32_t> free(span<const int32_t> blocks) {
        uint32_t freed = 0;
        const auto code =
            kvc_pool_free_n(get(), blocks.data(), detail::count32(blocks.size()), &freed);
        return detail::answer(code, freed);
    }
    result<uint32_t> refs(int32_t block) const {
        uint32_t refs = 0;
        const auto code = kvc_pool_refs(get(), block, &refs);
        return detail::answer(code, refs);
    }
    result<pool_counts> stats() const {
        pool_counts out{};
        const auto code = kvc_pool_stats(get(), &out, sizeof out);
        return detail::answer(code, out);
    }
};

// ----------------------------------------------------------------------------------------------
// prefix
// ----------------------------------------------------------------------------------------------
using prefix_options = detail::with_defaults<kvc_prefix_options, kvc_prefix_options_init>;
using prefix_batch = detail::with_defaults<kvc_prefix_batch, kvc_prefix_batch_init>;
using prefix_position = kvc_prefix_position;
using prefix_hit = kvc_prefix_hit;
using prefix_inserted = kvc_prefix_inserted;
using prefix_counts = kvc_prefix_counts;
using prefix_commit = kvc_prefix_commit;
using prefix_committed = kvc_prefix_committed;
using prefix_query = kvc_prefix_query;
using prefix_answer = kvc_prefix_answer;
using retention = kvc_retention;
using media = kvc_media;

// A pinned prefix of an index. Going out of scope unlocks it.
class pin {
  public:
    pin() noexcept = default;
    // Takes over a pin, as those that prefix::run() gives.
    pin(kvc_prefix *prefix, uint64_t id) noexcept : prefix_(prefix), id_(id) {}
    pin(pin &&other) noexcept
        : prefix_(std::exchange(other.prefix_, nullptr)), id_(std::exchange(other.id_, 0)) {}
    pin &operator=(pin &&other) noexcept {
        if (this != &other) {
            if (prefix_ != nullptr) kvc_prefix_unlock(prefix_, id_);
            prefix_ = std::exchange(other.prefix_, nullptr);
            id_ = std::exchange(other.id_, 0);
        }
        return *this;
    }
    ~pin() {
        if (prefix_ != nullptr) kvc_prefix_unlock(prefix_, id_);
    }
    uint64_t id() const noexcept { return id_; }
    explicit operator bool() const noexcept { return prefix_ != nullptr; }
    // Ends the pin without marking the prefix as used.
    result<void> unlock() {
        return detail::done(kvc_prefix_unlock(std::exchange(prefix_, nullptr), id_));
    }
    // Ends the pin at the end of its request: the prefix is the most recently used.
    result<void> release() {
        return detail::done(kvc_prefix_release(std::exchange(prefix_, nullptr), id_));
    }

  private:
    kvc_prefix *prefix_ = nullptr;
    uint64_t id_ = 0;
};

class prefix : public detail::handle<kvc_prefix, kvc_prefix_destroy> {
  public:
    using handle::handle;
    static result<prefix> create(uint32_t block_tokens, uint32_t groups, uint32_t capacity_blocks) {
        kvc_prefix *raw = nullptr;
        const auto code = kvc_prefix_create(block_tokens, groups, capacity_blocks, &raw);
        return detail::answer(code, prefix(raw));
    }
    static result<prefix> create(const kvc_prefix_options &options) {
        kvc_prefix *raw = nullptr;
        const auto code = kvc_prefix_create_with(&options, &raw);
        return detail::answer(code, prefix(raw));
    }

    // `out_tail_blocks` is empty, or has a place a group.
    result<prefix_hit> lookup(uint64_t name_space, span<const uint32_t> tokens, uint64_t max_tokens,
                              span<int32_t> out_blocks, span<int32_t> out_tail_blocks = {}) const {
        prefix_hit out{};
        const auto code = kvc_prefix_lookup(
            get(), name_space, tokens.data(), tokens.size(), max_tokens, out_blocks.data(),
            out_blocks.size(), out_tail_blocks.empty() ? nullptr : out_tail_blocks.data(), &out);
        return detail::answer(code, out);
    }
    result<prefix_inserted> insert(uint64_t name_space, span<const uint32_t> tokens,
                                   span<const int32_t> blocks, span<int32_t> out_present = {}) {
        prefix_inserted out{};
        const auto code = kvc_prefix_insert(
            get(), name_space, tokens.data(), tokens.size(), blocks.data(), blocks.size(),
            out_present.empty() ? nullptr : out_present.data(), out_present.size(), &out);
        return detail::answer(code, out);
    }
    result<pin> lock(const prefix_position &at) {
        uint64_t id = 0;
        const auto code = kvc_prefix_lock(get(), &at, &id);
        return detail::answer(code, code == KVC_OK ? pin(get(), id) : pin());
    }
    // How many entries went; their ids are the first of `out_blocks`.
    result<uint64_t> evict(uint64_t want_blocks, span<int32_t> out_blocks) {
        uint64_t evicted = 0;
        const auto code = kvc_prefix_evict(get(), want_blocks, out_blocks.data(), out_blocks.size(),
                                           &evicted);
        return detail::answer(code, evicted);
    }
    // The sliding windows of the groups of an empty index, in tokens; 0 for none.
    result<void> set_windows(span<const uint32_t> windows) {
        return detail::done(
            kvc_prefix_set_windows(get(), windows.data(), detail::count32(windows.size())));
    }
    // How many of `blocks` an entry had: those come first then.
    result<uint64_t> forget(uint32_t group, span<int32_t> blocks) {
        uint64_t forgotten = 0;
        const auto code =
            kvc_prefix_forget(get(), group, blocks.data(), blocks.size(), &forgotten);
        return detail::answer(code, forgotten);
    }
    // Unlocks, commits and queries of a step, in one crossing.
    result<void> run(const kvc_prefix_batch &batch) {
        return detail::done(kvc_prefix_run(get(), &batch));
    }
    result<void> touch(const prefix_position &at) {
        return detail::done(kvc_prefix_touch(get(), &at));
    }
    result<void> prioritize(const prefix_position &at, span<const retention> ranges) {
        return detail::done(
            kvc_prefix_prioritize(get(), &at, ranges.data(), detail::count32(ranges.size())));
    }
    // `use` is one of next_use.
    result<void> hint(const prefix_position &at, uint64_t from_block, uint32_t use,
                      uint64_t when_ms = 0) {
        return detail::done(kvc_prefix_hint(get(), &at, from_block, use, when_ms));
    }
    result<void> advance(uint64_t now_ms) {
        return detail::done(kvc_prefix_advance(get(), now_ms));
    }
    result<prefix_counts> stats() const {
        prefix_counts out{};
        const auto code = kvc_prefix_stats(get(), &out, sizeof out);
        return detail::answer(code, out);
    }
};

// ----------------------------------------------------------------------------------------------
// cache and seq
// ----------------------------------------------------------------------------------------------
using cache_options = detail::with_defaults<kvc_cache_options, kvc_cache_options_init>;
using cache_counts = kvc_cache_counts;
using metrics = kvc_metrics;
using histogram = kvc_histogram;
using tier_options = detail::with_defaults<kvc_tier_options, kvc_tier_options_init>;
using tier_store = detail::with_defaults<kvc_tier_store, kvc_tier_store_init>;
using tier_slice = kvc_tier_slice;
using tier_object = kvc_tier_object;
using tier_counts = kvc_tier_counts;

// A layer of a layer group; the group is 0 in uniform models.
struct layer {
    constexpr layer(uint32_t layer_index, uint32_t group_index = 0) noexcept
        : index(layer_index), group(group_index) {}
    uint32_t index;
    uint32_t group;
};

// A sequence of a cache. Going out of scope releases it; its full blocks stay cached.
class sequence {
  public:
    sequence() noexcept = default;
    // Takes over a sequence of the C interface.
    sequence(kvc_cache *cache, kvc_seq id) noexcept : cache_(cache), id_(id) {}
    sequence(sequence &&other) noexcept
        : cache_(std::exchange(other.cache_, nullptr)), id_(other.id_) {}
    sequence &operator=(sequence &&other) noexcept {
        if (this != &other) {
            if (cache_ != nullptr) kvc_seq_release(cache_, id_);
            cache_ = std::exchange(other.cache_, nullptr);
            id_ = other.id_;
        }
        return *this;
    }
    ~sequence() {
        if (cache_ != nullptr) kvc_seq_release(cache_, id_);
    }

    kvc_seq id() const noexcept { return id_; }
    explicit operator bool() const noexcept { return cache_ != nullptr; }
    // What a step does for this sequence: `tokens` must live until step::begin().
    kvc_work work(span<const uint32_t> tokens) const noexcept {
        return kvc_work{id_, detail::count32(tokens.size()), tokens.data()};
    }
    result<sequence> fork() const {
        kvc_seq id = 0;
        const auto code = kvc_seq_fork(cache_, id_, &id);
        return detail::answer(code, code == KVC_OK ? sequence(cache_, id) : sequence());
    }
    result<void> truncate(uint32_t tokens) {
        return detail::done(kvc_seq_truncate(cache_, id_, tokens));
    }
    // Of a sequence that cache::onboard() started: whether the layer of all its blocks is there, after
    // at most `wait_ms`, during which others may use the cache. status::layer_missing where it never
    // will be: cancel the step, then the load.
    result<bool> wait_layer(layer at, uint32_t wait_ms = 0) {
        uint32_t there = 0;
        const auto code = kvc_onboard_wait(cache_, id_, at.group, at.index, wait_ms, &there);
        return detail::answer(code, there != 0);
    }
    result<kvc_onboard_progress> load_progress() const {
        kvc_onboard_progress out{};
        const auto code = kvc_onboard_state(cache_, id_, &out, sizeof out);
        return detail::answer(code, out);
    }
    // Gives up what has not come; how many tokens the sequence holds then.
    result<uint32_t> cancel_load() {
        uint32_t tokens = 0;
        const auto code = kvc_onboard_cancel(cache_, id_, &tokens);
        return detail::answer(code, tokens);
    }
    // Ends it now and says whether that worked: not while an open step has it.
    result<void> release() {
        const auto code = kvc_seq_release(cache_, id_);
        if (code == KVC_OK) cache_ = nullptr;
        return detail::done(code);
    }
    result<void> prioritize(span<const retention> ranges) {
        return detail::done(
            kvc_seq_prioritize(cache_, id_, ranges.data(), detail::count32(ranges.size())));
    }
    // `use` is one of next_use.
    result<void> hint(uint64_t from_block, uint32_t use, uint64_t when_ms = 0) {
        return detail::done(kvc_seq_hint(cache_, id_, from_block, use, when_ms));
    }
    // Copies the tokens, and answers how many there are; an empty span asks for that alone.
    result<uint64_t> tokens(span<uint32_t> out = {}) const {
        uint64_t count = 0;
        const auto code = kvc_seq_tokens(cache_, id_, out.empty() ? nullptr : out.data(),
                                         out.size(), &count);
        return detail::answer(code, count);
    }
    // The same of the blocks in a layer group.
    result<uint64_t> blocks(uint32_t group, span<int32_t> out = {}) const {
        uint64_t count = 0;
        const auto code = kvc_seq_blocks(cache_, id_, group, out.empty() ? nullptr : out.data(),
                                         out.size(), &count);
        return detail::answer(code, count);
    }

  private:
    kvc_cache *cache_ = nullptr;
    kvc_seq id_ = 0;
};

// A sequence that was started, and how many tokens of its prompt the cache has.
struct started {
    sequence seq;
    uint32_t cached_tokens;
};

class cache : public detail::handle<kvc_cache, kvc_cache_destroy> {
  public:
    using handle::handle;
    static result<cache> create(span<const group_spec> groups,
                                const kvc_cache_options &options = cache_options()) {
        kvc_cache *raw = nullptr;
        const auto code = kvc_cache_create(&options, groups.data(), detail::count32(groups.size()),
                                           &raw);
        return detail::answer(code, cache(raw));
    }
    // Of a uniform model.
    static result<cache> create(const group_spec &group,
                                const kvc_cache_options &options = cache_options()) {
        return create(span<const group_spec>(&group, 1), options);
    }

    result<started> start(span<const uint32_t> prompt, uint64_t name_space = 0) {
        kvc_seq id = 0;
        uint32_t cached = 0;
        const auto code =
            kvc_seq_start(get(), prompt.data(), prompt.size(), name_space, &id, &cached);
        return detail::answer(
            code, started{code == KVC_OK ? sequence(get(), id) : sequence(), cached});
    }
    // For a prompt in which tokens stand for media, in the order of their positions.
    result<started> start(span<const uint32_t> prompt, span<const kvcache::media> media,
                          uint64_t name_space = 0) {
        kvc_seq id = 0;
        uint32_t cached = 0;
        const auto code = kvc_seq_start_media(get(), prompt.data(), prompt.size(), media.data(),
                                              detail::count32(media.size()), name_space, &id,
                                              &cached);
        return detail::answer(
            code, started{code == KVC_OK ? sequence(get(), id) : sequence(), cached});
    }
    // For an engine that begins before all blocks are on the device: what tiers have of the prompt is
    // counted, and comes layer by layer (sequence::wait_layer(), step::wait_layer()).
    result<started> onboard(span<const uint32_t> prompt, span<const kvcache::media> media = {},
                            uint64_t name_space = 0) {
        kvc_seq id = 0;
        uint32_t cached = 0;
        const auto code = kvc_onboard_start(get(), prompt.data(), prompt.size(), media.data(),
                                            detail::count32(media.size()), name_space, &id, &cached);
        return detail::answer(
            code, started{code == KVC_OK ? sequence(get(), id) : sequence(), cached});
    }
    result<void> sync() { return detail::done(kvc_cache_sync(get())); }
    result<void> advance(uint64_t now_ms) { return detail::done(kvc_cache_advance(get(), now_ms)); }
    result<void> clear_prefix() { return detail::done(kvc_cache_clear_prefix(get())); }
    result<void> audit() const { return detail::done(kvc_cache_audit(get())); }
    result<cache_counts> stats() const {
        cache_counts out{};
        const auto code = kvc_cache_stats(get(), &out, sizeof out);
        return detail::answer(code, out);
    }

    // One a KV head, before anything is stored; no `v` for latents.
    result<void> set_scales(layer at, span<const float> k, span<const float> v = {}) {
        if (!v.empty() && v.size() != k.size()) {
            return detail::done(KVC_ERR_INVALID_ARGUMENT, "k and v must have a scale a KV head");
        }
        return detail::done(kvc_cache_set_scales(get(), at.group, at.index, k.data(),
                                                 v.empty() ? nullptr : v.data(),
                                                 detail::count32(k.size())));
    }

    // As measured, instead of what the device says of itself.
    result<void> set_device_rates(const kvc_device_rates &rates) {
        return detail::done(kvc_cache_set_device_rates(get(), &rates));
    }

    // What options point to is read in the call; a store's functions and user live as long as the
    // cache.
    result<void> attach_tiers(const kvc_tier_options &options) {
        return detail::done(kvc_tier_attach(get(), &options));
    }
    // Whether all that is to be demoted is on disk and in the store.
    result<bool> flush_tiers(uint32_t wait_ms) {
        uint32_t done = 0;
        const auto code = kvc_tier_flush(get(), wait_ms, &done);
        return detail::answer(code, done != 0);
    }
    // Of the host for 0, then of disk and store as far as they are there.
    result<tier_counts> tier_stats(uint32_t index) const {
        tier_counts out{};
        const auto code = kvc_tier_stats(get(), index, &out, sizeof out);
        return detail::answer(code, out);
    }

    // The full blocks of a sequence, written to a blocking descriptor that stays open; how many
    // tokens. `slices` as in tier_options, empty for a cache of the whole model.
    result<uint64_t> export_blocks(kvc_seq seq, const char *model, int fd,
                                   span<const kvc_tier_slice> slices = {}) {
        uint64_t tokens = 0;
        const auto code =
            kvc_transfer_export(get(), seq, model, slices.empty() ? nullptr : slices.data(),
                                detail::count32(slices.size()), fd, &tokens);
        return detail::answer(code, tokens);
    }
    // Those read from descriptors, parts of one stream, into the prefix index; how many tokens.
    result<uint64_t> import_blocks(span<const int32_t> fds, const char *model,
                                   uint64_t name_space = 0,
                                   span<const kvc_tier_slice> slices = {}) {
        uint64_t tokens = 0;
        const auto code = kvc_transfer_import(
            get(), name_space, model, slices.empty() ? nullptr : slices.data(),
            detail::count32(slices.size()), fds.data(), detail::count32(fds.size()), &tokens);
        return detail::answer(code, tokens);
    }

    // What a name space is in the server's words; NULL for none.
    result<void> describe(uint64_t name_space, const char *salt, const char *lora) {
        return detail::done(kvc_events_describe(get(), name_space, salt, lora));
    }

    result<kvcache::metrics> metrics() const {
        kvcache::metrics out{};
        const auto code = kvc_metrics_read(get(), &out, sizeof out);
        return detail::answer(code, out);
    }
    // As Prometheus reads them.
    result<std::string> metrics_text() const {
        kvc_status code = KVC_OK;
        std::string text = detail::text([&](char *buf, uint64_t len) {
            uint64_t length = 0;
            code = kvc_metrics_text(get(), buf, len, &length);
            return length;
        });
        return detail::answer(code, std::move(text));
    }
    result<void> watch_metrics(uint32_t every) {
        return detail::done(kvc_metrics_watch(get(), every));
    }
    result<void> set_metrics_time(uint64_t now_ms) {
        return detail::done(kvc_metrics_set_time(get(), now_ms));
    }
};

// ----------------------------------------------------------------------------------------------
// tier and prefetch
// ----------------------------------------------------------------------------------------------
using tier_decision = kvc_tier_decision;

// A tier's store made of an object, which the tier's threads call, several at a time, and which
// must outlive the cache. An exception that leaves it ends the program. Keys are 32 bytes each.
//
//   bool exists(const uint8_t *keys, span<uint8_t> found);   false: the store failed
//   void put(span<const tier_object> objects, span<kvc_status> outcomes);
//   void get(span<const tier_object> objects, span<kvc_status> outcomes);
//   void remove(const uint8_t *keys, uint64_t count);
template <class S>
tier_store store_of(S &object) noexcept {
    tier_store store;
    store.user = &object;
    store.exists = [](void *user, const uint8_t *keys, uint64_t count,
                      uint8_t *found) noexcept -> int32_t {
        const span<uint8_t> out(found, static_cast<std::size_t>(count));
        return static_cast<S *>(user)->exists(keys, out) ? 0 : 1;
    };
    store.put = [](void *user, const kvc_tier_object *objects, uint64_t count,
                   kvc_status *outcomes) noexcept {
        const auto n = static_cast<std::size_t>(count);
        static_cast<S *>(user)->put(span<const tier_object>(objects, n),
                                    span<kvc_status>(outcomes, n));
    };
    store.get = [](void *user, const kvc_tier_object *objects, uint64_t count,
                   kvc_status *outcomes) noexcept {
        const auto n = static_cast<std::size_t>(count);
        static_cast<S *>(user)->get(span<const tier_object>(objects, n),
                                    span<kvc_status>(outcomes, n));
    };
    store.remove = [](void *user, const uint8_t *keys, uint64_t count) noexcept {
        static_cast<S *>(user)->remove(keys, count);
    };
    return store;
}

// A prompt whose blocks are on their way from lower tiers. Going out of scope gives up what has not
// arrived.
class prefetch : public detail::handle<kvc_prefetch, kvc_prefetch_destroy> {
  public:
    prefetch() noexcept = default;
    // Takes over a prefetch of the C interface, made for `cache`.
    prefetch(kvc_cache *cache, kvc_prefetch *raw) noexcept : handle(raw), cache_(cache) {}
    // What was found and decided goes to `out_decision`, if there is one.
    static result<prefetch> create(cache &of, span<const uint32_t> prompt, uint64_t name_space = 0,
                                   tier_decision *out_decision = nullptr) {
        kvc_prefetch *raw = nullptr;
        const auto code =
            kvc_prefetch_create(of.get(), prompt.data(), detail::count32(prompt.size()),
                                name_space, &raw, out_decision);
        return detail::answer(code, prefetch(of.get(), raw));
    }
    // Of a prompt with media, as cache::start() takes it.
    static result<prefetch> create(cache &of, span<const uint32_t> prompt,
                                   span<const kvcache::media> media, uint64_t name_space = 0,
                                   tier_decision *out_decision = nullptr) {
        kvc_prefetch *raw = nullptr;
        const auto code = kvc_prefetch_create_media(
            of.get(), prompt.data(), detail::count32(prompt.size()), media.data(),
            detail::count32(media.size()), name_space, &raw, out_decision);
        return detail::answer(code, prefetch(of.get(), raw));
    }

    // Takes what has arrived after at most `wait_ms`; whether nothing more comes.
    result<bool> wait(uint32_t wait_ms = 0) {
        uint32_t done = 0;
        const auto code = kvc_prefetch_wait(cache_, get(), wait_ms, &done);
        return detail::answer(code, done != 0);
    }

  private:
    kvc_cache *cache_ = nullptr;
};

// ----------------------------------------------------------------------------------------------
// step
// ----------------------------------------------------------------------------------------------
using scoring = detail::with_defaults<kvc_scoring, kvc_scoring_init>;
using work = kvc_work;

// Rows that are read: their address, and the type of their elements. Floats as they are, the others
// by name.
struct rows {
    rows(const void *address, uint32_t element) noexcept : data(address), dtype(element) {}
    rows(const float *address) noexcept : rows(address, KVC_DTYPE_F32) {}
    template <class C, class = decltype(static_cast<const float *>(std::declval<C &>().data()))>
    rows(const C &values) noexcept : rows(static_cast<const float *>(values.data())) {}
    static rows f16(const void *address) noexcept { return {address, KVC_DTYPE_F16}; }
    static rows bf16(const void *address) noexcept { return {address, KVC_DTYPE_BF16}; }
    const void *data;
    uint32_t dtype;
};

// Rows that are written.
struct out_rows {
    out_rows(void *address, uint32_t element) noexcept : data(address), dtype(element) {}
    out_rows(float *address) noexcept : out_rows(address, KVC_DTYPE_F32) {}
    template <class C, class = decltype(static_cast<float *>(std::declval<C &>().data()))>
    out_rows(C &&values) noexcept : out_rows(static_cast<float *>(values.data())) {}
    static out_rows f16(void *address) noexcept { return {address, KVC_DTYPE_F16}; }
    static out_rows bf16(void *address) noexcept { return {address, KVC_DTYPE_BF16}; }
    void *data;
    uint32_t dtype;
};

// One forward pass over a batch: begin, append and attend in each layer, commit or cancel. Made
// once and used again. An open step that goes out of scope is cancelled.
class step : public detail::handle<kvc_step, kvc_step_destroy> {
  public:
    using handle::handle;
    static result<step> create() {
        kvc_step *raw = nullptr;
        const auto code = kvc_step_create(&raw);
        return detail::answer(code, step(raw));
    }

    // The calls below are on the same cache until commit() or cancel().
    result<void> begin(cache &on, span<const kvc_work> items) {
        cache_ = on.get();
        return detail::done(
            kvc_step_begin(cache_, get(), items.data(), detail::count32(items.size())));
    }
    // How many rows the open step has; their positions go to `positions`, if it has any place.
    result<uint32_t> row_positions(span<uint32_t> positions = {}) const {
        uint32_t rows = 0;
        const auto code =
            kvc_step_rows(get(), positions.empty() ? nullptr : positions.data(), positions.size(),
                          &rows);
        return detail::answer(code, rows);
    }
    // `[row][kv_head][k_dim]` and `[row][kv_head][v_dim]`, of one type.
    result<void> append(layer at, rows k, rows v, const kvc_rope *rope = nullptr) {
        if (k.dtype != v.dtype && v.data != nullptr) return two_types();
        return detail::done(kvc_step_append(cache_, get(), at.group, at.index, k.data, v.data,
                                            k.dtype, rope));
    }
    // `[row][q_head][k_dim]` to `[row][q_head][v_dim]`.
    result<void> attend(layer at, uint32_t q_heads, rows q, out_rows out,
                        const kvc_scoring *score = nullptr, float *lse = nullptr) {
        return detail::done(kvc_step_attend(cache_, get(), at.group, at.index, q_heads, q.data,
                                            q.dtype, out.data, out.dtype, score, lse));
    }
    // For rows in the memory of the cache's device, on the cache's stream.
    result<void> append_device(layer at, rows k, rows v, const kvc_rope *rope = nullptr) {
        if (k.dtype != v.dtype && v.data != nullptr) return two_types();
        return detail::done(kvc_step_append_device(cache_, get(), at.group, at.index, k.data,
                                                   v.data, k.dtype, rope));
    }
    result<void> attend_device(layer at, uint32_t q_heads, rows q, out_rows out,
                               const kvc_scoring *score = nullptr, float *lse = nullptr) {
        return detail::done(kvc_step_attend_device(cache_, get(), at.group, at.index, q_heads,
                                                   q.data, q.dtype, out.data, out.dtype, score,
                                                   lse));
    }
    // Whether the layer of all sequences is there, after at most `wait_ms`: before attend(), where
    // cache::onboard() started one of them.
    result<bool> wait_layer(layer at, uint32_t wait_ms = 0) {
        uint32_t there = 0;
        const auto code = kvc_onboard_wait_step(cache_, get(), at.group, at.index, wait_ms, &there);
        return detail::answer(code, there != 0);
    }
    result<void> commit() { return detail::done(kvc_step_commit(cache_, get())); }
    result<void> cancel() { return detail::done(kvc_step_cancel(cache_, get())); }

  private:
    static result<void> two_types() {
        return detail::done(KVC_ERR_INVALID_ARGUMENT, "k and v must have one element type");
    }
    kvc_cache *cache_ = nullptr;
};

// ----------------------------------------------------------------------------------------------
// device
// ----------------------------------------------------------------------------------------------
using device_facts = kvc_device_facts;
using device_attend_options =
    detail::with_defaults<kvc_device_attend_options, kvc_device_attend_options_init>;
using device_append_options =
    detail::with_defaults<kvc_device_append_options, kvc_device_append_options_init>;
using device_copy_desc = detail::with_defaults<kvc_device_copy_desc, kvc_device_copy_desc_init>;
using device_merge_desc = detail::with_defaults<kvc_device_merge_desc, kvc_device_merge_desc_init>;
using device_lookup_desc =
    detail::with_defaults<kvc_device_lookup_desc, kvc_device_lookup_desc_init>;
using device_rates = detail::with_defaults<kvc_device_rates, kvc_device_rates_init>;
using device_cascade_query =
    detail::with_defaults<kvc_device_cascade_query, kvc_device_cascade_query_init>;
using device_cascade_prefix = kvc_device_cascade_prefix;
using device_cascade_segment = kvc_device_cascade_segment;
using device_cascade_estimate = kvc_device_cascade_estimate;

// Which of `prefixes` a cascade should split off, by the cost model: `out_segments` is filled, for
// device::cascade; all of it splits nothing off where the answer's `pays` is 0.
inline result<device_cascade_estimate> choose_cascade(const kvc_device_cascade_query &query,
                                                      span<const device_cascade_prefix> prefixes,
                                                      span<device_cascade_segment> out_segments) {
    device_cascade_estimate out{};
    const auto code = kvc_device_cascade_choose(
        &query, prefixes.data(), detail::count32(prefixes.size()), out_segments.data(),
        detail::count32(out_segments.size()), &out, sizeof out);
    return detail::answer(code, out);
}

// Memory of a device, which has to stay open for as long.
class device_memory {
  public:
    device_memory() noexcept = default;
    device_memory(const kvc_device *device, void *address, uint64_t bytes) noexcept
        : device_(device), address_(address), bytes_(bytes) {}
    device_memory(device_memory &&other) noexcept
        : device_(other.device_),
          address_(std::exchange(other.address_, nullptr)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    device_memory &operator=(device_memory &&other) noexcept {
        if (this != &other) {
            if (address_ != nullptr) kvc_device_free(device_, address_);
            device_ = other.device_;
            address_ = std::exchange(other.address_, nullptr);
            bytes_ = std::exchange(other.bytes_, 0);
        }
        return *this;
    }
    ~device_memory() {
        if (address_ != nullptr) kvc_device_free(device_, address_);
    }
    void *get() const noexcept { return address_; }
    uint64_t bytes() const noexcept { return bytes_; }
    explicit operator bool() const noexcept { return address_ != nullptr; }

  private:
    const kvc_device *device_ = nullptr;
    void *address_ = nullptr;
    uint64_t bytes_ = 0;
};

class device : public detail::handle<kvc_device, kvc_device_close> {
  public:
    using handle::handle;
    // `kind` is one of device_kind.
    static result<device> open(uint32_t kind, uint32_t ordinal = 0) {
        kvc_device *raw = nullptr;
        const auto code = kvc_device_open(kind, ordinal, &raw);
        return detail::answer(code, device(raw));
    }

    result<device_facts> info() const {
        device_facts out{};
        const auto code = kvc_device_info(get(), &out, sizeof out);
        return detail::answer(code, out);
    }
    // What caches on this device go by.
    result<kvc_device_rates> rates() const {
        kvc_device_rates out{};
        const auto code = kvc_device_rates_read(get(), &out, sizeof out);
        return detail::answer(code, out);
    }
    result<std::string> name() const {
        char name[256] = {};
        const auto code = kvc_device_name(get(), name, sizeof name);
        return detail::answer(code, std::string(name));
    }

    result<device_memory> alloc(uint64_t bytes) const {
        void *address = nullptr;
        const auto code = kvc_device_alloc(get(), bytes, &address);
        return detail::answer(
            code, code == KVC_OK ? device_memory(get(), address, bytes) : device_memory());
    }
    result<void> upload(void *to, const void *from, uint64_t bytes, void *stream = nullptr) const {
        return detail::done(kvc_device_upload(get(), to, from, bytes, stream));
    }
    // To the beginning of `to`, which must be large enough.
    template <class T>
    result<void> upload(const device_memory &to, span<const T> from, void *stream = nullptr) const {
        static_assert(std::is_trivially_copyable_v<T>, "bytes are copied");
        if (from.size() > to.bytes() / sizeof(T)) return too_long();
        return upload(to.get(), from.data(), from.size() * sizeof(T), stream);
    }
    result<void> download(void *to, const void *from, uint64_t bytes,
                          void *stream = nullptr) const {
        return detail::done(kvc_device_download(get(), to, from, bytes, stream));
    }
    // From the beginning of `from`, which must hold as much.
    template <class T>
    result<void> download(span<T> to, const device_memory &from, void *stream = nullptr) const {
        static_assert(std::is_trivially_copyable_v<T>, "bytes are copied");
        if (to.size() > from.bytes() / sizeof(T)) return too_long();
        return download(to.data(), from.get(), to.size() * sizeof(T), stream);
    }
    result<void> zero(void *at, uint64_t bytes, void *stream = nullptr) const {
        return detail::done(kvc_device_zero(get(), at, bytes, stream));
    }
    result<void> sync(void *stream = nullptr) const {
        return detail::done(kvc_device_sync(get(), stream));
    }

    // On the caller's memory and stream.
    result<void> attend(const kvc_attend_desc &desc, const kvc_device_attend_options &options,
                        void *stream = nullptr) const {
        return detail::done(kvc_device_attend(get(), &desc, &options, stream));
    }
    result<void> append(const kvc_append_desc &desc, const kvc_device_append_options *options,
                        void *stream = nullptr) const {
        return detail::done(kvc_device_append(get(), &desc, options, stream));
    }
    result<void> copy(const kvc_device_copy_desc &desc, void *stream = nullptr) const {
        return detail::done(kvc_device_copy(get(), &desc, stream));
    }
    result<void> merge(const kvc_device_merge_desc &desc, void *stream = nullptr) const {
        return detail::done(kvc_device_merge(get(), &desc, stream));
    }
    // attend() with a list of which sequences share what, on the device.
    result<void> cascade(const kvc_attend_desc &desc, const kvc_device_attend_options &options,
                         const device_cascade_segment *segments, uint32_t segment_count,
                         void *stream = nullptr) const {
        return detail::done(
            kvc_device_cascade(get(), &desc, &options, segments, segment_count, stream));
    }
    // The three below work without an open device where the options have its multiprocessors.
    result<uint64_t> cascade_workspace_size(const kvc_attend_desc &desc,
                                            const kvc_device_attend_options &options,
                                            uint32_t segment_count) const {
        uint64_t bytes = 0;
        const auto code = kvc_device_cascade_workspace_size(get(), &desc, &options, segment_count,
                                                            &bytes);
        return detail::answer(code, bytes);
    }
    result<uint64_t> attend_workspace_size(const kvc_attend_desc &desc,
                                           const kvc_device_attend_options &options) const {
        uint64_t bytes = 0;
        const auto code = kvc_device_attend_workspace_size(get(), &desc, &options, &bytes);
        return detail::answer(code, bytes);
    }
    result<std::string> attend_kernel(const kvc_attend_desc &desc,
                                      const kvc_device_attend_options &options) const {
        char name[128] = {};
        const auto code = kvc_device_attend_kernel(get(), &desc, &options, name, sizeof name);
        return detail::answer(code, std::string(name));
    }

  private:
    static result<void> too_long() {
        return detail::done(KVC_ERR_BUFFER_TOO_SMALL, "more than the device memory holds");
    }
};

// A prefix index's copy on a device, kept up by sync() and looked up in there.
class device_prefix : public detail::handle<kvc_device_prefix, kvc_device_prefix_destroy> {
  public:
    using handle::handle;
    // Bytes of device memory that a copy of `index` takes.
    static result<uint64_t> size(const prefix &index) {
        uint64_t bytes = 0;
        const auto code = kvc_device_prefix_size(index.get(), &bytes);
        return detail::answer(code, bytes);
    }
    static result<device_prefix> create(const device &on, const prefix &index) {
        kvc_device_prefix *raw = nullptr;
        const auto code = kvc_device_prefix_create(on.get(), index.get(), &raw);
        return detail::answer(code, device_prefix(raw));
    }
    // Enqueues the upload of what changed; the bytes of it.
    result<uint64_t> sync(void *stream = nullptr) {
        uint64_t bytes = 0;
        const auto code = kvc_device_prefix_sync(get(), stream, &bytes);
        return detail::answer(code, bytes);
    }
    // Of a batch of token sequences; all addresses are the device's.
    result<void> lookup(const kvc_device_lookup_desc &desc, void *stream = nullptr) const {
        return detail::done(kvc_device_prefix_lookup(get(), &desc, stream));
    }
};

// ----------------------------------------------------------------------------------------------
// events
// ----------------------------------------------------------------------------------------------
using event = kvc_event;
using events_options = detail::with_defaults<kvc_events_options, kvc_events_options_init>;
using events_counts = kvc_events_counts;

// The publishing of a cache's events, which ends with it.
class events : public detail::handle<kvc_events, kvc_events_destroy> {
  public:
    using handle::handle;
    static result<events> create(cache &of, const kvc_events_options &options) {
        kvc_events *raw = nullptr;
        const auto code = kvc_events_create(of.get(), &options, &raw);
        return detail::answer(code, events(raw));
    }
    // Calls `f(const event &)` from the publishing thread. `f` must outlive the events, and an
    // exception that leaves it ends the program.
    template <class F>
    static result<events> create(cache &of, kvc_events_options options, F &f) {
        options.user = &f;
        options.callback = [](void *user, const kvc_event *said) noexcept {
            (*static_cast<F *>(user))(*said);
        };
        return create(of, options);
    }

    result<void> snapshot() { return detail::done(kvc_events_snapshot(get())); }
    result<events_counts> stats() const {
        events_counts out{};
        const auto code = kvc_events_stats(get(), &out, sizeof out);
        return detail::answer(code, out);
    }
    // Where the PUB socket, or the ROUTER socket that repeats messages, is bound.
    result<std::string> endpoint(bool replay = false) const {
        kvc_status code = KVC_OK;
        std::string text = detail::text([&](char *buf, uint64_t len) {
            uint64_t length = 0;
            code = kvc_events_endpoint(get(), replay, buf, len, &length);
            return length;
        });
        return detail::answer(code, std::move(text));
    }
};

}  // namespace throwing or results
}  // namespace kvcache

#endif  // KVCACHE_HPP
