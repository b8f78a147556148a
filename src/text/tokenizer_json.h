// Reads a tokenizer.json: the Hugging Face tokenizers format, of which we take byte-level BPE
// (DeepSeek, GLM, Llama 3, GPT-2). A part that would change the tokens and that we do not implement
// is refused by name.
//
// Rules: token ids are 0 to N-1, each used once (an added token may repeat a model token under the
// same id); all 256 byte tokens exist; merges name existing tokens and produce existing tokens.
// Memory is a small multiple of the file.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/splitter.h"

namespace indexcache {

inline constexpr size_t kMaxTokenizerBytes = 64u << 20;
inline constexpr size_t kMaxMerges = size_t{1} << 21;

struct TokenizerFile {
  std::vector<std::string> tokens;      // by id, as the file writes them (byte-level spelling)
  std::vector<bool> in_model;           // by id: part of the BPE model, not only an added token
  std::array<int32_t, 256> byte_ids{};  // the token of each byte
  std::vector<Merge> merges;
  bool ignore_merges = false;  // a piece that is a token as a whole is not taken apart
  std::vector<AddedToken> added_tokens;
  std::vector<SplitStage> splits;       // before the prefix space
  bool add_prefix_space = false;        // each piece that does not begin with a space gets one
  std::vector<SplitStage> late_splits;  // after the prefix space
  std::vector<int32_t> prefix;  // put before and after the tokens of a text when special tokens
  std::vector<int32_t> suffix;  // are asked for
};

// `where` (the file's path) begins every error message.
TokenizerFile parse_tokenizer_file(std::string_view json, const std::string& where);

}  // namespace indexcache
