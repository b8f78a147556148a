// Long-context tasks under index plans: every variant gets the same prompts, answers greedily, and
// is right or wrong.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "analysis/eval_text.h"
#include "text/long_context_tasks.h"
#include "text/tokenizer.h"

namespace indexcache {

struct TaskPlan {
  std::vector<TaskKind> kinds;
  std::vector<int64_t> contexts;  // tokens of prompt and answer
  int64_t samples = 20;           // a kind and context
  uint64_t seed = 1;
};

struct TaskScore {
  TaskKind kind;
  int64_t context = 0;
  std::vector<int64_t> right;  // of `samples`, one a variant
};

// The tokens that an answer may take before it is cut off, and so what a context needs beyond the
// prompt.
inline constexpr int64_t kMaxAnswerTokens = 256;

// Each engine's context holds the longest of the contexts, better kMaxAnswerTokens more.
std::vector<TaskScore> score_tasks(const std::vector<Variant>& variants, const TaskPlan& plan,
                                   const TaskFiller& filler, const Tokenizer& tokenizer,
                                   const std::function<void(int64_t answers_done)>& progress = {});

}  // namespace indexcache
