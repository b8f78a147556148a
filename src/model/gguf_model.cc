#include "model/gguf_model.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "checkpoint/block_scales.h"
#include "model/weights.h"

namespace indexcache {

namespace {

constexpr uint32_t kSigmoidGating = 2, kQuantizationVersion = 2;
constexpr int64_t kSmallestRotation = 64;  // below, llama.cpp aborts in ggml_mul_mat

uint32_t file_type(GgmlType type) {
  switch (type) {
    case GgmlType::kF32:
      return 0;
    case GgmlType::kF16:
      return 1;
    case GgmlType::kQ8_0:
      return 7;
    case GgmlType::kBF16:
      return 32;
  }
  CHECK(false);
  return 0;
}

int64_t num_dense_layers(const ModelConfig& config) {
  const auto& types = config.mlp_layer_types;
  return std::find(types.begin(), types.end(), MlpType::kSparse) - types.begin();
}

void refuse_what_it_cannot_run(const ModelConfig& config, const IndexPlan& plan,
                               const std::string& where) {
  const bool glm = config.model_type == ModelType::kGlmMoeDsa;
  const char* architecture = gguf_architecture(config.model_type);
  const auto refuse = [&](const std::string& found, const std::string& expected) {
    fail("{}: {}, but llama.cpp's {} {}", where, found, architecture, expected);
  };
  if (!glm && plan.num_full() != plan.num_layers()) {
    refuse(fmt::format("the plan {} has shared layers", to_string(plan)),
           "runs the indexer of every layer: it has no attention.indexer.types");
  }
  if (config.indexer.indexer_rope_interleave != glm) {
    refuse(fmt::format("indexer_rope_interleave is {}", config.indexer.indexer_rope_interleave),
           fmt::format("always takes it as {}", glm));
  }
  const int64_t head_dim = config.indexer.index_head_dim;
  if (!std::has_single_bit(static_cast<uint64_t>(head_dim)) || head_dim < kSmallestRotation) {
    refuse(fmt::format("index_head_dim is {}", head_dim),
           fmt::format("rotates it by a Hadamard matrix and needs a power of two from {} on",
                       kSmallestRotation));
  }
  const int64_t num_dense = num_dense_layers(config);
  const bool has_moe = num_dense < config.num_hidden_layers;
  if (std::find(config.mlp_layer_types.begin() + num_dense, config.mlp_layer_types.end(),
                MlpType::kDense) != config.mlp_layer_types.end()) {
    refuse("a dense layer comes after a sparse one", "knows only a number of leading dense layers");
  }
  if (has_moe && config.moe.n_shared_experts == 0)
    refuse("n_shared_experts is 0", "needs a shared expert in every sparse layer");
  const RopeConfig& rope = config.rope;
  if (rope.rope_type == RopeConfig::Type::kYarn) {
    if (rope.beta_fast != 32 || rope.beta_slow != 1) {
      refuse(fmt::format("beta_fast is {} and beta_slow {}", rope.beta_fast, rope.beta_slow),
             "always takes 32 and 1");
    }
    if (rope_cos_sin_scale(rope) != 1)
      refuse("mscale and mscale_all_dim differ", "has only one of them");
  }
}

class MetadataBuilder {
 public:
  explicit MetadataBuilder(std::string architecture) : architecture_(std::move(architecture)) {}

  void general(const std::string& key, GgufValue value) {
    entries_.emplace_back("general." + key, std::move(value));
  }
  void set(const std::string& key, GgufValue value) {
    entries_.emplace_back(architecture_ + "." + key, std::move(value));
  }
  void count(const std::string& key, int64_t value) {
    CHECK(value >= 0 && value <= UINT32_MAX);
    set(key, static_cast<uint32_t>(value));
  }
  void number(const std::string& key, double value) { set(key, static_cast<float>(value)); }

  GgufMetadata take() { return std::move(entries_); }

 private:
  std::string architecture_;
  GgufMetadata entries_;
};

GgufMetadata model_metadata(const ModelConfig& config, const IndexPlan& plan, GgmlType type,
                            const std::string& name) {
  const AttentionConfig& attn = config.attention;
  const IndexerConfig& indexer = config.indexer;
  const MoeConfig& moe = config.moe;
  MetadataBuilder out(gguf_architecture(config.model_type));
  out.general("architecture", std::string(gguf_architecture(config.model_type)));
  out.general("name", name);
  out.general("file_type", file_type(type));
  if (type == GgmlType::kQ8_0) out.general("quantization_version", kQuantizationVersion);

  out.count("context_length", config.max_position_embeddings);
  out.count("embedding_length", config.hidden_size);
  out.count("block_count", config.num_hidden_layers);
  out.count("feed_forward_length",
            config.intermediate_size > 0 ? config.intermediate_size : moe.moe_intermediate_size);
  out.count("vocab_size", config.vocab_size);
  out.count("attention.head_count", attn.num_attention_heads);
  out.count("attention.head_count_kv", 1);  // the latent is shared by all heads
  out.number("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
  out.number("attention.layer_norm_epsilon", kIndexerNormEps);
  out.count("attention.q_lora_rank", attn.q_lora_rank);
  out.count("attention.kv_lora_rank", attn.kv_lora_rank);
  out.count("attention.key_length", attn.kv_lora_rank + attn.qk_rope_head_dim);
  out.count("attention.value_length", attn.kv_lora_rank);
  out.count("attention.key_length_mla", attn.qk_head_dim());
  out.count("attention.value_length_mla", attn.v_head_dim);
  out.count("attention.indexer.head_count", indexer.index_n_heads);
  out.count("attention.indexer.key_length", indexer.index_head_dim);
  out.count("attention.indexer.top_k", indexer.index_topk);
  if (config.model_type == ModelType::kGlmMoeDsa) {
    std::vector<bool> types;
    for (int l = 0; l < plan.num_layers(); ++l) types.push_back(plan.is_full(l));
    out.set("attention.indexer.types", std::move(types));
  }

  out.count("rope.dimension_count", attn.qk_rope_head_dim);
  out.number("rope.freq_base", config.rope.rope_theta);
  if (config.rope.rope_type == RopeConfig::Type::kYarn) {
    out.set("rope.scaling.type", std::string("yarn"));
    out.number("rope.scaling.factor", config.rope.factor);
    out.count("rope.scaling.original_context_length", config.rope.original_max_position_embeddings);
    out.number("rope.scaling.yarn_log_multiplier", 0.1 * config.rope.mscale_all_dim);
  }

  out.count("leading_dense_block_count", num_dense_layers(config));
  out.count("expert_count", moe.n_routed_experts);
  out.count("expert_used_count", moe.num_experts_per_tok);
  out.count("expert_shared_count", moe.n_shared_experts);
  out.count("expert_feed_forward_length", moe.moe_intermediate_size);
  out.number("expert_weights_scale", moe.routed_scaling_factor);
  out.set("expert_weights_norm", moe.norm_topk_prob);
  out.set("expert_gating_func", kSigmoidGating);
  if (moe.n_group > 1) {
    out.count("expert_group_count", moe.n_group);
    out.count("expert_group_used_count", moe.topk_group);
  }
  return out.take();
}

const std::vector<DType> kSourceTypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3};

// Asks the checkpoint for every tensor of the model, by the file's names.
struct PartLister {
  Binder& binder;
  const ModelConfig& config;
  GgmlType type;
  GgufModel& out;

  GgufPart& add(const std::string& name, Shape shape, GgmlType tensor_type) {
    if (shape.back() % ggml_block(tensor_type) != 0) {
      tensor_type = GgmlType::kF16;
      ++out.num_f16_instead;
    }
    out.parts.push_back({{name, tensor_type, std::move(shape)}, GgufPart::Layout::kRows, {}, {}});
    return out.parts.back();
  }

  void vector(const std::string& name, const std::string& source, int64_t size) {
    add(name, {size}, GgmlType::kF32)
        .sources.push_back(
            {binder.require(source, {size}, {DType::kF32, DType::kF16, DType::kBF16}), {}});
  }
  void matrix(const std::string& name, const std::string& source, int64_t rows, int64_t cols,
              bool always_f32 = false) {
    add(name, {rows, cols}, always_f32 ? GgmlType::kF32 : type)
        .sources.push_back(binder.require_scaled(source, {rows, cols}, kSourceTypes));
  }

  // Both halves of kv_b_proj, whose rows are [nope | v] for each head.
  void kv_b(const std::string& block, const std::string& source) {
    const AttentionConfig& attn = config.attention;
    const int64_t heads = attn.num_attention_heads, nope = attn.qk_nope_head_dim;
    const ScaledView view = binder.require_scaled(
        source, {heads * (nope + attn.v_head_dim), attn.kv_lora_rank}, kSourceTypes);
    GgufPart& keys = add(block + "attn_k_b.weight", {heads, attn.kv_lora_rank, nope}, type);
    keys.layout = GgufPart::Layout::kKeysTransposed;
    keys.sources.push_back(view);
    GgufPart& values =
        add(block + "attn_v_b.weight", {heads, attn.v_head_dim, attn.kv_lora_rank}, type);
    values.layout = GgufPart::Layout::kValues;
    values.sources.push_back(view);
  }

  void mlp(const std::string& block, const std::string& suffix, const std::string& source,
           int64_t width) {
    const int64_t hidden = config.hidden_size;
    matrix(block + "ffn_gate" + suffix, source + "gate_proj.weight", width, hidden);
    matrix(block + "ffn_up" + suffix, source + "up_proj.weight", width, hidden);
    matrix(block + "ffn_down" + suffix, source + "down_proj.weight", hidden, width);
  }

  void experts(const std::string& name, const std::string& source, const std::string& projection,
               int64_t rows, int64_t cols) {
    GgufPart& part = add(name, {config.moe.n_routed_experts, rows, cols}, type);
    for (int64_t e = 0; e < config.moe.n_routed_experts; ++e) {
      part.sources.push_back(binder.require_scaled(fmt::format("{}{}.{}", source, e, projection),
                                                   {rows, cols}, kSourceTypes));
    }
  }

  void moe(const std::string& block, const std::string& source) {
    const MoeConfig& moe = config.moe;
    const int64_t hidden = config.hidden_size, width = moe.moe_intermediate_size;
    matrix(block + "ffn_gate_inp.weight", source + "gate.weight", moe.n_routed_experts, hidden,
           true);
    vector(block + "exp_probs_b.bias", source + "gate.e_score_correction_bias",
           moe.n_routed_experts);
    const std::string routed = source + "experts.";
    experts(block + "ffn_gate_exps.weight", routed, "gate_proj.weight", width, hidden);
    experts(block + "ffn_up_exps.weight", routed, "up_proj.weight", width, hidden);
    experts(block + "ffn_down_exps.weight", routed, "down_proj.weight", hidden, width);
    mlp(block, "_shexp.weight", source + "shared_experts.", moe.n_shared_experts * width);
  }

  void indexer(const std::string& block, const std::string& source) {
    const IndexerConfig& indexer = config.indexer;
    vector(block + "indexer.k_norm.weight", source + "k_norm.weight", indexer.index_head_dim);
    vector(block + "indexer.k_norm.bias", source + "k_norm.bias", indexer.index_head_dim);
    matrix(block + "indexer.proj.weight", source + "weights_proj.weight", indexer.index_n_heads,
           config.hidden_size, true);
    matrix(block + "indexer.attn_k.weight", source + "wk.weight", indexer.index_head_dim,
           config.hidden_size);
    matrix(block + "indexer.attn_q_b.weight", source + "wq_b.weight",
           indexer.index_n_heads * indexer.index_head_dim, config.attention.q_lora_rank);
  }

  void layer(int index, bool full) {
    const AttentionConfig& attn = config.attention;
    const int64_t hidden = config.hidden_size, heads = attn.num_attention_heads;
    const std::string block = fmt::format("blk.{}.", index);
    const std::string source = fmt::format("model.layers.{}.", index);
    const std::string self_attn = source + "self_attn.";
    vector(block + "attn_norm.weight", source + "input_layernorm.weight", hidden);
    matrix(block + "attn_q_a.weight", self_attn + "q_a_proj.weight", attn.q_lora_rank, hidden);
    vector(block + "attn_q_a_norm.weight", self_attn + "q_a_layernorm.weight", attn.q_lora_rank);
    matrix(block + "attn_q_b.weight", self_attn + "q_b_proj.weight", heads * attn.qk_head_dim(),
           attn.q_lora_rank);
    matrix(block + "attn_kv_a_mqa.weight", self_attn + "kv_a_proj_with_mqa.weight",
           attn.kv_lora_rank + attn.qk_rope_head_dim, hidden);
    vector(block + "attn_kv_a_norm.weight", self_attn + "kv_a_layernorm.weight", attn.kv_lora_rank);
    kv_b(block, self_attn + "kv_b_proj.weight");
    matrix(block + "attn_output.weight", self_attn + "o_proj.weight", hidden,
           heads * attn.v_head_dim);
    if (full) indexer(block, indexer_prefix(index));
    vector(block + "ffn_norm.weight", source + "post_attention_layernorm.weight", hidden);
    if (config.is_moe(index)) {
      moe(block, source + "mlp.");
    } else {
      mlp(block, ".weight", source + "mlp.", config.intermediate_size);
    }
  }
};

template <class ToFloat>
void read_elements(const uint8_t* data, size_t bytes, std::span<float> out, ToFloat to_float) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = to_float(data + i * bytes);
}

uint16_t load_u16(const uint8_t* data) {
  uint16_t bits;
  std::memcpy(&bits, data, sizeof(bits));
  return bits;
}

// Row `row` of a matrix as float32; `scales` are those of an fp8 weight, else empty.
void read_row(const TensorView& view, const std::vector<float>& scales, int64_t row,
              std::span<float> out) {
  const auto cols = static_cast<int64_t>(out.size());
  const uint8_t* data = view.data + row * cols * dtype_bytes(view.dtype);
  switch (view.dtype) {
    case DType::kF32:
      std::memcpy(out.data(), data, out.size_bytes());
      return;
    case DType::kF16:
      return read_elements(data, 2, out, [](const uint8_t* p) { return f16_to_f32(load_u16(p)); });
    case DType::kBF16:
      return read_elements(data, 2, out, [](const uint8_t* p) { return bf16_to_f32(load_u16(p)); });
    case DType::kF8E4M3: {
      const int64_t scales_a_row = (cols + kScaleBlock - 1) / kScaleBlock;
      const float* row_scales = scales.data() + row / kScaleBlock * scales_a_row;
      for (int64_t c = 0; c < cols; ++c) {
        out[static_cast<size_t>(c)] = f8e4m3_table()[data[c]] * row_scales[c / kScaleBlock];
      }
      return;
    }
    default:
      CHECK(false);
  }
}

void give_rows(const GgufPart& part, const AttentionConfig& attn, const RowSink& sink) {
  std::vector<float> row;
  if (part.layout == GgufPart::Layout::kRows) {
    row.resize(static_cast<size_t>(part.tensor.row_elements()));
    for (size_t s = 0; s < part.sources.size(); ++s) {
      const TensorView& view = part.sources[s].weight;
      const int64_t num_rows = num_elements(view.shape) / part.tensor.row_elements();
      for (int64_t r = 0; r < num_rows; ++r) {
        read_row(view, part.scales[s], r, row);
        sink(row);
      }
    }
    return;
  }
  const int64_t nope = attn.qk_nope_head_dim, v = attn.v_head_dim, rank = attn.kv_lora_rank;
  const TensorView& view = part.sources[0].weight;
  row.resize(static_cast<size_t>(rank));
  std::vector<float> transposed(static_cast<size_t>(rank * nope));
  for (int64_t h = 0; h < attn.num_attention_heads; ++h) {
    const int64_t first = h * (nope + v);
    if (part.layout == GgufPart::Layout::kValues) {
      for (int64_t r = 0; r < v; ++r) {
        read_row(view, part.scales[0], first + nope + r, row);
        sink(row);
      }
      continue;
    }
    for (int64_t r = 0; r < nope; ++r) {
      read_row(view, part.scales[0], first + r, row);
      for (int64_t c = 0; c < rank; ++c)
        transposed[static_cast<size_t>(c * nope + r)] = row[static_cast<size_t>(c)];
    }
    for (int64_t c = 0; c < rank; ++c)
      sink(std::span(transposed).subspan(static_cast<size_t>(c * nope), static_cast<size_t>(nope)));
  }
}

}  // namespace

const char* gguf_architecture(ModelType type) {
  return type == ModelType::kGlmMoeDsa ? "glm-dsa" : "deepseek32";
}

std::vector<GgufTensor> GgufModel::tensors() const {
  std::vector<GgufTensor> tensors;
  for (const GgufPart& part : parts) tensors.push_back(part.tensor);
  return tensors;
}

GgufModel gguf_model(const Checkpoint& checkpoint, const ModelConfig& config, const IndexPlan& plan,
                     GgmlType type, const std::string& name) {
  const std::string where = printable(checkpoint.path, 400);
  check_indexer_weights(plan, layers_with_indexer(list_tensors(checkpoint), config), where);
  refuse_what_it_cannot_run(config, plan, where);
  GgufModel model;
  model.attention = config.attention;
  model.metadata = model_metadata(config, plan, type, name);

  Binder binder(checkpoint);
  for (const auto& [prefix, reason] : unused_prefixes(config, plan))
    binder.ignore_prefix(prefix, reason);
  PartLister lister{binder, config, type, model};
  lister.matrix("token_embd.weight", "model.embed_tokens.weight", config.vocab_size,
                config.hidden_size);
  lister.vector("output_norm.weight", "model.norm.weight", config.hidden_size);
  if (!config.tie_word_embeddings)
    lister.matrix("output.weight", "lm_head.weight", config.vocab_size, config.hidden_size);
  for (int l = 0; l < plan.num_layers(); ++l) lister.layer(l, plan.is_full(l));
  binder.finish();

  for (GgufPart& part : model.parts) {
    for (const ScaledView& source : part.sources) {
      part.scales.emplace_back();
      if (source.weight.dtype == DType::kF8E4M3)
        part.scales.back() = read_block_scales(source.weight, source.scales, where);
    }
  }
  return model;
}

void write_gguf_model(const GgufModel& model, const GgufMetadata& tokenizer,
                      const std::string& path,
                      const std::function<void(uint64_t bytes_done)>& progress) {
  GgufMetadata metadata = model.metadata;
  metadata.insert(metadata.end(), tokenizer.begin(), tokenizer.end());
  size_t next = 0;
  uint64_t done = 0;
  write_gguf(path, metadata, model.tensors(), [&](const GgufTensor& tensor, const RowSink& sink) {
    const GgufPart& part = model.parts[next++];
    CHECK_EQ(part.tensor.name, tensor.name);
    const uint64_t row_bytes = ggml_row_bytes(tensor.type, tensor.row_elements());
    give_rows(part, model.attention, [&](std::span<const float> row) {
      sink(row);
      done += row_bytes;
      if (progress) progress(done);
    });
  });
}

std::vector<std::string> gguf_hazards(const ModelConfig& config, const IndexPlan& plan) {
  std::vector<std::string> hazards;
  const AttentionConfig& attn = config.attention;
  if (config.model_type == ModelType::kGlmMoeDsa) {
    hazards.push_back(
        "llama.cpp 34af94cd9 normalises glm-dsa's indexer keys with epsilon 0 where the model has "
        "1e-6: selections can differ at near ties");
    if (plan != plan_from_freq(4, 3, plan.num_layers(), "GLM-5.2")) {
      hazards.push_back(
          "ik_llama.cpp does not read attention.indexer.types: it runs GLM-5.2's own plan, not "
          "this one");
    }
  }
  if (attn.kv_lora_rank != 512 || attn.qk_rope_head_dim != 64 ||
      attn.num_attention_heads % 4 != 0) {
    hazards.push_back(
        "ik_llama.cpp loads only models with kv_lora_rank 512, qk_rope_head_dim 64 and a multiple "
        "of 4 heads");
  }
  if (config.num_nextn_predict_layers > 0) hazards.push_back("the MTP layers are left out");
  return hazards;
}

}  // namespace indexcache
