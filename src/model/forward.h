// The forward pass of a DSA model under an index plan: prefill in chunks and decode are the same
// code over a ragged batch.
//
// Each sequence of the batch brings new tokens that continue what its cache holds. Shapes use T =
// tokens of the batch. Scores of the indexer are never stored: memory is O(T), whatever the
// context.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "cache/kv_cache.h"
#include "model/weights.h"
#include "ops/kit/exec.h"
#include "ops/rope/rope_table.h"

namespace indexcache {

// A model bound to an index plan. The views in `weights` point into a checkpoint that outlives it.
struct Model {
  ModelConfig config;
  IndexPlan plan;
  Compute compute = Compute::kF32;
  Weights weights;
};

// The cache type that goes with a compute type.
DType cache_dtype(Compute compute);
struct CacheTypes {
  DType latent = DType::kF32;  // kF32, kBF16, or kF8E4M3 (kv_lora_rank a multiple of 128)
  DType indexer_keys = DType::kF32;
};
KvCacheShape cache_shape(const ModelConfig& config, const IndexPlan& plan, CacheTypes types,
                         int64_t num_pages);

struct BatchSequence {
  SequenceCache* cache = nullptr;   // with pages reserved for its tokens and the new ones
  std::span<const int32_t> tokens;  // the new ones, at least 1
  int64_t num_logits = 1;           // how many of the last new tokens want logits
};

// The positions that every query attends to: the rows of `positions` are ascending, padded with -1
// up to index_topk.
struct Selection {
  std::span<int32_t> positions;  // [T, index_topk]
  std::span<int32_t> counts;     // [T]
};

// Where a caller may look in. `selection` may also change what the layer, and those that share it,
// attend to.
struct ForwardTap {
  std::function<void(int index, std::span<const float> hidden)>
      hidden;  // [T, H]; 0 embedding ... last after the norm
  std::function<void(int layer, Selection selection)> selection;  // of each full layer
  // Which of them; null: every one. From a GPU each look is a copy that the host waits for.
  std::function<bool(int index)> wants_hidden;
  std::function<bool(int layer)> wants_selection;
};

// Seconds by part. indexer: projections, norm, rope, key write, scoring and selection of full
// layers.
struct ForwardTimes {
  double indexer = 0, attention = 0, ffn = 0, head = 0;
  std::vector<double> layer_seconds;  // one a layer
  double total() const { return indexer + attention + ffn + head; }
};

// A step of decoding on a GPU as it was recorded, and what the recording holds for.
struct DecodeGraph {
  struct Bound {
    const Model* model = nullptr;
    const uint8_t *cache = nullptr, *inputs = nullptr, *scratch = nullptr;
    IndexPlan plan;
    bool batch_invariant = false;
    std::map<std::string, std::string> forced;
    bool operator==(const Bound&) const = default;
  };
  Bound bound;
  CudaGraph graph;
};

// All intermediate results, allocated once for the largest batch, in the memory of the device.
struct Activations {
  Activations(const ModelConfig& config, int64_t max_tokens, Device device = Device::kCpu);

  int64_t max_tokens;
  Memory memory;
  float* x;              // [T, hidden_size] the residual stream
  float* normed;         // [T, hidden_size]
  float* q_latent;       // [T, q_lora_rank]
  uint16_t* normed16;    // on a GPU: `normed` and the normalised `q_latent` in bf16
  uint16_t* q_latent16;  //
  float* q;              // [T, num_attention_heads, nope + rope]; bf16 where products make bf16
  float* kv;             // [T, kv_lora_rank + rope]
  float* q_absorbed;     // [T, num_attention_heads, kv_lora_rank + rope]
  float* attended;       // [T, num_attention_heads, kv_lora_rank]
  float* value;          // [T, num_attention_heads, v_head_dim]; as q
  float* index_q;        // [T, index_n_heads, index_head_dim]
  float* index_key;      // [T, index_head_dim]
  float* index_weights;  // [T, index_n_heads]
  int32_t* positions;    // [T, index_topk]
  int32_t* counts;       // [T]
  float* gate;  // [rows, intermediate], rows = T, or T * num_experts_per_tok of an expert's width;
                // of experts in one product, bf16 rows of the shared one too
  float* up;    // the same
  float* router_logits;  // [T, n_routed_experts]
  // On a GPU the shared expert may be one of them: one more of each token and of the experts.
  int32_t* experts;       // [T, num_experts_per_tok]
  float* expert_weights;  // [T, num_experts_per_tok]
  int32_t* row_begin;     // [n_routed_experts + 1] of the grouped expert rows
  int32_t* slots;         // [T, num_experts_per_tok] row of the grouped expert rows
  int32_t* slot_tokens;   // [T * num_experts_per_tok] the inverse: which token
  float* expert_rows;     // [T * num_experts_per_tok, hidden_size] in, then out; bf16 as q
  float* logits;          // on a GPU: [logit_rows, vocab_size], to be copied out
  int32_t* targets;       // on a GPU: [T]
  double* nll;            // on a GPU: [T]
  int64_t logit_rows;

  // The batch, on the host.
  RopeTable rope;
  std::vector<int32_t> token_ids, token_positions;  // [T]
  std::vector<SeqSpan> spans;
  // The same for the ops: on a GPU copies in `inputs`, which begin_forward makes at once.
  const int32_t* ids = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
  const SeqSpan* device_seqs = nullptr;
  Memory inputs;
  std::vector<uint8_t> packed_inputs;
  std::map<int64_t, DecodeGraph> decode_graphs;  // by number of sequences

  // What of the GPU's a caller looks at.
  std::vector<float> host_x, host_logits;
  std::vector<int32_t> host_positions, host_counts;
};

uint64_t activation_bytes(const ModelConfig& config, int64_t max_tokens,
                          Device device = Device::kCpu);

// Memory beside activations that ops take on a GPU for a batch of `max_tokens`, at most.
uint64_t gpu_workspace_bytes(const ModelConfig& config, DType indexer_dtype, int64_t max_tokens,
                             int64_t context);

// Runs the batch, appends its tokens to the caches, and writes the wanted rows of logits, [sum of
// num_logits, vocab_size], in batch order. Token ids must be in [0, vocab_size): an Error
// otherwise. `tap` and `times` may be null. On a GPU a step of decoding that has been seen before
// (one token a sequence, so many sequences) is one launch of a recorded graph, if neither `tap`,
// `times` nor a profile is wanted: so a caller that decodes for speed looks at times now and then.
void forward(Exec& exec, const Model& model, KvCache& cache, Activations& activations,
             std::span<BatchSequence> batch, float* logits, const ForwardTap* tap = nullptr,
             ForwardTimes* times = nullptr);

// The parts that forward() is made of, for a caller that runs only some layers. Between them the
// state of the pass is the residual stream and the selection in force; the caller may read and
// replace both. A layer needs nothing else from the layers before
// it, so a pass may begin at any layer with what an earlier pass of the same tokens had there.
// forward() adds the batch's tokens to the caches at the end; a caller of the parts does so itself.
// run_head leaves the residual stream as it is: read_residual() gives that of the last layer.
void begin_forward(Exec& exec, const Model& model, Activations& activations,
                   std::span<const BatchSequence> batch);
void run_embedding(Exec& exec, const Model& model, Activations& activations,
                   ForwardTimes* times = nullptr);
void run_layers(Exec& exec, const Model& model, KvCache& cache, Activations& activations,
                int first_layer, int last_layer, const ForwardTap* tap = nullptr,
                ForwardTimes* times = nullptr);
void run_head(Exec& exec, const Model& model, Activations& activations,
              std::span<const BatchSequence> batch, float* logits, const ForwardTap* tap = nullptr,
              ForwardTimes* times = nullptr);
// In place of the logits what the first targets.size() rows of them say of these tokens, in nats:
// logits of a long chunk are more than all the rest, and never leave the device.
void run_head_nll(Exec& exec, const Model& model, Activations& activations,
                  std::span<const BatchSequence> batch, std::span<const int32_t> targets,
                  std::span<double> nll);

// The state of a pass where the host may read and write it: on the CPU the activations themselves,
// on a GPU a copy.
struct PassState {
  std::span<float> x;            // [T, hidden_size]
  std::span<int32_t> positions;  // [T, index_topk]
  std::span<int32_t> counts;     // [T]
};
// With what is in it undefined, to be filled and then put in force.
PassState new_state(Exec& exec, const Model& model, Activations& activations);
void put_state(Exec& exec, const Model& model, Activations& activations);
std::span<const float> read_residual(Exec& exec, const Model& model, Activations& activations);

}  // namespace indexcache
