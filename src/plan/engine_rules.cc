#include "plan/engine_rules.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "base/error.h"

namespace indexcache {

namespace {

// A field as Python's getattr(config, key, default) sees it: absent and null differ, and some
// engines trip over null.
const Json* find(const Json& config, const char* key) {
  const auto it = config.find(key);
  return it == config.end() ? nullptr : &*it;
}

[[noreturn]] void raise(const char* engine, const char* exception, const std::string& text) {
  fail("{} raises {}: {}", engine, exception, text);
}

// A number in Python arithmetic. Floats pass where Python lets them pass.
double number(const char* engine, const char* key, const Json& value) {
  if (value.is_boolean()) return value.get<bool>() ? 1 : 0;
  if (value.is_number()) return value.get<double>();
  raise(engine, "TypeError", fmt::format("{} is {}", key, json_excerpt(value)));
}

double number_or(const char* engine, const char* key, const Json* value, double fallback) {
  return value == nullptr ? fallback : number(engine, key, *value);
}

// max(i - offset + 1, 0) % freq == 0. Whether the remainder is 0 does not depend on freq's sign.
bool rule_is_full(const char* engine, int layer, double freq, double offset) {
  if (freq == 0) raise(engine, "ZeroDivisionError", "index_topk_freq is 0");
  return std::fmod(std::max(layer - offset + 1, 0.0), freq) == 0;
}

// pattern[i] for each i: the characters of a string (code points), the strings of a list ("" for an
// entry of another type, which equals no letter).
std::vector<std::string> pattern_entries(const char* engine, const Json& pattern) {
  std::vector<std::string> entries;
  if (pattern.is_string()) {
    const std::string& text = pattern.get_ref<const std::string&>();
    for (size_t i = 0, n = 1; i < text.size(); i += n, n = 1) {
      while (i + n < text.size() && (static_cast<unsigned char>(text[i + n]) & 0xC0) == 0x80) ++n;
      entries.push_back(text.substr(i, n));
    }
  } else if (pattern.is_array()) {
    for (const Json& entry : pattern)
      entries.push_back(entry.is_string() ? entry.get<std::string>() : "");
  } else {
    raise(engine, "TypeError", fmt::format("index_topk_pattern is {}", json_excerpt(pattern)));
  }
  return entries;
}

std::optional<std::vector<std::string>> find_pattern(const char* engine, const Json& config) {
  const Json* pattern = find(config, "index_topk_pattern");
  if (pattern == nullptr || pattern->is_null()) return std::nullopt;
  return pattern_entries(engine, *pattern);
}

template <class IsFull>
std::string letters(int num_layers, IsFull is_full) {
  std::string plan;
  for (int i = 0; i < num_layers; ++i) plan += is_full(i) ? 'F' : 'S';
  return plan;
}

// vllm-ascend copied vLLM's rule.
std::string vllm_rule(const char* engine, const Json& config, int num_layers) {
  if (const auto pattern = find_pattern(engine, config)) {
    return letters(num_layers,
                   [&](size_t i) { return i >= pattern->size() || (*pattern)[i] != "S"; });
  }
  const double freq = number_or(engine, "index_topk_freq", find(config, "index_topk_freq"), 1);
  const double offset =
      number_or(engine, "index_skip_topk_offset", find(config, "index_skip_topk_offset"), 2);
  return letters(num_layers, [&](int i) { return rule_is_full(engine, i, freq, offset); });
}

std::string vllm_plan(const Json& config, int num_layers) {
  return vllm_rule("vLLM", config, num_layers);
}

std::string vllm_ascend_plan(const Json& config, int num_layers) {
  return vllm_rule("vllm-ascend", config, num_layers);
}

std::string sglang_plan(const Json& config, int num_layers) {
  if (const auto pattern = find_pattern("SGLang", config)) {
    return letters(num_layers,
                   [&](size_t i) { return i >= pattern->size() || (*pattern)[i] != "S"; });
  }
  const Json* freq_field = find(config, "index_topk_freq");
  const double freq = freq_field == nullptr || freq_field->is_null()
                          ? 1
                          : number("SGLang", "index_topk_freq", *freq_field);
  if (freq == 1) return std::string(static_cast<size_t>(num_layers), 'F');
  const Json* offset_field = find(config, "index_skip_topk_offset");
  double offset = 2;
  if (offset_field != nullptr && !offset_field->is_null()) {
    offset = number("SGLang", "index_skip_topk_offset", *offset_field);
    if (offset <= 0) raise("SGLang", "ValueError", "index_skip_topk_offset must be positive");
  }
  return letters(num_layers, [&](int i) { return rule_is_full("SGLang", i, freq, offset); });
}

std::string tensorrt_llm_plan(const Json& config, int num_layers) {
  std::string plan;
  if (const auto pattern = find_pattern("TensorRT-LLM", config)) {
    plan = letters(num_layers, [&](size_t i) {
      return i >= pattern->size() || ((*pattern)[i] != "S" && (*pattern)[i] != "s");
    });
  } else {
    // max(index_topk_freq or 1, 1): null and 0 are 1.
    const Json* freq_field = find(config, "index_topk_freq");
    const double freq = freq_field == nullptr || freq_field->is_null()
                            ? 1
                            : std::max(number("TensorRT-LLM", "index_topk_freq", *freq_field), 1.0);
    const double offset = number_or("TensorRT-LLM", "index_skip_topk_offset",
                                    find(config, "index_skip_topk_offset"), 2);
    plan =
        letters(num_layers, [&](int i) { return rule_is_full("TensorRT-LLM", i, freq, offset); });
  }
  if (!plan.empty()) plan[0] = 'F';  // forced, with a warning
  return plan;
}

std::string transformers_plan(const Json& config, int num_layers) {
  const char* engine = "transformers";
  // Its deepseek_v32 has no sharing: every layer runs its indexer whatever the config says.
  const Json* model_type = find(config, "model_type");
  if (model_type != nullptr && model_type->is_string() &&
      model_type->get_ref<const std::string&>() == "deepseek_v32") {
    return std::string(static_cast<size_t>(num_layers), 'F');
  }
  const Json* types = find(config, "indexer_types");
  const Json* pattern = find(config, "index_topk_pattern");
  const bool has_types = types != nullptr && !types->is_null();
  if (has_types || (pattern != nullptr && !pattern->is_null())) {
    const Json& source = has_types ? *types : *pattern;
    const bool by_letter = !has_types && source.is_string();
    const std::vector<std::string> entries = pattern_entries(engine, source);
    for (const std::string& entry : entries) {
      if (by_letter && entry != "F" && entry != "S") raise(engine, "KeyError", printable(entry));
      if (!by_letter && entry != "full" && entry != "shared") {
        raise(engine, "ValueError",
              fmt::format("an entry is {}, not full or shared", printable(entry)));
      }
    }
    if (entries.size() < static_cast<size_t>(num_layers)) {
      raise(engine, "IndexError", fmt::format("{} entries, {} layers", entries.size(), num_layers));
    }
    return letters(num_layers, [&](size_t i) { return entries[i] == "F" || entries[i] == "full"; });
  }
  const double freq =
      std::max(number_or(engine, "index_topk_freq", find(config, "index_topk_freq"), 1), 1.0);
  const double offset =
      number_or(engine, "index_skip_topk_offset", find(config, "index_skip_topk_offset"), 2);
  return letters(num_layers, [&](int i) { return rule_is_full(engine, i, freq, offset); });
}

std::string thudm_plan(const Json& config, int num_layers) {
  const char* engine = "the THUDM patch";
  if (const auto pattern = find_pattern(engine, config)) {
    if (pattern->size() < static_cast<size_t>(num_layers)) {
      raise(engine, "IndexError",
            fmt::format("{} entries, {} layers", pattern->size(), num_layers));
    }
    return letters(num_layers, [&](size_t i) { return (*pattern)[i] != "S"; });
  }
  const double freq = number_or(engine, "index_topk_freq", find(config, "index_topk_freq"), 1);
  // max(i - 1, 0) % freq: the patch knows no offset.
  return letters(num_layers, [&](int i) { return rule_is_full(engine, i, freq, 2); });
}

constexpr EngineRule kRules[] = {
    {"vllm", vllm_plan},
    {"sglang", sglang_plan},
    {"tensorrt-llm", tensorrt_llm_plan},
    {"transformers", transformers_plan},
    {"vllm-ascend", vllm_ascend_plan},
    {"thudm", thudm_plan},
};

}  // namespace

std::span<const EngineRule> engine_rules() { return kRules; }

const EngineRule& engine_rule(const std::string& name) {
  std::string names;
  for (const EngineRule& rule : kRules) {
    if (name == rule.name) return rule;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", rule.name);
  }
  fail("unknown engine \"{}\", expected one of {}", printable(name), names);
}

}  // namespace indexcache
