// Long-context tasks in the style of RULER (Hsieh et al., 2024): facts hidden in real text,
// questions at the end. One generator serves training and evaluation, so that the formats are the
// same, and keeps them apart: every key is an adjective-noun pair, and a fixed eighth of the pairs
// belongs to held-out tasks alone. Held-out tasks should also be given held-out filler.
//
//   single needle      The special number for crimson-otter is 48213.
//   multi-key needle   1 to 8 of those, one asked
//   multi-value        One special number for crimson-otter is 48213.   (2 to 4, all asked, in
//   order) variable tracking  VAR crimson-otter = 48213.   VAR silver-maple = VAR crimson-otter. (1
//   to 4
//                      hops beside 1 or 2 other chains of the same length; the last variable is
//                      asked, the answer names every variable down to the value)
//   copy               Passage crimson-otter: <a sentence of real text>
//
// A prompt ends with the words that stood before the fact ("Answer: The special number for
// crimson-otter is") and the answer is what followed them, so that a model that only continues text
// can answer. The answer begins with a space and ends with a newline: generation stops there.
//
// Facts are uniform over the filler, in tokens; a chain's come in the order of its hops, as in
// RULER. The same request and filler give the same task on every machine.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/task_filler.h"

namespace indexcache {

enum class TaskKind { kSingleNeedle, kMultiKey, kMultiValue, kVariableTracking, kCopy };
inline constexpr TaskKind kTaskKinds[] = {TaskKind::kSingleNeedle, TaskKind::kMultiKey,
                                          TaskKind::kMultiValue, TaskKind::kVariableTracking,
                                          TaskKind::kCopy};
const char* task_name(TaskKind kind);  // "single", "multikey", "multivalue", "variables", "copy"
std::optional<TaskKind> task_from_name(std::string_view name);

enum class TaskSplit { kTraining, kHeldOut };

struct TaskRequest {
  TaskKind kind = TaskKind::kSingleNeedle;
  TaskSplit split = TaskSplit::kHeldOut;
  uint64_t seed = 0;
  // Prompt and answer together. Reached from below, to within a fragment; exceeded only where the
  // facts and the question alone are longer.
  int64_t target_tokens = 4096;
  int size = 0;  // keys (1 to 8), values (2 to 4) or hops (1 to 4); 0: drawn from that range
};

struct Task {
  TaskKind kind;
  std::string prompt;
  std::string answer;  // " 48213.\n"
};

// Errors: target_tokens < 1, a size out of its range.
Task make_task(const TaskRequest& request, const TaskFiller& filler);

// True where what a model wrote after the prompt is the answer: compared up to the first newline,
// without spaces around it.
bool answer_matches(std::string_view answer, std::string_view output);

// A training text holds several tasks of random kinds in one filler and asks about every key and
// chain: far more to learn from per token than one question at the end of 16K tokens. The first
// question follows the text just as in make_task.
struct TaskSegment {
  std::string text;
  bool is_answer;
};
std::vector<TaskSegment> make_training_text(uint64_t seed, int64_t target_tokens,
                                            const TaskFiller& filler);

}  // namespace indexcache
