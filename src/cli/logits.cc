// indexcache logits: what the model computes for given tokens, for checks from outside
// (docs/architecture.md, "logits").

#include <cstring>
#include <memory>

#include "base/atomic_file.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/units.h"
#include "checkpoint/safetensors_writer.h"
#include "cli/options.h"

namespace indexcache {

namespace {

struct LogitsFlags {
  CommonFlags common;
  std::string token_file, output;
  int64_t greedy = 0;
  bool deterministic = false;
};

// What the file will hold is held in memory until it is written.
void check_room_for_output(const Model& model, int64_t S) {
  const ModelConfig& config = model.config;
  const int64_t values = S * config.vocab_size +
                         S * config.hidden_size * (config.num_hidden_layers + 1) +
                         S * config.indexer.index_topk * model.plan.num_full();
  const uint64_t bytes = static_cast<uint64_t>(values) * sizeof(float);
  const uint64_t available = available_memory_bytes();
  if (available == 0 || bytes <= available) return;
  fail(
      "logits, hidden states and selections of {} tokens take {}, found {} available; give fewer "
      "tokens",
      S, format_bytes(bytes), format_bytes(available));
}

int logits(const LogitsFlags& flags) {
  RunOptions options = run_options(flags.common);
  check_can_write({flags.output}, {flags.token_file});
  const std::vector<int32_t> tokens = load_token_ids(flags.token_file);
  const ModelSource source = open_model(flags.common.model);
  const int64_t S = static_cast<int64_t>(tokens.size());
  if (options.context == 0) options.context = S + flags.greedy;
  Engine engine(source, options);
  if (flags.deterministic) make_batch_invariant(engine);
  check_room_for_output(engine.model, S);
  const ModelConfig& config = engine.model.config;
  const int64_t V = config.vocab_size, H = config.hidden_size, k = config.indexer.index_topk;
  const int num_layers = static_cast<int>(config.num_hidden_layers);

  Tensor all_logits(DType::kF32, {S, V});
  std::vector<Tensor> hidden;
  for (int i = 0; i <= num_layers; ++i) hidden.emplace_back(DType::kF32, Shape{S, H});
  std::map<int, Tensor> topk;
  int64_t first = 0;
  ForwardTap tap;
  tap.hidden = [&](int index, std::span<const float> rows) {
    std::memcpy(hidden[static_cast<size_t>(index)].as<float>() + first * H, rows.data(),
                rows.size_bytes());
  };
  tap.selection = [&](int layer, Selection selection) {
    Tensor& out = topk.try_emplace(layer, DType::kI32, Shape{S, k}).first->second;
    for (size_t t = 0; t < selection.counts.size(); ++t) {
      const int32_t* row = selection.positions.data() + static_cast<int64_t>(t) * k;
      int32_t* to = out.as<int32_t>() + (first + static_cast<int64_t>(t)) * k;
      const int32_t count = selection.counts[t];
      std::reverse_copy(row, row + count, to);
      std::fill(to + count, to + k, -1);
    }
  };
  double nll = 0;
  PrefillHooks hooks;
  hooks.tap = &tap;
  hooks.chunk_logits = [&](int64_t begin, std::span<const float> rows) {
    std::memcpy(all_logits.as<float>() + begin * V, rows.data(), rows.size_bytes());
    const int64_t count = static_cast<int64_t>(rows.size()) / V;
    for (int64_t i = 0; i < count && begin + i + 1 < S; ++i) {
      nll +=
          negative_log_likelihood(rows.subspan(static_cast<size_t>(i * V), static_cast<size_t>(V)),
                                  tokens[static_cast<size_t>(begin + i + 1)]);
    }
    first = begin + count;
  };
  Progress progress("logits", S, "tokens");
  hooks.progress = [&](int64_t done) { progress.update(done); };
  SequenceCache sequence;
  prefill(engine, sequence, tokens, nullptr, hooks);

  Tensor greedy(DType::kI32, {flags.greedy});
  Sampler sampler({});
  std::vector<float> row(all_logits.as<float>() + (S - 1) * V, all_logits.as<float>() + S * V);
  for (int64_t i = 0; i < flags.greedy; ++i) {
    const int32_t token = sampler.next(row);
    greedy.as<int32_t>()[i] = token;
    if (i + 1 < flags.greedy) prefill(engine, sequence, {&token, 1}, &row);
  }
  Tensor mean_nll(DType::kF64, {1});
  *mean_nll.as<double>() = S > 1 ? nll / static_cast<double>(S - 1) : 0.0;

  std::vector<std::pair<std::string, TensorView>> out = {{"logits", all_logits.view()},
                                                         {"mean_nll", mean_nll.view()}};
  for (int i = 0; i <= num_layers; ++i)
    out.emplace_back(fmt::format("hidden.{}", i), hidden[static_cast<size_t>(i)].view());
  for (const auto& [layer, tensor] : topk)
    out.emplace_back(fmt::format("topk.{}", layer), tensor.view());
  if (flags.greedy > 0) out.emplace_back("greedy", greedy.view());
  Metadata metadata = {{"plan", to_string(engine.model.plan)}, {"model", config.fingerprint}};
  if (engine.adapter) metadata["indexers"] = options.indexers;
  write_safetensors(flags.output, out, metadata);
  info("{}: logits of {} tokens, plan {}{}, mean negative log likelihood {:.6f} nats/token",
       flags.output, S, to_string(engine.model.plan),
       engine.adapter ? ", indexers " + printable(options.indexers, 400) : "",
       *mean_nll.as<double>());
  return 0;
}

}  // namespace

void add_logits_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<LogitsFlags>();
  CLI::App* command = program->add_subcommand(
      "logits", "Write logits, selections and hidden states of given tokens");
  command->footer(
      "Example: indexcache logits -m models/demo --tokens ids.json -o out.safetensors --greedy 16\n"
      "The file holds logits [S, V], hidden.<i> [S, H], topk.<layer> [S, index_topk] (descending, "
      "-1 padded),\n"
      "greedy [N] and mean_nll [1] (nats/token).");
  add_model_flag(command, &flags->common, true);
  add_run_flags(command, &flags->common);
  command->add_option("--tokens", flags->token_file, "A JSON array of token ids")->required();
  command->add_option("-o,--output", flags->output, "The safetensors file to write")->required();
  command->add_option("--greedy", flags->greedy, "Also generate this many tokens greedily")
      ->check(CLI::Range(0, 1 << 20));
  command->add_flag("--deterministic", flags->deterministic,
                    "The same bits for a token whatever it is computed with, as those of serve "
                    "--deterministic");
  command->callback([flags, exit_code] { *exit_code = logits(*flags); });
}

}  // namespace indexcache
