// The program: parses, runs one command, and turns errors into one line and an exit code.
// 0 done, 1 it failed, 2 wrong use, 130 interrupted.

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <system_error>

#include "cli/options.h"
#include "device/cpu_features.h"

namespace indexcache {
namespace {

// CLI11 takes 010 for 8, -1 for a large unsigned number, and what overflows for the largest there
// is.
std::string check_whole_number(const std::string& text, bool with_sign) {
  const bool negative = text.starts_with('-');
  const std::string digits = text.substr(negative ? 1 : 0);
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  const bool plain = error == std::errc() && end == digits.data() + digits.size() &&
                     (digits == "0" || digits[0] != '0');
  const uint64_t largest = with_sign ? INT64_MAX : UINT64_MAX;
  if (plain && value <= largest && (with_sign || !negative)) return "";
  return fmt::format("{}: expected a whole number from {} to {}", printable(text),
                     with_sign ? INT64_MIN + 1 : 0, largest);
}

// A number is whole where one is asked for, and no option that a command cannot do without is
// empty.
void check_values(CLI::App* program) {
  for (CLI::App* command : program->get_subcommands([](CLI::App*) { return true; })) {
    for (CLI::Option* option : command->get_options()) {
      if (option->get_required()) {
        option->check(CLI::Validator(
            [](std::string& text) { return text.empty() ? "expected a value" : ""; }, ""));
      }
      const std::string type = option->get_type_name();
      const bool with_sign = type.starts_with("INT"), without = type.starts_with("UINT");
      if (!with_sign && !without) continue;
      option->check(CLI::Validator(
          [with_sign](std::string& text) { return check_whole_number(text, with_sign); }, ""));
    }
  }
}

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
  check_values(&program);
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : 2;
  }
  // A full disk shows only here, where what is still held back is written.
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    fail("the standard output cannot be written: {}", strerror(errno));
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
  } catch (const std::system_error& error) {  // no more threads, say
    fmt::print(stderr, "error: {}\n", error.what());
  }
  return 1;
}
