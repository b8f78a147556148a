// Long-context tasks (text/long_context_tasks.h) for training, many at a time, as JSON lines that
// train/tokenize.h reads: mostly "segments", a part as "messages" so that the chat template is
// learnt as well. The file depends on the options and filler alone, not on the number of threads.
//
// Errors: no filler; lengths that are not 1 <= min_tokens <= max_tokens; whatever the filler's
// files are wrong about.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/long_context_tasks.h"

namespace indexcache {

struct TaskFileOptions {
  uint64_t seed = 1;
  int64_t total_tokens = 100'000'000;  // the sum of the tasks' target lengths reaches this
  // A task's length, drawn so that every doubling is equally likely.
  int64_t min_tokens = 256;
  int64_t max_tokens = 16384;
  double chat_share = 0.1;
  int num_threads = 1;
};

// The "text" (or the texts of "segments") of the documents of JSON-lines files: all of them, or an
// even choice of about `max_bytes`.
std::vector<std::string> load_texts(const std::vector<std::string>& jsonl_paths, size_t max_bytes);

// Returns the number of tasks.
uint64_t make_tasks_jsonl(const TaskFiller& filler, const TaskFileOptions& options,
                          const std::string& out_path);

}  // namespace indexcache
