// config.json of a DSA model as one plain struct. Fields keep config.json's names.
//
// Read: model_type glm_moe_dsa (GlmMoeDsaForCausalLM) and deepseek_v32 (DeepseekV32ForCausalLM), in
// both spellings of the hub (`rope_parameters`, or top-level `rope_theta` with `rope_scaling`;
// `mlp_layer_types` or `first_k_dense_replace`).
//
// Rules: what would change the result and is not supported is refused by name; so is a key that
// begins with "index" and is not known, because ignoring it would change the plan. Two spellings
// that disagree are an Error. Every size is checked against a bound, and against the other sizes,
// before anything is allocated from it. Keys that ask for code from the checkpoint (auto_map ...)
// are ignored with one line in the log.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "plan/index_plan.h"

namespace indexcache {

enum class ModelType { kGlmMoeDsa, kDeepseekV32 };
const char* model_type_name(ModelType type);          // "glm_moe_dsa"
const char* model_architecture_name(ModelType type);  // "GlmMoeDsaForCausalLM"

struct RopeConfig {
  enum class Type { kDefault, kYarn };
  Type rope_type = Type::kDefault;
  double rope_theta = 1e4;
  // YaRN only.
  double factor = 1;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 0;  // 0 is "not given", as the reference reads it
  double mscale_all_dim = 0;

  bool operator==(const RopeConfig&) const = default;
};

struct AttentionConfig {
  int64_t num_attention_heads = 0;
  int64_t q_lora_rank = 0;
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;  // even
  int64_t v_head_dim = 0;

  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  bool operator==(const AttentionConfig&) const = default;
};

struct IndexerConfig {
  int64_t index_n_heads = 0;
  int64_t index_head_dim =
      0;  // at least qk_rope_head_dim: its first qk_rope_head_dim entries are rotated
  int64_t index_topk = 0;
  bool indexer_rope_interleave = true;  // false: half-split (NeoX)

  bool operator==(const IndexerConfig&) const = default;
};

// All 0 in a model without sparse layers.
struct MoeConfig {
  int64_t n_routed_experts = 0;
  int64_t n_shared_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t moe_intermediate_size = 0;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1;

  bool operator==(const MoeConfig&) const = default;
};

// fp8 e4m3 weights with one scale for each 128x128 block (`weight_scale_inv`).
struct QuantizationConfig {
  std::string scale_fmt;  // "ue8m0", or empty when not stated
  std::vector<std::string> modules_to_not_convert;

  bool operator==(const QuantizationConfig&) const = default;
};

enum class MlpType : uint8_t { kDense, kSparse };

struct ModelConfig {
  ModelType model_type = ModelType::kGlmMoeDsa;
  int64_t num_hidden_layers = 0;
  int64_t num_nextn_predict_layers = 0;  // MTP layers after the last decoder layer; not run
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;  // of dense layers
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  std::vector<MlpType> mlp_layer_types;  // one a decoder layer
  AttentionConfig attention;
  IndexerConfig indexer;
  MoeConfig moe;
  RopeConfig rope;
  std::optional<QuantizationConfig> quantization_config;
  std::optional<int32_t> bos_token_id;
  std::vector<int32_t> eos_token_id;
  std::string dtype;  // "bfloat16", "float16", "float32", or empty when not stated; the tensors'
                      // own dtypes decide

  IndexPlan index_plan;  // what the file states; a user's override replaces it (plan/plan_file.h)
  std::string fingerprint;  // config_fingerprint(config_json(*this)): the same in every spelling of
                            // the file

  bool is_moe(int layer) const {
    return mlp_layer_types[static_cast<size_t>(layer)] == MlpType::kSparse;
  }
  bool operator==(const ModelConfig&) const = default;
};

// LayerNorm of the indexer's keys (`k_norm`); fixed in every published implementation, in no
// config.
constexpr float kIndexerNormEps = 1e-6f;

ModelConfig parse_config(const Json& json, const std::string& where);

// `path` is a config.json or the folder that holds it.
ModelConfig load_config(const std::string& path);

// The hub's layout. parse_config(config_json(c)) == c, if c's fingerprint is right.
Json config_json(const ModelConfig& config);

// Rotation speeds, radians a position, of the `dim` / 2 pairs of a head part of `dim` (even)
// entries. Rounded to f32 at the steps where the reference rounds, so that far positions turn by
// the same angle.
std::vector<float> rope_inv_freq(const RopeConfig& rope, int64_t dim);

// The factor on cos and sin; 1 unless YaRN's mscale and mscale_all_dim differ.
float rope_cos_sin_scale(const RopeConfig& rope);

// The factor on attention scores: qk_head_dim^-0.5, times YaRN's mscale squared where there is one.
float attention_scale(const ModelConfig& config);

}  // namespace indexcache
