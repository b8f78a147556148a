#include "cli/report.h"

#include <algorithm>

#include "base/checked.h"
#include "base/log.h"

namespace indexcache {

namespace {

double per_second(double count, double seconds) { return seconds > 0 ? count / seconds : 0; }
double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

// Of mapped weights only what was touched is in memory.
std::string memory_line(const Engine& engine, int64_t num_tokens) {
  const uint64_t peak = peak_rss_bytes();
  if (engine.exec.device != Device::kCpu)
    return fmt::format("peak RSS {} beside what the GPU holds", format_bytes(peak));
  const uint64_t cache = static_cast<uint64_t>(engine.memory.cache_bytes_per_token *
                                               round_up(num_tokens, kPageTokens));
  const uint64_t weights = std::min(engine.memory.weights_bytes, file_rss_bytes());
  const uint64_t known = weights + cache;
  return fmt::format("peak RSS {} = weights {} + cache {} + {} other", format_bytes(peak),
                     format_bytes(weights), format_bytes(cache),
                     format_bytes(peak > known ? peak - known : 0));
}

}  // namespace

const char* cached_name(DType dtype) {
  return dtype == DType::kI8       ? "i8"
         : dtype == DType::kF8E4M3 ? "fp8"
         : dtype == DType::kBF16   ? "bf16"
                                   : "f32";
}

void print_engine(const Engine& engine) {
  const Model& model = engine.model;
  info("model: {}, {} layers, index_topk {}, {}, latent KV {}, indexer keys {}",
       model_type_name(model.config.model_type), model.config.num_hidden_layers,
       model.config.indexer.index_topk, compute_name(model.compute),
       cached_name(engine.cache.shape().dtype), cached_name(engine.cache.shape().indexer_dtype));
  info("plan: {} ({} full of {})", to_string(model.plan), model.plan.num_full(),
       model.plan.num_layers());
  if (engine.adapter) {
    info("indexers: {}, trained under {}", printable(engine.options.indexers, 400),
         engine.adapter->plan);
  }
  info(
      "memory: {} = weights {} + copies {} + cache {} ({} tokens, {} B each) + activations {}, "
      "of {} {}; {} threads",
      format_bytes(engine.memory.total()), format_bytes(engine.memory.weights_bytes),
      format_bytes(engine.memory.owned_bytes), format_bytes(engine.memory.cache_bytes),
      engine.memory.cache_tokens, engine.memory.cache_bytes_per_token,
      format_bytes(engine.memory.activation_bytes + engine.memory.workspace_bytes),
      format_bytes(engine.memory.available_bytes),
      engine.exec.device == Device::kCuda ? "free on the GPU" : "available",
      engine.exec.pool.num_threads());
}

void print_generation(const Engine& engine, const GenerateResult& result, int64_t cached_tokens) {
  const double decoded = static_cast<double>(result.tokens.size());
  const double steps = decoded > 0 ? decoded - 1 : 0;
  const std::string prefilled =
      result.prefill_tokens == result.prompt_tokens
          ? fmt::format("{}", result.prompt_tokens)
          : fmt::format("{} of {}", result.prefill_tokens, result.prompt_tokens);
  info("prefill: {} tokens in {} ({:.1f} tokens/s), indexer {:.1f}% of the time", prefilled,
       format_seconds(result.prefill_seconds),
       per_second(static_cast<double>(result.prefill_tokens), result.prefill_seconds),
       100 * share(result.prefill_times.indexer, result.prefill_times.total()));
  if (steps > 0) {
    info("decode: {} tokens in {} ({:.1f} tokens/s), indexer {:.1f}% of the time",
         static_cast<int64_t>(steps), format_seconds(result.decode_seconds),
         per_second(steps, result.decode_seconds),
         100 * share(result.decode_times.indexer, result.decode_times.total()));
  }
  switch (result.finish) {
    case GenerateResult::Finish::kInterrupted:
      info("stopped by Ctrl-C");
      break;
    case GenerateResult::Finish::kContextFull:
      info("stopped: the context of {} tokens is full", engine.memory.context);
      break;
    default:
      break;
  }
  info("{}", memory_line(engine, cached_tokens));
}

Json generation_json(const Engine& engine, const GenerateResult& result) {
  const char* finish[] = {"length", "stop", "interrupted", "context_full"};
  Json json = {
      {"tokens", result.tokens},
      {"finish_reason", finish[static_cast<int>(result.finish)]},
      {"plan", to_string(engine.model.plan)},
      {"prompt_tokens", result.prompt_tokens},
      {"prefill_tokens", result.prefill_tokens},
      {"prefill_s", result.prefill_seconds},
      {"decode_s", result.decode_seconds},
      {"prefill_indexer_share", share(result.prefill_times.indexer, result.prefill_times.total())},
      {"decode_indexer_share", share(result.decode_times.indexer, result.decode_times.total())},
      {"peak_rss_bytes", peak_rss_bytes()}};
  if (engine.adapter) json["indexers"] = engine.options.indexers;
  return json;
}

}  // namespace indexcache
