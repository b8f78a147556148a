// indexcache train: hands over to indexcache-train, which is a program of its own so that the
// engine does not carry libtorch.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <unistd.h>

#include "cli/options.h"

namespace indexcache {

namespace {

// Beside this program, else in PATH.
std::string trainer_path() {
  std::error_code no_error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", no_error);
  const std::filesystem::path beside = self.parent_path() / "indexcache-train";
  return !self.empty() && std::filesystem::exists(beside, no_error) ? beside.string()
                                                                    : "indexcache-train";
}

void become_trainer(const std::vector<std::string>& arguments) {
  const std::string program = trainer_path();
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  execvp(program.c_str(), argv.data());
  const std::string missing = fmt::format(
      "{}: {}; expected the trainer beside indexcache or in PATH: cmake --preset release "
      "-DINDEXCACHE_TRAIN=ON builds it (needs libtorch)",
      printable(program), std::strerror(errno));
  if (std::find(arguments.begin(), arguments.end(), "--help") == arguments.end())
    fail("{}", missing);
  fmt::print(
      "Train a model or its indexers: pretrain, warmup, sparse\n"
      "Example: indexcache train warmup -m models/demo -o run --data text.tokens --plan 1/4 "
      "--freeze-backbone\n"
      "Its flags are listed by the program that has them.\n{}\n",
      missing);
}

}  // namespace

void add_train_command(CLI::App* program) {
  CLI::App* command = program->add_subcommand(
      "train", "Train a model or its indexers: pretrain, warmup, sparse (indexcache-train)");
  // Every argument, --help too, is the trainer's.
  command->prefix_command();
  command->set_help_flag();
  command->callback([command] { become_trainer(command->remaining()); });
}

}  // namespace indexcache
