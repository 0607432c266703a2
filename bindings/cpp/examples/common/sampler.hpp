// Choosing the next token: the most likely one, or a draw at a temperature. The same draws as
// examples/generate makes from the same seed.
#pragma once

#include <cmath>
#include <cstdint>

#include "kvcache.hpp"

class Sampler {
  public:
    // Temperature 0 is greedy and needs no seed.
    Sampler(float temperature, uint64_t seed) : temperature_(temperature), state_(seed) {}

    uint32_t pick(kvcache::span<const float> logits) {
        const uint32_t best = argmax(logits);
        if (temperature_ == 0.0f) return best;
        const auto weight = [&](float logit) {
            return std::exp(static_cast<double>((logit - logits[best]) / temperature_));
        };
        double left = 0.0;
        for (const float logit : logits) left += weight(logit);
        left *= uniform();
        for (std::size_t token = 0; token < logits.size(); token++) {
            left -= weight(logits[token]);
            if (left < 0.0) return static_cast<uint32_t>(token);
        }
        return best;
    }

  private:
    // The first of the largest.
    static uint32_t argmax(kvcache::span<const float> logits) {
        std::size_t best = 0;
        for (std::size_t token = 1; token < logits.size(); token++) {
            if (logits[token] > logits[best]) best = token;
        }
        return static_cast<uint32_t>(best);
    }

    // SplitMix64, in [0, 1).
    double uniform() {
        state_ += 0x9e3779b97f4a7c15;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return static_cast<double>((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
    }

    float temperature_;
    uint64_t state_;
};
