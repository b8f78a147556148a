// A small model with every part, for tests: dense and sparse layers, odd sizes, index_topk 19.
#pragma once

#include <string>
#include <vector>

#include "base/rng.h"
#include "engine/engine.h"
#include "model/synthetic.h"

namespace indexcache {

inline constexpr int kSmallVocab = 97;

inline ModelConfig small_model_config(const std::string& plan) {
  const int num_layers = static_cast<int>(plan.size());
  ModelConfig config;
  config.num_hidden_layers = num_layers;
  config.hidden_size = 72;
  config.intermediate_size = 100;
  config.vocab_size = kSmallVocab;
  config.max_position_embeddings = 1024;
  config.mlp_layer_types.assign(plan.size(), MlpType::kSparse);
  config.mlp_layer_types[0] = MlpType::kDense;
  config.attention = {.num_attention_heads = 3,
                      .q_lora_rank = 40,
                      .kv_lora_rank = 36,
                      .qk_nope_head_dim = 20,
                      .qk_rope_head_dim = 8,
                      .v_head_dim = 18};
  config.indexer = {
      .index_n_heads = 5, .index_head_dim = 24, .index_topk = 19, .indexer_rope_interleave = true};
  config.moe = {.n_routed_experts = 6,
                .n_shared_experts = 1,
                .num_experts_per_tok = 2,
                .moe_intermediate_size = 28,
                .routed_scaling_factor = 1.5};
  config.index_plan = plan_from_string(plan, num_layers, "test");
  return parse_config(config_json(config), "test");
}

inline ModelSource small_model(const std::string& plan, uint64_t seed = 20261123) {
  const ModelConfig config = small_model_config(plan);
  return {config, synthetic_checkpoint(config, DType::kF32, seed), true};
}

inline std::vector<int32_t> small_tokens(uint64_t seed, int64_t count) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(rng.below(kSmallVocab));
  return tokens;
}

}  // namespace indexcache
