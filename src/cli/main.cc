// The program: parses, runs one command, and turns errors into one line and an exit code.
// 0 done, 1 it failed, 2 wrong use, 130 interrupted.

#include <cstdio>
#include <new>

#include "cli/options.h"
#include "device/cpu_features.h"

namespace indexcache {
namespace {

int run_program(int argc, char** argv) {
  CLI::App program{
      "indexcache: runs DeepSeek-Sparse-Attention models (DeepSeek-V3.2, GLM-5) under an index "
      "plan.\n"
      "Full layers (F) run the lightning indexer, shared layers (S) reuse the last selection."};
  program.require_subcommand(1);
  program.set_version_flag("--version",
                           fmt::format("indexcache {} ({})", INDEXCACHE_VERSION, cpu_isa_names()));
  int exit_code = 0;
  add_run_command(&program, &exit_code);
  add_serve_command(&program, &exit_code);
  add_bench_command(&program, &exit_code);
  add_logits_command(&program, &exit_code);
  add_inspect_command(&program, &exit_code);
  add_export_command(&program, &exit_code);
  add_search_command(&program, &exit_code);
  add_overlap_command(&program, &exit_code);
  add_eval_command(&program, &exit_code);
  add_report_command(&program, &exit_code);
  add_synth_command(&program, &exit_code);
  add_train_command(&program);
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : 2;
  }
  return exit_code;
}

}  // namespace
}  // namespace indexcache

int main(int argc, char** argv) {
  try {
    return indexcache::run_program(argc, argv);
  } catch (const indexcache::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "error: out of memory\n");
  }
  return 1;
}
