// Flags of commands that measure a model on text: which text, how much of it, and which part.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "search/text_data.h"
#include "text/tokenizer.h"

namespace indexcache {

struct DataFlags {
  std::vector<std::string> files;
  SequenceRequest request;
};

void add_data_flags(CLI::App* command, DataFlags* flags);

// The text, the tokenizer of the model's folder, and what the request cuts with it.
struct TextData {
  std::vector<std::string> documents;
  Tokenizer tokenizer;
  TokenSequences tokens;
};
TextData load_text(const DataFlags& flags, const std::string& model, const ModelConfig& config);

// Error when no query of a sequence sees more than index_topk tokens: every plan is then the same.
// A warning when few do.
void check_sequence_length(int64_t sequence_tokens, const ModelConfig& config, bool accept_short);

// For plan files and reports: where the data came from.
Json data_json(const DataFlags& flags, const TokenSequences& data);

}  // namespace indexcache
