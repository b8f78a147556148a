// Makes a vocabulary: byte-level byte-pair encoding learnt from text, written as a Hugging Face
// tokenizer.json that text/tokenizer.h and Hugging Face tokenizers read alike.
//
// Text is first split by kSplitPattern (words with the character before them, single digits, runs
// of punctuation, line ends, indentation); merges never cross a split. Each step joins the most
// frequent adjacent pair; of equally frequent pairs the one with the lower left, then right token.
// So the result depends on the texts alone, not on threads or the order of texts.
//
// Ids: special tokens, then the 256 bytes, then one token a merge.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace indexcache {

// <|begin|> stands before a text, <|endoftext|> after it.
inline constexpr std::string_view kSpecialTokens[] = {"<|pad|>",    "<|begin|>", "<|endoftext|>",
                                                      "<|system|>", "<|user|>",  "<|assistant|>"};
inline constexpr int kPadId = 0, kBeginId = 1, kEndId = 2;

inline constexpr std::string_view kSplitPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

using WordCounts = std::unordered_map<std::string, int64_t>;

// Splits the texts and adds up how often each piece occurs. Errors: text that is not UTF-8.
WordCounts count_words(std::span<const std::string> texts, int num_threads);

struct Vocabulary {
  std::vector<std::string> tokens;          // by id; bytes
  std::vector<std::pair<int, int>> merges;  // ids, in order of learning
};

struct BpeOptions {
  int vocab_size = 8192;        // special tokens and bytes included
  size_t max_token_bytes = 32;  // longer ones are rare strings of a few documents
  int64_t min_count = 2;        // a pair seen less often is not joined
};

// Errors: a vocab_size that does not hold the special tokens and bytes, or that the text is too
// small to fill.
Vocabulary train_bpe(const WordCounts& words, const BpeOptions& options);

std::string tokenizer_json(const Vocabulary& vocabulary);
// With a chat template: <|begin|><|user|>...<|assistant|>...<|endoftext|>.
std::string tokenizer_config_json(int64_t model_max_length);

}  // namespace indexcache
