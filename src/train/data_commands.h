// The commands that make training data: `vocabulary` (train/bpe_trainer.h), `tasks`
// (train/task_file.h), `tokenize` (train/tokenize.h) and `example`, one task to look at. None needs
// libtorch or a GPU.
#pragma once

#include <CLI/CLI.hpp>

namespace indexcache {

// A command runs when the app has parsed it; its errors are thrown as Error.
void add_data_commands(CLI::App& app);

}  // namespace indexcache
