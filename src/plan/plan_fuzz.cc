// Bytes as an override string, as the plan fields of a config, and as a plan file. What is accepted
// must be a valid plan, survive a round trip, and mean the same to every engine that does not
// raise.
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/log.h"
#include "plan/engine_rules.h"
#include "plan/index_plan.h"
#include "plan/plan_file.h"

namespace indexcache {
namespace {

void check_plan(const IndexPlan& plan, int num_layers) {
  CHECK_EQ(plan.num_layers(), num_layers);
  for (int l = 0; l < num_layers; ++l) {
    const int source = plan.source[static_cast<size_t>(l)];
    CHECK(source >= 0 && source <= l && plan.is_full(source));
  }
  CHECK(plan_from_string(to_string(plan), num_layers, "fuzz") == plan);
}

void try_override(std::string_view text, int num_layers) {
  try {
    check_plan(plan_from_override(text, num_layers), num_layers);
  } catch (const Error&) {
  }
}

void try_config(const Json& json, int num_layers) {
  for (const EngineRule& rule : engine_rules()) {
    try {
      CHECK_EQ(rule.plan(json, num_layers).size(), static_cast<size_t>(num_layers));
    } catch (const Error&) {
    }
  }
  try {
    check_plan(plan_from_config(JsonObject(json, "fuzz"), num_layers), num_layers);
  } catch (const Error&) {
  }
  CHECK_EQ(config_fingerprint(json).size(), 64u);
}

void try_file(const Json& json) {
  try {
    const PlanFile file = parse_plan_file(json, "fuzz");
    const std::string written = plan_file_json(file).dump();
    const PlanFile again = parse_plan_file(parse_json(written, "fuzz"), "fuzz");
    CHECK(again.plan == file.plan && again.steps == file.steps && again.settings == file.settings);
  } catch (const Error&) {
  }
}

}  // namespace
}  // namespace indexcache

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace indexcache;
  set_log_enabled(false);
  if (size == 0) return 0;
  const int num_layers = 1 + data[0] % 96;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  try_override(text, num_layers);
  try {
    const Json json = parse_json(text, "fuzz");
    try_file(json);
    if (json.is_object()) try_config(json, num_layers);
  } catch (const Error&) {
  }
  return 0;
}
