#include "plan/pipeline_stages.h"

#include "base/error.h"

namespace indexcache {

namespace {

// Stages that each reach to the farthest full layer that `longest` layers allow, but leave one full
// layer for every stage that is still to come. Absent if some stage would have to be longer.
std::optional<std::vector<int>> cut_within(const std::vector<int>& full_layers, int num_layers,
                                           int num_stages, int longest) {
  std::vector<int> cut;
  const int num_full = static_cast<int>(full_layers.size());
  int at = 0;
  for (int stages_left = num_stages; stages_left > 1; --stages_left) {
    const int start = full_layers[static_cast<size_t>(at)];
    int next = at;
    while (next + 1 <= num_full - (stages_left - 1) &&
           full_layers[static_cast<size_t>(next + 1)] - start <= longest) {
      ++next;
    }
    if (next == at) return std::nullopt;
    cut.push_back(full_layers[static_cast<size_t>(next)] - start);
    at = next;
  }
  cut.push_back(num_layers - full_layers[static_cast<size_t>(at)]);
  if (cut.back() > longest) return std::nullopt;
  return cut;
}

}  // namespace

std::vector<int> cut_by_rule(StageRule rule, int num_layers, int num_stages) {
  CHECK(num_stages >= 1 && num_stages <= num_layers);
  std::vector<int> cut(static_cast<size_t>(num_stages), num_layers / num_stages);
  const size_t extra = static_cast<size_t>(num_layers % num_stages), stages = cut.size();
  for (size_t i = 0; i < extra; ++i) {
    switch (rule) {
      case StageRule::kBeforeLast:
        ++cut[stages - 2 - i];
        break;
      case StageRule::kLast:
        ++cut[stages - 1 - i];
        break;
      case StageRule::kFirst:
        ++cut[i];
        break;
    }
  }
  return cut;
}

std::vector<int> shared_stage_starts(const IndexPlan& plan, const std::vector<int>& cut) {
  std::vector<int> starts;
  int start = 0;
  for (const int size : cut) {
    if (!plan.is_full(start)) starts.push_back(start);
    start += size;
  }
  CHECK_EQ(start, plan.num_layers());
  return starts;
}

std::optional<std::vector<int>> cut_on_full_layers(const IndexPlan& plan, int num_stages) {
  CHECK(num_stages >= 1 && num_stages <= plan.num_layers());
  if (plan.num_full() < num_stages) return std::nullopt;
  std::vector<int> full_layers;
  for (int l = 0; l < plan.num_layers(); ++l) {
    if (plan.is_full(l)) full_layers.push_back(l);
  }
  int too_short = 0, enough = plan.num_layers();
  while (enough - too_short > 1) {
    const int middle = (too_short + enough) / 2;
    (cut_within(full_layers, plan.num_layers(), num_stages, middle) ? enough : too_short) = middle;
  }
  return cut_within(full_layers, plan.num_layers(), num_stages, enough);
}

}  // namespace indexcache
