// indexcache-train: the training-aware method. A program of its own, so that the engine does not
// carry libtorch.
#include "train/trainer.h"

//
#include <signal.h>

#include <CLI/CLI.hpp>

#include "base/log.h"
#include "base/units.h"
#include "train/data_commands.h"

namespace indexcache {
namespace {

struct Flags {
  TrainOptions options;
  std::vector<std::string> data, held_out;
  std::string sequence = "2048", loss = "multi-layer", dtype = "f32", save_dtype = "bf16";
  double max_minutes = 0;
  uint64_t shard_mb = 5000;
};

double parse_number(const std::string& text, const std::string& what) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value))
    fail("{}: expected a number, found \"{}\"", what, printable(text));
  return value;
}

int64_t parse_count(const std::string& text, const std::string& what) {
  const double value = parse_number(text, what);
  if (value < 1 || value > 1e15 || value != std::floor(value))
    fail("{}: expected a whole number of at least 1, found \"{}\"", what, printable(text));
  return static_cast<int64_t>(value);
}

// "2048:3000,16384"
std::vector<SequencePhase> parse_sequence(const std::string& text) {
  std::vector<SequencePhase> phases;
  for (const std::string& part : CLI::detail::split(text, ',')) {
    const size_t colon = part.find(':');
    SequencePhase phase{parse_count(part.substr(0, colon), "--seq"), 0};
    if (colon != std::string::npos) phase.steps = parse_count(part.substr(colon + 1), "--seq");
    phases.push_back(phase);
  }
  for (size_t i = 0; i + 1 < phases.size(); ++i)
    if (phases[i].steps == 0)
      fail("--seq {}: every phase but the last needs its number of steps, as in 2048:3000,16384",
           printable(text));
  return phases;
}

// "text.tokens=0.5": the share is 1 where none is given.
std::vector<std::pair<std::string, double>> parse_data(const std::vector<std::string>& texts) {
  std::vector<std::pair<std::string, double>> data;
  for (const std::string& text : texts) {
    const size_t equals = text.rfind('=');
    if (equals == std::string::npos) {
      data.emplace_back(text, 1.0);
    } else {
      data.emplace_back(text.substr(0, equals), parse_number(text.substr(equals + 1), "--data"));
    }
  }
  return data;
}

void run(Flags& flags, Stage stage) {
  TrainOptions& options = flags.options;
  options.stage = stage;
  options.sequence = parse_sequence(flags.sequence);
  options.data = parse_data(flags.data);
  for (const std::string& text : flags.held_out) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0)
      fail("--held-out {}: expected NAME=FILE", printable(text));
    options.held_out.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  options.multi_layer = flags.loss == "multi-layer";
  options.bf16 = flags.dtype == "bf16";
  options.save_dtype = flags.save_dtype == "bf16" ? DType::kBF16 : DType::kF32;
  options.max_shard_bytes = flags.shard_mb * 1'000'000;
  options.stop_after_seconds = flags.max_minutes * 60;
  int64_t longest = 0;
  for (const SequencePhase& phase : options.sequence) longest = std::max(longest, phase.row_tokens);
  if (options.batch_tokens < longest || options.micro_tokens < longest)
    fail("--batch-tokens {} and --micro-tokens {} must hold a sequence of {} tokens",
         options.batch_tokens, options.micro_tokens, longest);
  train(options);
}

void add_stage(CLI::App& app, Flags& flags, Stage stage, const char* name, const char* what) {
  CLI::App* command = app.add_subcommand(name, what);
  TrainOptions& o = flags.options;
  command->add_option("-m,--model", o.model, "Folder of the model to start from");
  if (stage == Stage::kPretrain)
    command->add_option("--config", o.config, "config.json of a new model, instead of --model");
  command->add_option("-o,--out", o.out, "Folder of the run: log, checkpoints, result")->required();
  command->add_option("--data", flags.data, "Token files, each as FILE or FILE=SHARE of the tokens")
      ->required();
  command->add_option("--held-out", flags.held_out, "NAME=FILE: loss measured, never trained on");
  command->add_option("--tokenizer", o.tokenizer,
                      "Folder whose tokenizer files the result carries");
  command->add_option("--steps", o.steps, "Optimiser steps")->check(CLI::PositiveNumber);
  command->add_option("--seq", flags.sequence,
                      "Sequence length, or phases of them: 2048:3000,16384 is 3000 steps of 2048");
  command->add_option("--batch-tokens", o.batch_tokens, "Tokens a step")
      ->check(CLI::PositiveNumber);
  command->add_option("--micro-tokens", o.micro_tokens, "Tokens in memory at a time")
      ->check(CLI::PositiveNumber);
  command->add_option("--lr", o.lr, "Peak learning rate of the backbone")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--lr-warmup", o.lr_warmup_steps, "Steps of linear warm-up")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--lr-final", o.lr_final, "Learning rate at the end, of the peak (cosine)")
      ->check(CLI::Range(0.0, 1.0));
  command->add_option("--weight-decay", o.weight_decay, "AdamW, matrices only")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--clip", o.clip, "Largest norm of the gradient")->check(CLI::PositiveNumber);
  if (stage != Stage::kPretrain) {
    command->add_option("--indexer-lr", o.indexer_lr, "Peak learning rate of the indexers")
        ->check(CLI::NonNegativeNumber);
    command->add_option("--plan", o.plan, "Index plan to train under: FSSS..., 1/4 or a plan file");
    command
        ->add_option("--loss", flags.loss,
                     "Whose attention an indexer learns: multi-layer (all layers it serves) or "
                     "per-layer (its own)")
        ->check(CLI::IsMember({"multi-layer", "per-layer"}));
    command->add_flag("--freeze-backbone", o.freeze_backbone,
                      "Train the indexers alone; writes indexers.safetensors");
  }
  command->add_option("--seed", o.seed, "Seed of weights and data order");
  command->add_option("--device", o.device, "cpu, cuda or cuda:N");
  command->add_option("--dtype", flags.dtype, "What products are made in; masters are always f32")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command->add_option("--save-dtype", flags.save_dtype, "Of the result")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command->add_option("--shard-mb", flags.shard_mb, "Largest file of the result")
      ->check(CLI::PositiveNumber);
  command->add_flag("--checkpoint-activations", o.checkpoint_activations,
                    "Keep one activation a layer group and compute the rest again: less memory, a "
                    "third more time");
  command->add_option("--save-every", o.save_every, "Steps")->check(CLI::PositiveNumber);
  command->add_option("--held-out-every", o.held_out_every, "Steps")->check(CLI::PositiveNumber);
  command->add_option("--held-out-tokens", o.held_out_tokens, "Tokens of each")
      ->check(CLI::PositiveNumber);
  command->add_option("--log-every", o.log_every, "Steps between rows of log.csv")
      ->check(CLI::PositiveNumber);
  command->add_option("--max-minutes", flags.max_minutes, "Save and stop then; --resume goes on")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--resume", o.resume, "Go on from the newest checkpoint of --out");
  command->footer(
      fmt::format("Example: indexcache-train {} -m model -o run --data text.tokens=0.6 "
                  "--data tasks.tokens=0.4 --steps 2000 --device cuda --dtype bf16",
                  name));
  command->callback([&flags, stage] { run(flags, stage); });
}

int run_program(int argc, char** argv) {
  CLI::App app(
      "indexcache-train: trains DeepSeek-Sparse-Attention models and their indexers, with the "
      "multi-layer loss of IndexCache");
  app.footer(
      "Example: indexcache train warmup -m models/demo -o run --data text.tokens --plan 1/4 "
      "--freeze-backbone");
  app.require_subcommand(1);
  app.set_version_flag("--version", fmt::format("indexcache-train {} (libtorch {})",
                                                INDEXCACHE_VERSION, TORCH_VERSION));
  Flags flags;
  add_data_commands(app);
  add_stage(app, flags, Stage::kPretrain, "pretrain",
            "Dense attention, language loss: for models made from nothing");
  add_stage(app, flags, Stage::kWarmup, "warmup",
            "Dense attention; only the indexers of full layers learn");
  add_stage(app, flags, Stage::kSparse, "sparse",
            "Attention over the selection: backbone and indexers learn");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return 0;
}

}  // namespace
}  // namespace indexcache

int main(int argc, char** argv) {
  signal(SIGXFSZ, SIG_IGN);  // a limit on the size of files is an error of the write
  try {
    return indexcache::run_program(argc, argv);
  } catch (const c10::Error& error) {
    indexcache::log_line("error: ", error.what_without_backtrace());
  } catch (const std::exception& error) {
    indexcache::log_line("error: ", error.what());
  }
  return 1;
}
