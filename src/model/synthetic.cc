#include "model/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
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

void set_element(DType dtype, uint8_t* data, int64_t i, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(data + 4 * i, &value, sizeof(value));
  } else if (dtype == DType::kF8E4M3) {
    data[i] = f32_to_f8e4m3(value);
  } else {
    const uint16_t bits = dtype == DType::kBF16 ? f32_to_bf16(value) : f32_to_f16(value);
    std::memcpy(data + 2 * i, &bits, sizeof(bits));
  }
}

// Of "model.layers.12.input_layernorm.weight" 12; -1 for tensors of no layer.
int layer_of(const std::string& name) {
  int layer = -1;
  std::sscanf(name.c_str(), "model.layers.%d.", &layer);
  return layer;
}

bool decides_selections(const std::string& name) {
  return name.find(".indexer.") != std::string::npos || name.ends_with("q_a_proj.weight") ||
         name.ends_with("q_a_layernorm.weight") || name.ends_with("input_layernorm.weight");
}

// SyntheticKind::kSimilar, see the header. False: the tensor is as in a plain checkpoint, but for
// `factor`.
bool fill_similar(const TensorSpec& spec, uint64_t seed, float mean, float deviation, uint8_t* data,
                  float* factor) {
  const std::string& name = spec.name;
  const int64_t count = num_elements(spec.shape);
  if (name.ends_with("embed_tokens.weight")) {
    const int64_t columns = spec.shape.back();
    Rng own(hash_name(name, seed));
    for (int64_t row = 0; row < spec.shape[0]; ++row) {
      Rng topic(hash_name(fmt::format("topic {}", row % kSyntheticTopics), seed));
      for (int64_t i = 0; i < columns; ++i) {
        set_element(spec.dtype, data, row * columns + i,
                    std::sqrt(0.9f) * quick_normal(topic) + std::sqrt(0.1f) * quick_normal(own));
      }
    }
    return true;
  }
  if (name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight")) *factor = 0.05f;
  const int layer = layer_of(name);
  if (layer < 0 || !decides_selections(name)) return false;
  const std::string in_layer = name.substr(name.find('.', std::strlen("model.layers.")) + 1);
  constexpr float kOwn = 0.08f;
  const float common = std::sqrt(1 - kOwn * kOwn), angle = 0.004f * static_cast<float>(layer);
  const float of_first = common * std::cos(angle), of_second = common * std::sin(angle);
  Rng first(hash_name("first " + in_layer, seed)), second(hash_name("second " + in_layer, seed)),
      own(hash_name(name, seed));
  for (int64_t i = 0; i < count; ++i) {
    const float normal = of_first * quick_normal(first) + of_second * quick_normal(second) +
                         kOwn * quick_normal(own);
    set_element(spec.dtype, data, i, mean + deviation * normal);
  }
  return true;
}

// Fills `data` with the tensor's values; scales of fp8 tensors come from scale_values.
void fill(const TensorSpec& spec, uint64_t seed, SyntheticKind kind, uint8_t* data) {
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
  float factor = 1;
  if (kind == SyntheticKind::kSimilar && fill_similar(spec, seed, mean, deviation, data, &factor))
    return;
  for (int64_t i = 0; i < count; ++i)
    set_element(spec.dtype, data, i, mean + factor * deviation * quick_normal(rng));
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

std::vector<int32_t> topical_tokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  const int64_t topics = std::min(kSyntheticTopics, vocab_size);
  int64_t topic = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i == 0 || rng.below(64) == 0)
      topic = static_cast<int64_t>(rng.below(static_cast<uint64_t>(topics)));
    const int64_t ids = (vocab_size - topic + topics - 1) / topics;  // of the topic
    tokens[i] = static_cast<int32_t>(
        topic + topics * static_cast<int64_t>(rng.below(static_cast<uint64_t>(ids))));
  }
  return tokens;
}

Checkpoint synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed,
                                SyntheticKind kind) {
  Checkpoint checkpoint;
  checkpoint.path = "synthetic";
  const std::vector<TensorSpec> specs = checkpoint_specs(config, dtype);
  std::vector<Tensor> tensors;
  for (const TensorSpec& spec : specs) tensors.emplace_back(spec.dtype, spec.shape);
  // A tensor's values follow from its name and the seed, so any thread may make them.
  ThreadPool pool(num_usable_cpus());
  pool.parallel_for(static_cast<int64_t>(specs.size()), [&](int64_t i, int) {
    const size_t at = static_cast<size_t>(i);
    fill(specs[at], seed, kind, tensors[at].memory.data());
  });
  for (size_t i = 0; i < specs.size(); ++i) checkpoint.add(specs[i].name, std::move(tensors[i]));
  return checkpoint;
}

void write_synthetic_checkpoint(const ModelConfig& config, DType dtype, uint64_t seed,
                                uint64_t max_shard_bytes, const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) fail("{}: cannot create the folder: {}", printable(folder), error.message());

  write_sharded_safetensors(folder, checkpoint_specs(config, dtype), {{"format", "pt"}},
                            max_shard_bytes, [&](const TensorSpec& spec, const ByteSink& sink) {
                              std::vector<uint8_t> data(spec.num_bytes());
                              fill(spec, seed, SyntheticKind::kPlain, data.data());
                              sink(data);
                            });
  write_text_file(folder + "/generation_config.json", "{\n  \"do_sample\": false\n}\n");
  // Last, so that a folder with a config.json is a whole checkpoint.
  write_text_file(folder + "/config.json", config_json(config).dump(2) + "\n");
}

}  // namespace indexcache
