// What the server serves and says of it.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "server/generator.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace indexcache {

struct ServedModel {
  std::string name;
  Generator* generator = nullptr;
  std::optional<Tokenizer> tokenizer;
  TextConfig text;
  int64_t context = 0;       // tokens of one request: prompt and answer
  int64_t vocab_size = 0;    // rows of logits
  size_t longest_token = 0;  // bytes, for bounds on texts; 0: not known
  std::vector<int32_t> eos_tokens;
  std::string plan;     // FFSS...
  int64_t started = 0;  // Unix time
};

inline size_t longest_token_bytes(const Tokenizer& tokenizer) {
  size_t longest = 0;
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id)
    longest = std::max(longest, tokenizer.token_bytes(id).size());
  return longest;
}

}  // namespace indexcache
