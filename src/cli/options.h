// Flags that several commands share, under the names that the field knows, and what follows from
// them.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "text/tokenizer.h"

namespace indexcache {

struct CommonFlags {
  std::string model;
  std::string device = "cpu";
  std::string dtype = "auto";
  std::string indexer_keys = "auto";
  std::string kv_cache = "auto";
  std::vector<std::string> forced;  // op=implementation
  RunOptions run;
};

// -m/--model, and the flags of RunOptions.
void add_model_flag(CLI::App* command, CommonFlags* flags, bool required);
void add_run_flags(CLI::App* command, CommonFlags* flags);

// Turns texts into options. Error for a device or a type that there is not.
RunOptions run_options(const CommonFlags& flags);

// Reads a JSON array of token ids.
std::vector<int32_t> load_token_ids(const std::string& path);

// The tokenizer.json of a model folder.
Tokenizer load_tokenizer(const std::string& model);

// The commands. Each adds itself to the program and runs when parsed; `exit_code` is what main
// returns.
void add_run_command(CLI::App* program, int* exit_code);
void add_logits_command(CLI::App* program, int* exit_code);
void add_inspect_command(CLI::App* program, int* exit_code);
void add_export_command(CLI::App* program, int* exit_code);
void add_bench_command(CLI::App* program, int* exit_code);
void add_search_command(CLI::App* program, int* exit_code);
void add_overlap_command(CLI::App* program, int* exit_code);
void add_eval_command(CLI::App* program, int* exit_code);
void add_report_command(CLI::App* program, int* exit_code);
void add_synth_command(CLI::App* program, int* exit_code);
void add_serve_command(CLI::App* program, int* exit_code);
void add_train_command(CLI::App* program);

}  // namespace indexcache
