// Continuous batching over one cache: requests come in from any thread, one thread runs them all.
//
// A step feeds every running request its next tokens: a chunk of its prompt, or the token that was
// sampled last. One request is admitted a step, so that later ones find what they share with
// earlier ones in the prefix index. Where blocks run out, the request that came last gives its own
// back and waits; they stay cached, so that it goes on where it was. It knows nothing of HTTP.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../common/model.hpp"
#include "../common/sampler.hpp"
#include "../common/tokenizer.hpp"

// One request, shared by the thread that waits for its tokens and the engine.
class Request {
  public:
    Request(std::vector<uint32_t> prompt, uint32_t max_tokens, uint64_t tenant, Sampler sampler)
        : tokens_(std::move(prompt)), max_tokens_(max_tokens), tenant_(tenant), sampler_(sampler) {}

    // Waits for tokens after the first `known`, or until there will be none, and appends them to
    // `out`. False where the request has ended and `out` has all.
    bool wait(std::vector<uint32_t> &out) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return ended_ || answer_.size() > out.size(); });
        out.insert(out.end(), answer_.begin() + static_cast<std::ptrdiff_t>(out.size()),
                   answer_.end());
        return !ended_;
    }
    // Why it ended early; empty where it did not.
    std::string error() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return error_;
    }
    // The client has gone: the engine ends the request at its next step.
    void cancel() { cancelled_ = true; }

  private:
    friend class Engine;

    void push(uint32_t token) {
        const std::lock_guard<std::mutex> lock(mutex_);
        answer_.push_back(token);
        changed_.notify_all();
    }
    void end(std::string error = {}) {
        const std::lock_guard<std::mutex> lock(mutex_);
        ended_ = true;
        error_ = std::move(error);
        changed_.notify_all();
    }

    // The engine's own: all tokens so far, how many the cache has been fed, and where they are.
    std::vector<uint32_t> tokens_;
    std::size_t fed_ = 0, chunk_ = 0;
    uint32_t max_tokens_, sampled_ = 0;
    uint64_t tenant_;
    Sampler sampler_;
    kvcache::sequence seq_;

    std::atomic<bool> cancelled_{false};
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<uint32_t> answer_;
    std::string error_;
    bool ended_ = false;
};

class Engine {
  public:
    struct Limits {
        uint32_t batch, blocks, chunk_tokens, waiting, format, threads;
    };
    struct Counts {
        uint64_t finished, cancelled, failed, preempted, running, waiting;
    };

    Engine(const std::string &model, const Limits &limits)
        : limits_(limits), model_(model), step_(need(kvcache::step::create())) {
        kvcache::cache_options options;
        options.blocks = limits.blocks;
        options.max_seqs = limits.batch;
        options.threads = limits.threads;
        cache_ = need(kvcache::cache::create(model_.group(limits.format), options));
        need(cache_.watch_metrics(1));
        thread_ = std::thread([this] { run(); });
    }
    ~Engine() { stop(); }

    const Model::Config &config() const { return model_.config; }
    std::string cache_metrics() const { return need(cache_.metrics_text()); }
    // The most tokens that a request can have: those of the model, or of the whole cache.
    std::size_t max_tokens() const {
        return std::min<std::size_t>(model_.config.max_tokens, std::size_t{limits_.blocks} * 16);
    }

    // False where too many wait, or the engine ends.
    bool submit(std::shared_ptr<Request> request) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (stopping_ || waiting_.size() >= limits_.waiting) return false;
        waiting_.push_back(std::move(request));
        counts_.waiting = waiting_.size();
        work_.notify_one();
        return true;
    }
    Counts counts() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return counts_;
    }

    // Ends what still runs, then the thread.
    void stop() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
            work_.notify_one();
        }
        if (thread_.joinable()) thread_.join();
    }

    // After stop(): what is wrong with the cache, or nothing. No sequence, no block may be left.
    std::string audit() {
        if (auto audited = cache_.audit(); !audited) return audited.error().message();
        need(cache_.clear_prefix());
        const kvcache::cache_counts counts = need(cache_.stats());
        if (counts.sequences != 0 || counts.free_blocks != counts.blocks) {
            return std::to_string(counts.sequences) + " sequences and " +
                   std::to_string(counts.blocks - counts.free_blocks) + " blocks are left";
        }
        return {};
    }

  private:
    using Shared = std::shared_ptr<Request>;

    void run() {
        for (;;) {
            Shared admitted;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                work_.wait(lock,
                           [&] { return stopping_ || !waiting_.empty() || !running_.empty(); });
                if (stopping_) break;
                if (!waiting_.empty() && !full_ && running_.size() < limits_.batch) {
                    admitted = std::move(waiting_.front());
                    waiting_.pop_front();
                }
            }
            if (admitted != nullptr) admit(std::move(admitted));
            drop_cancelled();
            try {
                if (reserve()) forward();
            } catch (const std::exception &error) {
                // A fault of one step ends its requests, and the server goes on.
                (void)step_.cancel();
                while (!running_.empty()) finish(0, error.what());
            }
            const std::lock_guard<std::mutex> lock(mutex_);
            counts_.running = running_.size();
            counts_.waiting = waiting_.size();
        }
        while (!running_.empty()) finish(0, "the server is ending");
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const Shared &request : waiting_) request->end("the server is ending");
        waiting_.clear();
    }

    void admit(Shared request) {
        if (request->cancelled_) return end(*request, "cancelled");
        auto started = cache_.start(request->tokens_, request->tenant_);
        if (!started) return end(*request, started.error().message());
        request->seq_ = std::move(started->seq);
        request->fed_ = started->cached_tokens;
        running_.push_back(std::move(request));
    }

    void drop_cancelled() {
        for (std::size_t i = running_.size(); i-- > 0;) {
            if (running_[i]->cancelled_) finish(i, "cancelled");
        }
    }

    // Opens a step for all that runs. Where blocks are missing, the last request has to wait.
    bool reserve() {
        while (!running_.empty()) {
            work_items_.clear();
            for (const Shared &request : running_) {
                const std::size_t left = request->tokens_.size() - request->fed_;
                request->chunk_ = std::min<std::size_t>(left, limits_.chunk_tokens);
                work_items_.push_back(request->seq_.work(
                    {request->tokens_.data() + request->fed_, request->chunk_}));
            }
            const auto begun = step_.begin(cache_, work_items_);
            if (begun) return true;
            if (begun.code() != kvcache::status::out_of_blocks) {
                throw std::runtime_error(begun.error().message());
            }
            if (running_.size() == 1) {
                finish(0, begun.error().message());
                break;
            }
            Shared last = std::move(running_.back());
            running_.pop_back();
            full_ = true;
            need(last->seq_.release());
            const std::lock_guard<std::mutex> lock(mutex_);
            waiting_.push_front(std::move(last));
            counts_.preempted += 1;
        }
        return false;
    }

    void forward() {
        tokens_.clear(), wanted_.clear();
        for (const Shared &request : running_) {
            const auto at = request->tokens_.begin() + static_cast<std::ptrdiff_t>(request->fed_);
            tokens_.insert(tokens_.end(), at, at + static_cast<std::ptrdiff_t>(request->chunk_));
            request->fed_ += request->chunk_;
            // Only the last token of all says what comes next.
            if (request->fed_ == request->tokens_.size()) wanted_.push_back(tokens_.size() - 1);
        }
        const float *logits = model_.forward(step_, tokens_, wanted_).data();
        need(step_.commit());
        const std::size_t vocab = model_.config.vocab;
        std::vector<std::size_t> done;
        for (std::size_t i = 0; i < running_.size(); i++) {
            Request &request = *running_[i];
            if (request.fed_ != request.tokens_.size()) continue;
            const uint32_t token = request.sampler_.pick({logits, vocab});
            logits += vocab;
            request.tokens_.push_back(token);
            request.sampled_ += 1;
            request.push(token);
            if (token == Tokenizer::END || request.sampled_ == request.max_tokens_) {
                done.push_back(i);
            }
        }
        while (!done.empty()) {
            finish(done.back(), {});
            done.pop_back();
        }
    }

    void finish(std::size_t i, std::string error) {
        const Shared request = std::move(running_[i]);
        running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
        need(request->seq_.release());
        full_ = false;
        end(*request, std::move(error));
    }

    void end(Request &request, std::string error) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            (error.empty() ? counts_.finished
             : request.cancelled_ ? counts_.cancelled
                                  : counts_.failed) += 1;
        }
        request.end(std::move(error));
    }

    Limits limits_;
    Model model_;
    kvcache::cache cache_;
    kvcache::step step_;
    // Of the engine's thread alone. Full: blocks ran out, and no request has ended since.
    bool full_ = false;
    std::vector<Shared> running_;
    std::vector<kvcache::work> work_items_;
    std::vector<uint32_t> tokens_;
    std::vector<std::size_t> wanted_;

    mutable std::mutex mutex_;
    std::condition_variable work_;
    std::deque<Shared> waiting_;
    Counts counts_{};
    bool stopping_ = false;
    std::thread thread_;
};
