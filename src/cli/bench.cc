// indexcache bench: prefill time, decode rate and the indexer's share at growing contexts, for each
// index plan.
//
// One pass per plan: the prompt grows from frontier to frontier, so the prefill time of a context
// is what a prompt of that length takes; at each frontier some tokens are decoded and taken back.
// Per-layer times are of the newest tokens alone, which is where a cost that grows with the context
// shows.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>

#include "base/atomic_file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/shape_flags.h"
#include "device/gpus.h"

namespace indexcache {

namespace {

struct BenchFlags {
  CommonFlags common;
  ShapeFlags shape;
  std::vector<int64_t> contexts = {2048, 8192, 32768};
  std::vector<std::string> plans;
  int64_t decode_tokens = 32;
  uint64_t seed = 1;
  bool json = false, csv = false;
  std::string output;
};

struct BenchRow {
  int64_t context = 0;
  std::string plan;
  int num_full = 0;
  double prefill_s = 0, decode_tok_s = 0, indexer_share = 0, decode_indexer_share = 0;
  // Of the newest tokens before the frontier, microseconds a token and layer; 0 where the plan has
  // no such layer.
  double full_layer_us = 0, shared_layer_us = 0;
  uint64_t peak_rss_bytes = 0, other_bytes = 0;
};

struct OpTable {
  std::string plan;
  Profile prefill, decode;
};

struct BenchResult {
  std::string model, indexers, device, kernels;
  std::vector<BenchRow> rows;
  std::vector<OpTable> ops;  // over the whole prefill and all decoding of a plan
  double matmul_flops_per_s = 0;
};

// What this machine's threads reach on a large dense product in the type of the run: the rate that
// kernels are held against.
double measure_matmul_rate(Engine& engine) {
  constexpr int64_t m = 512, k = 2048, n = 4096;
  Rng rng(1);
  std::vector<float> x(m * k), y(m * n);
  std::vector<uint8_t> w(static_cast<size_t>(n * k * 4));
  for (float& value : x) value = rng.normal();
  const bool bf16 = engine.model.compute == Compute::kBF16;
  for (int64_t i = 0; i < n * k; ++i) {
    const float value = static_cast<float>(rng.uniform()) - 0.5f;
    if (bf16) {
      const uint16_t bits = f32_to_bf16(value);
      std::memcpy(w.data() + 2 * i, &bits, 2);
    } else {
      std::memcpy(w.data() + 4 * i, &value, 4);
    }
  }
  MatmulGroup group{x.data(), k, m, {bf16 ? DType::kBF16 : DType::kF32, n, k, w.data(), nullptr},
                    y.data(), n};
  CudaMemory on_gpu;
  if (engine.exec.device == Device::kCuda) {
    const size_t x_bytes = x.size() * sizeof(float), y_bytes = y.size() * sizeof(float);
    on_gpu = CudaMemory(x_bytes + y_bytes + w.size());
    uint8_t* base = on_gpu.data();
    engine.exec.cuda().copy_in(base, x.data(), x_bytes);
    engine.exec.cuda().copy_in(base + x_bytes + y_bytes, w.data(), w.size());
    engine.exec.wait();
    group.x = reinterpret_cast<const float*>(base);
    group.y = reinterpret_cast<float*>(base + x_bytes);
    group.w.data = base + x_bytes + y_bytes;
  }
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const double start = monotonic_seconds();
    matmul(engine.exec, {{&group, 1}, engine.model.compute, false});
    engine.exec.wait();
    best = std::max(best, 2.0 * m * k * n / (monotonic_seconds() - start));
  }
  return best;
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens)
    token = static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab_size)));
  return tokens;
}

// Mean microseconds a token of full and of shared layers.
void layer_times(const Engine& engine, const std::vector<double>& before,
                 const std::vector<double>& after, int64_t tokens, BenchRow* row) {
  double full = 0, shared = 0;
  const IndexPlan& plan = engine.model.plan;
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    const size_t i = static_cast<size_t>(layer);
    (plan.is_full(layer) ? full : shared) += after[i] - (before.empty() ? 0 : before[i]);
  }
  const double scale = 1e6 / static_cast<double>(tokens);
  const int num_shared = plan.num_layers() - plan.num_full();
  row->full_layer_us = full * scale / plan.num_full();
  row->shared_layer_us = num_shared > 0 ? shared * scale / num_shared : 0;
}

// The rows of one plan.
void bench_plan(const ModelSource& source, const BenchFlags& flags, RunOptions options,
                BenchResult* result) {
  const int64_t longest = flags.contexts.back();
  options.context = longest + flags.decode_tokens;
  // VmHWM must be this plan's own; where the kernel does not allow it, the figure covers the plans
  // before too.
  std::ofstream("/proc/self/clear_refs") << "5";
  Engine engine(source, options);
  result->device = hardware_name(options.device);
  result->kernels = kernel_names(options.device);
  if (result->matmul_flops_per_s == 0) result->matmul_flops_per_s = measure_matmul_rate(engine);
  const std::vector<int32_t> tokens =
      random_tokens(longest + flags.decode_tokens, source.config.vocab_size, flags.seed);
  const std::span<const int32_t> all(tokens);

  SequenceCache warm;
  prefill(engine, warm, all.first(static_cast<size_t>(std::min<int64_t>(longest, 64))), nullptr);
  engine.cache.release(warm);

  OpTable ops{to_string(engine.model.plan), {}, {}};
  Progress progress("bench " + ops.plan, longest, "tokens");
  SequenceCache sequence;
  double prefill_seconds = 0;
  ForwardTimes times;
  int64_t done = 0;
  for (const int64_t context : flags.contexts) {
    BenchRow row{.context = context, .plan = ops.plan, .num_full = engine.model.plan.num_full()};
    // The newest tokens: the last two forward passes before the frontier, or all there are.
    const int64_t newest = std::min(2 * engine.options.batch_tokens, context - done);
    std::vector<double> before;
    engine.exec.profile = &ops.prefill;
    PrefillHooks hooks{.times = &times};
    hooks.progress = [&](int64_t chunk) {
      progress.update(sequence.num_tokens > 0 ? sequence.num_tokens : chunk);
    };
    for (const int64_t part : {context - done - newest, newest}) {
      before = times.layer_seconds;
      const double start = monotonic_seconds();
      if (part > 0)
        prefill(engine, sequence, all.subspan(static_cast<size_t>(done), static_cast<size_t>(part)),
                nullptr, hooks);
      prefill_seconds += monotonic_seconds() - start;
      done += part;
    }
    layer_times(engine, before, times.layer_seconds, newest, &row);
    row.prefill_s = prefill_seconds;
    row.indexer_share = times.indexer / times.total();

    ForwardTimes decode_times;
    std::vector<float> logits;
    const auto decode = [&] {
      for (int64_t i = 0; i < flags.decode_tokens; ++i) {
        prefill(engine, sequence, all.subspan(static_cast<size_t>(context + i), 1), &logits,
                {.times = &decode_times});
      }
    };
    // The clock of an op waits for a GPU, which costs more than most ops of a single token: those
    // are measured in a second run.
    engine.exec.profile = engine.exec.device == Device::kCpu ? &ops.decode : nullptr;
    const double start = monotonic_seconds();
    decode();
    row.decode_tok_s = static_cast<double>(flags.decode_tokens) / (monotonic_seconds() - start);
    row.decode_indexer_share = decode_times.indexer / decode_times.total();
    if (engine.exec.device == Device::kCuda) {
      sequence.num_tokens = context;
      engine.exec.profile = &ops.decode;
      decode();
    }
    sequence.num_tokens =
        context;  // the decoded tokens are taken back; the next frontier writes over them

    row.peak_rss_bytes = peak_rss_bytes();
    const uint64_t known = engine.memory.weights_bytes +
                           static_cast<uint64_t>(engine.memory.cache_bytes_per_token * context);
    row.other_bytes = row.peak_rss_bytes > known ? row.peak_rss_bytes - known : 0;
    result->rows.push_back(row);
  }
  result->ops.push_back(std::move(ops));
}

Json rows_json(const BenchResult& result) {
  Json rows = Json::array();
  for (const BenchRow& r : result.rows) {
    rows.push_back({{"device", result.device},
                    {"model", result.model},
                    {"context", r.context},
                    {"plan", r.plan},
                    {"num_full", r.num_full},
                    {"prefill_s", r.prefill_s},
                    {"prefill_tok_s", static_cast<double>(r.context) / r.prefill_s},
                    {"decode_tok_s", r.decode_tok_s},
                    {"indexer_share", r.indexer_share},
                    {"decode_indexer_share", r.decode_indexer_share},
                    {"full_layer_us", r.full_layer_us},
                    {"shared_layer_us", r.shared_layer_us},
                    {"peak_rss_bytes", r.peak_rss_bytes},
                    {"other_bytes", r.other_bytes}});
    if (!result.indexers.empty()) rows.back()["indexers"] = result.indexers;
  }
  return rows;
}

std::string rows_csv(const BenchResult& result) {
  std::string out;
  for (const Json& row : rows_json(result)) {
    if (out.empty()) {
      for (const auto& [key, value] : row.items()) out += (out.empty() ? "" : ",") + key;
      out += "\n";
    }
    std::string line;
    for (const auto& [key, value] : row.items()) line += (line.empty() ? "" : ",") + value.dump();
    out += line + "\n";
  }
  return out;
}

std::string op_lines(const Profile& profile, double matmul_rate) {
  std::vector<std::pair<std::string, OpTime>> ops(profile.ops.begin(), profile.ops.end());
  std::sort(ops.begin(), ops.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  double total = 0;
  for (const auto& [name, time] : ops) total += time.seconds;
  std::string out = fmt::format("  {:<14}{:>8}{:>12}{:>8}{:>12}{:>12}{:>10}\n", "op", "calls",
                                "time", "share", "GFLOP/s", "of matmul", "GB/s");
  for (const auto& [name, time] : ops) {
    const double flops = time.cost.flops / time.seconds;
    out +=
        fmt::format("  {:<14}{:>8}{:>12}{:>7.1f}%{:>12.1f}{:>11.0f}%{:>10.2f}\n", name, time.calls,
                    format_seconds(time.seconds), 100 * time.seconds / total, flops / 1e9,
                    100 * flops / matmul_rate, time.cost.bytes / time.seconds / 1e9);
  }
  return out;
}

std::string rows_text(const BenchResult& result) {
  std::string out = fmt::format("{} on {} ({}); dense product {:.0f} GFLOP/s\n", result.model,
                                result.device, result.kernels, result.matmul_flops_per_s / 1e9);
  out += fmt::format("{:>9} {:>12} {:>11} {:>11} {:>9} {:>11} {:>9} {:>10} {:>10} {:>11} {:>11}\n",
                     "context", "plan", "prefill", "tokens/s", "indexer", "decode", "indexer",
                     "F layer", "S layer", "peak RSS", "other");
  out += fmt::format("{:>9} {:>12} {:>11} {:>11} {:>9} {:>11} {:>9} {:>10} {:>10} {:>11} {:>11}\n",
                     "tokens", "", "s", "", "%", "tokens/s", "%", "us/token", "us/token", "", "");
  for (const BenchRow& r : result.rows) {
    const std::string plan =
        r.plan.size() <= 12 ? r.plan : fmt::format("{}F of {}", r.num_full, r.plan.size());
    out += fmt::format(
        "{:>9} {:>12} {:>11.3f} {:>11.1f} {:>9.1f} {:>11.1f} {:>9.1f} {:>10.2f} {:>10.2f} {:>11} "
        "{:>11}\n",
        r.context, plan, r.prefill_s, static_cast<double>(r.context) / r.prefill_s,
        100 * r.indexer_share, r.decode_tok_s, 100 * r.decode_indexer_share, r.full_layer_us,
        r.shared_layer_us, format_bytes(r.peak_rss_bytes), format_bytes(r.other_bytes));
  }
  // Speed-up of the last plan over the first at each context.
  const size_t per_plan = result.rows.size() / result.ops.size();
  for (size_t p = 1; p < result.ops.size(); ++p) {
    out += fmt::format("{} over {}:", result.ops[p].plan, result.ops[0].plan);
    for (size_t i = 0; i < per_plan; ++i) {
      const BenchRow &base = result.rows[i], &row = result.rows[p * per_plan + i];
      out += fmt::format("  {} tokens: prefill {:.2f}x, decode {:.2f}x;", row.context,
                         base.prefill_s / row.prefill_s, row.decode_tok_s / base.decode_tok_s);
    }
    out += "\n";
  }
  for (const OpTable& table : result.ops) {
    out += fmt::format("prefill, plan {}\n{}", table.plan,
                       op_lines(table.prefill, result.matmul_flops_per_s));
    out += fmt::format("decode, plan {}\n{}", table.plan,
                       op_lines(table.decode, result.matmul_flops_per_s));
  }
  return out;
}

int bench(BenchFlags flags) {
  if (flags.shape.name.empty() == flags.common.model.empty())
    throw CLI::ValidationError("bench", "expected either -m or --synthetic");
  RunOptions options = run_options(flags.common);
  std::sort(flags.contexts.begin(), flags.contexts.end());
  flags.contexts.erase(std::unique(flags.contexts.begin(), flags.contexts.end()),
                       flags.contexts.end());
  if (flags.plans.empty()) flags.plans.push_back(options.plan.empty() ? "default" : options.plan);
  BenchResult result;
  result.model = flags.shape.name.empty() ? flags.common.model : flags.shape.name;
  ModelSource source;
  std::string default_plan;
  if (flags.shape.name.empty()) {
    source = open_model(flags.common.model);
  } else {
    default_plan = to_string(shape_config(flags.shape).index_plan);
    flags.shape.plan = "1/1";  // an indexer in every layer, so that any plan can be run
    source = synthetic_source(flags.shape);
  }
  // Every plan is checked before the first is timed.
  const LaidOver laid =
      lay_over(source.config, list_tensors(source.checkpoint), source.checkpoint.path, options);
  if (default_plan.empty() || laid.adapter) default_plan = to_string(laid.config.index_plan);
  for (std::string& plan : flags.plans) {
    options.plan = plan == "default" ? default_plan : plan == "all" ? "1/1" : plan;
    plan = to_string(plan_in_force(laid.config, laid.layer_has_indexer, options, laid.where));
  }
  if (laid.adapter) {
    result.indexers = options.indexers;
    info("indexers: {}, trained under {}", printable(options.indexers, 400), laid.adapter->plan);
  }
  info("seed {}, random tokens; weights {}", flags.seed,
       flags.shape.name.empty() ? "of the checkpoint" : "random");
  for (const std::string& plan : flags.plans) {
    options.plan = plan;
    bench_plan(source, flags, options, &result);
  }
  const std::string text = flags.json  ? rows_json(result).dump(2) + "\n"
                           : flags.csv ? rows_csv(result)
                                       : rows_text(result);
  if (!flags.output.empty()) {
    write_text_file(flags.output, text);
  } else {
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
  return 0;
}

}  // namespace

void add_bench_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* command = program->add_subcommand(
      "bench", "Measure prefill and decode at growing contexts for index plans");
  command->footer(
      "Example: indexcache bench --synthetic tiny --contexts 2048,8192,32768 --plans all,1/4\n"
      "prefill: seconds for a prompt of that length. F and S layer: microseconds a token of a full "
      "and of a\n"
      "shared layer for the newest tokens. other: peak RSS less weights and cache.");
  add_model_flag(command, &flags->common, false);
  add_run_flags(command, &flags->common);
  add_shape_flags(command, &flags->shape, "--synthetic");
  command->add_option("--contexts", flags->contexts, "Context lengths, tokens")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 24));
  command->add_option("--plans", flags->plans, "Index plans to compare: all, default, 1/4, FSSF...")
      ->delimiter(',');
  command->add_option("-n,--predict", flags->decode_tokens, "Tokens to decode at each context")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Seed of the random tokens")->capture_default_str();
  auto* json = command->add_flag("--json", flags->json, "An array of rows");
  command->add_flag("--csv", flags->csv, "Rows as CSV")->excludes(json);
  command->add_option("-o,--output", flags->output, "Write there in place of the standard output");
  command->callback([flags, exit_code] { *exit_code = bench(*flags); });
}

}  // namespace indexcache
