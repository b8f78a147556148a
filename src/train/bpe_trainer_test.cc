#include "train/bpe_trainer.h"

#include <gtest/gtest.h>

#include <map>

#include "base/error.h"
#include "base/json.h"
#include "base/rng.h"
#include "text/tokenizer.h"

namespace indexcache {
namespace {

constexpr int kFirstMerge = static_cast<int>(std::size(kSpecialTokens)) + 256;

std::vector<std::string> random_texts(uint64_t seed, int count) {
  Rng rng(seed);
  const std::vector<std::string> parts = {"low",  "lower", "newest", "wide",  " ",   "  ", "\n",
                                          "\n\n", "don't", "1234",   "f(x);", "été", "::", "aaaa"};
  std::vector<std::string> texts(count);
  for (std::string& text : texts)
    for (int i = 0; i < 60; ++i) text += parts[rng.below(parts.size())];
  return texts;
}

// The definition: count all pairs anew at every step.
std::vector<std::pair<int, int>> obvious_merges(const WordCounts& words, int count,
                                                size_t max_token_bytes) {
  std::vector<std::pair<std::vector<int>, int64_t>> split;
  std::vector<std::string> tokens(kFirstMerge - 256);
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (const auto& [text, times] : words) {
    split.emplace_back();
    for (const char c : text)
      split.back().first.push_back(kFirstMerge - 256 + static_cast<uint8_t>(c));
    split.back().second = times;
  }
  std::vector<std::pair<int, int>> merges;
  while (static_cast<int>(merges.size()) < count) {
    std::map<std::pair<int, int>, int64_t> pairs;
    for (const auto& [ids, times] : split)
      for (size_t i = 1; i < ids.size(); ++i) pairs[{ids[i - 1], ids[i]}] += times;
    std::pair<int, int> best;
    int64_t most = 0;
    for (const auto& [pair, times] : pairs) {
      const std::string bytes = tokens[pair.first] + tokens[pair.second];
      if (times <= most || bytes.size() > max_token_bytes ||
          std::ranges::find(tokens, bytes) != tokens.end())
        continue;
      best = pair;
      most = times;
    }
    if (most == 0) break;
    const auto id = static_cast<int>(tokens.size());
    tokens.push_back(tokens[best.first] + tokens[best.second]);
    merges.push_back(best);
    for (auto& [ids, times] : split)
      for (size_t i = 0; i + 1 < ids.size(); ++i) {
        if (ids[i] != best.first || ids[i + 1] != best.second) continue;
        ids[i] = id;
        ids.erase(ids.begin() + static_cast<ptrdiff_t>(i) + 1);
      }
  }
  return merges;
}

TEST(BpeTrainer, SameMergesAsCountingAnewAtEveryStep) {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    const auto texts = random_texts(seed, 12);
    const WordCounts words = count_words(texts, 1);
    const auto expected = obvious_merges(words, 60, 6);
    ASSERT_GE(expected.size(), 20u);
    BpeOptions options;
    options.vocab_size = kFirstMerge + static_cast<int>(expected.size());
    options.max_token_bytes = 6;
    options.min_count = 1;
    EXPECT_EQ(train_bpe(words, options).merges, expected) << "seed " << seed;
  }
}

TEST(BpeTrainer, ThreadsAndOrderDoNotMatter) {
  std::vector<std::string> texts = random_texts(7, 300);
  BpeOptions options;
  options.vocab_size = kFirstMerge + 40;
  const std::string one = tokenizer_json(train_bpe(count_words(texts, 1), options));
  EXPECT_EQ(tokenizer_json(train_bpe(count_words(texts, 4), options)), one);
  std::ranges::reverse(texts);
  EXPECT_EQ(tokenizer_json(train_bpe(count_words(texts, 2), options)), one);
}

TEST(BpeTrainer, TheTokenizerLoadsItAndGivesTheTextBack) {
  const auto texts = random_texts(3, 40);
  BpeOptions options;
  options.vocab_size = kFirstMerge + 50;
  const Vocabulary vocabulary = train_bpe(count_words(texts, 1), options);
  const Tokenizer tokenizer = Tokenizer::parse(tokenizer_json(vocabulary), "test");
  EXPECT_EQ(tokenizer.vocab_size(), options.vocab_size);
  for (int id = 0; id < tokenizer.vocab_size(); ++id)
    EXPECT_EQ(tokenizer.token_bytes(id), vocabulary.tokens[id]);
  for (const std::string& text : texts) {
    const auto ids = tokenizer.encode(text, true, false);
    EXPECT_EQ(ids.front(), kBeginId);
    EXPECT_LT(ids.size(), text.size() / 2);
    EXPECT_EQ(tokenizer.decode(ids, true), text);
  }
  // Digits stay single, and control tokens are found only when asked for.
  EXPECT_EQ(tokenizer.encode("48213", false, false).size(), 5u);
  EXPECT_EQ(tokenizer.encode("<|endoftext|>", false, true), std::vector<int32_t>{kEndId});
  EXPECT_GT(tokenizer.encode("<|endoftext|>", false, false).size(), 1u);
}

TEST(BpeTrainer, ConfigNamesTokensAndTemplate) {
  const Json config = parse_json(tokenizer_config_json(16384), "config");
  EXPECT_EQ(config["bos_token"], kSpecialTokens[kBeginId]);
  EXPECT_EQ(config["eos_token"], kSpecialTokens[kEndId]);
  EXPECT_EQ(config["pad_token"], kSpecialTokens[kPadId]);
  EXPECT_EQ(config["added_tokens_decoder"]["5"]["content"], "<|assistant|>");
  EXPECT_EQ(config["model_max_length"], 16384);
}

TEST(BpeTrainer, TooLittleTextOrRoomIsAnError) {
  const std::vector<std::string> texts = {"ab ab"};
  EXPECT_THROW(train_bpe(count_words(texts, 1), {}), Error);
  BpeOptions options;
  options.vocab_size = 200;
  EXPECT_THROW(train_bpe(count_words(random_texts(1, 9), 1), options), Error);
  EXPECT_THROW(count_words(std::vector<std::string>{"a\xFF"}, 2), Error);
}

}  // namespace
}  // namespace indexcache
