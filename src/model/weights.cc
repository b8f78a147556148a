#include "model/weights.h"

#include <algorithm>
#include <optional>
#include <unordered_set>

#include "base/log.h"
#include "checkpoint/binder.h"
#include "checkpoint/block_scales.h"

namespace indexcache {

namespace {

const std::vector<DType> kWeightTypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3};
const std::vector<DType> kNormTypes = {DType::kF32, DType::kF16, DType::kBF16};

std::string layer_prefix(int64_t layer) { return fmt::format("model.layers.{}.", layer); }

// What was asked of the binder, to be turned into Weights once finish() has found no problem.
struct Loader {
  Binder binder;
  const ModelConfig& config;
  Weights& out;
  struct Matrix {
    Weight* weight;
    std::string name;
    ScaledView found;
  };
  std::vector<Matrix> matrices;
  std::vector<std::pair<VectorWeight*, TensorView>> vectors;

  void matrix(Weight* weight, const std::string& name, int64_t rows, int64_t cols) {
    matrices.push_back({weight, name, binder.require_scaled(name, {rows, cols}, kWeightTypes)});
  }

  void vector(VectorWeight* values, const std::string& name, int64_t size) {
    vectors.emplace_back(values, binder.require(name, {size}, kNormTypes));
  }

  void mlp(MlpWeights* weights, const std::string& prefix, int64_t width) {
    matrix(&weights->gate_proj, prefix + "gate_proj.weight", width, config.hidden_size);
    matrix(&weights->up_proj, prefix + "up_proj.weight", width, config.hidden_size);
    matrix(&weights->down_proj, prefix + "down_proj.weight", config.hidden_size, width);
  }

  void moe(MoeWeights* weights, const std::string& prefix) {
    const MoeConfig& moe = config.moe;
    matrix(&weights->gate, prefix + "gate.weight", moe.n_routed_experts, config.hidden_size);
    vector(&weights->e_score_correction_bias, prefix + "gate.e_score_correction_bias",
           moe.n_routed_experts);
    for (ExpertWeights* w : {&weights->gate_proj, &weights->up_proj, &weights->down_proj})
      w->experts.resize(static_cast<size_t>(moe.n_routed_experts));
    for (size_t e = 0; e < static_cast<size_t>(moe.n_routed_experts); ++e) {
      const std::string expert = fmt::format("{}experts.{}.", prefix, e);
      const int64_t width = moe.moe_intermediate_size, hidden = config.hidden_size;
      matrix(&weights->gate_proj.experts[e], expert + "gate_proj.weight", width, hidden);
      matrix(&weights->up_proj.experts[e], expert + "up_proj.weight", width, hidden);
      matrix(&weights->down_proj.experts[e], expert + "down_proj.weight", hidden, width);
    }
    if (moe.n_shared_experts > 0) {
      mlp(&weights->shared_experts, prefix + "shared_experts.",
          moe.n_shared_experts * moe.moe_intermediate_size);
    }
  }

  void indexer(IndexerWeights* weights, const std::string& prefix) {
    const IndexerConfig& indexer = config.indexer;
    matrix(&weights->wq_b, prefix + "wq_b.weight", indexer.index_n_heads * indexer.index_head_dim,
           config.attention.q_lora_rank);
    matrix(&weights->wk, prefix + "wk.weight", indexer.index_head_dim, config.hidden_size);
    matrix(&weights->weights_proj, prefix + "weights_proj.weight", indexer.index_n_heads,
           config.hidden_size);
    vector(&weights->k_norm_weight, prefix + "k_norm.weight", indexer.index_head_dim);
    vector(&weights->k_norm_bias, prefix + "k_norm.bias", indexer.index_head_dim);
  }

  void layer(LayerWeights* weights, Weight* kv_b_proj, int index, bool with_indexer) {
    const AttentionConfig& attn = config.attention;
    const std::string prefix = layer_prefix(index), self_attn = prefix + "self_attn.";
    const int64_t heads = attn.num_attention_heads;
    vector(&weights->input_layernorm, prefix + "input_layernorm.weight", config.hidden_size);
    vector(&weights->post_attention_layernorm, prefix + "post_attention_layernorm.weight",
           config.hidden_size);
    matrix(&weights->q_a_proj, self_attn + "q_a_proj.weight", attn.q_lora_rank, config.hidden_size);
    vector(&weights->q_a_layernorm, self_attn + "q_a_layernorm.weight", attn.q_lora_rank);
    matrix(&weights->q_b_proj, self_attn + "q_b_proj.weight", heads * attn.qk_head_dim(),
           attn.q_lora_rank);
    matrix(&weights->kv_a_proj_with_mqa, self_attn + "kv_a_proj_with_mqa.weight",
           attn.kv_lora_rank + attn.qk_rope_head_dim, config.hidden_size);
    vector(&weights->kv_a_layernorm, self_attn + "kv_a_layernorm.weight", attn.kv_lora_rank);
    matrix(kv_b_proj, self_attn + "kv_b_proj.weight",
           heads * (attn.qk_nope_head_dim + attn.v_head_dim), attn.kv_lora_rank);
    matrix(&weights->o_proj, self_attn + "o_proj.weight", config.hidden_size,
           heads * attn.v_head_dim);
    if (with_indexer) indexer(&weights->indexer, self_attn + "indexer.");
    if (config.is_moe(index)) {
      moe(&weights->moe, prefix + "mlp.");
    } else {
      mlp(&weights->mlp, prefix + "mlp.", config.intermediate_size);
    }
  }

  void resolve(const std::string& where) {
    for (auto& [weight, name, found] : matrices) {
      const TensorView& view = found.weight;
      *weight = {view.dtype, view.shape[0], view.shape[1], view.data, nullptr};
      if (view.dtype != DType::kF8E4M3) continue;
      out.floats.push_back(read_block_scales(view, found.scales, where + ": " + name));
      weight->scale_inv = out.floats.back().data();
    }
    for (auto& [values, view] : vectors) {
      out.floats.push_back(to_f32(view));
      *values = {out.floats.back().data(), static_cast<int64_t>(out.floats.back().size())};
    }
  }
};

DType owned_dtype(Compute compute) { return compute == Compute::kF32 ? DType::kF32 : DType::kBF16; }

float weight_element(const Weight& w, int64_t row, int64_t col) {
  const float value = element_as_f32({w.dtype, {w.rows, w.cols}, w.data}, row * w.cols + col);
  if (w.scale_inv == nullptr) return value;
  return value * w.scale_inv[row / kScaleBlock * ((w.cols + kScaleBlock - 1) / kScaleBlock) +
                             col / kScaleBlock];
}

// A copy of rows [first, first + rows) of `w`, transposed if asked, as `dtype`.
Weight owned_copy(const Weight& w, int64_t first, int64_t rows, bool transposed, DType dtype,
                  Weights* out) {
  out->owned.emplace_back(dtype, transposed ? Shape{w.cols, rows} : Shape{rows, w.cols});
  Tensor& tensor = out->owned.back();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < w.cols; ++c) {
      const int64_t i = transposed ? c * rows + r : r * w.cols + c;
      const float value = weight_element(w, first + r, c);
      if (dtype == DType::kBF16) {
        tensor.as<uint16_t>()[i] = f32_to_bf16(value);
      } else {
        tensor.as<float>()[i] = value;
      }
    }
  }
  return {dtype, tensor.shape[0], tensor.shape[1], tensor.memory.data(), nullptr};
}

void split_kv_b(const Weight& kv_b, const AttentionConfig& attn, Compute compute,
                LayerWeights* layer, Weights* out) {
  const int64_t nope = attn.qk_nope_head_dim, v = attn.v_head_dim;
  for (int64_t h = 0; h < attn.num_attention_heads; ++h) {
    const int64_t first = h * (nope + v);
    layer->w_uk_t.push_back(owned_copy(kv_b, first, nope, true, owned_dtype(compute), out));
    if (kv_b.dtype == DType::kF8E4M3) {
      layer->w_uv.push_back(owned_copy(kv_b, first + nope, v, false, owned_dtype(compute), out));
    } else {
      const uint8_t* data = kv_b.data + (first + nope) * kv_b.cols * dtype_bytes(kv_b.dtype);
      layer->w_uv.push_back({kv_b.dtype, v, kv_b.cols, data, nullptr});
    }
  }
}

}  // namespace

namespace {

// Never guess: a checkpoint says that it is quantised in its config and in its tensors, or in
// neither.
void check_quantization(const Checkpoint& checkpoint, const ModelConfig& config) {
  const std::string* fp8_name = nullptr;
  for (const auto& [name, view] : checkpoint.tensors()) {
    if (view.dtype == DType::kF8E4M3 && name.ends_with(".weight")) fp8_name = &name;
  }
  if (fp8_name != nullptr && !config.quantization_config) {
    fail("{}: {} is F8_E4M3, but config.json has no quantization_config",
         printable(checkpoint.path), printable(*fp8_name));
  }
  if (fp8_name == nullptr && config.quantization_config) {
    fail("{}: config.json has a quantization_config (fp8), but no weight is F8_E4M3",
         printable(checkpoint.path));
  }
}

}  // namespace

std::string indexer_prefix(int64_t layer) { return layer_prefix(layer) + "self_attn.indexer."; }

std::vector<std::pair<std::string, std::string>> unused_prefixes(const ModelConfig& config,
                                                                 const IndexPlan& plan) {
  std::vector<std::pair<std::string, std::string>> prefixes;
  for (int64_t i = 0; i < std::max<int64_t>(config.num_nextn_predict_layers, 1); ++i) {
    prefixes.emplace_back(layer_prefix(config.num_hidden_layers + i),
                          "MTP layers, which are not run");
  }
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    if (!plan.is_full(layer)) {
      prefixes.emplace_back(indexer_prefix(layer), "indexers of shared layers");
    }
  }
  if (config.tie_word_embeddings)
    prefixes.emplace_back("lm_head.", "the head, which is tied to the embedding");
  return prefixes;
}

namespace {

// All that a model takes, found and not yet read.
struct Matched {
  Loader own;
  std::vector<Weight> kv_b_proj;        // of each layer
  std::optional<Loader> brought;        // by an adapter
  std::deque<IndexerWeights> not_used;  // brought, and checked all the same
};

void match_adapter(const IndexerAdapter& adapter, const ModelConfig& config, const IndexPlan& plan,
                   Weights* weights, Matched* matched) {
  const IndexPlan brought = adapter_plan(adapter, static_cast<int>(config.num_hidden_layers));
  Loader& loader = matched->brought.emplace(Loader{Binder(adapter.tensors), config, *weights});
  for (int layer = 0; layer < brought.num_layers(); ++layer) {
    if (!brought.is_full(layer)) continue;
    IndexerWeights* indexer = plan.is_full(layer)
                                  ? &weights->layers[static_cast<size_t>(layer)].indexer
                                  : &matched->not_used.emplace_back();
    loader.indexer(indexer, indexer_prefix(layer));
  }
  loader.binder.finish();
}

Matched match(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
              const IndexerAdapter* adapter, Weights* weights) {
  check_quantization(checkpoint, config);
  Matched matched{{Binder(checkpoint), config, *weights}};
  Loader& loader = matched.own;
  for (const auto& [prefix, reason] : unused_prefixes(config, plan))
    loader.binder.ignore_prefix(prefix, reason);
  for (int layer = 0; adapter != nullptr && layer < plan.num_layers(); ++layer) {
    if (plan.is_full(layer))
      loader.binder.ignore_prefix(indexer_prefix(layer), "indexers, which an adapter replaces");
  }

  loader.matrix(&weights->embed_tokens, "model.embed_tokens.weight", config.vocab_size,
                config.hidden_size);
  loader.vector(&weights->norm, "model.norm.weight", config.hidden_size);
  if (!config.tie_word_embeddings) {
    loader.matrix(&weights->lm_head, "lm_head.weight", config.vocab_size, config.hidden_size);
  }
  weights->layers.resize(static_cast<size_t>(config.num_hidden_layers));
  matched.kv_b_proj.resize(weights->layers.size());
  for (size_t i = 0; i < weights->layers.size(); ++i) {
    loader.layer(&weights->layers[i], &matched.kv_b_proj[i], static_cast<int>(i),
                 adapter == nullptr && plan.is_full(static_cast<int>(i)));
  }
  loader.binder.finish();
  if (adapter != nullptr) match_adapter(*adapter, config, plan, weights, &matched);
  return matched;
}

}  // namespace

void check_weights(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
                   const IndexerAdapter* adapter) {
  Weights unread;
  match(checkpoint, config, plan, adapter, &unread);
}

Weights bind_weights(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
                     Compute compute, const IndexerAdapter* adapter) {
  Weights weights;
  Matched matched = match(checkpoint, config, plan, adapter, &weights);
  if (const std::string ignored = matched.own.binder.ignored_summary(); !ignored.empty())
    info("{}", ignored);

  matched.own.resolve(printable(checkpoint.path));
  if (adapter != nullptr) matched.brought->resolve(printable(adapter->tensors.path));
  if (config.tie_word_embeddings) weights.lm_head = weights.embed_tokens;
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    split_kv_b(matched.kv_b_proj[i], config.attention, compute, &weights.layers[i], &weights);
  }
  return weights;
}

std::vector<TensorSpec> list_tensors(const Checkpoint& checkpoint) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, view] : checkpoint.tensors())
    specs.push_back({name, view.dtype, view.shape});
  return specs;
}

std::vector<TensorSpec> with_adapter(std::vector<TensorSpec> specs, const IndexerAdapter& adapter,
                                     const ModelConfig& config) {
  std::vector<std::string> replaced;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer)
    replaced.push_back(indexer_prefix(layer));
  std::erase_if(specs, [&](const TensorSpec& spec) {
    return std::any_of(replaced.begin(), replaced.end(),
                       [&](const std::string& prefix) { return spec.name.starts_with(prefix); });
  });
  for (TensorSpec& spec : list_tensors(adapter.tensors)) specs.push_back(std::move(spec));
  return specs;
}

std::vector<bool> layers_with_indexer(const std::vector<TensorSpec>& specs,
                                      const ModelConfig& config) {
  std::unordered_set<std::string_view> names;
  for (const TensorSpec& spec : specs) names.insert(spec.name);
  std::vector<bool> present;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    present.push_back(names.contains(indexer_prefix(layer) + "wq_b.weight"));
  }
  return present;
}

uint64_t used_weight_bytes(const std::vector<TensorSpec>& specs, const ModelConfig& config,
                           const IndexPlan& plan) {
  const auto unused = unused_prefixes(config, plan);
  uint64_t bytes = 0;
  for (const TensorSpec& spec : specs) {
    const bool skip = std::any_of(unused.begin(), unused.end(), [&](const auto& prefix) {
      return spec.name.starts_with(prefix.first);
    });
    if (!skip) bytes += spec.num_bytes();
  }
  return bytes;
}

uint64_t owned_weight_bytes(const std::vector<TensorSpec>& specs, const ModelConfig& config,
                            Compute compute) {
  const AttentionConfig& attn = config.attention;
  uint64_t bytes = 0;
  for (const TensorSpec& spec : specs) {
    if (!spec.name.ends_with("self_attn.kv_b_proj.weight")) continue;
    const int64_t v = spec.dtype == DType::kF8E4M3 ? attn.v_head_dim : 0;
    bytes += static_cast<uint64_t>(attn.num_attention_heads * (attn.qk_nope_head_dim + v) *
                                   attn.kv_lora_rank * dtype_bytes(owned_dtype(compute)));
  }
  return bytes;
}

}  // namespace indexcache
