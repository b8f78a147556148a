#include "model/synthetic.h"

#include <cmath>
#include <cstring>
#include <filesystem>

#include "base/atomic_file.h"
#include "base/checked.h"
#include "base/rng.h"
#include "checkpoint/block_scales.h"
#include "device/thread_pool.h"

namespace indexcache {

namespace {

void add_mlp(std::vector<TensorSpec>* specs, const std::string& prefix, int64_t hidden,
             int64_t width, DType dtype) {
  specs->push_back({prefix + "gate_proj.weight", dtype, {width, hidden}});
  specs->push_back({prefix + "up_proj.weight", dtype, {width, hidden}});
  specs->push_back({prefix + "down_proj.weight", dtype, {hidden, width}});
}

uint64_t hash_name(const std::string& name, uint64_t seed) {
  uint64_t hash = 0xCBF29CE484222325ull ^ splitmix64(seed);  // FNV-1a
  for (const char c : name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3ull;
  return hash;
}

// Close to standard normal (the sum of four uniforms), six times as fast as Box-Muller: a 30B
// checkpoint has 3e10 of them.
float quick_normal(Rng& rng) {
  const uint64_t bits = rng.next();
  const int64_t sum = static_cast<int64_t>((bits & 0xFFFF) + (bits >> 16 & 0xFFFF) +
                                           (bits >> 32 & 0xFFFF) + (bits >> 48));
  return static_cast<float>(sum - 131070) * (1.7320508f / 65536.0f);
}

// Mean and standard deviation of a tensor's values.
std::pair<float, float> distribution(const TensorSpec& spec) {
  const std::string& name = spec.name;
  if (name.ends_with("norm.bias")) return {0.0f, 0.1f};
  if (name.ends_with("norm.weight")) return {1.0f, 0.1f};
  if (name.ends_with("e_score_correction_bias")) return {0.0f, 0.05f};
  if (name.ends_with("embed_tokens.weight")) return {0.0f, 1.0f};
  return {0.0f, 1.0f / std::sqrt(static_cast<float>(spec.shape.back()))};
}

// Fills `data` with the tensor's values; scales of fp8 tensors come from scale_values.
void fill(const TensorSpec& spec, uint64_t seed, uint8_t* data) {
  const int64_t count = num_elements(spec.shape);
  if (spec.name.ends_with("_scale_inv")) {
    Rng rng(hash_name(spec.name, seed));
    // A unit-scale e4m3 matrix has values up to a few units; this brings them back to variance 1 /
    // columns, unevenly.
    for (int64_t i = 0; i < count; ++i) {
      const float scale = std::exp2(static_cast<float>(rng.below(5)) * 0.25f - 5.5f);
      std::memcpy(data + 4 * i, &scale, sizeof(scale));
    }
    return;
  }
  Rng rng(hash_name(spec.name, seed));
  const auto [mean, deviation] =
      spec.dtype == DType::kF8E4M3 ? std::pair(0.0f, 1.0f) : distribution(spec);
  for (int64_t i = 0; i < count; ++i) {
    const float value = mean + deviation * quick_normal(rng);
    if (spec.dtype == DType::kF32) {
      std::memcpy(data + 4 * i, &value, sizeof(value));
    } else if (spec.dtype == DType::kF8E4M3) {
      data[i] = f32_to_f8e4m3(value);
    } else {
      const uint16_t bits = spec.dtype == DType::kBF16 ? f32_to_bf16(value) : f32_to_f16(value);
      std::memcpy(data + 2 * i, &bits, sizeof(bits));
    }
  }
}

}  // namespace

std::vector<TensorSpec> checkpoint_specs(const ModelConfig& config, DType dtype) {
  const AttentionConfig& attn = config.attention;
  const IndexerConfig& indexer = config.indexer;
  const MoeConfig& moe = config.moe;
  const int64_t hidden = config.hidden_size, heads = attn.num_attention_heads;
  const DType plain = dtype == DType::kF8E4M3 ? DType::kBF16 : dtype, norm = DType::kF32;

  std::vector<TensorSpec> specs;
  specs.push_back({"model.embed_tokens.weight", plain, {config.vocab_size, hidden}});
  specs.push_back({"model.norm.weight", norm, {hidden}});
  if (!config.tie_word_embeddings)
    specs.push_back({"lm_head.weight", plain, {config.vocab_size, hidden}});
  for (int layer = 0; layer < static_cast<int>(config.num_hidden_layers); ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer),
                      self_attn = prefix + "self_attn.";
    specs.push_back({prefix + "input_layernorm.weight", norm, {hidden}});
    specs.push_back({prefix + "post_attention_layernorm.weight", norm, {hidden}});
    specs.push_back({self_attn + "q_a_proj.weight", dtype, {attn.q_lora_rank, hidden}});
    specs.push_back({self_attn + "q_a_layernorm.weight", norm, {attn.q_lora_rank}});
    specs.push_back(
        {self_attn + "q_b_proj.weight", dtype, {heads * attn.qk_head_dim(), attn.q_lora_rank}});
    specs.push_back({self_attn + "kv_a_proj_with_mqa.weight",
                     dtype,
                     {attn.kv_lora_rank + attn.qk_rope_head_dim, hidden}});
    specs.push_back({self_attn + "kv_a_layernorm.weight", norm, {attn.kv_lora_rank}});
    specs.push_back({self_attn + "kv_b_proj.weight",
                     dtype,
                     {heads * (attn.qk_nope_head_dim + attn.v_head_dim), attn.kv_lora_rank}});
    specs.push_back({self_attn + "o_proj.weight", dtype, {hidden, heads * attn.v_head_dim}});
    if (config.index_plan.is_full(layer)) {
      const std::string prefix_indexer = self_attn + "indexer.";
      specs.push_back({prefix_indexer + "wq_b.weight",
                       dtype,
                       {indexer.index_n_heads * indexer.index_head_dim, attn.q_lora_rank}});
      specs.push_back({prefix_indexer + "wk.weight", dtype, {indexer.index_head_dim, hidden}});
      specs.push_back(
          {prefix_indexer + "weights_proj.weight", plain, {indexer.index_n_heads, hidden}});
      specs.push_back({prefix_indexer + "k_norm.weight", norm, {indexer.index_head_dim}});
      specs.push_back({prefix_indexer + "k_norm.bias", norm, {indexer.index_head_dim}});
    }
    if (!config.is_moe(layer)) {
      add_mlp(&specs, prefix + "mlp.", hidden, config.intermediate_size, dtype);
      continue;
    }
    specs.push_back({prefix + "mlp.gate.weight", plain, {moe.n_routed_experts, hidden}});
    specs.push_back({prefix + "mlp.gate.e_score_correction_bias", norm, {moe.n_routed_experts}});
    for (int64_t e = 0; e < moe.n_routed_experts; ++e) {
      add_mlp(&specs, fmt::format("{}mlp.experts.{}.", prefix, e), hidden,
              moe.moe_intermediate_size, dtype);
    }
    if (moe.n_shared_experts > 0) {
      add_mlp(&specs, prefix + "mlp.shared_experts.", hidden,
              moe.n_shared_experts * moe.moe_intermediate_size, dtype);
    }
  }
  if (dtype == DType::kF8E4M3) {
    const size_t count = specs.size();
    for (size_t i = 0; i < count; ++i) {
      if (specs[i].dtype != DType::kF8E4M3) continue;
      specs.push_back({scale_name(specs[i].name), DType::kF32, scale_shape(specs[i].shape)});
    }
  }
  return specs;
}

Checkpoint synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed) {
  Checkpoint checkpoint;
  checkpoint.path = "synthetic";
  const std::vector<TensorSpec> specs = checkpoint_specs(config, dtype);
  std::vector<Tensor> tensors;
  for (const TensorSpec& spec : specs) tensors.emplace_back(spec.dtype, spec.shape);
  // A tensor's values follow from its name and the seed, so any thread may make them.
  ThreadPool pool(num_usable_cpus());
  pool.parallel_for(static_cast<int64_t>(specs.size()), [&](int64_t i, int) {
    const size_t at = static_cast<size_t>(i);
    fill(specs[at], seed, tensors[at].memory.data());
  });
  for (size_t i = 0; i < specs.size(); ++i) checkpoint.add(specs[i].name, std::move(tensors[i]));
  return checkpoint;
}

void write_synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed,
                                uint64_t max_shard_bytes, const std::string& folder) {
  const std::string config_path = folder + "/config.json";
  if (std::filesystem::exists(config_path))
    fail("{}: already there; choose another folder", printable(config_path));
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail("{}: cannot create the folder: {}", printable(folder), error.message());

  write_sharded_safetensors(folder, checkpoint_specs(config, dtype), {{"format", "pt"}},
                            max_shard_bytes, [&](const TensorSpec& spec, const ByteSink& sink) {
                              std::vector<uint8_t> data(spec.num_bytes());
                              fill(spec, seed, data.data());
                              sink(data);
                            });
  write_text_file(folder + "/generation_config.json", "{\n  \"do_sample\": false\n}\n");
  // Last, so that a folder with a config.json is a whole checkpoint.
  write_text_file(config_path, config_json(config).dump(2) + "\n");
}

}  // namespace indexcache
