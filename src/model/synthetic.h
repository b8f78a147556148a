// Random checkpoints of any shape, for tests, demonstrations and benchmarks.
//
// Values depend on the seed and the tensor's name alone, so a tensor is the same whatever the plan
// or the order. Matrices are normal with variance 1 / columns, which keeps activations near 1
// through any number of layers; norms are near 1; routing biases are small. Such weights give
// selections that are spread over the context, and that no two layers or tokens share: the worst
// case for gathering.
//
// SyntheticKind::kSimilar is like a trained model where that decides speed and what an index plan
// loses. It differs in three things:
// - The matrices that decide selections (q_a_proj, the indexer's, and the norms before them) are in
//   layer l  c * (cos(0.004 l) A + sin(0.004 l) B) + 0.08 * own_l,  c^2 + 0.08^2 = 1, with A and B
//   the same in all layers. So neighbouring layers select nearly the same tokens, and distant ones
//   fewer in common.
// - What a layer adds to the residual stream is 1/20 as large, as after initialisations that
//   divide it by the depth.
// - A token's embedding is sqrt(0.9) of its topic's and sqrt(0.1) its own; the topic of id t is t %
//   kSyntheticTopics. Tokens that come in runs of one topic (topical_tokens()) select, and are
//   selected, together.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "checkpoint/safetensors_writer.h"

namespace indexcache {

// The tensors of a checkpoint with this config, in the hub's names. Layers that are shared in
// config.index_plan have no indexer, as GLM-5.2 ships it. `dtype` is that of the matrices: kF32,
// kF16, kBF16, or kF8E4M3 with 128x128 block scales (embedding, head, router and weights_proj then
// stay bf16, as published).
std::vector<TensorSpec> checkpoint_specs(const ModelConfig& config, DType dtype);

enum class SyntheticKind { kPlain, kSimilar };

inline constexpr int64_t kSyntheticTopics = 256;

// Random ids in runs of one topic, 64 tokens long on average.
std::vector<int32_t> topical_tokens(int64_t count, int64_t vocab_size, uint64_t seed);

// The checkpoint in memory. All threads of the machine make it, at some nanoseconds a number.
Checkpoint synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed,
                                SyntheticKind kind = SyntheticKind::kPlain);

// The checkpoint in the hub's layout: config.json, generation_config.json and sharded safetensors,
// one tensor in memory at a time. `folder` is created if it is not there; files of these names are
// replaced.
void write_synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed,
                                uint64_t max_shard_bytes, const std::string& folder);

}  // namespace indexcache
