#include "train/bpe_trainer.h"

#include <algorithm>
#include <mutex>
#include <queue>

#include "base/error.h"
#include "base/json.h"
#include "text/byte_level.h"
#include "text/splitter.h"
#include "text/utf8.h"
#include "train/parallel.h"

namespace indexcache {
namespace {

constexpr int kNumSpecial = static_cast<int>(std::size(kSpecialTokens));
constexpr int kFirstMerge = kNumSpecial + 256;

struct Word {
  std::vector<int> ids;
  int64_t count;
};

uint64_t pair_key(int left, int right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

struct PairUse {
  int64_t count = 0;
  std::vector<uint32_t> words;  // that hold or held the pair
};

struct Candidate {
  int64_t count;
  uint64_t pair;

  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

// Keeps the counts of all adjacent pairs while merges are applied.
class Merger {
 public:
  explicit Merger(std::vector<Word> words) : words_(std::move(words)) {
    for (uint32_t w = 0; w < words_.size(); ++w)
      for (size_t i = 1; i < words_[w].ids.size(); ++i)
        add(words_[w].ids[i - 1], words_[w].ids[i], w);
    for (const auto& [pair, use] : pairs_) queue_.push({use.count, pair});
  }

  // The most frequent pair, or a count of 0. A pair is offered once.
  Candidate next() {
    while (!queue_.empty()) {
      const Candidate candidate = queue_.top();
      queue_.pop();
      const auto it = pairs_.find(candidate.pair);
      if (it == pairs_.end() || it->second.count <= 0) continue;
      // Counts in the queue may be old; a pair with an old count goes back with its true one.
      if (it->second.count == candidate.count) return candidate;
      queue_.push({it->second.count, candidate.pair});
    }
    return {0, 0};
  }

  void drop(uint64_t pair) { pairs_.erase(pair); }

  void merge(uint64_t pair, int result) {
    const int left = static_cast<int>(pair >> 32), right = static_cast<int>(pair & 0xFFFFFFFF);
    std::vector<uint32_t> users = std::move(pairs_[pair].words);
    pairs_.erase(pair);
    std::ranges::sort(users);
    users.erase(std::unique(users.begin(), users.end()), users.end());
    std::vector<uint64_t> touched;
    for (const uint32_t w : users) {
      std::vector<int>& ids = words_[w].ids;
      const int64_t count = words_[w].count;
      for (size_t i = 0; i + 1 < ids.size(); ++i) {
        if (ids[i] != left || ids[i + 1] != right) continue;
        if (i > 0) {
          subtract(ids[i - 1], left, count);
          add(ids[i - 1], result, w);
          touched.push_back(pair_key(ids[i - 1], result));
        }
        if (i + 2 < ids.size()) {
          subtract(right, ids[i + 2], count);
          add(result, ids[i + 2], w);
          touched.push_back(pair_key(result, ids[i + 2]));
        }
        ids[i] = result;
        ids.erase(ids.begin() + static_cast<ptrdiff_t>(i) + 1);
      }
    }
    std::ranges::sort(touched);
    touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    for (const uint64_t key : touched) queue_.push({pairs_[key].count, key});
  }

 private:
  void add(int left, int right, uint32_t word) {
    PairUse& use = pairs_[pair_key(left, right)];
    use.count += words_[word].count;
    if (use.words.empty() || use.words.back() != word) use.words.push_back(word);
  }
  void subtract(int left, int right, int64_t count) {
    const auto it = pairs_.find(pair_key(left, right));
    if (it != pairs_.end()) it->second.count -= count;
  }

  std::vector<Word> words_;
  std::unordered_map<uint64_t, PairUse> pairs_;
  std::priority_queue<Candidate> queue_;
};

Json added_token(int id) {
  return {
      {"id", id},        {"content", kSpecialTokens[id]}, {"single_word", false}, {"lstrip", false},
      {"rstrip", false}, {"normalized", false},           {"special", true}};
}

}  // namespace

WordCounts count_words(std::span<const std::string> texts, int num_threads) {
  const std::string where = "the vocabulary's split";
  std::vector<SplitStage> stages;
  stages.push_back(
      {parse_split_regex(kSplitPattern, where), SplitBehavior::kIsolated, false, where});
  const Splitter splitter(std::move(stages));

  WordCounts total;
  std::mutex mutex;
  // Many texts at a time, so that adding up is rare.
  constexpr size_t kStep = 64;
  run_parallel((texts.size() + kStep - 1) / kStep, num_threads, [&](size_t batch) {
    WordCounts counts;
    for (const std::string& text :
         texts.subspan(batch * kStep, std::min(kStep, texts.size() - batch * kStep))) {
      if (const auto at = find_invalid_utf8(text))
        fail("vocabulary: a text is not UTF-8 at byte {}", *at);
      for (const std::string_view piece : splitter.split(text)) ++counts[std::string(piece)];
    }
    const std::lock_guard lock(mutex);
    for (const auto& [word, count] : counts) total[word] += count;
  });
  return total;
}

Vocabulary train_bpe(const WordCounts& words, const BpeOptions& options) {
  if (options.vocab_size < kFirstMerge)
    fail("vocabulary: size {}, expected at least {}: {} special tokens and 256 bytes",
         options.vocab_size, kFirstMerge, kNumSpecial);
  Vocabulary vocabulary;
  for (const std::string_view token : kSpecialTokens) vocabulary.tokens.emplace_back(token);
  for (int byte = 0; byte < 256; ++byte) vocabulary.tokens.emplace_back(1, static_cast<char>(byte));

  std::vector<Word> split;
  split.reserve(words.size());
  for (const auto& [text, count] : words) {
    Word word{{}, count};
    for (const char c : text) word.ids.push_back(kNumSpecial + static_cast<uint8_t>(c));
    split.push_back(std::move(word));
  }
  Merger merger(std::move(split));
  // Two ways to the same bytes would be two tokens of one spelling.
  std::unordered_map<std::string, int> known;
  for (int id = 0; id < kFirstMerge; ++id) known.emplace(vocabulary.tokens[id], id);
  while (static_cast<int>(vocabulary.tokens.size()) < options.vocab_size) {
    const Candidate best = merger.next();
    if (best.count < std::max<int64_t>(options.min_count, 1))
      fail("vocabulary: the text is too small: {} of {} tokens found that occur at least {} times",
           vocabulary.tokens.size(), options.vocab_size, options.min_count);
    const int left = static_cast<int>(best.pair >> 32);
    const int right = static_cast<int>(best.pair & 0xFFFFFFFF);
    std::string bytes = vocabulary.tokens[left] + vocabulary.tokens[right];
    if (bytes.size() > options.max_token_bytes || known.contains(bytes)) {
      merger.drop(best.pair);
      continue;
    }
    const auto id = static_cast<int>(vocabulary.tokens.size());
    known.emplace(bytes, id);
    vocabulary.tokens.push_back(std::move(bytes));
    vocabulary.merges.emplace_back(left, right);
    merger.merge(best.pair, id);
  }
  return vocabulary;
}

std::string tokenizer_json(const Vocabulary& vocabulary) {
  Json json;
  json["version"] = "1.0";
  json["truncation"] = nullptr;
  json["padding"] = nullptr;
  json["added_tokens"] = Json::array();
  for (int id = 0; id < kNumSpecial; ++id) json["added_tokens"].push_back(added_token(id));
  json["normalizer"] = nullptr;
  json["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers",
                            {{{"type", "Split"},
                              {"pattern", {{"Regex", kSplitPattern}}},
                              {"behavior", "Isolated"},
                              {"invert", false}},
                             {{"type", "ByteLevel"},
                              {"add_prefix_space", false},
                              {"trim_offsets", true},
                              {"use_regex", false}}}}};
  const Json begin = {{"SpecialToken", {{"id", kSpecialTokens[kBeginId]}, {"type_id", 0}}}};
  const auto sequence = [](const char* id, int type) {
    return Json{{"Sequence", {{"id", id}, {"type_id", type}}}};
  };
  json["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single", Json::array({begin, sequence("A", 0)})},
                            {"pair", Json::array({begin, sequence("A", 0), sequence("B", 1)})},
                            {"special_tokens",
                             {{std::string(kSpecialTokens[kBeginId]),
                               {{"id", kSpecialTokens[kBeginId]},
                                {"ids", Json::array({kBeginId})},
                                {"tokens", Json::array({kSpecialTokens[kBeginId]})}}}}}};
  json["decoder"] = {{"type", "ByteLevel"},
                     {"add_prefix_space", true},
                     {"trim_offsets", true},
                     {"use_regex", true}};
  Json vocab = Json::object(), merges = Json::array();
  const auto spelled = [&](int id) {
    return id < kNumSpecial ? vocabulary.tokens[id] : to_byte_level(vocabulary.tokens[id]);
  };
  for (int id = 0; id < static_cast<int>(vocabulary.tokens.size()); ++id) vocab[spelled(id)] = id;
  for (const auto& [left, right] : vocabulary.merges)
    merges.push_back(Json::array({spelled(left), spelled(right)}));
  json["model"] = {{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"ignore_merges", false},
                   {"vocab", std::move(vocab)},
                   {"merges", std::move(merges)}};
  return json.dump(1, ' ', false) + "\n";
}

std::string tokenizer_config_json(int64_t model_max_length) {
  Json json;
  json["tokenizer_class"] = "PreTrainedTokenizerFast";
  json["model_max_length"] = model_max_length;
  json["bos_token"] = kSpecialTokens[kBeginId];
  json["eos_token"] = kSpecialTokens[kEndId];
  json["pad_token"] = kSpecialTokens[kPadId];
  json["clean_up_tokenization_spaces"] = false;
  Json decoder = Json::object();
  for (int id = 0; id < kNumSpecial; ++id) {
    Json token = added_token(id);
    token.erase("id");
    decoder[std::to_string(id)] = std::move(token);
  }
  json["added_tokens_decoder"] = std::move(decoder);
  json["chat_template"] =
      "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + "
      "message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
      "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
  return json.dump(2) + "\n";
}

}  // namespace indexcache
