#include "text/byte_level.h"

#include <array>

#include "base/error.h"
#include "base/json.h"
#include "text/utf8.h"

namespace indexcache {

namespace {

struct Spelling {
  std::array<uint16_t, 256> character;
  std::array<int16_t, 0x200> byte;  // -1: stands for no byte
};

constexpr Spelling make_spelling() {
  Spelling spelling{};
  for (int16_t& byte : spelling.byte) byte = -1;
  uint16_t next_substitute = 0x100;
  for (uint16_t byte = 0; byte < 256; ++byte) {
    const bool printable_itself =
        (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    const uint16_t character = printable_itself ? byte : next_substitute++;
    spelling.character[byte] = character;
    spelling.byte[character] = static_cast<int16_t>(byte);
  }
  return spelling;
}

constexpr Spelling kSpelling = make_spelling();

}  // namespace

uint32_t byte_level_character(uint8_t byte) { return kSpelling.character[byte]; }

std::string to_byte_level(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) append_utf8(byte_level_character(static_cast<uint8_t>(c)), out);
  return out;
}

std::optional<std::string> from_byte_level(std::string_view spelled) {
  std::string out;
  for (size_t at = 0; at < spelled.size();) {
    const Utf8Step step = utf8_step(spelled, at);
    if (!step.valid || step.code_point >= kSpelling.byte.size()) return std::nullopt;
    const int16_t byte = kSpelling.byte[step.code_point];
    if (byte < 0) return std::nullopt;
    out.push_back(static_cast<char>(byte));
    at += step.length;
  }
  return out;
}

std::string byte_level_tokenizer_json(int vocab_size) {
  if (vocab_size < 260)
    fail("vocab_size is {}, expected at least 260 for a byte-level tokenizer", vocab_size);
  Json vocab = Json::object();
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    vocab[to_byte_level({&c, 1})] = byte;
  }
  Json added = Json::array();
  for (int id = 256; id < vocab_size; ++id) {
    constexpr std::array<const char*, 4> kNames = {"<|endoftext|>", "<|system|>", "<|user|>",
                                                   "<|assistant|>"};
    const size_t index = static_cast<size_t>(id - 256);
    added.push_back(
        {{"id", id},
         {"content", index < kNames.size() ? std::string(kNames[index])
                                           : fmt::format("<|reserved_{}|>", index - kNames.size())},
         {"single_word", false},
         {"lstrip", false},
         {"rstrip", false},
         {"normalized", false},
         {"special", true}});
  }
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", false}};
  const Json file = {{"version", "1.0"},
                     {"truncation", nullptr},
                     {"padding", nullptr},
                     {"added_tokens", added},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", byte_level},
                     {"post_processor", nullptr},
                     {"decoder", byte_level},
                     {"model",
                      {{"type", "BPE"},
                       {"dropout", nullptr},
                       {"unk_token", nullptr},
                       {"continuing_subword_prefix", nullptr},
                       {"end_of_word_suffix", nullptr},
                       {"fuse_unk", false},
                       {"byte_fallback", false},
                       {"ignore_merges", false},
                       {"vocab", vocab},
                       {"merges", Json::array()}}}};
  return file.dump(1) + "\n";
}

}  // namespace indexcache
