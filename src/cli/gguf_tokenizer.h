// A tokenizer.json as the `tokenizer.ggml.*` entries of a GGUF file.
//
// llama.cpp splits text by rules of its own, chosen by name (`tokenizer.ggml.pre`); the name
// follows from the patterns of tokenizer.json. A tokenizer whose patterns have no such name is an
// Error: another name would give other tokens. One without merges has every name's tokens.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "checkpoint/gguf_writer.h"

namespace indexcache {

struct GgufTokenizer {
  GgufMetadata metadata;
  std::vector<std::string> notes;  // what could not be said in a GGUF file
};

// From `folder`'s tokenizer.json, with the chat template of chat_template.jinja or
// tokenizer_config.json if there is one. A folder without tokenizer.json gives `no_vocab`:
// llama.cpp then takes token ids only.
GgufTokenizer gguf_tokenizer(const std::string& folder, const ModelConfig& config);

}  // namespace indexcache
