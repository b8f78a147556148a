// Random checkpoints of any shape, for tests, demonstrations and benchmarks.
//
// Values depend on the seed and the tensor's name alone, so a tensor is the same whatever the plan
// or the order. Matrices are normal with variance 1 / columns, which keeps activations near 1
// through any number of layers; norms are near 1; routing biases are small. Random weights give
// selections that are spread over the context: the worst case for gathering.
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

// The checkpoint in memory.
Checkpoint synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed);

// The checkpoint in the hub's layout: config.json, generation_config.json and sharded safetensors,
// one tensor in memory at a time. `folder` is created; a config.json that is already there is an
// Error.
void write_synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed,
                                uint64_t max_shard_bytes, const std::string& folder);

}  // namespace indexcache
