// What a serving engine has to be told so that it runs an index plan: the exact lines, checked
// through that engine's own rule (engine_rules.h), and what can go wrong there all the same.
//
// The plan is always given as a pattern (transformers: as `indexer_types`), never as freq and
// offset: a pattern is read alike by every version of every engine, while the first versions of
// vLLM and the THUDM patch know no offset.
//
// Hazards are facts about the engine's code as read (the versions in engine_rules.h), said only
// where this model, plan and pipeline run into them.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "plan/index_plan.h"

namespace indexcache {

struct ExportRequest {
  Json config;                          // config.json as the engine will read it
  IndexPlan plan;                       // one that the checkpoint's weights can run
  std::vector<bool> layer_has_indexer;  // what the checkpoint ships
  int num_mtp_layers = 0;
  int pipeline_stages = 1;
};

struct EngineLines {
  std::string engine;
  std::string place;                     // what the lines are: "arguments of vllm serve"
  Json settings = Json::object();        // config fields that the lines set
  std::vector<std::string> lines;        // to be pasted as they are
  std::vector<std::string> environment;  // VARIABLE=value, to be set as well
  bool config_suffices = false;          // config.json alone gives the plan, without the lines
  std::string refusal;  // why the engine cannot run the plan; no lines then. Empty: it can
  std::vector<std::string> hazards;
};

std::vector<std::string> export_engines();

// Error for an unknown engine, a plan that needs indexers which the checkpoint lacks, and a number
// of stages that is not 1 to num_hidden_layers.
EngineLines export_lines(const std::string& engine, const ExportRequest& request);

// `config` with the plan in the two spellings that engines read, `indexer_types` and
// `index_topk_pattern`, and without the fields that could say something else. Every other key keeps
// its place.
Json config_with_plan(const Json& config, const IndexPlan& plan);

// The engines that run `plan` from `config` with no line at all.
std::vector<std::string> engines_that_agree(const Json& config, const IndexPlan& plan);

}  // namespace indexcache
