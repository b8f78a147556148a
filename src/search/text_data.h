// Text as a language model is measured on it: documents from files, cut into token sequences of one
// length.
//
// A file whose name ends in ".jsonl" has one JSON object a line, with the text under "text"; any
// other file is one document. The tokens of all documents follow one another, an end-of-text token
// between them where the model has one, and are cut into windows of `sequence_tokens`. The seed
// orders the windows; a request takes the next ones after those it skips, so two requests with the
// same seed that skip apart share no token.
//
// Errors name the file and the line: not UTF-8, a line without "text", fewer tokens than asked for.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "text/tokenizer.h"

namespace indexcache {

std::vector<std::string> load_documents(const std::vector<std::string>& paths);

struct SequenceRequest {
  int64_t total_tokens = 65536;    // rounded up to whole sequences
  int64_t sequence_tokens = 2048;  // at least 2
  int64_t skip_tokens = 0;         // rounded up to whole sequences
  uint64_t seed = 1;
};

struct TokenSequences {
  std::vector<std::vector<int32_t>> sequences;  // all of one length
  std::string hash;                             // SHA-256 of the ids: names the data

  int64_t sequence_tokens() const { return static_cast<int64_t>(sequences.front().size()); }
  int64_t total_tokens() const {
    return static_cast<int64_t>(sequences.size()) * sequence_tokens();
  }
  // Tokens that have a loss: all but the first of every sequence.
  int64_t num_targets() const {
    return static_cast<int64_t>(sequences.size()) * (sequence_tokens() - 1);
  }
};

TokenSequences cut_sequences(const std::vector<std::string>& documents, const Tokenizer& tokenizer,
                             std::optional<int32_t> end_of_text, const SequenceRequest& request);

}  // namespace indexcache
