#include "plan/index_plan.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "base/error.h"

namespace indexcache {

namespace {

// "FFSS..." from one flag a layer; layer 0 must be full.
IndexPlan plan_from_flags(const std::vector<bool>& is_full, const std::string& where) {
  if (!is_full.empty() && !is_full[0]) {
    fail(
        "{}: layer 0 is shared, expected full: there is no layer before it whose selection it "
        "could use",
        where);
  }
  IndexPlan plan;
  plan.source.reserve(is_full.size());
  int32_t source = 0;
  for (size_t l = 0; l < is_full.size(); ++l) {
    if (is_full[l]) source = static_cast<int32_t>(l);
    plan.source.push_back(source);
  }
  return plan;
}

void check_length(size_t found, const char* unit, int num_layers, const std::string& where) {
  if (found == static_cast<size_t>(num_layers)) return;
  fail(
      "{}: the plan has {} {}, the model has {} layers, expected one for each layer (MTP layers "
      "not counted)",
      where, found, unit, num_layers);
}

bool all_digits(std::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

// The whole of `text` as a decimal number without sign.
std::optional<int64_t> parse_digits(std::string_view text) {
  int64_t value = 0;
  if (!all_digits(text)) return std::nullopt;
  if (std::from_chars(text.data(), text.data() + text.size(), value).ec != std::errc())
    return std::nullopt;
  return value;
}

struct StatedPlan {
  std::string key;
  IndexPlan plan;
};

IndexPlan plan_from_rule_text(std::string_view text, int num_layers, const std::string& where) {
  std::optional<int64_t> freq, offset;
  if (text.ends_with(',')) fail("{}: ends with a comma, expected freq=N,offset=M", where);
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), item.size() + 1));
    const std::string_view name = item.substr(0, item.find('='));
    std::optional<int64_t>* target = name == "freq" ? &freq : name == "offset" ? &offset : nullptr;
    if (target == nullptr || name.size() == item.size()) {
      fail("{}: found \"{}\", expected freq=N or freq=N,offset=M", where, printable(item));
    }
    if (target->has_value()) fail("{}: {} is given twice", where, name);
    *target = parse_digits(item.substr(name.size() + 1));
    if (!target->has_value()) {
      fail("{}: {} is \"{}\", expected an integer from 1 to {}", where, name,
           printable(item.substr(name.size() + 1)), kMaxPlanLayers);
    }
  }
  if (!freq.has_value()) fail("{}: offset is given without freq, expected freq=N,offset=M", where);
  return plan_from_freq(*freq, offset.value_or(kDefaultTopkOffset), num_layers, where);
}

}  // namespace

int IndexPlan::num_full() const {
  int count = 0;
  for (int l = 0; l < num_layers(); ++l) count += is_full(l) ? 1 : 0;
  return count;
}

std::string to_string(const IndexPlan& plan) {
  std::string letters;
  for (int l = 0; l < plan.num_layers(); ++l) letters += plan.is_full(l) ? 'F' : 'S';
  return letters;
}

IndexPlan all_full_plan(int num_layers) {
  CHECK_GE(num_layers, 0);
  CHECK_LE(num_layers, kMaxPlanLayers);
  return plan_from_flags(std::vector<bool>(static_cast<size_t>(num_layers), true), "plan");
}

IndexPlan plan_from_freq(int64_t freq, int64_t offset, int num_layers, const std::string& where) {
  if (freq < 1 || freq > kMaxPlanLayers) {
    fail("{}: freq is {}, expected an integer from 1 to {}", where, freq, kMaxPlanLayers);
  }
  if (offset < 1 || offset > kMaxPlanLayers) {
    fail("{}: offset is {}, expected an integer from 1 to {} (below 1 layer 0 would be shared)",
         where, offset, kMaxPlanLayers);
  }
  std::vector<bool> is_full;
  for (int64_t l = 0; l < num_layers; ++l) {
    is_full.push_back(std::max<int64_t>(l - offset + 1, 0) % freq == 0);
  }
  return plan_from_flags(is_full, where);
}

IndexPlan plan_from_string(std::string_view letters, int num_layers, const std::string& where) {
  // Letters before length: a stray byte order mark or space is better named than counted.
  std::vector<bool> is_full;
  is_full.reserve(letters.size());
  for (size_t i = 0; i < letters.size(); ++i) {
    if (letters[i] != 'F' && letters[i] != 'S') {
      fail("{}: found \"{}\" at position {}, expected F or S", where,
           printable(letters.substr(i), 8), i);
    }
    is_full.push_back(letters[i] == 'F');
  }
  check_length(letters.size(), "letters", num_layers, where);
  return plan_from_flags(is_full, where);
}

IndexPlan plan_from_list(const Json& list, int num_layers, const std::string& where) {
  if (!list.is_array()) {
    fail("{}: found {}, expected a list of \"full\" and \"shared\"", where, json_excerpt(list));
  }
  std::vector<bool> is_full;
  is_full.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const bool full = is_text(list[i], "full") || is_text(list[i], "F");
    if (!full && !is_text(list[i], "shared") && !is_text(list[i], "S")) {
      fail("{}: entry {} is {}, expected \"full\", \"shared\", \"F\" or \"S\"", where, i,
           json_excerpt(list[i]));
    }
    is_full.push_back(full);
  }
  check_length(list.size(), "entries", num_layers, where);
  return plan_from_flags(is_full, where);
}

IndexPlan plan_from_config(const JsonObject& config, int num_layers) {
  const auto where = [&](const char* key) {
    return fmt::format("{}: \"{}\"", config.where(), key);
  };
  // In order of precedence. All that are there are expanded, so that a disagreement is seen.
  std::vector<StatedPlan> stated;
  if (config.has("indexer_types")) {
    stated.push_back({"indexer_types", plan_from_list(config.get("indexer_types"), num_layers,
                                                      where("indexer_types"))});
  }
  if (config.has("index_topk_pattern")) {
    const Json& pattern = config.get("index_topk_pattern");
    if (!pattern.is_string() && !pattern.is_array()) {
      config.wrong("index_topk_pattern",
                   "a string of F and S or a list of \"full\" and \"shared\"");
    }
    stated.push_back({"index_topk_pattern",
                      pattern.is_string()
                          ? plan_from_string(pattern.get_ref<const std::string&>(), num_layers,
                                             where("index_topk_pattern"))
                          : plan_from_list(pattern, num_layers, where("index_topk_pattern"))});
  }
  // The offset alone says nothing about the plan (freq 1 is all full at any offset), but it must
  // still make sense.
  const int64_t offset =
      config.integer_or("index_skip_topk_offset", kDefaultTopkOffset, 1, kMaxPlanLayers);
  if (config.has("index_topk_freq")) {
    const int64_t freq = config.integer("index_topk_freq", 1, kMaxPlanLayers);
    stated.push_back(
        {"index_topk_freq", plan_from_freq(freq, offset, num_layers, where("index_topk_freq"))});
  }
  if (stated.empty()) return all_full_plan(num_layers);
  for (const StatedPlan& other : stated) {
    if (other.plan == stated[0].plan) continue;
    fail("{}: \"{}\" gives the plan {} but \"{}\" gives {}, expected fields that agree; remove one",
         config.where(), stated[0].key, to_string(stated[0].plan), other.key,
         to_string(other.plan));
  }
  return stated[0].plan;
}

IndexPlan plan_from_override(std::string_view text, int num_layers) {
  const std::string where = fmt::format("plan \"{}\"", printable(text));
  if (text.empty())
    fail("{}: is empty, expected FSSF..., 1/4, freq=4,offset=3 or the path of a plan file", where);
  const size_t slash = text.find('/');
  if (slash != std::string_view::npos && all_digits(text.substr(0, slash)) &&
      all_digits(text.substr(slash + 1))) {
    const std::optional<int64_t> freq = parse_digits(text.substr(slash + 1));
    if (text.substr(0, slash) != "1" || !freq.has_value() || *freq < 1 || *freq > kMaxPlanLayers) {
      fail("{}: expected a retention 1/N with N from 1 to {}", where, kMaxPlanLayers);
    }
    return plan_from_freq(*freq, kDefaultTopkOffset, num_layers, where);
  }
  if (text.find('=') != std::string_view::npos) return plan_from_rule_text(text, num_layers, where);
  return plan_from_string(text, num_layers, where);
}

void check_indexer_weights(const IndexPlan& plan, const std::vector<bool>& layer_has_indexer,
                           const std::string& where) {
  CHECK_EQ(layer_has_indexer.size(), plan.source.size());
  std::string missing;
  int num_missing = 0;
  for (int l = 0; l < plan.num_layers(); ++l) {
    if (!plan.is_full(l) || layer_has_indexer[static_cast<size_t>(l)]) continue;
    missing += fmt::format("{}{}", num_missing == 0 ? "" : ", ", l);
    ++num_missing;
  }
  if (num_missing == 0) return;
  fail("{}: the plan {} makes {} layer{} full for which there are no indexer weights: {}", where,
       to_string(plan), num_missing, num_missing == 1 ? "" : "s", missing);
}

}  // namespace indexcache
