// How engines cut a model's layers into pipeline stages, and cuts that keep every shared layer in
// the stage that made its selection. A stage that begins on a shared layer has no selection of its
// own to use.
//
// A cut is the number of layers of each stage, in order. Every function needs 1 to num_layers
// stages.
#pragma once

#include <optional>
#include <vector>

#include "plan/index_plan.h"

namespace indexcache {

// Where the layers that do not divide evenly go.
enum class StageRule {
  kBeforeLast,  // one each to the stages before the last, going backwards (vLLM, vllm-ascend)
  kLast,        // one each to the last stages (SGLang)
  kFirst,       // one each to the first stages (TensorRT-LLM)
};

std::vector<int> cut_by_rule(StageRule rule, int num_layers, int num_stages);

// The first layers of the stages that begin on a shared layer.
std::vector<int> shared_stage_starts(const IndexPlan& plan, const std::vector<int>& cut);

// Every stage begins on a full layer, and the longest stage is as short as that allows. Absent if
// the plan has fewer full layers than stages.
std::optional<std::vector<int>> cut_on_full_layers(const IndexPlan& plan, int num_stages);

}  // namespace indexcache
