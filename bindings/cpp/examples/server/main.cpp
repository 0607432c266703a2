// A small inference server on libkvcache: HTTP on 127.0.0.1, answers as JSON or as server-sent
// events, continuous batching with prefix reuse.
//
//   POST /generate  {"prompt": "..."} and optionally "max_tokens", "temperature", "seed", "stream",
//                   "tenant" (a number: what may share cached prefixes) and "system" (false: without
//                   the system prompt). Answers {"text", "tokens"}, or with "stream" one event
//                   {"text", "token"} a token and a last one {"done", "text", "tokens"}. A stream
//                   whose client hangs up is ended, and what it held is free for others.
//   GET /metrics    for Prometheus
//   GET /health
//
// SIGINT and SIGTERM end it: what runs is answered, the cache is audited, and the exit status is 0
// where nothing is left in it.
#include <csignal>
#include <cstdio>
#include <iostream>

#include <httplib.h>

#include "engine.hpp"

namespace {

using nlohmann::json;

struct Options {
    std::string model = "examples/generate/model";
    int port = 8080;
    Engine::Limits limits{16, 1024, 256, 256, kvcache::format::bf16, 0};
};

Options parse(int argc, char **argv) {
    Options options;
    if (const char *folder = std::getenv("KVCACHE_MODEL_DIR")) options.model = folder;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string flag = argv[i], value = argv[i + 1];
        const auto number = [&] { return static_cast<uint32_t>(std::stoul(value)); };
        if (flag == "--model") {
            options.model = value;
        } else if (flag == "--port") {
            options.port = std::stoi(value);
        } else if (flag == "--batch") {
            options.limits.batch = number();
        } else if (flag == "--blocks") {
            options.limits.blocks = number();
        } else if (flag == "--threads") {
            options.limits.threads = number();
        } else if (flag == "--dtype" && (value == "f32" || value == "bf16")) {
            options.limits.format =
                value == "f32" ? kvcache::format::f32 : kvcache::format::bf16;
        } else {
            throw std::invalid_argument("unknown option " + flag + " " + value);
        }
    }
    if (argc % 2 == 0) throw std::invalid_argument(std::string(argv[argc - 1]) + " needs a value");
    return options;
}

// A body that the server does not accept.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a client asks for, checked.
struct Ask {
    explicit Ask(const std::string &body) {
        const json object = json::parse(body, nullptr, false);
        if (!object.is_object()) throw Refused("the body must be a JSON object");
        for (const auto &[name, value] : object.items()) {
            if (name == "prompt" && value.is_string()) {
                prompt = value.get<std::string>();
                has_prompt = true;
            } else if (name == "max_tokens" && value.is_number_unsigned() && value > 0 &&
                       value <= 65536) {
                max_tokens = value;
            } else if (name == "temperature" && value.is_number() && value >= 0 && value <= 100) {
                temperature = value;
            } else if (name == "seed" && value.is_number_unsigned()) {
                seed = value;
            } else if (name == "tenant" && value.is_number_unsigned()) {
                tenant = value;
            } else if (name == "stream" && value.is_boolean()) {
                stream = value;
            } else if (name == "system" && value.is_boolean()) {
                system = value;
            } else {
                throw Refused("not accepted: \"" + name + "\"");
            }
        }
        if (!has_prompt) throw Refused("\"prompt\" is missing");
    }
    std::string prompt;
    bool has_prompt = false, stream = false, system = true;
    uint32_t max_tokens = 32;
    float temperature = 0.0f;
    uint64_t seed = 0, tenant = 0;
};

void refuse(httplib::Response &response, int status, const std::string &why) {
    response.status = status;
    response.set_content(
        json{{"error", why}}.dump(-1, ' ', false, json::error_handler_t::replace) + "\n",
        "application/json");
}

class Server {
  public:
    explicit Server(const Options &options)
        : engine_(options.model, options.limits), tokenizer_(options.model + "/tokenizer.txt") {
        std::ifstream file(options.model + "/../system.txt");
        system_.assign(std::istreambuf_iterator<char>(file), {});
        if (!file) throw std::runtime_error(options.model + "/../system.txt cannot be read");
        system_.erase(system_.find_last_not_of(" \t\r\n") + 1);

        // A thread a connection: they only wait for the engine.
        http_.new_task_queue = [] { return new httplib::ThreadPool(128); };
        http_.set_socket_options([this](socket_t listening) {
            httplib::default_socket_options(listening);
            listening_ = listening;
        });
        http_.set_payload_max_length(1 << 20);
        http_.set_keep_alive_timeout(10);
        http_.set_read_timeout(30);
        http_.Post("/generate", [this](const httplib::Request &request, httplib::Response &response) {
            try {
                generate(Ask(request.body), response);
            } catch (const Refused &why) {
                refuse(response, 400, why.what());
            }
        });
        http_.Get("/metrics", [this](const httplib::Request &, httplib::Response &response) {
            response.set_content(metrics(), "text/plain; version=0.0.4");
        });
        http_.Get("/health", [](const httplib::Request &, httplib::Response &response) {
            response.set_content("ok\n", "text/plain");
        });
    }

    // Serves until stop(). Port 0 takes any.
    void serve(int port) {
        const bool bound = port == 0 ? (port = http_.bind_to_any_port("127.0.0.1")) > 0
                                     : http_.bind_to_port("127.0.0.1", port);
        if (!bound) throw std::runtime_error("cannot bind 127.0.0.1:" + std::to_string(port));
        // The library's queue of 5 loses some of the clients that come all at once.
        ::listen(listening_, 128);
        std::cout << "listening on http://127.0.0.1:" << port << std::endl;
        // Comes back when every connection has been answered.
        http_.listen_after_bind();
        engine_.stop();
    }
    // Takes no more requests, waits for those that are being answered, and ends serve().
    void stop() {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            ending_ = true;
            closed_.wait(lock, [this] { return open_ == 0; });
        }
        // Cuts off streams, which is why none may be open.
        http_.stop();
    }

    // What is left in the cache when it should be empty.
    std::string audit() { return engine_.audit(); }
    Engine::Counts counts() const { return engine_.counts(); }

  private:
    // A request that is being answered, until the last copy goes. Empty where the server is ending.
    std::shared_ptr<void> open() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (ending_) return nullptr;
        open_ += 1;
        return std::shared_ptr<void>(this, [this](void *) {
            const std::lock_guard<std::mutex> closing(mutex_);
            open_ -= 1;
            closed_.notify_all();
        });
    }

    void generate(const Ask &ask, httplib::Response &response) {
        const std::shared_ptr<void> opened = open();
        if (opened == nullptr) return refuse(response, 503, "the server is ending");
        std::vector<uint32_t> prompt{Tokenizer::END};
        const auto ids =
            tokenizer_.encode(ask.system ? system_ + "\n\n" + ask.prompt : ask.prompt);
        prompt.insert(prompt.end(), ids.begin(), ids.end());
        if (prompt.size() + ask.max_tokens > engine_.max_tokens()) {
            throw Refused("prompt and answer have more than " +
                          std::to_string(engine_.max_tokens()) + " tokens");
        }
        auto request = std::make_shared<Request>(std::move(prompt), ask.max_tokens, ask.tenant,
                                                 Sampler(ask.temperature, ask.seed));
        if (!engine_.submit(request)) {
            return refuse(response, 503, "too many requests wait");
        }
        if (ask.stream) return stream(request, opened, response);
        std::vector<uint32_t> tokens;
        while (request->wait(tokens)) continue;
        if (const std::string error = request->error(); !error.empty()) {
            return refuse(response, 500, error);
        }
        Utf8 utf8;
        std::string text;
        for (const uint32_t token : tokens) text += utf8.feed(tokenizer_.bytes(token));
        text += utf8.finish();
        response.set_content(json{{"text", text}, {"tokens", tokens}}.dump() + "\n",
                             "application/json");
    }

    // What one stream has sent.
    struct Sent {
        std::vector<uint32_t> tokens;
        std::size_t told = 0;
        std::string text;
        Utf8 utf8;
    };

    void stream(const std::shared_ptr<Request> &request, const std::shared_ptr<void> &opened,
                httplib::Response &response) {
        response.set_header("Cache-Control", "no-store");
        response.set_chunked_content_provider(
            "text/event-stream",
            [this, request, sent = std::make_shared<Sent>()](std::size_t, httplib::DataSink &sink) {
                const bool more = request->wait(sent->tokens);
                const auto event = [&](const json &data) {
                    const std::string line = "data: " + data.dump() + "\n\n";
                    return sink.is_writable() && sink.write(line.data(), line.size());
                };
                for (; sent->told < sent->tokens.size(); sent->told++) {
                    const uint32_t token = sent->tokens[sent->told];
                    const std::string text = sent->utf8.feed(tokenizer_.bytes(token));
                    sent->text += text;
                    // Fails where the client has hung up; then the request is cancelled below.
                    if (!event({{"text", text}, {"token", token}})) return false;
                }
                if (more) return true;
                json last{{"done", true}, {"tokens", sent->tokens}};
                if (const std::string error = request->error(); !error.empty()) {
                    last["error"] = error;
                }
                last["text"] = sent->text + sent->utf8.finish();
                if (!event(last)) return false;
                sink.done();
                return true;
            },
            // Whatever the reason that the response ends: nobody reads on.
            [request, opened](bool) { request->cancel(); });
    }

    std::string metrics() const {
        const Engine::Counts counts = engine_.counts();
        std::string text = engine_.cache_metrics();
        const auto add = [&](const char *name, const char *type, uint64_t value) {
            text += std::string("# TYPE server_") + name + " " + type + "\nserver_" + name + " " +
                    std::to_string(value) + "\n";
        };
        add("requests_finished_total", "counter", counts.finished);
        add("requests_cancelled_total", "counter", counts.cancelled);
        add("requests_failed_total", "counter", counts.failed);
        add("requests_preempted_total", "counter", counts.preempted);
        add("requests_running", "gauge", counts.running);
        add("requests_waiting", "gauge", counts.waiting);
        return text;
    }

    Engine engine_;
    Tokenizer tokenizer_;
    std::string system_;
    std::mutex mutex_;
    std::condition_variable closed_;
    uint64_t open_ = 0;
    bool ending_ = false;
    socket_t listening_ = INVALID_SOCKET;
    httplib::Server http_;
};

}  // namespace

int main(int argc, char **argv) {
    // Signals are taken by one thread; all that are made later inherit the mask.
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
    try {
        const Options options = parse(argc, argv);
        Server server(options);
        std::thread([&server, signals] {
            int signal = 0;
            sigwait(&signals, &signal);
            server.stop();
        }).detach();
        server.serve(options.port);
        const Engine::Counts counts = server.counts();
        const std::string left = server.audit();
        std::cout << json{{"finished", counts.finished},
                          {"cancelled", counts.cancelled},
                          {"failed", counts.failed},
                          {"preempted", counts.preempted},
                          {"audit", left.empty() ? "ok" : left}}
                         .dump()
                  << std::endl;
        return left.empty() ? 0 : 1;
    } catch (const std::exception &error) {
        std::cerr << "server: " << error.what() << '\n';
        return 2;
    }
}
