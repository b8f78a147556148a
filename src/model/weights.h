// The weights of a model: views into the checkpoint's mapped files with the shape beside each, and
// the little that has to be owned (norms as float32, fp8 scales as float32, W_UK transposed).
//
// W_UV is a view too, unless the checkpoint is fp8: a head's rows then begin inside a scale block.
//
// A shared layer owns no indexer weights: its IndexerWeights are absent even where the checkpoint
// ships them. MTP layers are skipped with a message. Every missing, surplus, wrong-shape or
// wrong-dtype tensor is listed in one Error.
//
// An indexer adapter takes the place of the checkpoint's own indexers, which are then not read; it
// must hold the indexers of all full layers of its plan, and nothing else.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "checkpoint/indexer_adapter.h"
#include "checkpoint/safetensors_writer.h"
#include "ops/matmul/matmul.h"

namespace indexcache {

// Numbers that are used as float32, whatever the checkpoint holds.
struct VectorWeight {
  const float* data = nullptr;
  int64_t size = 0;
};

struct IndexerWeights {
  Weight wq_b;                              // [index_n_heads * index_head_dim, q_lora_rank]
  Weight wk;                                // [index_head_dim, hidden_size]
  Weight weights_proj;                      // [index_n_heads, hidden_size]
  VectorWeight k_norm_weight, k_norm_bias;  // [index_head_dim]
};

struct MlpWeights {
  Weight gate_proj, up_proj;  // [intermediate, hidden_size]
  Weight down_proj;           // [hidden_size, intermediate]
};

// One matrix of every expert of a layer.
struct ExpertWeights {
  std::vector<Weight> experts;  // [n_routed_experts]
  // On a GPU: these, then the shared expert where it is one more of their shape, so that a layer's
  // experts are one product. Of each matrix one after the other.
  std::vector<Weight> all;
  const Weight* device_experts = nullptr;  // `all` in its memory
};

struct MoeWeights {
  Weight gate;                           // [n_routed_experts, hidden_size]
  VectorWeight e_score_correction_bias;  // [n_routed_experts]
  ExpertWeights gate_proj, up_proj, down_proj;
  MlpWeights shared_experts;  // absent when n_shared_experts is 0
};

struct LayerWeights {
  VectorWeight input_layernorm, post_attention_layernorm;  // [hidden_size]
  Weight q_a_proj;                                         // [q_lora_rank, hidden_size]
  VectorWeight q_a_layernorm;                              // [q_lora_rank]
  Weight q_b_proj;              // [num_attention_heads * (nope + rope), q_lora_rank]
  Weight kv_a_proj_with_mqa;    // [kv_lora_rank + rope, hidden_size]
  VectorWeight kv_a_layernorm;  // [kv_lora_rank]
  // kv_b_proj, [num_attention_heads * (nope + v), kv_lora_rank], cut in two: W_UK is owned and
  // transposed, because the absorbed form contracts over the nope rows.
  std::vector<Weight> w_uk_t;  // per head [kv_lora_rank, nope]
  std::vector<Weight> w_uv;    // per head [v_head_dim, kv_lora_rank]
  Weight o_proj;               // [hidden_size, num_attention_heads * v]
  IndexerWeights indexer;      // full layers only
  MlpWeights mlp;              // dense layers only
  MoeWeights moe;              // sparse layers only
};

struct Weights {
  Weight embed_tokens;  // [vocab_size, hidden_size]
  VectorWeight norm;    // [hidden_size]
  Weight lm_head;       // [vocab_size, hidden_size]; embed_tokens when tied
  std::vector<LayerWeights> layers;

  std::deque<Tensor> owned;  // behind w_uk_t and fp8 w_uv; a deque, because views point into it
  std::deque<std::vector<float>> floats;  // behind VectorWeight and Weight::scale_inv

  CudaMemory device;  // behind everything, once it is on a GPU
};

// Copies all weights to the GPU, where their pointers then lead; the host keeps none.
void move_to_gpu(Exec& exec, Weights* weights);

// Error that lists every tensor which does not fit, from names, types and shapes alone: what
// bind_weights asks before it reads.
void check_weights(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
                   const IndexerAdapter* adapter = nullptr);

// `plan` is the plan in force; with an adapter (null: none), all its full layers are full in the
// adapter's. Owned copies are made in `compute`'s type.
Weights bind_weights(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
                     Compute compute, const IndexerAdapter* adapter = nullptr);

// How the names of a layer's indexer tensors begin.
std::string indexer_prefix(int64_t layer);

// Prefixes of tensors that the model does not use under a plan, each with the reason.
std::vector<std::pair<std::string, std::string>> unused_prefixes(const ModelConfig& config,
                                                                 const IndexPlan& plan);

// What follows from names, types and shapes alone, before any weight is read. A checkpoint's list
// is list_tensors(); one that is yet to be made has checkpoint_specs().
std::vector<TensorSpec> list_tensors(const Checkpoint& checkpoint);

// The same with an adapter's indexers in place of the checkpoint's.
std::vector<TensorSpec> with_adapter(std::vector<TensorSpec> specs, const IndexerAdapter& adapter,
                                     const ModelConfig& config);

// Which layers have an indexer: what a plan may make full.
std::vector<bool> layers_with_indexer(const std::vector<TensorSpec>& specs,
                                      const ModelConfig& config);

// Bytes of the tensors that bind_weights would use, and of the copies that it would make.
uint64_t used_weight_bytes(const std::vector<TensorSpec>& specs, const ModelConfig& config,
                           const IndexPlan& plan);
uint64_t owned_weight_bytes(const std::vector<TensorSpec>& specs, const ModelConfig& config,
                            Compute compute);

}  // namespace indexcache
