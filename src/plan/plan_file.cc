#include "plan/plan_file.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <initializer_list>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/log.h"
#include "base/sha256.h"

namespace indexcache {

namespace {

void refuse_unknown_keys(const JsonObject& object, std::initializer_list<std::string_view> known) {
  for (const auto& [key, value] : object.raw().items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    std::string names;
    for (const std::string_view name : known)
      names += fmt::format("{}{}", names.empty() ? "" : ", ", name);
    fail("{}: unknown key \"{}\", expected only {}", object.where(), printable(key), names);
  }
}

bool is_fingerprint(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

// Floating numbers that are integers become integers, so that 1000000 and 1000000.0 are the same
// config.
nlohmann::json canonical(const Json& value) {
  if (value.is_object()) {
    nlohmann::json sorted = nlohmann::json::object();
    for (const auto& [key, member] : value.items()) {
      if (!member.is_null()) sorted[key] = canonical(member);
    }
    return sorted;
  }
  if (value.is_array()) {
    nlohmann::json list = nlohmann::json::array();
    for (const Json& item : value) list.push_back(canonical(item));
    return list;
  }
  if (value.is_number_float()) {
    const double number = value.get<double>();
    if (std::abs(number) < 0x1p53 && number == std::floor(number))
      return static_cast<int64_t>(number);
    return number;
  }
  // Unsigned and signed integers dump alike, so the two kinds need no merging.
  return nlohmann::json(value);
}

bool is_plan_path(const std::string& text) {
  if (text.ends_with(".json")) return true;
  if (text.find('/') != std::string::npos) {
    return text.find_first_not_of("0123456789/") != std::string::npos || text[0] == '/';
  }
  if (text.find_first_not_of("FS") == std::string::npos) return false;
  std::error_code ignored;
  return std::filesystem::exists(text, ignored);
}

}  // namespace

PlanFile parse_plan_file(const Json& json, const std::string& where) {
  const JsonObject object(json, where);
  refuse_unknown_keys(object, {"plan", "model_fingerprint", "steps", "settings", "version"});
  object.integer("version", kPlanFileVersion, kPlanFileVersion);

  PlanFile file;
  file.plan = object.string("plan");
  const auto check_plan = [&](const std::string& plan, size_t num_layers,
                              const std::string& place) {
    if (num_layers < 1 || num_layers > kMaxPlanLayers) {
      fail("{}: has {} letters, expected 1 to {}", place, num_layers, kMaxPlanLayers);
    }
    plan_from_string(plan, static_cast<int>(num_layers), place);
  };
  check_plan(file.plan, file.plan.size(), fmt::format("{}: \"plan\"", where));

  file.model_fingerprint = object.string("model_fingerprint");
  if (!is_fingerprint(file.model_fingerprint)) {
    object.wrong("model_fingerprint", "64 lower-case hexadecimal digits");
  }

  if (!object.get("steps").is_array()) object.wrong("steps", "a list");
  const Json& steps = object.get("steps");
  for (size_t i = 0; i < steps.size(); ++i) {
    const JsonObject step(steps[i], fmt::format("{}: \"steps\" entry {}", where, i));
    refuse_unknown_keys(step, {"layer", "loss", "plan"});
    PlanStep parsed;
    parsed.layer =
        static_cast<int32_t>(step.integer("layer", 0, static_cast<int64_t>(file.plan.size()) - 1));
    parsed.loss = step.number("loss");
    parsed.plan = step.string("plan");
    check_plan(parsed.plan, file.plan.size(), fmt::format("{}: \"plan\"", step.where()));
    file.steps.push_back(std::move(parsed));
  }

  if (!object.get("settings").is_object()) object.wrong("settings", "an object");
  file.settings = object.get("settings");
  return file;
}

PlanFile load_plan_file(const std::string& path) {
  return parse_plan_file(load_json(path), printable(path, 400));
}

Json plan_file_json(const PlanFile& file) {
  CHECK(is_fingerprint(file.model_fingerprint));
  CHECK(file.settings.is_object());
  Json steps = Json::array();
  for (const PlanStep& step : file.steps) {
    steps.push_back(Json{{"layer", step.layer}, {"loss", step.loss}, {"plan", step.plan}});
  }
  return Json{{"version", kPlanFileVersion},
              {"plan", file.plan},
              {"model_fingerprint", file.model_fingerprint},
              {"settings", file.settings},
              {"steps", std::move(steps)}};
}

void save_plan_file(const PlanFile& file, const std::string& path) {
  // Settings may quote a path or a prompt that is not UTF-8; JSON can only hold it with the bad
  // bytes replaced.
  const std::string text =
      plan_file_json(file).dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  // What is written must be readable: a non-finite loss, for one, would become null.
  parse_plan_file(parse_json(text, printable(path, 400)), printable(path, 400));
  write_text_file(path, text);
}

IndexPlan resolve_plan(const std::string& text, int num_layers,
                       const std::string& model_fingerprint, FingerprintCheck check) {
  if (!is_plan_path(text)) return plan_from_override(text, num_layers);
  const PlanFile file = load_plan_file(text);
  const std::string where = fmt::format("{}: \"plan\"", printable(text, 400));
  const IndexPlan plan = plan_from_string(file.plan, num_layers, where);
  if (file.model_fingerprint == model_fingerprint) return plan;
  const std::string mismatch =
      fmt::format("{}: \"model_fingerprint\" is {}, this model's is {}", printable(text, 400),
                  file.model_fingerprint, model_fingerprint);
  if (check == FingerprintCheck::kRequire)
    fail("{}, expected a plan made for this model", mismatch);
  warn("{}; used all the same, as asked", mismatch);
  return plan;
}

std::string config_fingerprint(const Json& config) {
  nlohmann::json identity = canonical(config);
  for (const char* key :
       {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset",
        "use_index_cache", "dtype", "torch_dtype", "quantization_config", "bos_token_id",
        "eos_token_id", "transformers_version", "_name_or_path"}) {
    identity.erase(key);
  }
  return sha256_hex(identity.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace));
}

}  // namespace indexcache
