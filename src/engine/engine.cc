#include "engine/engine.h"

#include <algorithm>

#include "base/checked.h"
#include "base/log.h"
#include "checkpoint/nonfinite.h"
#include "device/gpus.h"
#include "ops/index_select/index_select_cuda.h"
#include "plan/plan_file.h"

namespace indexcache {

namespace {

constexpr int64_t kDefaultContext = 4096;
constexpr int64_t kMaxCacheTokens = int64_t{1} << 36;  // pages are counted in 31 bits

int64_t resolve_context(const ModelConfig& config, int64_t wanted) {
  if (wanted == 0) return std::min(config.max_position_embeddings, kDefaultContext);
  if (wanted < 1 || wanted > config.max_position_embeddings) {
    fail("a context of {} tokens was asked for, expected 1 to {} (max_position_embeddings)", wanted,
         config.max_position_embeddings);
  }
  return wanted;
}

int64_t resolve_cache_tokens(int64_t wanted, int64_t context) {
  if (wanted == 0) return context;
  if (wanted < 1 || wanted > kMaxCacheTokens) {
    fail("a cache of {} tokens was asked for, expected 1 to {}", wanted, kMaxCacheTokens);
  }
  return wanted;
}

// Mapped weights need no memory of their own to start, but without them in memory every token reads
// the disk.
void check_memory(MemoryPlan& plan, bool weights_in_memory, Device device) {
  const bool gpu = device == Device::kCuda;
  uint64_t available = gpu ? cuda_free_bytes() : available_memory_bytes();
  plan.available_bytes = available;
  if (available == 0 && !gpu) return;
  if (weights_in_memory && !gpu) available += plan.weights_bytes;
  if (plan.total() <= available) return;
  const uint64_t fixed = plan.total() - plan.cache_bytes;
  const int64_t fits =
      fixed >= available ? 0
                         : static_cast<int64_t>((available - fixed) /
                                                static_cast<uint64_t>(plan.cache_bytes_per_token));
  fail(
      "needs {} (weights {}, copies {}, cache {} for {} tokens, activations {}), found {} "
      "{}; {}",
      format_bytes(plan.total()), format_bytes(plan.weights_bytes), format_bytes(plan.owned_bytes),
      format_bytes(plan.cache_bytes), plan.cache_tokens,
      format_bytes(plan.activation_bytes + plan.workspace_bytes), format_bytes(available),
      gpu ? "free on the GPU" : "available",
      fits > 0 ? fmt::format("the largest {} that fits is {} tokens",
                             plan.cache_tokens == plan.context ? "context" : "cache",
                             fits / kPageTokens * kPageTokens)
               : std::string("no context fits"));
}

std::string other_model(const IndexerAdapter& adapter, const ModelConfig& config) {
  return fmt::format("{}: \"model_fingerprint\" is {}, this model's is {}",
                     printable(adapter.tensors.path, 400), printable(adapter.model_fingerprint),
                     config.fingerprint);
}

}  // namespace

Compute resolve_compute(const std::vector<TensorSpec>& specs, const RunOptions& options) {
  if (options.compute == ComputeChoice::kF32) return Compute::kF32;
  if (options.compute == ComputeChoice::kBF16) return Compute::kBF16;
  if (options.compute == ComputeChoice::kFP8) {
    if (options.device != Device::kCuda)
      fail("fp8 products were asked for on the CPU, expected a GPU (--device cuda)");
    const auto is_fp8 = [](const TensorSpec& spec) { return spec.dtype == DType::kF8E4M3; };
    if (std::ranges::none_of(specs, is_fp8))
      fail(
          "fp8 products were asked for, but the checkpoint has no fp8 matrix: expected weights "
          "in e4m3 with scales of 128x128 blocks");
    return Compute::kFP8;
  }
  for (const TensorSpec& spec : specs) {
    if (spec.name == "model.layers.0.self_attn.q_a_proj.weight" && spec.dtype == DType::kF32)
      return Compute::kF32;
  }
  return Compute::kBF16;
}

namespace {

DType indexer_dtype(const ModelConfig& config, Compute compute, const RunOptions& options) {
  const IndexerConfig& indexer = config.indexer;
  switch (options.indexer_keys) {
    case IndexerKeys::kI8:
      return DType::kI8;
    case IndexerKeys::kFp8:
      return DType::kF8E4M3;
    case IndexerKeys::kCacheType:
      return cache_dtype(compute);
    case IndexerKeys::kAuto:
      break;
  }
  const bool hopper =
      options.device == Device::kCuda && compute != Compute::kF32 && first_gpu_is_hopper() &&
      index_select_hopper_takes(indexer.index_n_heads, indexer.index_head_dim, indexer.index_topk);
  return hopper ? DType::kF8E4M3 : cache_dtype(compute);
}

}  // namespace

CacheTypes cache_types(const ModelConfig& config, Compute compute, const RunOptions& options) {
  CacheTypes types{cache_dtype(compute), indexer_dtype(config, compute, options)};
  if (options.kv_cache == KvCacheType::kAuto) return types;
  if (const int64_t rank = config.attention.kv_lora_rank; rank % kFp8Block != 0) {
    fail("fp8 latent KV was asked for, but kv_lora_rank is {}, expected a multiple of {}", rank,
         kFp8Block);
  }
  types.latent = DType::kF8E4M3;
  return types;
}

IndexPlan plan_in_force(const ModelConfig& config, const std::vector<bool>& layer_has_indexer,
                        const RunOptions& options, const std::string& where) {
  IndexPlan plan = config.index_plan;
  if (!options.plan.empty()) {
    plan =
        resolve_plan(options.plan, static_cast<int>(config.num_hidden_layers), config.fingerprint,
                     options.force_plan ? FingerprintCheck::kForce : FingerprintCheck::kRequire);
  }
  check_indexer_weights(plan, layer_has_indexer, printable(where));
  return plan;
}

MemoryPlan plan_memory(const ModelConfig& config, const std::vector<TensorSpec>& specs,
                       const IndexPlan& plan, Compute compute, const RunOptions& options) {
  MemoryPlan memory;
  memory.context = resolve_context(config, options.context);
  memory.cache_tokens = resolve_cache_tokens(options.cache_tokens, memory.context);
  const int64_t pages = ceil_div(memory.cache_tokens, kPageTokens);
  const CacheTypes types = cache_types(config, compute, options);
  memory.cache_bytes_per_token = cache_bytes_per_token(cache_shape(config, plan, types, pages));
  memory.cache_bytes = static_cast<uint64_t>(memory.cache_bytes_per_token * pages * kPageTokens);
  const int64_t batch_tokens = std::min(options.batch_tokens, memory.context);
  memory.activation_bytes = activation_bytes(config, batch_tokens, options.device);
  if (options.device == Device::kCuda)
    memory.workspace_bytes =
        gpu_workspace_bytes(config, types.indexer_keys, batch_tokens, memory.context);
  memory.weights_bytes = used_weight_bytes(specs, config, plan);
  memory.owned_bytes = owned_weight_bytes(specs, config, compute);
  return memory;
}

namespace {

Model bind_model(const ModelSource& source, const RunOptions& options, MemoryPlan* memory,
                 std::optional<IndexerAdapter>* adapter) {
  if (options.batch_tokens < 1)
    fail("a batch of {} tokens was asked for, expected at least 1", options.batch_tokens);
  if (options.device == Device::kCuda) {
    if (const std::string why = cuda_unavailable_reason(); !why.empty())
      fail("--device cuda: {}", why);
  }
  LaidOver laid =
      lay_over(source.config, list_tensors(source.checkpoint), source.checkpoint.path, options);
  *adapter = std::move(laid.adapter);
  const IndexerAdapter* indexers = adapter->has_value() ? &**adapter : nullptr;
  if (indexers != nullptr && indexers->model_fingerprint != source.config.fingerprint)
    warn("{}; used all the same, as asked", other_model(*indexers, source.config));
  Model model;
  model.config = std::move(laid.config);
  if (options.dense)
    model.config.indexer.index_topk = resolve_context(model.config, options.context);
  model.plan = plan_in_force(model.config, laid.layer_has_indexer, options, laid.where);
  model.compute = resolve_compute(laid.specs, options);
  *memory = plan_memory(model.config, laid.specs, model.plan, model.compute, options);
  check_memory(*memory, source.in_memory, options.device);
  if (options.check_tensors) {
    check_finite(source.checkpoint);
    if (indexers != nullptr) check_finite(indexers->tensors);
  }
  model.weights =
      bind_weights(source.checkpoint, model.config, model.plan, model.compute, indexers);
  return model;
}

}  // namespace

ModelSource open_model(const std::string& path) {
  return {load_config(path), Checkpoint::open(path)};
}

LaidOver lay_over(const ModelConfig& config, std::vector<TensorSpec> specs,
                  const std::string& where, const RunOptions& options) {
  LaidOver laid;
  laid.config = config;
  laid.where = where;
  if (options.indexers.empty()) {
    laid.layer_has_indexer = layers_with_indexer(specs, config);
    laid.specs = std::move(specs);
    return laid;
  }
  laid.adapter = open_indexer_adapter(options.indexers);
  laid.where = options.indexers;
  if (laid.adapter->model_fingerprint != config.fingerprint && !options.force_plan)
    fail("{}, expected indexers of this model", other_model(*laid.adapter, config));
  // What the file says that it brings: that it does is checked, tensor by tensor, as it is bound.
  laid.config.index_plan = adapter_plan(*laid.adapter, static_cast<int>(config.num_hidden_layers));
  for (int layer = 0; layer < laid.config.index_plan.num_layers(); ++layer)
    laid.layer_has_indexer.push_back(laid.config.index_plan.is_full(layer));
  laid.specs = with_adapter(std::move(specs), *laid.adapter, config);
  return laid;
}

IndexPlan widest_plan(const ModelSource& source, const RunOptions& options) {
  const LaidOver laid =
      lay_over(source.config, list_tensors(source.checkpoint), source.checkpoint.path, options);
  std::string letters;
  for (const bool full : laid.layer_has_indexer) letters += full ? 'F' : 'S';
  return plan_from_string(letters, static_cast<int>(letters.size()),
                          printable(laid.where) + ": layers with an indexer");
}

Engine::Engine(const ModelSource& source, const RunOptions& options_in)
    : model(bind_model(source, options_in, &memory, &adapter)),
      options(options_in),
      exec(options.num_threads > 0 ? options.num_threads : num_usable_cpus(), options.device),
      cache(cache_shape(model.config, model.plan, cache_types(model.config, model.compute, options),
                        ceil_div(memory.cache_tokens, kPageTokens)),
            options.device),
      activations(model.config, std::min(options.batch_tokens, memory.context), options.device) {
  exec.forced = options.forced_ops;
  if (options.device == Device::kCuda) move_to_gpu(exec, &model.weights);
}

int64_t prefill(Engine& engine, SequenceCache& sequence, std::span<const int32_t> tokens,
                std::vector<float>* last_logits, const PrefillHooks& hooks) {
  const int64_t total = static_cast<int64_t>(tokens.size()), vocab = engine.model.config.vocab_size;
  if (sequence.num_tokens + total > engine.memory.context ||
      !engine.cache.reserve(sequence, sequence.num_tokens + total)) {
    const bool widest = engine.memory.context == engine.model.config.max_position_embeddings;
    fail("the input has {} tokens after {} in the context, which holds {}{}", total,
         sequence.num_tokens, engine.memory.context,
         widest ? ", the model's max_position_embeddings" : "; a larger -c/--ctx makes room");
  }
  std::vector<float> rows;
  int64_t done = 0;
  while (done < total && !(hooks.stop != nullptr && *hooks.stop)) {
    const int64_t count = std::min(total - done, engine.activations.max_tokens);
    const bool last = done + count == total;
    BatchSequence batch{&sequence,
                        tokens.subspan(static_cast<size_t>(done), static_cast<size_t>(count)),
                        hooks.chunk_logits ? count : (last ? 1 : 0)};
    rows.resize(static_cast<size_t>(batch.num_logits * vocab));
    forward(engine.exec, engine.model, engine.cache, engine.activations, {&batch, 1}, rows.data(),
            hooks.tap, hooks.times);
    if (hooks.chunk_logits) hooks.chunk_logits(done, rows);
    done += count;
    if (last && last_logits != nullptr) last_logits->assign(rows.end() - vocab, rows.end());
    if (hooks.progress) hooks.progress(done);
  }
  return done;
}

GenerateResult generate(Engine& engine, SequenceCache& sequence, std::span<const int32_t> prompt,
                        const GenerateOptions& options) {
  check_sampling_params(options.sampling);
  if (prompt.empty()) fail("the prompt has no tokens, expected at least 1");
  GenerateResult result;
  result.prompt_tokens = static_cast<int64_t>(prompt.size());
  Sampler sampler(options.sampling);
  std::vector<float> logits;
  auto interrupted = [&] { return options.stop != nullptr && *options.stop; };

  double start = monotonic_seconds();
  PrefillHooks hooks{.times = &result.prefill_times, .stop = options.stop};
  if (options.on_prefill) {
    hooks.progress = [&](int64_t done) { options.on_prefill(done, result.prompt_tokens); };
  }
  result.prefill_tokens = prefill(engine, sequence, prompt, &logits, hooks);
  result.prefill_seconds = monotonic_seconds() - start;

  start = monotonic_seconds();
  while (static_cast<int64_t>(result.tokens.size()) < options.max_tokens) {
    if (interrupted()) {
      result.finish = GenerateResult::Finish::kInterrupted;
      break;
    }
    const int32_t token = sampler.next(logits);
    if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) !=
        options.stop_tokens.end()) {
      result.finish = GenerateResult::Finish::kStopToken;
      break;
    }
    result.tokens.push_back(token);
    if (options.on_token) options.on_token(token);
    if (static_cast<int64_t>(result.tokens.size()) == options.max_tokens) break;
    if (sequence.num_tokens + 1 > engine.memory.context) {
      result.finish = GenerateResult::Finish::kContextFull;
      break;
    }
    const bool timed = is_timed_step(engine, std::ssize(result.tokens));
    prefill(engine, sequence, {&token, 1}, &logits,
            {.times = timed ? &result.decode_times : nullptr});
  }
  result.decode_seconds = monotonic_seconds() - start;
  return result;
}

void make_batch_invariant(Engine& engine) {
  if (engine.exec.device == Device::kCuda)
    fail(
        "--deterministic with --device cuda: products on a GPU depend on what else is in the "
        "batch, expected --device cpu");
  engine.exec.batch_invariant = true;
}

}  // namespace indexcache
