// indexcache bench: prefill time, decode rate and the indexer's share at growing contexts, for each
// index plan.
//
// One pass per plan: the prompt grows from frontier to frontier, so the prefill time of a context
// is what a prompt of that length takes; at each frontier some tokens are decoded and taken back.
// Per-layer times are of the newest tokens alone, which is where a cost that grows with the context
// shows.
//
// A batch is decoded with copies of the prompt's cache, each in pages of its own as distinct
// prompts would be, so nothing is prefilled twice and no sequence finds the rows of another in a
// cache of the chip.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>

#include "base/atomic_file.h"
#include "base/checked.h"
#include "base/json.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/report_page.h"
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
  int64_t max_batch = 1;
  uint64_t seed = 1;
  bool json = false, csv = false;
  std::string output, ops_output;
};

struct BenchRow {
  int64_t context = 0;
  std::string plan;
  int num_full = 0;
  double prefill_s = 0, decode_tok_s = 0, indexer_share = 0, decode_indexer_share = 0;
  // Of the newest tokens before the frontier, microseconds a token and layer; 0 where the plan has
  // no such layer.
  double full_layer_us = 0, shared_layer_us = 0;
  // Of so many sequences of that context at once, tokens of all of them.
  int64_t batch = 1;
  double batch_tok_s = 0, batch_indexer_share = 0;
  uint64_t peak_rss_bytes = 0, other_bytes = 0;
};

// Times of ops at one context: of the tokens that were prefilled since the context before (on a
// GPU, where the clock of an op waits, of the newest of them once more), and of decoding.
struct OpTable {
  std::string plan;
  int64_t context = 0;
  Profile prefill, decode, batch;
};

struct BenchResult {
  std::string model, indexers, device, kernels;
  std::vector<BenchRow> rows;
  std::vector<OpTable> ops;
  double matmul_flops_per_s = 0;
};

// What this machine's threads reach on a large dense product in the type of the run: the rate that
// kernels are held against.
double measure_matmul_rate(Engine& engine) {
  const bool gpu = engine.exec.device == Device::kCuda;
  const int64_t m = gpu ? 8192 : 512, k = gpu ? 4096 : 2048, n = 4096;
  Rng rng(1);
  std::vector<float> x(static_cast<size_t>(m * k)), y(static_cast<size_t>(m * n));
  std::vector<uint8_t> w(static_cast<size_t>(n * k * 4));
  for (float& value : x) value = rng.normal();
  const bool bf16 = engine.model.compute != Compute::kF32;
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
  if (gpu) {
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
    best = std::max(best, 2 * static_cast<double>(m * k * n) / (monotonic_seconds() - start));
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

int64_t tokens_in_pages(int64_t tokens) { return round_up(tokens, kPageTokens); }

// Cache for `max_batch` sequences of each context, or as much of it as memory allows.
int64_t cache_tokens_for(const ModelSource& source, const BenchFlags& flags,
                         const RunOptions& options) {
  const int64_t one = tokens_in_pages(options.context);
  int64_t wanted = one;
  for (const int64_t context : flags.contexts) {
    const int64_t most = std::min(context + flags.decode_tokens, options.context);
    wanted = std::max(wanted, flags.max_batch * tokens_in_pages(most));
  }
  if (flags.max_batch == 1) return one;
  const LaidOver laid =
      lay_over(source.config, list_tensors(source.checkpoint), source.checkpoint.path, options);
  const IndexPlan plan = plan_in_force(laid.config, laid.layer_has_indexer, options, laid.where);
  const MemoryPlan memory =
      plan_memory(laid.config, laid.specs, plan, resolve_compute(laid.specs, options), options);
  // What libraries take beside.
  constexpr uint64_t kSpare = uint64_t{2} << 30;
  const bool gpu = options.device == Device::kCuda;
  const uint64_t needed =
      memory.total() - (source.in_memory && !gpu ? memory.weights_bytes : 0) + kSpare;
  const uint64_t available = gpu ? cuda_free_bytes() : available_memory_bytes();
  if (available <= needed) return one;
  const auto more = static_cast<int64_t>((available - needed) /
                                         static_cast<uint64_t>(memory.cache_bytes_per_token));
  return std::min(wanted, one + more / kPageTokens * kPageTokens);
}

// Decodes some tokens of `sequence` and of copies of it at once, tokens of each its own.
class BatchDecoder {
 public:
  // As many as fit, at most `batch`.
  BatchDecoder(Engine& engine, SequenceCache& sequence, int64_t batch, int64_t steps,
               std::span<const int32_t> tokens)
      : engine_(engine),
        prompt_(sequence.num_tokens),
        // At the model's last positions there is room for the steps only a little earlier.
        context_(std::min(prompt_, engine.memory.context - steps)),
        steps_(steps),
        tokens_(tokens),
        sequence_(sequence) {
    CHECK(engine_.cache.reserve(sequence, context_ + steps_));  // planned for
    const auto pages = static_cast<size_t>(ceil_div(context_, kPageTokens));
    const std::span<const int32_t> from = std::span(sequence.pages).first(pages);
    while (size() < std::min(batch, engine.activations.max_tokens)) {
      SequenceCache copy;
      if (!engine_.cache.reserve(copy, context_ + steps_)) break;
      engine_.cache.copy_pages(engine_.exec, from, std::span(copy.pages).first(pages));
      copies_.push_back(std::move(copy));
    }
    logits_.resize(static_cast<size_t>(size() * engine.model.config.vocab_size));
    engine_.exec.wait();
  }
  ~BatchDecoder() {
    for (SequenceCache& copy : copies_) engine_.cache.release(copy);
    sequence_.num_tokens = prompt_;
  }
  int64_t size() const { return 1 + std::ssize(copies_); }
  BatchDecoder(const BatchDecoder&) = delete;
  BatchDecoder& operator=(const BatchDecoder&) = delete;

  // Seconds.
  double run(ForwardTimes* times) {
    std::vector<SequenceCache*> sequences = {&sequence_};
    for (SequenceCache& copy : copies_) sequences.push_back(&copy);
    for (SequenceCache* sequence : sequences) sequence->num_tokens = context_;
    const double start = monotonic_seconds();
    for (int64_t step = 0; step < steps_; ++step) {
      std::vector<BatchSequence> batch;
      for (size_t i = 0; i < sequences.size(); ++i) {
        const size_t token = (i * 997 + static_cast<size_t>(step)) % tokens_.size();
        batch.push_back({sequences[i], tokens_.subspan(token, 1), 1});
      }
      forward(engine_.exec, engine_.model, engine_.cache, engine_.activations, batch,
              logits_.data(), nullptr, times);
    }
    engine_.exec.wait();
    return monotonic_seconds() - start;
  }

 private:
  Engine& engine_;
  int64_t prompt_, context_, steps_;
  std::span<const int32_t> tokens_;
  SequenceCache& sequence_;
  std::vector<SequenceCache> copies_;
  std::vector<float> logits_;
};

// Rate and the indexer's share; times of ops in a run of their own, where their clock would be in
// the way.
void time_decoding(Engine& engine, BatchDecoder& decoder, int64_t tokens, Profile* profile,
                   double* tok_s, double* indexer_share) {
  const bool gpu = engine.exec.device == Device::kCuda;
  engine.exec.profile = gpu ? nullptr : profile;
  if (gpu) decoder.run(nullptr);  // whatever is set up at first use
  ForwardTimes times;
  *tok_s = static_cast<double>(tokens) / decoder.run(gpu ? nullptr : &times);
  if (gpu) {
    decoder.run(&times);
    engine.exec.profile = profile;
    decoder.run(nullptr);
  }
  engine.exec.profile = nullptr;
  *indexer_share = times.indexer / times.total();
}

// The rows of one plan.
void bench_plan(const ModelSource& source, const BenchFlags& flags, RunOptions options,
                BenchResult* result) {
  const int64_t longest = flags.contexts.back();
  options.context = std::max(
      longest, std::min(longest + flags.decode_tokens, source.config.max_position_embeddings));
  options.cache_tokens = cache_tokens_for(source, flags, options);
  // VmHWM must be this plan's own; where the kernel does not allow it, the figure covers the plans
  // before too.
  std::ofstream("/proc/self/clear_refs") << "5";
  Engine engine(source, options);
  result->device = hardware_name(options.device);
  result->kernels = kernel_names(options.device);
  if (result->matmul_flops_per_s == 0) result->matmul_flops_per_s = measure_matmul_rate(engine);
  const bool gpu = options.device == Device::kCuda;
  const std::vector<int32_t> tokens =
      flags.shape.similar
          ? topical_tokens(longest + flags.decode_tokens, source.config.vocab_size, flags.seed)
          : random_tokens(longest + flags.decode_tokens, source.config.vocab_size, flags.seed);
  const std::span<const int32_t> all(tokens);

  SequenceCache warm;
  const int64_t warm_tokens = std::min(longest, gpu ? engine.options.batch_tokens : 64);
  prefill(engine, warm, all.first(static_cast<size_t>(warm_tokens)), nullptr);
  engine.cache.release(warm);

  const std::string plan = to_string(engine.model.plan);
  Progress progress("bench " + plan, longest, "tokens");
  SequenceCache sequence;
  double prefill_seconds = 0;
  ForwardTimes times;
  int64_t done = 0;
  for (const int64_t context : flags.contexts) {
    BenchRow row{.context = context, .plan = plan, .num_full = engine.model.plan.num_full()};
    OpTable ops{.plan = plan, .context = context};
    // The newest tokens: the last two forward passes before the frontier, or all there are.
    const int64_t newest = std::min(2 * engine.options.batch_tokens, context - done);
    std::vector<double> before;
    engine.exec.profile = gpu ? nullptr : &ops.prefill;
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

    if (gpu) {
      sequence.num_tokens = context - newest;
      engine.exec.profile = &ops.prefill;
      prefill(engine, sequence,
              all.subspan(static_cast<size_t>(context - newest), static_cast<size_t>(newest)),
              nullptr);
      engine.exec.profile = nullptr;
    }

    {
      BatchDecoder decoder(engine, sequence, 1, flags.decode_tokens, all);
      time_decoding(engine, decoder, flags.decode_tokens, &ops.decode, &row.decode_tok_s,
                    &row.decode_indexer_share);
      row.batch_tok_s = row.decode_tok_s;
      row.batch_indexer_share = row.decode_indexer_share;
    }
    if (flags.max_batch > 1) {
      BatchDecoder decoder(engine, sequence, flags.max_batch, flags.decode_tokens, all);
      row.batch = decoder.size();
      if (row.batch > 1)
        time_decoding(engine, decoder, row.batch * flags.decode_tokens, &ops.batch,
                      &row.batch_tok_s, &row.batch_indexer_share);
    }

    row.peak_rss_bytes = peak_rss_bytes();
    const uint64_t known = engine.memory.weights_bytes +
                           static_cast<uint64_t>(engine.memory.cache_bytes_per_token * context);
    row.other_bytes = row.peak_rss_bytes > known ? row.peak_rss_bytes - known : 0;
    result->rows.push_back(row);
    result->ops.push_back(std::move(ops));
  }
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
                    {"batch", r.batch},
                    {"batch_tok_s", r.batch_tok_s},
                    {"batch_indexer_share", r.batch_indexer_share},
                    {"full_layer_us", r.full_layer_us},
                    {"shared_layer_us", r.shared_layer_us},
                    {"peak_rss_bytes", r.peak_rss_bytes},
                    {"other_bytes", r.other_bytes}});
    if (!result.indexers.empty()) rows.back()["indexers"] = result.indexers;
  }
  return rows;
}

// With the command, for the report.
Json report_json(const BenchResult& result) {
  Json rows = rows_json(result);
  for (Json& row : rows) row["command"] = command_line();
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

// One line for each op of each context and plan.
std::string ops_csv(const BenchResult& result) {
  std::string out = "plan,context,phase,op,calls,seconds,share,tflop_s,gb_s\n";
  for (const OpTable& table : result.ops) {
    const std::pair<const char*, const Profile*> phases[] = {
        {"prefill", &table.prefill}, {"decode", &table.decode}, {"batch", &table.batch}};
    for (const auto& [phase, profile] : phases) {
      double total = 0;
      for (const auto& [name, time] : profile->ops) total += time.seconds;
      for (const auto& [name, time] : profile->ops) {
        out += fmt::format("{},{},{},{},{},{:.6f},{:.4f},{:.3f},{:.1f}\n", table.plan,
                           table.context, phase, name, time.calls, time.seconds,
                           time.seconds / total, time.cost.flops / time.seconds / 1e12,
                           time.cost.bytes / time.seconds / 1e9);
      }
    }
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
  constexpr const char* kHeading =
      "{:>9} {:>12} {:>11} {:>11} {:>9} {:>11} {:>9} {:>6} {:>11} {:>9} {:>10} {:>10} {:>11} "
      "{:>11}\n";
  out += fmt::format(kHeading, "context", "plan", "prefill", "tokens/s", "indexer", "decode",
                     "indexer", "batch", "decode", "indexer", "F layer", "S layer", "peak RSS",
                     "other");
  out += fmt::format(kHeading, "tokens", "", "s", "", "%", "tokens/s", "%", "", "tokens/s", "%",
                     "us/token", "us/token", "", "");
  for (const BenchRow& r : result.rows) {
    const std::string plan =
        r.plan.size() <= 12 ? r.plan : fmt::format("{}F of {}", r.num_full, r.plan.size());
    out += fmt::format(
        "{:>9} {:>12} {:>11.3f} {:>11.1f} {:>9.1f} {:>11.1f} {:>9.1f} {:>6} {:>11.1f} {:>9.1f} "
        "{:>10.2f} {:>10.2f} {:>11} {:>11}\n",
        r.context, plan, r.prefill_s, static_cast<double>(r.context) / r.prefill_s,
        100 * r.indexer_share, r.decode_tok_s, 100 * r.decode_indexer_share, r.batch, r.batch_tok_s,
        100 * r.batch_indexer_share, r.full_layer_us, r.shared_layer_us,
        format_bytes(r.peak_rss_bytes), format_bytes(r.other_bytes));
  }
  // Speed-up of the plans over the first at each context.
  const auto differs = [&](const BenchRow& r) { return r.plan != result.rows[0].plan; };
  const auto per_plan =
      std::find_if(result.rows.begin(), result.rows.end(), differs) - result.rows.begin();
  for (auto i = static_cast<size_t>(per_plan); i < result.rows.size(); ++i) {
    const BenchRow &row = result.rows[i], &base = result.rows[i % static_cast<size_t>(per_plan)];
    out += fmt::format(
        "{} over {} at {} tokens: prefill {:.2f}x, decode {:.2f}x, batch of {} {:.2f}x\n", row.plan,
        base.plan, row.context, base.prefill_s / row.prefill_s,
        row.decode_tok_s / base.decode_tok_s, row.batch, row.batch_tok_s / base.batch_tok_s);
  }
  for (const OpTable& table : result.ops) {
    if (table.context != result.rows.back().context) continue;
    const std::pair<const char*, const Profile*> phases[] = {{"prefill", &table.prefill},
                                                             {"decode", &table.decode},
                                                             {"decode of a batch", &table.batch}};
    for (const auto& [phase, profile] : phases) {
      if (profile->ops.empty()) continue;
      out += fmt::format("{} at {} tokens, plan {}\n{}", phase, table.context, table.plan,
                         op_lines(*profile, result.matmul_flops_per_s));
    }
  }
  return out;
}

int bench(BenchFlags flags) {
  if (flags.shape.name.empty() == flags.common.model.empty())
    throw CLI::ValidationError("bench", "expected either -m or --synthetic");
  RunOptions options = run_options(flags.common);
  check_can_write({flags.output, flags.ops_output});
  std::sort(flags.contexts.begin(), flags.contexts.end());
  flags.contexts.erase(std::unique(flags.contexts.begin(), flags.contexts.end()),
                       flags.contexts.end());
  if (flags.decode_tokens >= flags.contexts.front())
    fail("-n {}: found a context of {} tokens, expected more than that", flags.decode_tokens,
         flags.contexts.front());
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
  info("seed {}, random tokens{}; weights {}", flags.seed,
       flags.shape.similar ? " in runs of one topic" : "",
       flags.shape.name.empty() ? "of the checkpoint" : "random");
  for (const std::string& plan : flags.plans) {
    options.plan = plan;
    bench_plan(source, flags, options, &result);
  }
  if (!flags.ops_output.empty()) write_text_file(flags.ops_output, ops_csv(result));
  const std::string text = flags.json  ? report_json(result).dump(2) + "\n"
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
  command
      ->add_option("--max-batch", flags->max_batch,
                   "Decode as many sequences at once as memory holds, at most this many")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_flag("--similar", flags->shape.similar,
                    "With --synthetic: weights whose layers select nearly the same tokens, and "
                    "tokens in runs of one topic, as trained models and texts have");
  command->add_option("--ops-output", flags->ops_output, "Write times of every op there, as CSV");
  command->add_option("--seed", flags->seed, "Seed of the random tokens")->capture_default_str();
  auto* json = command->add_flag("--json", flags->json, "An array of rows");
  command->add_flag("--csv", flags->csv, "Rows as CSV")->excludes(json);
  command->add_option("-o,--output", flags->output, "Write there in place of the standard output");
  command->callback([flags, exit_code] { *exit_code = bench(*flags); });
}

}  // namespace indexcache
