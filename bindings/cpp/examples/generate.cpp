// Generates text with a small language model and a KV cache, from C++: prompts that share a system
// prompt, with continuous batching. Writes the same tokens as examples/generate (Rust) for the same
// prompts, seed and batch.
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iostream>
#include <iterator>

#include "common/model.hpp"
#include "common/sampler.hpp"
#include "common/tokenizer.hpp"

namespace {

const char *const USAGE =
    "usage: generate [options]\n"
    "  --model DIR          the model's folder (default: $KVCACHE_MODEL_DIR or\n"
    "                       examples/generate/model)\n"
    "  --prompt TEXT        a prompt after the system prompt; repeat for more (default: 8 of them)\n"
    "  --batch N            sequences that run at once (default 4)\n"
    "  --max-tokens N       tokens to generate for each prompt (default 32)\n"
    "  --dtype f32|f16|bf16 how K and V are stored (default bf16)\n"
    "  --temperature T      0 is greedy (default 0)\n"
    "  --seed N             seed of the draw where the temperature is not 0 (default 0)\n"
    "  --json               print tokens and texts as one JSON object\n";

struct Args {
    std::string model = "examples/generate/model";
    std::vector<std::string> prompts;
    uint32_t batch = 4, max_tokens = 32, format = kvcache::format::bf16;
    float temperature = 0.0f;
    uint64_t seed = 0;
    bool json = false;
};

Args parse(int argc, char **argv) {
    Args args;
    if (const char *folder = std::getenv("KVCACHE_MODEL_DIR")) args.model = folder;
    for (int i = 1; i < argc; i++) {
        const std::string flag = argv[i];
        if (flag == "--json") {
            args.json = true;
            continue;
        }
        if (i + 1 == argc) throw std::invalid_argument(flag + " needs a value");
        const std::string value = argv[++i];
        const auto number = [&](unsigned long most) {
            if (value.find_first_not_of("0123456789") != std::string::npos || value.size() > 18 ||
                value.empty() || std::stoul(value) > most) {
                throw std::invalid_argument(flag + " cannot be " + value);
            }
            return std::stoul(value);
        };
        if (flag == "--model") {
            args.model = value;
        } else if (flag == "--prompt") {
            args.prompts.push_back(value);
        } else if (flag == "--batch") {
            args.batch = static_cast<uint32_t>(number(65536));
        } else if (flag == "--max-tokens") {
            args.max_tokens = static_cast<uint32_t>(number(65536));
        } else if (flag == "--seed") {
            args.seed = number(UINT64_MAX);
        } else if (flag == "--temperature") {
            args.temperature = std::stof(value);
        } else if (flag == "--dtype") {
            args.format = value == "f32"    ? kvcache::format::f32
                          : value == "f16"  ? kvcache::format::f16
                          : value == "bf16" ? kvcache::format::bf16
                                            : throw std::invalid_argument("no dtype " + value);
        } else {
            throw std::invalid_argument("unknown option " + flag);
        }
    }
    if (args.batch == 0 || args.max_tokens == 0) {
        throw std::invalid_argument("--batch and --max-tokens must be at least 1");
    }
    if (!(args.temperature >= 0.0f) || std::isinf(args.temperature)) {
        throw std::invalid_argument("--temperature must be 0 or more");
    }
    return args;
}

std::string slurp(const std::string &path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + " cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

// A sequence that runs: which prompt it is of, and what its next step is fed.
struct Running {
    std::size_t prompt;
    kvcache::sequence seq;
    std::vector<uint32_t> next;
};

// Runs all prompts to their end, at most `batch` at a time. One is admitted a step, so that every
// later one finds the shared system prompt in the prefix index.
std::vector<std::vector<uint32_t>> serve(Model &model, kvcache::cache &cache, const Args &args,
                                         const std::vector<std::vector<uint32_t>> &prompts) {
    std::vector<std::vector<uint32_t>> outputs(prompts.size());
    std::vector<Running> running;
    std::vector<kvcache::work> work;
    std::vector<uint32_t> tokens;
    std::vector<std::size_t> last;
    Sampler sampler(args.temperature, args.seed);
    kvcache::step step = need(kvcache::step::create());
    std::size_t waiting = 0;
    while (waiting < prompts.size() || !running.empty()) {
        if (waiting < prompts.size() && running.size() < args.batch) {
            const auto &prompt = prompts[waiting];
            kvcache::started started = need(cache.start(prompt));
            running.push_back({waiting++, std::move(started.seq),
                               {prompt.begin() + started.cached_tokens, prompt.end()}});
        }
        work.clear(), tokens.clear(), last.clear();
        for (const Running &run : running) {
            work.push_back(run.seq.work(run.next));
            tokens.insert(tokens.end(), run.next.begin(), run.next.end());
            last.push_back(tokens.size() - 1);
        }
        need(step.begin(cache, work));
        const std::vector<float> &logits = model.forward(step, tokens, last);
        need(step.commit());

        std::vector<Running> rest;
        for (std::size_t row = 0; row < running.size(); row++) {
            const std::size_t vocab = model.config.vocab;
            const uint32_t token = sampler.pick({logits.data() + row * vocab, vocab});
            Running &run = running[row];
            auto &output = outputs[run.prompt];
            output.push_back(token);
            // One that has ended is released here, and its blocks stay cached.
            if (token == Tokenizer::END || output.size() == args.max_tokens) continue;
            run.next = {token};
            rest.push_back(std::move(run));
        }
        running = std::move(rest);
    }
    return outputs;
}

void run(const Args &args) {
    Model model(args.model);
    const Tokenizer tokenizer(args.model + "/tokenizer.txt");
    std::string system = slurp(args.model + "/../system.txt");
    system.erase(system.find_last_not_of(" \t\r\n") + 1);
    std::vector<std::string> questions = args.prompts;
    if (questions.empty()) {
        std::ifstream file(args.model + "/../prompts.txt");
        for (std::string line; std::getline(file, line);) questions.push_back(line);
    }
    std::vector<std::vector<uint32_t>> prompts;
    std::size_t longest = 0;
    for (const std::string &question : questions) {
        prompts.push_back({Tokenizer::END});
        const auto ids = tokenizer.encode(system + "\n\n" + question);
        prompts.back().insert(prompts.back().end(), ids.begin(), ids.end());
        longest = std::max(longest, prompts.back().size() + args.max_tokens);
    }
    if (longest > model.config.max_tokens) {
        throw std::runtime_error(std::to_string(longest) + " tokens are past the model's " +
                                 std::to_string(model.config.max_tokens));
    }

    kvcache::cache_options options;
    options.max_seqs = args.batch;
    // Room for a full batch, and for every prompt to stay in the index.
    options.blocks = static_cast<uint32_t>((args.batch + prompts.size()) *
                                           (longest / options.block_tokens + 1));
    kvcache::cache cache = need(kvcache::cache::create(model.group(args.format), options));
    const auto outputs = serve(model, cache, args, prompts);
    need(cache.audit());

    auto sequences = nlohmann::json::array();
    for (std::size_t i = 0; i < outputs.size(); i++) {
        Utf8 utf8;
        std::string text;
        for (const uint32_t token : outputs[i]) text += utf8.feed(tokenizer.bytes(token));
        text += utf8.finish();
        sequences.push_back({{"prompt", questions[i]}, {"text", text}, {"tokens", outputs[i]}});
        if (!args.json) std::cout << "> " << questions[i] << text << "\n\n";
    }
    const kvcache::cache_counts counts = need(cache.stats());
    if (args.json) {
        std::cout << nlohmann::json{{"sequences", sequences},
                                    {"prompt_tokens", counts.looked_up_tokens},
                                    {"prefix_hit_tokens", counts.hit_tokens}}
                         .dump(2)
                  << '\n';
    } else {
        std::cout << counts.hit_tokens << " of " << counts.looked_up_tokens
                  << " prompt tokens were found in the prefix index\n";
    }
}

}  // namespace

int main(int argc, char **argv) {
    try {
        run(parse(argc, argv));
    } catch (const std::invalid_argument &error) {
        std::cerr << "generate: " << error.what() << '\n' << USAGE;
        return 2;
    } catch (const std::exception &error) {
        std::cerr << "generate: " << error.what() << '\n';
        return 1;
    }
}
