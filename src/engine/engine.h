// One model ready to run: weights, cache, threads and activations, and generation for one sequence.
//
// What is needed is planned before anything is loaded: too little memory is an Error that names the
// largest context that fits.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/indexer_adapter.h"
#include "engine/sampler.h"
#include "model/forward.h"

namespace indexcache {

enum class ComputeChoice { kAuto, kF32, kBF16, kFP8 };
// auto: e4m3 where Hopper's kernels take them (bf16 models), else in the cache's type.
enum class IndexerKeys { kAuto, kCacheType, kI8, kFp8 };
// Of the latent KV. auto: the type that products use.
enum class KvCacheType { kAuto, kFp8 };

struct RunOptions {
  Device device = Device::kCpu;
  int num_threads = 0;         // 0: all CPUs this process may use
  int64_t context = 0;         // tokens of a sequence; 0: max_position_embeddings, at most 4096
  int64_t cache_tokens = 0;    // that all sequences together may keep; 0: as many as `context`
  int64_t batch_tokens = 512;  // tokens of one forward pass of a prefill
  std::string plan;            // override; empty: what the indexers were trained under, or what the
                               // checkpoint says
  std::string indexers;        // an indexer adapter in place of the checkpoint's indexers
  bool force_plan = false;     // accept a plan file or indexers of another model
  bool dense = false;          // every query selects all that it sees: index_topk is the context
  ComputeChoice compute = ComputeChoice::kAuto;  // auto: f32 for an f32 checkpoint, else bf16
  IndexerKeys indexer_keys = IndexerKeys::kAuto;
  KvCacheType kv_cache = KvCacheType::kAuto;
  bool check_tensors = false;  // refuse a checkpoint with NaN or infinity
  std::map<std::string, std::string> forced_ops;
};

// Bytes by purpose, known before any weight is read.
struct MemoryPlan {
  uint64_t weights_bytes = 0;     // tensors in use, mapped from the files
  uint64_t owned_bytes = 0;       // transposed and dequantised copies
  uint64_t cache_bytes = 0;       // at `cache_tokens` tokens
  uint64_t activation_bytes = 0;  // at `batch_tokens`
  uint64_t workspace_bytes = 0;   // on a GPU: what ops take beside
  uint64_t available_bytes = 0;   // found by an Engine before it took any; 0: unknown
  int64_t cache_bytes_per_token = 0;
  int64_t context = 0;
  int64_t cache_tokens = 0;
  uint64_t total() const {
    return weights_bytes + owned_bytes + cache_bytes + activation_bytes + workspace_bytes;
  }
};

// Config and tensors, from a folder in the hub's layout or made in memory. Several engines, each
// with its own plan, may run on one.
struct ModelSource {
  ModelConfig config;
  Checkpoint checkpoint;
  bool in_memory =
      false;  // weights made in memory already have their place; mapped ones still need it
};

ModelSource open_model(const std::string& path);

// What a model is with the indexers of `options.indexers` laid over it, or as it is without them.
struct LaidOver {
  std::optional<IndexerAdapter> adapter;
  ModelConfig config;             // its plan is the adapter's
  std::vector<TensorSpec> specs;  // indexers are the adapter's
  std::vector<bool> layer_has_indexer;
  std::string where;  // brings the indexers; for errors
};

// `specs` and `where` are the checkpoint's. Error for indexers of another model, unless forced.
LaidOver lay_over(const ModelConfig& config, std::vector<TensorSpec> specs,
                  const std::string& where, const RunOptions& options);

// Every layer that has an indexer is full: an engine with this plan has the weights to run any plan
// that the indexers in force allow (Model::plan may be replaced by a narrower one between passes).
IndexPlan widest_plan(const ModelSource& source, const RunOptions& options);

struct Engine {
  Engine(const ModelSource& source,
         const RunOptions& options);  // the source must outlive the engine

  MemoryPlan memory;                      // first: planned before the model is bound
  std::optional<IndexerAdapter> adapter;  // behind the model's views
  Model model;
  RunOptions options;
  Exec exec;
  KvCache cache;
  Activations activations;
};

// The plan in force for `options.plan`; checked against the config and against the layers that have
// an indexer.
IndexPlan plan_in_force(const ModelConfig& config, const std::vector<bool>& layer_has_indexer,
                        const RunOptions& options, const std::string& where);
// kFP8 is an Error without a GPU or without fp8 matrices.
Compute resolve_compute(const std::vector<TensorSpec>& specs, const RunOptions& options);
// What the cache holds. Error for fp8 latents of a model whose kv_lora_rank has no whole blocks.
CacheTypes cache_types(const ModelConfig& config, Compute compute, const RunOptions& options);
MemoryPlan plan_memory(const ModelConfig& config, const std::vector<TensorSpec>& specs,
                       const IndexPlan& plan, Compute compute, const RunOptions& options);

// From now on the bits of a token do not depend on what it is computed with. Error on a GPU, whose
// products choose their kernel by the number of rows.
void make_batch_invariant(Engine& engine);

// Whether step number `step` of decoding is one whose parts are timed. On a GPU a timed step is not
// a recorded graph and takes longer, so one in kTimedSteps stands for all.
inline constexpr int64_t kTimedSteps = 16;
inline bool is_timed_step(const Engine& engine, int64_t step) {
  return engine.exec.device == Device::kCpu || step % kTimedSteps == 0;
}

// Runs `tokens` through the model in chunks of at most `options.batch_tokens`, appending to
// `sequence`. Writes the last token's logits, or all of them when `all_logits` is set. Stops early,
// between chunks, when `stop` becomes true. Error when the context is full.
struct PrefillHooks {
  const ForwardTap* tap = nullptr;
  ForwardTimes* times = nullptr;
  const std::atomic<bool>* stop = nullptr;
  std::function<void(int64_t done)> progress;
  // Called after each chunk with its first token's index in `tokens` and the logits of its rows
  // (`all_logits` only).
  std::function<void(int64_t first, std::span<const float> logits)> chunk_logits;
};
// Returns the number of tokens done.
int64_t prefill(Engine& engine, SequenceCache& sequence, std::span<const int32_t> tokens,
                std::vector<float>* last_logits, const PrefillHooks& hooks = {});

struct GenerateOptions {
  int64_t max_tokens = 128;
  SamplingParams sampling;
  std::vector<int32_t> stop_tokens;         // generation ends before one of these is given out
  const std::atomic<bool>* stop = nullptr;  // Ctrl-C
  std::function<void(int32_t token)> on_token;
  std::function<void(int64_t done, int64_t total)> on_prefill;
};

struct GenerateResult {
  std::vector<int32_t> tokens;
  int64_t prompt_tokens = 0;
  int64_t prefill_tokens = 0;  // fewer where Ctrl-C came before the prompt's end
  double prefill_seconds = 0;
  double decode_seconds = 0;                 // of tokens after the first
  ForwardTimes prefill_times, decode_times;  // of decoding the steps that are timed
  enum class Finish { kLength, kStopToken, kInterrupted, kContextFull } finish = Finish::kLength;
};

// Continues `sequence` with the prompt, then token by token. The cache keeps prompt and answer.
GenerateResult generate(Engine& engine, SequenceCache& sequence, std::span<const int32_t> prompt,
                        const GenerateOptions& options);

}  // namespace indexcache
