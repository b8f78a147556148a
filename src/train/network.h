// The DSA network (GLM-MoE-DSA and DeepSeek-V3.2) for training: the engine's forward pass, with
// gradients.
//
// MLA is expanded where attention is dense and absorbed where it is sparse; the results are the
// same. Layers of one group (a full layer and the shared layers that use its selection) run
// together: the group is what an indexer's loss covers and what activation checkpointing computes
// again.
#pragma once

#include "train/indexer.h"
#include "train/parameters.h"

//
#include "checkpoint/config.h"

namespace indexcache {

enum class AttentionKind { kDense, kSparse };
// kPerLayer: the full layer's own attention is the target. kMultiLayer: that of all layers it
// serves.
enum class IndexerLoss { kNone, kPerLayer, kMultiLayer };

struct MlpParameters {
  size_t gate = 0, up = 0;  // [I, hidden]; two products, so that what follows is contiguous
  size_t down = 0;          // [hidden, I]
};

struct MoeParameters {
  size_t gate = 0;       // [E, hidden]
  torch::Tensor bias;    // f32 [E] e_score_correction_bias: follows the load, no gradient
  torch::Tensor load;    // f32 [E] tokens routed since balance_experts()
  size_t gate_proj = 0;  // [E, I, hidden]
  size_t up_proj = 0;    // [E, I, hidden]
  size_t down = 0;       // [E, hidden, I]
  std::optional<MlpParameters> shared;
};

struct IndexerParameters {
  size_t wq_b = 0, wk = 0, k_norm_weight = 0, k_norm_bias = 0, weights_proj = 0;
};

struct LayerParameters {
  size_t input_layernorm = 0, post_attention_layernorm = 0;
  size_t q_a_proj = 0, q_a_layernorm = 0, q_b_proj = 0;
  size_t kv_a_proj = 0, kv_a_layernorm = 0, kv_b_proj = 0, o_proj = 0;
  std::optional<IndexerParameters> indexer;  // of a full layer
  std::optional<MlpParameters> mlp;
  std::optional<MoeParameters> moe;
};

struct Network {
  ModelConfig config;
  IndexPlan plan;
  Parameters parameters;
  size_t embed_tokens = 0, norm = 0, lm_head = 0;
  std::vector<LayerParameters> layers;
  torch::Tensor rotations;  // complex f32 [max_position_embeddings, rope / 2]
  torch::Device device = torch::kCPU;
  torch::ScalarType compute = torch::kFloat;
  // Up to so many experts, every expert runs on every token, those not taken with weight 0: E / top
  // times the products, in a tenth of the kernels and without waiting for the host. With 8 experts
  // of width 96, top 2, a step of 65536 tokens takes 0.21 s on an H100; grouped by expert it takes
  // 0.40 s.
  int64_t max_dense_experts = 16;
};

struct Trainable {
  bool backbone = true;
  bool indexers = true;
};
// Parameters are zero: initialise() or load_network() comes next.
Network make_network(const ModelConfig& config, const IndexPlan& plan, torch::Device device,
                     torch::ScalarType compute, const Trainable& trainable);

void load_network(Network& network, const Checkpoint& checkpoint);
// The whole model in the hub's layout, config.json included, in shards of at most
// `max_shard_bytes`. Shared layers have no indexers in it.
void save_network(const Network& network, const std::string& folder, DType dtype,
                  uint64_t max_shard_bytes);

struct ForwardOptions {
  AttentionKind attention = AttentionKind::kDense;
  IndexerLoss indexer_loss = IndexerLoss::kNone;
  double indexer_loss_weight = 0;  // of the gradient; 0: only the value
  bool checkpoint_activations = false;
  bool training = false;  // counts the experts' load for balance_experts()
};

struct ForwardResult {
  torch::Tensor hidden;        // [T, hidden_size] after the final norm
  torch::Tensor indexer_loss;  // f64 scalar, mean over full layers, nats a token; see indexer.h
  // For tests: the selection of each full layer (sparse attention only), i32 [T, topk].
  std::vector<torch::Tensor> selections;
};
ForwardResult forward(Network& network, const Batch& batch, const ForwardOptions& options);

// Sums over the batch's targets, f64 on the device.
struct LanguageLoss {
  torch::Tensor loss;  // with gradient: sum of weight * nll / sum of weights
  torch::Tensor nll;   // sum over targets of weight > 0
  torch::Tensor num_targets;
};
LanguageLoss language_loss(const Network& network, const torch::Tensor& hidden, const Batch& batch);

torch::Tensor logits(const Network& network, const torch::Tensor& hidden);  // [T, vocab_size] f32

// Moves each expert's correction bias by `rate` against its load since the last call (DeepSeek-V3,
// section 2.1.2).
void balance_experts(Network& network, double rate);

}  // namespace indexcache
