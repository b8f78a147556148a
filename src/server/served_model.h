// What the server serves and says of it.
#pragma once

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
  int64_t context = 0;     // tokens of one request: prompt and answer
  int64_t vocab_size = 0;  // rows of logits
  std::vector<int32_t> eos_tokens;
  std::string plan;     // FFSS...
  int64_t started = 0;  // Unix time
};

}  // namespace indexcache
