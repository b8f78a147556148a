// indexcache synth: a random checkpoint of a known shape, in the hub's layout.

#include <filesystem>
#include <memory>

#include "base/atomic_file.h"
#include "base/atomic_folder.h"
#include "base/log.h"
#include "base/units.h"
#include "cli/options.h"
#include "cli/shape_flags.h"
#include "text/byte_level.h"

namespace indexcache {

namespace {

struct SynthFlags {
  ShapeFlags shape;
  std::string output;
  uint64_t max_shard_mib = 4096;
};

int synth(const SynthFlags& flags) {
  const ModelConfig config = shape_config(flags.shape);
  const DType dtype = shape_dtype(flags.shape);
  uint64_t bytes = 0;
  for (const TensorSpec& spec : checkpoint_specs(config, dtype)) bytes += spec.num_bytes();
  AtomicFolder out(flags.output);
  std::error_code error;
  const auto space = std::filesystem::space(out.temporary_path(), error);
  if (!error && bytes > space.available) {
    fail("{}: the checkpoint needs {}, found {} free", printable(flags.output), format_bytes(bytes),
         format_bytes(space.available));
  }
  write_text_file(out.temporary_path() + "/tokenizer.json",
                  byte_level_tokenizer_json(static_cast<int>(config.vocab_size)));
  write_synthetic_checkpoint(config, dtype, flags.shape.seed, flags.max_shard_mib << 20,
                             out.temporary_path());
  out.commit();
  info("{}: {} with random weights, {}, plan {}, seed {}", flags.output, flags.shape.name,
       format_bytes(bytes), to_string(config.index_plan), flags.shape.seed);
  return 0;
}

}  // namespace

void add_synth_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<SynthFlags>();
  CLI::App* command = program->add_subcommand(
      "synth", "Write a checkpoint with random weights, for tests and benchmarks");
  command->footer("Example: indexcache synth tiny -o /tmp/tiny --plan FFSSFFSS");
  add_shape_flags(command, &flags->shape, "shape");
  command->get_option("shape")->required();
  command->add_option("--plan", flags->shape.plan,
                      "Its index plan; shared layers get no indexer weights");
  command->add_option("-o,--output", flags->output, "The folder to write")->required();
  command->add_option("--max-shard-mib", flags->max_shard_mib, "Largest shard, MiB")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->callback([flags, exit_code] { *exit_code = synth(*flags); });
}

}  // namespace indexcache
