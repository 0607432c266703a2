// The model's byte-level BPE: ids 0 to 255 are bytes, 256 ends a text, the rest are merges in rank
// order. The rule that splits text into pieces is stated in examples/generate/model/README.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

class Tokenizer {
  public:
    // The id that ends a text.
    static constexpr uint32_t END = 256;

    // Reads one merge a line: the two ids it joins.
    explicit Tokenizer(const std::string &path) {
        for (int byte = 0; byte < 256; byte++) bytes_.emplace_back(1, static_cast<char>(byte));
        bytes_.emplace_back();
        std::ifstream file(path);
        if (!file) throw std::runtime_error(path + " cannot be read");
        uint32_t left = 0, right = 0;
        while (file >> left >> right) {
            if (std::max(left, right) >= bytes_.size()) {
                throw std::runtime_error(path + ": a merge names a later id");
            }
            ranks_.emplace(std::pair(left, right), static_cast<uint32_t>(bytes_.size()));
            bytes_.push_back(bytes_[left] + bytes_[right]);
        }
        if (!file.eof()) throw std::runtime_error(path + ": a merge is two ids");
    }

    std::vector<uint32_t> encode(std::string_view text) const {
        std::vector<uint32_t> ids;
        while (!text.empty()) {
            const std::size_t length = piece(text);
            encode_piece(text.substr(0, length), ids);
            text.remove_prefix(length);
        }
        return ids;
    }

    // The bytes of a token, which need not be whole characters.
    const std::string &bytes(uint32_t id) const { return bytes_.at(id); }

  private:
    static bool space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
    static bool letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }
    static bool other(char c) { return !space(c) && !letter(c); }

    // Length of the piece that `text` begins with: letters or other characters, either with one
    // space before them, or white space, which leaves its last space to a piece that follows.
    static std::size_t piece(std::string_view text) {
        const auto run = [&](std::size_t from, bool (*in)(char)) {
            while (from < text.size() && in(text[from])) from++;
            return from;
        };
        const std::size_t start = text[0] == ' ';
        if (start < text.size() && letter(text[start])) return run(start, letter);
        if (start < text.size() && other(text[start])) return run(start, other);
        const std::size_t end = run(0, space);
        return end - (end < text.size() && end > 1 && text[end - 1] == ' ');
    }

    // Joins the pair of the lowest rank until none is left.
    void encode_piece(std::string_view text, std::vector<uint32_t> &out) const {
        std::vector<uint32_t> ids;
        for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
        const auto rank = [&](std::size_t i) {
            const auto found =
                i + 1 < ids.size() ? ranks_.find({ids[i], ids[i + 1]}) : ranks_.end();
            return found == ranks_.end() ? UINT32_MAX : found->second;
        };
        for (;;) {
            uint32_t best = UINT32_MAX;
            for (std::size_t i = 0; i < ids.size(); i++) best = std::min(best, rank(i));
            if (best == UINT32_MAX) break;
            std::vector<uint32_t> joined;
            for (std::size_t i = 0; i < ids.size();) {
                const bool join = rank(i) == best;
                joined.push_back(join ? best : ids[i]);
                i += join ? 2 : 1;
            }
            ids = std::move(joined);
        }
        out.insert(out.end(), ids.begin(), ids.end());
    }

    std::map<std::pair<uint32_t, uint32_t>, uint32_t> ranks_;
    std::vector<std::string> bytes_;
};

// Makes UTF-8 of bytes that come in pieces: what can never become a character is U+FFFD, what still
// may waits for more bytes.
class Utf8 {
  public:
    std::string feed(std::string_view bytes) {
        held_.append(bytes);
        return take(false);
    }
    std::string finish() { return take(true); }

  private:
    // How long the character at `at` is, or how many bytes of one that is broken; 0: cut short.
    static std::size_t character(std::string_view text, std::size_t at, bool &broken) {
        const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
        const unsigned char lead = byte(0);
        const std::size_t length = lead < 0x80                   ? 1
                                   : lead >= 0xc2 && lead < 0xe0 ? 2
                                   : lead >= 0xe0 && lead < 0xf0 ? 3
                                   : lead >= 0xf0 && lead < 0xf5 ? 4
                                                                 : 0;
        broken = length == 0;
        for (std::size_t i = 1; i < length; i++) {
            if (at + i == text.size()) return 0;
            // The second byte of some leads is limited: no overlong forms, surrogates, or planes.
            unsigned char low = 0x80, high = 0xbf;
            if (i == 1 && lead == 0xe0) low = 0xa0;
            if (i == 1 && lead == 0xed) high = 0x9f;
            if (i == 1 && lead == 0xf0) low = 0x90;
            if (i == 1 && lead == 0xf4) high = 0x8f;
            if (byte(i) < low || byte(i) > high) {
                broken = true;
                return i;
            }
        }
        return broken ? 1 : length;
    }

    std::string take(bool all) {
        std::string out;
        std::size_t at = 0;
        while (at < held_.size()) {
            bool broken = false;
            std::size_t length = character(held_, at, broken);
            if (length == 0) {
                if (!all) break;
                broken = true;
                length = held_.size() - at;
            }
            out += broken ? "\xef\xbf\xbd" : held_.substr(at, length);
            at += length;
        }
        held_.erase(0, at);
        return out;
    }

    std::string held_;
};
