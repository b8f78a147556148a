// The plan file: what a search found and how, as JSON.
//
//   plan               the F/S string
//   model_fingerprint  config_fingerprint() of the model it was found for
//   steps              one object a step of the search: layer (the layer turned), loss (nats a
//   token), plan (after it) settings           an object: how it was found (search settings, data
//   hash, program version) version            the file's format, 1
//
// Reading is strict: a missing, unknown or ill-typed field is an Error. Writing is atomic.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "plan/index_plan.h"

namespace indexcache {

struct PlanStep {
  int32_t layer = 0;
  double loss = 0;
  std::string plan;

  bool operator==(const PlanStep&) const = default;
};

struct PlanFile {
  std::string plan;
  std::string model_fingerprint;
  std::vector<PlanStep> steps;
  Json settings = Json::object();
};

constexpr int64_t kPlanFileVersion = 1;

PlanFile parse_plan_file(const Json& json, const std::string& where);
PlanFile load_plan_file(const std::string& path);
Json plan_file_json(const PlanFile& file);
void save_plan_file(const PlanFile& file, const std::string& path);

enum class FingerprintCheck { kRequire, kForce };

// The plan of `text` as a user writes it after --plan: whatever plan_from_override reads, or the
// path of a plan file. Text that ends in ".json", holds a '/' other than "1/4", or names an
// existing file is a path. A plan file made for another model is an Error; kForce turns a
// fingerprint mismatch (never a length mismatch) into a warning.
IndexPlan resolve_plan(const std::string& text, int num_layers,
                       const std::string& model_fingerprint,
                       FingerprintCheck check = FingerprintCheck::kRequire);

// Identifies the model that a config describes: SHA-256, 64 hex digits, over the config with sorted
// keys, integral numbers written as integers, and without
//   - the plan (indexer_types, index_topk_pattern, index_topk_freq, index_skip_topk_offset,
//   use_index_cache),
//   - how the weights are stored (dtype, torch_dtype, quantization_config),
//   - when generation starts and stops (bos_token_id, eos_token_id),
//   - provenance (transformers_version, _name_or_path) and keys whose value is null.
std::string config_fingerprint(const Json& config);

}  // namespace indexcache
