#include "plan/export_lines.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "plan/engine_rules.h"
#include "plan/pipeline_stages.h"

namespace indexcache {

namespace {

// What an engine does with a stage that begins on a shared layer.
enum class Relay { kNone, kSince28532, kUnknown, kNotApplicable };

struct EngineTraits {
  const char* name;
  const char* place;
  Relay relay;
  StageRule stage_rule;
  // How a cut is asked for: before the numbers, and after them.
  const char* cut_before;
  const char* cut_after;
};

constexpr EngineTraits kEngines[] = {
    {"vllm", "argument of vllm serve", Relay::kNone, StageRule::kBeforeLast,
     "VLLM_PP_LAYER_PARTITION=", ""},
    {"sglang", "argument of sglang.launch_server", Relay::kSince28532, StageRule::kLast,
     "SGLANG_PP_LAYER_PARTITION=", ""},
    {"tensorrt-llm", "line of the checkpoint's config.json", Relay::kUnknown, StageRule::kFirst,
     "pp_partition: [", "]"},
    {"transformers", "line of the checkpoint's config.json", Relay::kNotApplicable,
     StageRule::kFirst, "", ""},
    {"vllm-ascend", "argument of vllm serve", Relay::kNone, StageRule::kBeforeLast,
     "VLLM_PP_LAYER_PARTITION=", ""},
};

const EngineTraits& find_engine(const std::string& name) {
  std::string names;
  for (const EngineTraits& engine : kEngines) {
    if (name == engine.name) return engine;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", engine.name);
  }
  fail("unknown engine \"{}\", expected one of {}", printable(name), names);
}

template <class Items>
std::string join(const Items& items) {
  std::string text;
  for (const auto& item : items) text += fmt::format("{}{}", text.empty() ? "" : ",", item);
  return text;
}

Json indexer_types(const std::vector<bool>& is_full) {
  Json types = Json::array();
  for (const bool full : is_full) types.push_back(full ? "full" : "shared");
  return types;
}

std::vector<bool> full_flags(const IndexPlan& plan) {
  std::vector<bool> flags;
  for (int l = 0; l < plan.num_layers(); ++l) flags.push_back(plan.is_full(l));
  return flags;
}

Json merged(Json config, const Json& settings) {
  for (const auto& [key, value] : settings.items()) config[key] = value;
  return config;
}

// vllm-ascend builds the indexer of a layer unless the layer is shared and `indexer_types` calls it
// shared, whatever the pattern says. So that list has to say which layers have weights.
bool ascend_builds_what_is_there(const Json& config, const ExportRequest& request) {
  const auto types = config.find("indexer_types");
  const bool has_types = types != config.end() && types->is_array() &&
                         types->size() == request.layer_has_indexer.size();
  for (int l = 0; l < request.plan.num_layers(); ++l) {
    const auto i = static_cast<size_t>(l);
    const bool builds = request.plan.is_full(l) || !has_types || (*types)[i] != "shared";
    if (builds != request.layer_has_indexer[i]) return false;
  }
  return true;
}

Json engine_settings(const std::string& engine, const ExportRequest& request) {
  if (engine == "transformers") {
    return {{"indexer_types", indexer_types(full_flags(request.plan))}};
  }
  Json settings = {{"index_topk_pattern", to_string(request.plan)}};
  if (engine == "vllm" || engine == "vllm-ascend") {
    // Read by the first versions only, which otherwise ignore the pattern.
    settings["use_index_cache"] = true;
  }
  if (engine == "vllm-ascend" && !ascend_builds_what_is_there(request.config, request)) {
    settings["indexer_types"] = indexer_types(request.layer_has_indexer);
  }
  return settings;
}

std::vector<std::string> engine_lines(const std::string& engine, const Json& settings) {
  // Letters and words without a quote: safe between single quotes.
  if (engine == "vllm" || engine == "vllm-ascend")
    return {fmt::format("--hf-overrides '{}'", settings.dump())};
  if (engine == "sglang") return {fmt::format("--json-model-override-args '{}'", settings.dump())};
  std::vector<std::string> lines;
  for (const auto& [key, value] : settings.items())
    lines.push_back(fmt::format("\"{}\": {},", key, value.dump()));
  return lines;
}

// The plan that an engine reads from a config, or what it raises.
struct Reading {
  std::string plan, problem;
};

Reading read_plan(const std::string& engine, const Json& config, int num_layers) {
  try {
    return {engine_rule(engine).plan(config, num_layers), ""};
  } catch (const Error& error) {
    return {"", error.what()};
  }
}

void add_pipeline(const EngineTraits& engine, const ExportRequest& request, EngineLines* out) {
  const int stages = request.pipeline_stages;
  if (stages == 1 || engine.relay == Relay::kNotApplicable) return;
  const IndexPlan& plan = request.plan;
  const std::vector<int> cut = cut_by_rule(engine.stage_rule, plan.num_layers(), stages);
  const std::vector<int> starts = shared_stage_starts(plan, cut);
  if (starts.empty()) return;
  const std::string stage = fmt::format(
      "with {} pipeline stages {} cuts the layers into {}, and the stage{} at layer {} begin{} on "
      "a shared layer",
      stages, engine.name, join(cut), starts.size() == 1 ? "" : "s", join(starts),
      starts.size() == 1 ? "s" : "");
  const auto safe = cut_on_full_layers(plan, stages);
  if (!safe && engine.relay == Relay::kNone) {
    out->refusal =
        fmt::format("{}; the plan has {} full layers, so at most {} stages can each begin on one",
                    stage, plan.num_full(), plan.num_full());
    return;
  }
  if (safe) out->environment.push_back(engine.cut_before + join(*safe) + engine.cut_after);
  const std::string cure =
      safe ? fmt::format("; {} makes every stage begin on a full layer", out->environment.back())
           : "; the plan has too few full layers to begin every stage on one";
  switch (engine.relay) {
    case Relay::kNone:
      out->hazards.push_back(fmt::format(
          "{}: selections are not passed between stages, and it would read a buffer that nothing "
          "wrote, without an error{}",
          stage, cure));
      break;
    case Relay::kSince28532:
      out->hazards.push_back(fmt::format(
          "{}: versions before PR 28532 crash or give garbage there, later ones pass the selection "
          "on{}",
          stage, cure));
      break;
    case Relay::kUnknown:
      out->hazards.push_back(
          fmt::format("{}: nothing says that selections are passed between stages{}", stage, cure));
      break;
    case Relay::kNotApplicable:
      break;
  }
}

void add_mtp_hazard(const std::string& engine, int num_mtp_layers, EngineLines* out) {
  if (num_mtp_layers == 0) return;
  const char* text = nullptr;
  if (engine == "vllm") {
    text =
        "the MTP layer is outside the plan and always runs its indexer; with "
        "index_share_for_mtp_iteration draft steps after the first reuse its selection and write "
        "no indexer keys";
  } else if (engine == "sglang") {
    text =
        "the MTP layer is outside the plan; draft steps share a selection only with EAGLE, "
        "speculative_eagle_topk 1 and index_share_for_mtp_iteration";
  } else if (engine == "tensorrt-llm") {
    text =
        "the MTP layer is outside the plan and full; sharing over draft steps is a setting of its "
        "own (index_share_for_mtp_iteration)";
  } else if (engine == "transformers") {
    text = "MTP weights are ignored";
  } else {
    text =
        "the MTP layer is outside the plan; with prefill and decode on separate nodes users report "
        "that draft acceptance falls to 0 (issue 13523)";
  }
  out->hazards.push_back(text);
}

void add_reading_hazards(const std::string& engine, const ExportRequest& request,
                         const Reading& without_lines, EngineLines* out) {
  const std::string plan = to_string(request.plan);
  if (without_lines.plan != plan) {
    std::string found = without_lines.problem.empty()
                            ? fmt::format("it runs {}", without_lines.plan)
                            : without_lines.problem;
    if (engine != "transformers" && request.config.contains("indexer_types"))
      found += " (it does not read indexer_types)";
    out->hazards.push_back(fmt::format("without the line: {}", found));
  }
  int surplus = 0;
  for (int l = 0; l < request.plan.num_layers(); ++l) {
    if (!request.plan.is_full(l) && request.layer_has_indexer[static_cast<size_t>(l)]) ++surplus;
  }
  if (surplus > 0 && engine == "vllm") {
    out->hazards.push_back(
        fmt::format("the checkpoint has indexers of {} shared layers: older versions stop with "
                    "KeyError wk_weights_proj, current ones drop them; export --checkpoint writes "
                    "one without",
                    surplus));
  }
  if (surplus > 0 && engine == "vllm-ascend") {
    out->hazards.push_back(fmt::format(
        "the indexers of {} shared layers are loaded and stay in memory, unused; export "
        "--checkpoint writes a checkpoint without",
        surplus));
  }
  if (request.plan.num_full() == request.plan.num_layers()) return;
  if (engine == "sglang")
    out->hazards.push_back("two-batch overlap is refused at start for models that share");
  if (engine == "tensorrt-llm") {
    out->hazards.push_back(
        "there is no argument for it: the line replaces index_topk_pattern in config.json");
  }
  if (engine == "transformers")
    out->hazards.push_back("it computes masked dense attention: right, but no faster for a plan");
  if (engine == "vllm-ascend")
    out->hazards.push_back("context parallelism ignored sharing in versions before PR 11386");
}

}  // namespace

std::vector<std::string> export_engines() {
  std::vector<std::string> names;
  for (const EngineTraits& engine : kEngines) names.emplace_back(engine.name);
  return names;
}

EngineLines export_lines(const std::string& engine, const ExportRequest& request) {
  const EngineTraits& traits = find_engine(engine);
  const int num_layers = request.plan.num_layers();
  check_indexer_weights(request.plan, request.layer_has_indexer, "export");
  if (request.pipeline_stages < 1 || request.pipeline_stages > num_layers) {
    fail("{} pipeline stages were asked for, expected 1 to {}, one layer each",
         request.pipeline_stages, num_layers);
  }
  EngineLines out;
  out.engine = traits.name;
  out.place = traits.place;
  const std::string plan = to_string(request.plan);
  const Json settings = engine_settings(engine, request);
  const Json told = merged(request.config, settings);
  const Reading with_lines = read_plan(engine, told, num_layers);
  if (with_lines.plan != plan) {
    out.refusal = with_lines.problem.empty()
                      ? fmt::format("its rule gives {} whatever it is told, the plan is {}",
                                    with_lines.plan, plan)
                      : with_lines.problem;
    const auto type = request.config.find("model_type");
    if (engine == "transformers" && type != request.config.end() && *type == "deepseek_v32")
      out.refusal += "; only its glm_moe_dsa shares";
    return out;
  }
  if (engine == "vllm-ascend") CHECK(ascend_builds_what_is_there(told, request));
  add_pipeline(traits, request, &out);
  if (!out.refusal.empty()) return out;

  const Reading without_lines = read_plan(engine, request.config, num_layers);
  out.settings = settings;
  out.lines = engine_lines(engine, settings);
  // vllm-ascend needs its indexer_types even where the plan is right without.
  out.config_suffices =
      without_lines.plan == plan &&
      (engine != "vllm-ascend" || ascend_builds_what_is_there(request.config, request));
  add_reading_hazards(engine, request, without_lines, &out);
  add_mtp_hazard(engine, request.num_mtp_layers, &out);
  return out;
}

Json config_with_plan(const Json& config, const IndexPlan& plan) {
  Json out = config;
  out.erase("index_topk_freq");
  out.erase("index_skip_topk_offset");
  out["indexer_types"] = indexer_types(full_flags(plan));
  out["index_topk_pattern"] = to_string(plan);
  out["use_index_cache"] = true;
  return out;
}

std::vector<std::string> engines_that_agree(const Json& config, const IndexPlan& plan) {
  std::vector<std::string> names;
  for (const EngineTraits& engine : kEngines) {
    if (read_plan(engine.name, config, plan.num_layers()).plan == to_string(plan))
      names.emplace_back(engine.name);
  }
  return names;
}

}  // namespace indexcache
