// Text to a token file (train/token_file.h), with several threads; the result does not depend on
// their number.
//
// Inputs: a file whose name ends in .jsonl has one document a line, each an object with one of
//   "text"                    trained on with weight 1
//   "prompt" + "completion"   weights prompt_weight and answer_weight
//   "segments"                [{"text", "answer": bool}, ...]: the same, alternating
//   "messages"                [{"role": "system"|"user"|"assistant", "content"}, ...]: laid out as
//                             the chat template does; what the assistant says has answer_weight
// Other keys are ignored. Any other file is one document of plain text. Special tokens in texts are
// only text. Before each document stand the tokens that the tokenizer puts before a text; after it
// <|endoftext|>.
//
// Errors, naming file and line: unreadable or empty inputs, a line that is not such an object, text
// that is not UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace indexcache {

struct TokenizeOptions {
  uint8_t prompt_weight = 1;
  uint8_t answer_weight = 10;
  int num_threads = 1;
};

struct DocumentTokens {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> weights;  // of each token as a target
};

// `where` ("tasks.jsonl: line 7") begins every error message.
DocumentTokens tokenize_record(std::string_view json, const std::string& where,
                               const Tokenizer& tokenizer, const TokenizeOptions& options);
DocumentTokens tokenize_text(std::string_view text, const std::string& where,
                             const Tokenizer& tokenizer);

struct TokenFileSummary {
  uint64_t documents, tokens, answer_tokens, text_bytes;
};
TokenFileSummary build_token_file(const std::vector<std::string>& inputs,
                                  const std::string& tokenizer_path, const TokenizeOptions& options,
                                  const std::string& out_path);

}  // namespace indexcache
