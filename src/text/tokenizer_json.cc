#include "text/tokenizer_json.h"

#include <limits>
#include <unordered_map>
#include <unordered_set>

#include "base/error.h"
#include "base/json.h"
#include "text/byte_level.h"

namespace indexcache {

namespace {

constexpr size_t kMaxStages = 16;
constexpr size_t kMaxTemplateIds = 64;

// The pattern that ByteLevel splits with when use_regex is true.
constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

class Reader {
 public:
  Reader(const Json& root, const std::string& where) : root_(root, where), where_(where) {}

  TokenizerFile read() {
    if (root_.has("truncation")) root_.wrong("truncation", "null");
    if (root_.has("padding")) root_.wrong("padding", "null");
    const JsonObject model = root_.object("model");
    check_model_options(model);
    count_ids(model);
    read_vocab(model);
    read_added_tokens();
    // Every token has an id of its own below their number, so no id can be left over.
    for (const bool used : used_) CHECK(used);
    read_merges(model);
    if (root_.has("normalizer"))
      refuse_unless_empty(JsonObject(root_.get("normalizer"), where_ + ": normalizer"));
    read_pre_tokenizer();
    read_post_processor();
    if (type_of(root_.object("decoder")) != "ByteLevel") root_.wrong("decoder", "type ByteLevel");
    return std::move(file_);
  }

 private:
  static std::string type_of(const JsonObject& object) { return object.string("type"); }

  const Json& array(const JsonObject& object, std::string_view key) const {
    if (!object.get(key).is_array()) object.wrong(key, "an array");
    return object.get(key);
  }

  void check_model_options(const JsonObject& model) {
    if (model.string_or("type", "BPE") != "BPE") model.wrong("type", "BPE");
    if (model.number_or("dropout", 0.0) != 0.0) model.wrong("dropout", "null");
    if (!model.string_or("continuing_subword_prefix", "").empty())
      model.wrong("continuing_subword_prefix", "null");
    if (!model.string_or("end_of_word_suffix", "").empty())
      model.wrong("end_of_word_suffix", "null");
    if (model.boolean_or("byte_fallback", false))
      model.wrong("byte_fallback", "false (byte-level BPE)");
    // unk_token and fuse_unk have no effect: there is a token for every byte.
    file_.ignore_merges = model.boolean_or("ignore_merges", false);
  }

  // How many different tokens the file has, so that an id out of range is seen before anything is
  // sized by it.
  void count_ids(const JsonObject& model) {
    const JsonObject vocab = model.object("vocab");
    size_t count = vocab.raw().size();
    if (root_.has("added_tokens")) {
      const auto& members = vocab.raw().get_ref<const Json::object_t&>();
      std::unordered_set<std::string_view> names;
      for (const auto& [token, id] : members) names.insert(token);
      for (const Json& item : array(root_, "added_tokens")) {
        const JsonObject added(item, where_ + ": added_tokens");
        const Json& content = added.get("content");
        if (content.is_string() && names.insert(content.get_ref<const std::string&>()).second)
          ++count;
      }
    }
    if (count > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
      fail("{}: {} tokens are too many", where_, count);
    file_.tokens.resize(count);
    file_.in_model.resize(count);
    used_.resize(count);
  }

  int32_t checked_id(const Json& value, std::string_view token) const {
    const size_t count = file_.tokens.size();
    const bool fits = value.is_number_unsigned() && value.get<uint64_t>() < count;
    if (!fits) {
      fail("{}: token \"{}\" has id {}, expected 0 to {}, as there are {} different tokens", where_,
           printable(token), json_excerpt(value), static_cast<int64_t>(count) - 1, count);
    }
    return value.get<int32_t>();
  }

  void read_vocab(const JsonObject& model) {
    const JsonObject vocab = model.object("vocab");
    for (const auto& [token, value] : vocab.raw().get_ref<const Json::object_t&>()) {
      const int32_t id = checked_id(value, token);
      const size_t index = static_cast<size_t>(id);
      if (used_[index]) {
        fail("{}: tokens \"{}\" and \"{}\" have the same id {}", where_,
             printable(file_.tokens[index]), printable(token), id);
      }
      used_[index] = true;
      file_.in_model[index] = true;
      file_.tokens[index] = token;
      ids_.emplace(token, id);
    }
    for (size_t byte = 0; byte < 256; ++byte) {
      const char c = static_cast<char>(byte);
      const auto it = ids_.find(to_byte_level({&c, 1}));
      if (it == ids_.end())
        fail("{}: the vocabulary has no token for the byte 0x{:02X}", where_, byte);
      file_.byte_ids[byte] = it->second;
    }
  }

  void read_added_tokens() {
    if (!root_.has("added_tokens")) return;
    std::unordered_set<std::string_view> seen;
    for (const Json& item : array(root_, "added_tokens")) {
      const JsonObject object(
          item, fmt::format("{}: added_tokens[{}]", where_, file_.added_tokens.size()));
      AddedToken token;
      token.content = object.string("content");
      if (token.content.empty()) object.wrong("content", "text");
      if (token.content.size() > kMaxAddedTokenBytes) {
        object.wrong("content", fmt::format("at most {} bytes", kMaxAddedTokenBytes));
      }
      token.id = checked_id(object.get("id"), token.content);
      token.special = object.boolean_or("special", false);
      token.normalized = object.boolean_or("normalized", !token.special);
      token.lstrip = object.boolean_or("lstrip", false);
      token.rstrip = object.boolean_or("rstrip", false);
      token.single_word = object.boolean_or("single_word", false);
      if (!seen.insert(object.get("content").get_ref<const std::string&>()).second) {
        object.wrong("content", "a token that is not in the list before");
      }
      const size_t index = static_cast<size_t>(token.id);
      const auto in_vocab = ids_.find(token.content);
      if (in_vocab != ids_.end() ? in_vocab->second != token.id : used_[index]) {
        object.wrong(
            "id",
            in_vocab != ids_.end()
                ? fmt::format("{}, the id of this token in the vocabulary", in_vocab->second)
                : fmt::format("an id other than that of \"{}\"", printable(file_.tokens[index])));
      }
      used_[index] = true;
      file_.tokens[index] = token.content;
      file_.added_tokens.push_back(std::move(token));
    }
  }

  int32_t merge_token(const std::string& token, size_t rank) const {
    const auto it = ids_.find(token);
    if (it == ids_.end()) {
      fail("{}: merge {} needs the token \"{}\", which is not in the vocabulary", where_, rank,
           printable(token));
    }
    return it->second;
  }

  void read_merges(const JsonObject& model) {
    const Json& merges = array(model, "merges");
    if (merges.size() > kMaxMerges)
      fail("{}: \"merges\" has {} entries, expected at most {}", where_, merges.size(), kMaxMerges);
    file_.merges.reserve(merges.size());
    for (const Json& merge : merges) {
      const size_t rank = file_.merges.size();
      std::string left;
      std::string right;
      if (merge.is_string()) {
        const std::string& text = merge.get_ref<const std::string&>();
        const size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
          wrong_merge(merge, rank);
        left = text.substr(0, space);
        right = text.substr(space + 1);
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        left = merge[0].get_ref<const std::string&>();
        right = merge[1].get_ref<const std::string&>();
      } else {
        wrong_merge(merge, rank);
      }
      if (left.empty() || right.empty()) wrong_merge(merge, rank);
      const int32_t left_id = merge_token(left, rank);
      const int32_t right_id = merge_token(right, rank);
      file_.merges.push_back({left_id, right_id, merge_token(left + right, rank)});
    }
  }

  [[noreturn]] void wrong_merge(const Json& merge, size_t rank) const {
    fail("{}: merge {} is {}, expected \"a b\" or [\"a\", \"b\"]", where_, rank,
         json_excerpt(merge));
  }

  void refuse_unless_empty(const JsonObject& normalizer) {
    const std::string type = type_of(normalizer);
    if (type != "Sequence")
      fail("{}: normalizer {} is not supported, expected none", where_, printable(type));
    for (const Json& item : array(normalizer, "normalizers")) {
      refuse_unless_empty(JsonObject(item, where_ + ": normalizer"));
    }
  }

  void read_pre_tokenizer() {
    const JsonObject pre_tokenizer(root_.get("pre_tokenizer"), where_ + ": pre_tokenizer");
    if (type_of(pre_tokenizer) != "Sequence") {
      read_pre_tokenizer_item(pre_tokenizer);
    } else {
      for (const Json& item : array(pre_tokenizer, "pretokenizers")) {
        if (seen_byte_level_) fail("{}: pre_tokenizer: expected ByteLevel to be the last", where_);
        read_pre_tokenizer_item(JsonObject(item, where_ + ": pre_tokenizer"));
      }
    }
    if (!seen_byte_level_) fail("{}: pre_tokenizer: expected ByteLevel to be the last", where_);
  }

  void read_pre_tokenizer_item(const JsonObject& item) {
    const std::string type = type_of(item);
    if (type == "Split") {
      if (file_.splits.size() >= kMaxStages)
        fail("{}: pre_tokenizer: more than {} Splits", where_, kMaxStages);
      file_.splits.push_back(read_split(item));
    } else if (type == "ByteLevel") {
      seen_byte_level_ = true;
      file_.add_prefix_space = item.boolean_or("add_prefix_space", true);
      if (item.boolean_or("use_regex", true)) {
        const std::string where = where_ + ": pre_tokenizer ByteLevel";
        (file_.add_prefix_space ? file_.late_splits : file_.splits)
            .push_back({parse_split_regex(kByteLevelPattern, where), SplitBehavior::kIsolated,
                        false, where});
      }
    } else {
      fail("{}: pre_tokenizer {} is not supported, expected Split or ByteLevel", where_,
           printable(type));
    }
  }

  SplitStage read_split(const JsonObject& item) {
    const std::string where =
        fmt::format("{}: pre_tokenizer Split {}", where_, file_.splits.size());
    SplitStage stage;
    stage.where = where;
    const JsonObject pattern = item.object("pattern");
    if (pattern.has("Regex")) {
      stage.pattern = parse_split_regex(pattern.string("Regex"), where);
    } else {
      stage.pattern = parse_split_literal(pattern.string("String"), where);
    }
    const std::string behavior = item.string("behavior");
    bool known = false;
    for (const auto& [name, value] :
         {std::pair{"Removed", SplitBehavior::kRemoved},
          std::pair{"Isolated", SplitBehavior::kIsolated},
          std::pair{"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
          std::pair{"MergedWithNext", SplitBehavior::kMergedWithNext},
          std::pair{"Contiguous", SplitBehavior::kContiguous}}) {
      if (behavior != name) continue;
      stage.behavior = value;
      known = true;
    }
    if (!known)
      item.wrong("behavior", "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
    stage.invert = item.boolean_or("invert", false);
    return stage;
  }

  void read_post_processor() {
    if (!root_.has("post_processor")) return;
    const JsonObject processor(root_.get("post_processor"), where_ + ": post_processor");
    if (type_of(processor) != "Sequence") return read_processor(processor);
    for (const Json& item : array(processor, "processors")) {
      read_processor(JsonObject(item, where_ + ": post_processor"));
    }
  }

  // ByteLevel as a post-processor only moves offsets, which we do not report.
  void read_processor(const JsonObject& processor) {
    const std::string type = type_of(processor);
    if (type == "ByteLevel") return;
    if (type != "TemplateProcessing") {
      fail("{}: post_processor {} is not supported, expected ByteLevel or TemplateProcessing",
           where_, printable(type));
    }
    if (seen_template_) fail("{}: post_processor: more than one TemplateProcessing", where_);
    seen_template_ = true;
    bool seen_text = false;
    for (const Json& item : array(processor, "single")) {
      const JsonObject piece(item, where_ + ": post_processor: single");
      if (piece.has("SpecialToken")) {
        append_template_ids(processor, piece.object("SpecialToken").string("id"),
                            seen_text ? file_.suffix : file_.prefix);
      } else if (piece.has("Sequence") && !seen_text &&
                 piece.object("Sequence").string("id") == "A") {
        seen_text = true;
      } else {
        processor.wrong("single", "special tokens and exactly one Sequence A");
      }
    }
    if (!seen_text) processor.wrong("single", "special tokens and exactly one Sequence A");
  }

  void append_template_ids(const JsonObject& processor, const std::string& name,
                           std::vector<int32_t>& out) {
    const JsonObject all = processor.object("special_tokens");
    if (!all.has(name))
      fail("{}: post_processor: special_tokens has no \"{}\"", where_, printable(name));
    const JsonObject entry(all.get(name), where_ + ": post_processor: special_tokens");
    for (const Json& id : array(entry, "ids")) {
      out.push_back(checked_id(id, name));
      if (out.size() > kMaxTemplateIds)
        fail("{}: post_processor: more than {} special tokens", where_, kMaxTemplateIds);
    }
  }

  JsonObject root_;
  const std::string& where_;
  TokenizerFile file_;
  std::vector<bool> used_;
  std::unordered_map<std::string, int32_t> ids_;  // of the model's vocabulary
  bool seen_byte_level_ = false;
  bool seen_template_ = false;
};

}  // namespace

TokenizerFile parse_tokenizer_file(std::string_view json, const std::string& where) {
  if (json.size() > kMaxTokenizerBytes) {
    fail("{}: found {} bytes, expected at most {}", where, json.size(), kMaxTokenizerBytes);
  }
  return Reader(parse_json(json, where), where).read();
}

}  // namespace indexcache
