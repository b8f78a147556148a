// Text to token ids and back, from a tokenizer.json (what is taken of that format:
// text/tokenizer_json.h). Ids equal those of Hugging Face tokenizers for every text that is valid
// UTF-8.
//
// Control tokens in text: with parse_special, an added token's text (<|user|>, <|endoftext|>)
// becomes that token. Without it, text is only text: no added token is recognised, whether or not
// the file marks it as special, since DeepSeek's
// <|User|> is not marked. Anything a user wrote is encoded without it.
//
// Errors: a bad file, text that is not UTF-8 (with the offset), text of 2 GiB or more, and a
// pre-tokenizer pattern that needs too many steps are Errors. A Tokenizer is immutable and may be
// used from several threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/utf8.h"

namespace indexcache {

class Tokenizer {
 public:
  static Tokenizer load(const std::string& path);
  static Tokenizer parse(std::string_view json, const std::string& where);

  // add_special_tokens: put what the file's post-processor says before and after the text
  // ([gMASK]<sop>).
  std::vector<int32_t> encode(std::string_view utf8, bool add_special_tokens,
                              bool parse_special) const;

  // With parse_special, except that an added token is found only where no byte is from input.
  // `from_input` has a byte for each byte of the text, not 0 where it is; empty: nothing is.
  std::vector<int32_t> encode_marked(std::string_view utf8, std::string_view from_input) const;

  // Valid UTF-8: bytes that are not, as when tokens were cut inside a character, become U+FFFD. Ids
  // without a token (a model's vocabulary is often padded) stand for no text. skip_special leaves
  // out special tokens.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;

  // Ids are 0 to vocab_size() - 1.
  int vocab_size() const;

  // The token with exactly this text; for tokens that are not plain ASCII, in the file's byte-level
  // spelling.
  std::optional<int32_t> token_id(std::string_view token) const;

  // The bytes that a token stands for; empty for ids without a token.
  std::string_view token_bytes(int32_t id) const;
  bool is_special(int32_t id) const;

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

// Decodes a stream of tokens. Only whole characters come out; all that comes out, with finish(),
// equals Tokenizer::decode of the same tokens.
class StreamDecoder {
 public:
  StreamDecoder(Tokenizer tokenizer, bool skip_special)
      : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

  std::string push(int32_t id);
  std::string finish() { return utf8_.finish(); }

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  Utf8Stream utf8_;
};

}  // namespace indexcache
