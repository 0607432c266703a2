// A Llama model over a cache: weights from safetensors, RMSNorm, rotary embedding, grouped-query
// attention through the cache, SwiGLU. It knows nothing of requests.
//
// Each sum is made in the order in which examples/generate makes it, so that both write the same
// text; compile without contraction to fused multiply-adds (-ffp-contract=off) to keep that.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "kvcache.hpp"

// The value of a call that the program cannot go on without.
template <class T>
T need(kvcache::result<T> result) {
    if (!result) throw std::runtime_error(result.error().message());
    if constexpr (!std::is_void_v<T>) return std::move(result).value();
}

class Model {
  public:
    // The dimensions, as config.json names them.
    struct Config {
        uint32_t layers, hidden, q_heads, kv_heads, head_dim, mlp, vocab, max_tokens;
        float norm_eps, rope_theta;
    };

    // Reads config.json and model.safetensors of `folder`.
    explicit Model(const std::string &folder) {
        const auto json = nlohmann::json::parse(read(folder + "/config.json"));
        const auto number = [&](const char *name) { return json.at(name).get<uint32_t>(); };
        config.layers = number("num_hidden_layers");
        config.hidden = number("hidden_size");
        config.q_heads = number("num_attention_heads");
        config.kv_heads = number("num_key_value_heads");
        config.head_dim = number("head_dim");
        config.mlp = number("intermediate_size");
        config.vocab = number("vocab_size");
        config.max_tokens = number("max_position_embeddings");
        config.norm_eps = json.at("rms_norm_eps").get<float>();
        config.rope_theta = json.at("rope_theta").get<float>();
        rope_.rotary_dim = config.head_dim;
        rope_.theta = config.rope_theta;

        const Tensors tensors(read(folder + "/model.safetensors"));
        embedding_ = tensors.floats("model.embed_tokens.weight", config.vocab, config.hidden);
        // The head is tied to the embedding.
        head_ = Linear(tensors, "model.embed_tokens.weight", config.vocab, config.hidden);
        norm_ = tensors.floats("model.norm.weight", config.hidden, 1);
        const uint32_t q = config.q_heads * config.head_dim, kv = config.kv_heads * config.head_dim;
        for (uint32_t n = 0; n < config.layers; n++) {
            const auto linear = [&](const char *part, uint32_t outputs, uint32_t inputs) {
                return Linear(tensors, name(n, part), outputs, inputs);
            };
            layers_.push_back({
                tensors.floats(name(n, "input_layernorm"), config.hidden, 1),
                linear("self_attn.q_proj", q, config.hidden),
                linear("self_attn.k_proj", kv, config.hidden),
                linear("self_attn.v_proj", kv, config.hidden),
                linear("self_attn.o_proj", config.hidden, q),
                tensors.floats(name(n, "post_attention_layernorm"), config.hidden, 1),
                linear("mlp.gate_proj", config.mlp, config.hidden),
                linear("mlp.up_proj", config.mlp, config.hidden),
                linear("mlp.down_proj", config.hidden, config.mlp),
            });
        }
    }

    // What a cache of this model's K and V is made of.
    kvcache::group_spec group(uint32_t format) const {
        kvcache::group_spec group;
        group.layers = config.layers;
        group.kv_heads = config.kv_heads;
        group.k_dim = group.v_dim = config.head_dim;
        group.format = format;
        return group;
    }

    // Runs the tokens of an open step, and gives the logits `[row][vocab]` of its rows `wanted`.
    const std::vector<float> &forward(kvcache::step &step, kvcache::span<const uint32_t> tokens,
                                      kvcache::span<const std::size_t> wanted) {
        const Config &c = config;
        positions_.resize(tokens.size());
        if (need(step.row_positions(positions_)) != tokens.size()) {
            throw std::runtime_error("the step has other rows");
        }
        x_.clear();
        for (const uint32_t token : tokens) {
            if (token >= c.vocab) throw std::runtime_error("a token is past the vocabulary");
            const auto row = embedding_.begin() + static_cast<std::ptrdiff_t>(token) * c.hidden;
            x_.insert(x_.end(), row, row + c.hidden);
        }
        attended_.resize(tokens.size() * c.q_heads * c.head_dim);
        for (uint32_t n = 0; n < c.layers; n++) {
            const Layer &layer = layers_[n];
            rms_norm(x_, layer.attention_norm, h_);
            layer.q.apply(h_, q_);
            layer.k.apply(h_, k_);
            layer.v.apply(h_, v_);
            // Keys are rotated on their way into the cache, queries here.
            need(rope_.rotate(q_, c.q_heads, c.head_dim, positions_));
            need(step.append(n, k_, v_, &rope_));
            need(step.attend(n, c.q_heads, q_, attended_));
            layer.o.apply(attended_, h_);
            add(x_, h_);

            rms_norm(x_, layer.mlp_norm, h_);
            layer.gate.apply(h_, gate_);
            layer.up.apply(h_, up_);
            for (std::size_t i = 0; i < gate_.size(); i++) {
                gate_[i] = gate_[i] / (1.0f + std::exp(-gate_[i])) * up_[i];
            }
            layer.down.apply(gate_, h_);
            add(x_, h_);
        }
        h_.clear();
        for (const std::size_t row : wanted) {
            const auto at = x_.begin() + static_cast<std::ptrdiff_t>(row * c.hidden);
            h_.insert(h_.end(), at, at + c.hidden);
        }
        rms_norm(h_, norm_, q_);
        head_.apply(q_, logits_);
        return logits_;
    }

    Config config{};

  private:
    static std::string read(const std::string &path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) throw std::runtime_error(path + " cannot be read");
        return {std::istreambuf_iterator<char>(file), {}};
    }

    static std::string name(uint32_t layer, const std::string &part) {
        return "model.layers." + std::to_string(layer) + "." + part + ".weight";
    }

    // A safetensors file: 8 bytes of length, a JSON object of that length, the tensors' bytes.
    class Tensors {
      public:
        explicit Tensors(std::string bytes) : bytes_(std::move(bytes)) {
            uint64_t length = 0;
            for (std::size_t i = 8; i-- > 0;) {
                length = length << 8 | static_cast<unsigned char>(bytes_.at(i));
            }
            if (length > bytes_.size() - 8) throw std::runtime_error("safetensors: cut short");
            begin_ = 8 + static_cast<std::size_t>(length);
            header_ = nlohmann::json::parse(bytes_.begin() + 8,
                                            bytes_.begin() + static_cast<std::ptrdiff_t>(begin_));
        }

        // The tensor of `rows` times `columns` f16 values.
        std::vector<float> floats(const std::string &name, std::size_t rows,
                                  std::size_t columns) const {
            const auto &tensor = header_.at(name);
            const auto offsets = tensor.at("data_offsets").get<std::vector<std::size_t>>();
            if (tensor.at("dtype") != "F16" || offsets.size() != 2 || offsets[1] < offsets[0] ||
                offsets[1] - offsets[0] != rows * columns * 2 ||
                offsets[1] > bytes_.size() - begin_) {
                throw std::runtime_error(name + " is not " + std::to_string(rows) + " x " +
                                         std::to_string(columns) + " of f16");
            }
            std::vector<float> values(rows * columns);
            for (std::size_t i = 0; i < values.size(); i++) {
                const std::size_t at = begin_ + offsets[0] + 2 * i;
                values[i] = half(static_cast<unsigned char>(bytes_[at]) |
                                 static_cast<unsigned char>(bytes_[at + 1]) << 8);
            }
            return values;
        }

      private:
        static float half(int bits) {
            const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
            const float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                               : exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                                                : std::ldexp(static_cast<float>(mantissa + 1024),
                                                             exponent - 25);
            return (bits & 0x8000) != 0 ? -size : size;
        }

        std::string bytes_;
        std::size_t begin_ = 0;
        nlohmann::json header_;
    };

    // A matrix kept as `[input][output]`, so that rows of outputs add up in vector registers.
    struct Linear {
        Linear() = default;
        Linear(const Tensors &tensors, const std::string &name, std::size_t rows,
               std::size_t columns)
            : weight(rows * columns), inputs(columns), outputs(rows) {
            const std::vector<float> stored = tensors.floats(name, rows, columns);
            for (std::size_t o = 0; o < outputs; o++) {
                for (std::size_t i = 0; i < inputs; i++) {
                    weight[i * outputs + o] = stored[o * inputs + i];
                }
            }
        }

        // `[row][input]` to `[row][output]`. Each row adds its inputs in order, whatever stands
        // beside it: a row's bits do not depend on the batch.
        void apply(const std::vector<float> &x, std::vector<float> &y) const {
            const std::size_t rows = x.size() / inputs;
            y.assign(rows * outputs, 0.0f);
            for (std::size_t first = 0; first < rows; first += 8) {
                const std::size_t end = std::min(rows, first + 8);
                for (std::size_t i = 0; i < inputs; i++) {
                    const float *w = weight.data() + i * outputs;
                    for (std::size_t row = first; row < end; row++) {
                        const float value = x[row * inputs + i];
                        float *out = y.data() + row * outputs;
                        for (std::size_t o = 0; o < outputs; o++) out[o] += value * w[o];
                    }
                }
            }
        }

        std::vector<float> weight;
        std::size_t inputs = 0, outputs = 0;
    };

    struct Layer {
        std::vector<float> attention_norm;
        Linear q, k, v, o;
        std::vector<float> mlp_norm;
        Linear gate, up, down;
    };

    void rms_norm(const std::vector<float> &x, const std::vector<float> &weight,
                  std::vector<float> &out) const {
        const std::size_t width = weight.size();
        out.resize(x.size());
        for (std::size_t row = 0; row < x.size(); row += width) {
            float sum = 0.0f;
            for (std::size_t i = 0; i < width; i++) sum += x[row + i] * x[row + i];
            const float scale =
                1.0f / std::sqrt(sum / static_cast<float>(width) + config.norm_eps);
            for (std::size_t i = 0; i < width; i++) out[row + i] = x[row + i] * scale * weight[i];
        }
    }

    static void add(std::vector<float> &x, const std::vector<float> &y) {
        for (std::size_t i = 0; i < x.size(); i++) x[i] += y[i];
    }

    kvcache::rope rope_;
    std::vector<float> embedding_, norm_;
    std::vector<Layer> layers_;
    Linear head_;
    // Buffers of forward(), kept from step to step.
    std::vector<uint32_t> positions_;
    std::vector<float> x_, h_, q_, k_, v_, attended_, gate_, up_, logits_;
};
