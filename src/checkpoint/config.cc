#include "checkpoint/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <numbers>
#include <span>

#include "base/error.h"
#include "base/log.h"
#include "plan/plan_file.h"

namespace indexcache {

namespace {

// Bounds far over any published model and far under what would overflow a product of three of them.
constexpr int64_t kMaxWidth = 1 << 17;
constexpr int64_t kMaxAttentionHeads = 128;  // what sparse_mla takes, and the most of any DSA model
constexpr int64_t kMaxHeads = 1 << 12;       // of the indexer
constexpr int64_t kMaxTopk = 1 << 20;
constexpr int64_t kMaxExperts = 1 << 14;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxPositions = int64_t{1} << 31;
constexpr int64_t kFp8Block = 128;

std::string join_names(std::span<const char* const> names) {
  std::string text;
  for (const char* name : names) text += fmt::format("{}{}", text.empty() ? "" : ", ", name);
  return text;
}

// A key whose value we do not implement any alternative to: absent or exactly `expected`.
template <class Value>
void require_value(const JsonObject& object, const char* key, const Value& expected) {
  if (object.has(key) && object.get(key) != Json(expected)) {
    object.wrong(key, fmt::format("{} (nothing else is supported)", json_excerpt(Json(expected))));
  }
}

double number_between(const JsonObject& object, const char* key, double above, double below) {
  const double value = object.number(key);
  if (!(value > above && value < below)) {
    object.wrong(key, fmt::format("a number above {} and below {}", above, below));
  }
  return value;
}

double number_between_or(const JsonObject& object, const char* key, double fallback, double above,
                         double below) {
  return object.has(key) ? number_between(object, key, above, below) : fallback;
}

ModelType parse_model_type(const JsonObject& config) {
  const std::string name = config.string("model_type");
  const auto types = {ModelType::kGlmMoeDsa, ModelType::kDeepseekV32};
  const auto type = std::find_if(types.begin(), types.end(),
                                 [&](ModelType t) { return name == model_type_name(t); });
  if (type == types.end()) config.wrong("model_type", "\"glm_moe_dsa\" or \"deepseek_v32\"");
  if (config.has("architectures") &&
      config.get("architectures") != Json::array({model_architecture_name(*type)})) {
    config.wrong("architectures", fmt::format("[\"{}\"], as model_type \"{}\" says",
                                              model_architecture_name(*type), name));
  }
  return *type;
}

void refuse_unknown_index_keys(const JsonObject& config) {
  constexpr std::array known = {"index_n_heads",
                                "index_head_dim",
                                "index_topk",
                                "index_topk_freq",
                                "index_topk_pattern",
                                "index_skip_topk_offset",
                                "indexer_types",
                                "index_share_for_mtp_iteration",
                                "indexer_rope_interleave"};
  for (const auto& [key, value] : config.raw().items()) {
    if (!key.starts_with("index") || std::find(known.begin(), known.end(), key) != known.end())
      continue;
    fail("{}: unknown key \"{}\"; of the keys that begin with \"index\", expected only {}",
         config.where(), printable(key), join_names(known));
  }
}

void report_ignored_code_keys(const JsonObject& config) {
  for (const char* key : {"auto_map", "trust_remote_code", "custom_pipelines"}) {
    if (config.has(key)) {
      info("{}: \"{}\" is ignored: code from a checkpoint is never loaded or run", config.where(),
           key);
    }
  }
}

void refuse_unsupported(const JsonObject& config) {
  require_value(config, "hidden_act", "silu");
  require_value(config, "attention_bias", false);
  require_value(config, "mlp_bias", false);
  require_value(config, "moe_layer_freq", 1);
  require_value(config, "rope_interleave", true);
  require_value(config, "partial_rotary_factor", 1.0);
  require_value(config, "scoring_func", "sigmoid");
  require_value(config, "topk_method", "noaux_tc");
}

AttentionConfig parse_attention(const JsonObject& config) {
  AttentionConfig attention;
  attention.num_attention_heads = config.integer("num_attention_heads", 1, kMaxAttentionHeads);
  attention.q_lora_rank = config.integer("q_lora_rank", 1, kMaxWidth);
  attention.kv_lora_rank = config.integer("kv_lora_rank", 1, kMaxWidth);
  attention.qk_nope_head_dim = config.integer("qk_nope_head_dim", 1, kMaxWidth);
  attention.qk_rope_head_dim = config.integer("qk_rope_head_dim", 2, kMaxWidth);
  attention.v_head_dim = config.integer("v_head_dim", 1, kMaxWidth);
  for (const char* key : {"qk_rope_head_dim", "kv_lora_rank"}) {
    if (config.integer(key, 2, kMaxWidth) % 2 != 0) config.wrong(key, "an even number");
  }
  require_value(config, "qk_head_dim", attention.qk_head_dim());
  require_value(config, "num_key_value_heads", attention.num_attention_heads);
  return attention;
}

IndexerConfig parse_indexer(const JsonObject& config, ModelType type,
                            const AttentionConfig& attention) {
  IndexerConfig indexer;
  indexer.index_n_heads = config.integer("index_n_heads", 1, kMaxHeads);
  indexer.index_head_dim = config.integer("index_head_dim", 1, kMaxWidth);
  indexer.index_topk = config.integer("index_topk", 1, kMaxTopk);
  if (indexer.index_head_dim % 2 != 0) config.wrong("index_head_dim", "an even number");
  if (indexer.index_head_dim < attention.qk_rope_head_dim) {
    config.wrong("index_head_dim",
                 fmt::format("at least qk_rope_head_dim, which is {}", attention.qk_rope_head_dim));
  }
  indexer.indexer_rope_interleave =
      config.boolean_or("indexer_rope_interleave", type == ModelType::kGlmMoeDsa);
  return indexer;
}

std::vector<MlpType> parse_mlp_layer_types(const JsonObject& config, int64_t num_hidden_layers) {
  const auto size = static_cast<size_t>(num_hidden_layers);
  std::vector<MlpType> types;
  if (config.has("mlp_layer_types")) {
    const Json& list = config.get("mlp_layer_types");
    if (!list.is_array() || list.size() != size) {
      config.wrong("mlp_layer_types", fmt::format("a list of {} entries, one a layer", size));
    }
    for (size_t l = 0; l < size; ++l) {
      const bool dense = is_text(list[l], "dense");
      if (!dense && !is_text(list[l], "sparse")) {
        fail("{}: \"mlp_layer_types\" entry {} is {}, expected \"dense\" or \"sparse\"",
             config.where(), l, json_excerpt(list[l]));
      }
      types.push_back(dense ? MlpType::kDense : MlpType::kSparse);
    }
    if (!config.has("first_k_dense_replace")) return types;
  }
  const auto num_dense =
      static_cast<size_t>(config.integer("first_k_dense_replace", 0, num_hidden_layers));
  std::vector<MlpType> by_count(size, MlpType::kSparse);
  std::fill_n(by_count.begin(), num_dense, MlpType::kDense);
  if (!types.empty() && types != by_count) {
    config.wrong("first_k_dense_replace",
                 "the dense layers of \"mlp_layer_types\", with which it disagrees");
  }
  return by_count;
}

MoeConfig parse_moe(const JsonObject& config) {
  MoeConfig moe;
  moe.n_routed_experts = config.integer("n_routed_experts", 1, kMaxExperts);
  moe.n_shared_experts = config.integer_or("n_shared_experts", 0, 0, kMaxExperts);
  moe.num_experts_per_tok = config.integer("num_experts_per_tok", 1, moe.n_routed_experts);
  moe.moe_intermediate_size = config.integer("moe_intermediate_size", 1, kMaxWidth);
  moe.n_group = config.integer_or("n_group", 1, 1, moe.n_routed_experts);
  moe.topk_group = config.integer_or("topk_group", 1, 1, moe.n_group);
  moe.norm_topk_prob = config.boolean_or("norm_topk_prob", true);
  moe.routed_scaling_factor = number_between_or(config, "routed_scaling_factor", 1.0, 0, 1e6);
  if (moe.n_routed_experts % moe.n_group != 0) {
    config.wrong("n_group",
                 fmt::format("a divisor of n_routed_experts, which is {}", moe.n_routed_experts));
  }
  const int64_t group_size = moe.n_routed_experts / moe.n_group;
  // A group's score is the sum of its two best experts.
  if (moe.n_group > 1 && group_size < 2) config.wrong("n_group", "groups of at least 2 experts");
  if (group_size * moe.topk_group < moe.num_experts_per_tok) {
    config.wrong("num_experts_per_tok",
                 fmt::format("at most the {} experts of the {} groups that topk_group keeps",
                             group_size * moe.topk_group, moe.topk_group));
  }
  return moe;
}

// One object of rope parameters in either spelling; `rope_theta` is the caller's when the object
// has none.
RopeConfig parse_rope_object(const JsonObject& object, std::optional<double> rope_theta) {
  constexpr std::array known = {"rope_theta",
                                "rope_type",
                                "type",
                                "factor",
                                "beta_fast",
                                "beta_slow",
                                "mscale",
                                "mscale_all_dim",
                                "truncate",
                                "partial_rotary_factor",
                                "original_max_position_embeddings"};
  for (const auto& [key, value] : object.raw().items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    fail("{}: unknown key \"{}\", expected only {}", object.where(), printable(key),
         join_names(known));
  }
  require_value(object, "truncate", true);
  require_value(object, "partial_rotary_factor", 1.0);

  RopeConfig rope;
  if (object.has("rope_theta") || !rope_theta.has_value()) {
    rope.rope_theta = number_between(object, "rope_theta", 1, 1e15);
    if (rope_theta.has_value() && *rope_theta != rope.rope_theta) {
      object.wrong("rope_theta",
                   fmt::format("the file's other \"rope_theta\", which is {}", *rope_theta));
    }
  } else {
    rope.rope_theta = *rope_theta;
  }
  if (object.has("rope_type") && object.has("type") &&
      object.get("rope_type") != object.get("type")) {
    object.wrong("type", "the same as \"rope_type\"");
  }
  const char* type_key = object.has("type") && !object.has("rope_type") ? "type" : "rope_type";
  const std::string type = object.string_or(type_key, "default");
  if (type == "default") return rope;
  if (type != "yarn") object.wrong(type_key, "\"default\" or \"yarn\"");
  rope.rope_type = RopeConfig::Type::kYarn;
  rope.factor = object.number("factor");
  if (!(rope.factor >= 1 && rope.factor < 1e6))
    object.wrong("factor", "a number from 1 to 1000000");
  rope.original_max_position_embeddings =
      object.integer("original_max_position_embeddings", 1, kMaxPositions);
  rope.beta_fast = number_between_or(object, "beta_fast", rope.beta_fast, 0, 1e6);
  rope.beta_slow = number_between_or(object, "beta_slow", rope.beta_slow, 0, 1e6);
  if (rope.beta_fast < rope.beta_slow) {
    fail("{}: \"beta_fast\" is {} and \"beta_slow\" {}, expected beta_fast at least beta_slow",
         object.where(), rope.beta_fast, rope.beta_slow);
  }
  // 0, like an absent key, means that there is none.
  for (const auto& [key, field] :
       {std::pair("mscale", &rope.mscale), std::pair("mscale_all_dim", &rope.mscale_all_dim)}) {
    *field = object.number_or(key, 0);
    if (!(*field >= 0 && *field < 1e3)) object.wrong(key, "a number from 0 to 1000");
  }
  return rope;
}

RopeConfig parse_rope(const JsonObject& config) {
  std::optional<double> rope_theta;
  if (config.has("rope_theta")) rope_theta = number_between(config, "rope_theta", 1, 1e15);
  std::optional<RopeConfig> found;
  const char* found_key = nullptr;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!config.has(key)) continue;
    const RopeConfig rope = parse_rope_object(config.object(key), rope_theta);
    if (found.has_value() && *found != rope) {
      config.wrong(key, fmt::format("what \"{}\" says, with which it disagrees", found_key));
    }
    found = rope;
    found_key = key;
  }
  if (found.has_value()) return *found;
  if (!rope_theta.has_value()) {
    fail("{}: key \"rope_theta\" is missing, expected it or \"rope_parameters\"", config.where());
  }
  RopeConfig rope;
  rope.rope_theta = *rope_theta;
  return rope;
}

std::optional<QuantizationConfig> parse_quantization(const JsonObject& config) {
  if (!config.has("quantization_config")) return std::nullopt;
  const JsonObject object = config.object("quantization_config");
  if (object.string("quant_method") != "fp8") {
    object.wrong("quant_method", "\"fp8\" (e4m3 with 128x128 blocks), or no quantization_config");
  }
  require_value(object, "fmt", "e4m3");
  require_value(object, "activation_scheme", "dynamic");
  require_value(object, "scale_fmt", "ue8m0");
  if (object.get("weight_block_size") != Json::array({kFp8Block, kFp8Block})) {
    object.wrong("weight_block_size", "[128, 128]");
  }
  QuantizationConfig quantization;
  quantization.scale_fmt = object.string_or("scale_fmt", "");
  if (object.has("modules_to_not_convert")) {
    const Json& modules = object.get("modules_to_not_convert");
    if (!modules.is_array()) object.wrong("modules_to_not_convert", "a list of names");
    for (const Json& module : modules) {
      if (!module.is_string()) object.wrong("modules_to_not_convert", "a list of names");
      quantization.modules_to_not_convert.push_back(module.get<std::string>());
    }
  }
  return quantization;
}

std::string parse_dtype_name(const JsonObject& config) {
  std::string dtype;
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!config.has(key)) continue;
    const std::string name = config.string(key);
    if (name != "float32" && name != "bfloat16" && name != "float16") {
      config.wrong(key, "\"float32\", \"bfloat16\" or \"float16\"");
    }
    if (!dtype.empty() && dtype != name) config.wrong(key, fmt::format("the \"dtype\" {}", dtype));
    dtype = name;
  }
  return dtype;
}

void parse_special_tokens(const JsonObject& config, ModelConfig& model) {
  const int64_t last = model.vocab_size - 1;
  if (config.has("bos_token_id")) {
    model.bos_token_id = static_cast<int32_t>(config.integer("bos_token_id", 0, last));
  }
  if (!config.has("eos_token_id")) return;
  const Json& eos = config.get("eos_token_id");
  if (!eos.is_array()) {
    model.eos_token_id.push_back(static_cast<int32_t>(config.integer("eos_token_id", 0, last)));
    return;
  }
  for (const Json& id : eos) {
    // An integer above INT64_MAX reads as negative here, and is refused as that.
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > last) {
      config.wrong("eos_token_id", fmt::format("token ids from 0 to {}", last));
    }
    model.eos_token_id.push_back(id.get<int32_t>());
  }
}

void check_layer_types(const JsonObject& config, int64_t num_hidden_layers) {
  if (!config.has("layer_types")) return;
  const Json& types = config.get("layer_types");
  const bool right = types.is_array() && types.size() == static_cast<size_t>(num_hidden_layers) &&
                     std::all_of(types.begin(), types.end(), [](const Json& type) {
                       return is_text(type, "deepseek_sparse_attention");
                     });
  if (!right) {
    config.wrong("layer_types", fmt::format("{} entries \"deepseek_sparse_attention\", one a layer",
                                            num_hidden_layers));
  }
}

}  // namespace

const char* model_type_name(ModelType type) {
  return type == ModelType::kGlmMoeDsa ? "glm_moe_dsa" : "deepseek_v32";
}

const char* model_architecture_name(ModelType type) {
  return type == ModelType::kGlmMoeDsa ? "GlmMoeDsaForCausalLM" : "DeepseekV32ForCausalLM";
}

ModelConfig parse_config(const Json& json, const std::string& where) {
  const JsonObject config(json, where);
  ModelConfig model;
  model.model_type = parse_model_type(config);
  refuse_unknown_index_keys(config);
  refuse_unsupported(config);
  report_ignored_code_keys(config);

  model.num_hidden_layers = config.integer("num_hidden_layers", 1, kMaxPlanLayers);
  model.num_nextn_predict_layers =
      config.integer_or("num_nextn_predict_layers", 0, 0, kMaxPlanLayers);
  model.hidden_size = config.integer("hidden_size", 1, kMaxWidth);
  model.vocab_size = config.integer("vocab_size", 1, kMaxVocab);
  model.max_position_embeddings = config.integer("max_position_embeddings", 1, kMaxPositions);
  model.rms_norm_eps = number_between(config, "rms_norm_eps", 0, 1);
  model.tie_word_embeddings = config.boolean_or("tie_word_embeddings", false);
  model.attention = parse_attention(config);
  model.indexer = parse_indexer(config, model.model_type, model.attention);
  check_layer_types(config, model.num_hidden_layers);
  model.mlp_layer_types = parse_mlp_layer_types(config, model.num_hidden_layers);
  const auto has_layer = [&](MlpType type) {
    return std::find(model.mlp_layer_types.begin(), model.mlp_layer_types.end(), type) !=
           model.mlp_layer_types.end();
  };
  if (has_layer(MlpType::kDense))
    model.intermediate_size = config.integer("intermediate_size", 1, kMaxWidth);
  if (has_layer(MlpType::kSparse)) model.moe = parse_moe(config);
  model.rope = parse_rope(config);
  model.quantization_config = parse_quantization(config);
  model.dtype = parse_dtype_name(config);
  parse_special_tokens(config, model);
  config.boolean_or("index_share_for_mtp_iteration",
                    false);  // concerns MTP layers, which are not run

  model.index_plan = plan_from_config(config, static_cast<int>(model.num_hidden_layers));
  model.fingerprint = config_fingerprint(config_json(model));
  return model;
}

ModelConfig load_config(const std::string& path) {
  std::error_code ignored;
  const std::string file = std::filesystem::is_directory(path, ignored)
                               ? (std::filesystem::path(path) / "config.json").string()
                               : path;
  return parse_config(load_json(file), printable(file, 400));
}

namespace {

Json rope_json(const RopeConfig& rope) {
  Json json = Json::object();  // a list of members would lose some of them where memory ends
  json["rope_theta"] = rope.rope_theta;
  if (rope.rope_type == RopeConfig::Type::kDefault) {
    json["rope_type"] = "default";
    return json;
  }
  json["rope_type"] = "yarn";
  json["factor"] = rope.factor;
  json["original_max_position_embeddings"] = rope.original_max_position_embeddings;
  json["beta_fast"] = rope.beta_fast;
  json["beta_slow"] = rope.beta_slow;
  if (rope.mscale != 0) json["mscale"] = rope.mscale;
  if (rope.mscale_all_dim != 0) json["mscale_all_dim"] = rope.mscale_all_dim;
  return json;
}

void add_moe_json(const MoeConfig& moe, Json& json) {
  json["n_routed_experts"] = moe.n_routed_experts;
  json["n_shared_experts"] = moe.n_shared_experts;
  json["num_experts_per_tok"] = moe.num_experts_per_tok;
  json["moe_intermediate_size"] = moe.moe_intermediate_size;
  json["n_group"] = moe.n_group;
  json["topk_group"] = moe.topk_group;
  json["norm_topk_prob"] = moe.norm_topk_prob;
  json["routed_scaling_factor"] = moe.routed_scaling_factor;
  json["scoring_func"] = "sigmoid";
  json["topk_method"] = "noaux_tc";
}

// Both spellings of the plan, because no engine reads them all.
void add_plan_json(const IndexPlan& plan, Json& json) {
  if (plan.num_full() == plan.num_layers()) return;
  Json types = Json::array();
  for (int l = 0; l < plan.num_layers(); ++l) types.push_back(plan.is_full(l) ? "full" : "shared");
  json["indexer_types"] = std::move(types);
  json["index_topk_pattern"] = to_string(plan);
}

Json quantization_json(const QuantizationConfig& quantization) {
  Json json = Json::object();
  json["quant_method"] = "fp8";
  json["fmt"] = "e4m3";
  json["weight_block_size"] = Json::array({kFp8Block, kFp8Block});
  json["activation_scheme"] = "dynamic";
  if (!quantization.scale_fmt.empty()) json["scale_fmt"] = quantization.scale_fmt;
  if (!quantization.modules_to_not_convert.empty()) {
    json["modules_to_not_convert"] = quantization.modules_to_not_convert;
  }
  return json;
}

}  // namespace

Json config_json(const ModelConfig& config) {
  Json json = Json::object();
  json["architectures"] = Json::array({model_architecture_name(config.model_type)});
  json["model_type"] = model_type_name(config.model_type);
  json["num_hidden_layers"] = config.num_hidden_layers;
  json["num_nextn_predict_layers"] = config.num_nextn_predict_layers;
  json["hidden_size"] = config.hidden_size;
  json["intermediate_size"] = config.intermediate_size;
  json["vocab_size"] = config.vocab_size;
  json["max_position_embeddings"] = config.max_position_embeddings;
  json["rms_norm_eps"] = config.rms_norm_eps;
  json["tie_word_embeddings"] = config.tie_word_embeddings;
  json["hidden_act"] = "silu";
  json["attention_bias"] = false;
  json["num_attention_heads"] = config.attention.num_attention_heads;
  json["num_key_value_heads"] = config.attention.num_attention_heads;
  json["q_lora_rank"] = config.attention.q_lora_rank;
  json["kv_lora_rank"] = config.attention.kv_lora_rank;
  json["qk_nope_head_dim"] = config.attention.qk_nope_head_dim;
  json["qk_rope_head_dim"] = config.attention.qk_rope_head_dim;
  json["v_head_dim"] = config.attention.v_head_dim;
  json["index_n_heads"] = config.indexer.index_n_heads;
  json["index_head_dim"] = config.indexer.index_head_dim;
  json["index_topk"] = config.indexer.index_topk;
  json["indexer_rope_interleave"] = config.indexer.indexer_rope_interleave;
  add_plan_json(config.index_plan, json);

  const std::vector<MlpType>& types = config.mlp_layer_types;
  const auto num_dense = std::find(types.begin(), types.end(), MlpType::kSparse) - types.begin();
  const bool dense_first =
      std::find(types.begin() + num_dense, types.end(), MlpType::kDense) == types.end();
  if (dense_first) {
    json["first_k_dense_replace"] = num_dense;
  } else {
    json["mlp_layer_types"] = Json::array();
    for (MlpType type : types) {
      json["mlp_layer_types"].push_back(type == MlpType::kDense ? "dense" : "sparse");
    }
  }
  if (config.moe.n_routed_experts > 0) add_moe_json(config.moe, json);
  json["rope_parameters"] = rope_json(config.rope);
  if (config.quantization_config)
    json["quantization_config"] = quantization_json(*config.quantization_config);
  json["bos_token_id"] = config.bos_token_id ? Json(*config.bos_token_id) : Json(nullptr);
  json["eos_token_id"] = config.eos_token_id.empty()       ? Json(nullptr)
                         : config.eos_token_id.size() == 1 ? Json(config.eos_token_id[0])
                                                           : Json(config.eos_token_id);
  if (!config.dtype.empty()) json["dtype"] = config.dtype;
  return json;
}

namespace {

// YaRN's attention temperature for one of its two mscale settings.
double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

}  // namespace

std::vector<float> rope_inv_freq(const RopeConfig& rope, int64_t dim) {
  CHECK(dim > 0 && dim % 2 == 0);
  const auto num_pairs = static_cast<size_t>(dim / 2);
  std::vector<float> inv_freq(num_pairs);
  // The pair at which the wavelength makes `rotations` turns over the original context.
  const auto pair_of = [&](double rotations) {
    return static_cast<double>(dim) *
           std::log(static_cast<double>(rope.original_max_position_embeddings) /
                    (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(rope.rope_theta));
  };
  float low = 0, high = 0;
  if (rope.rope_type == RopeConfig::Type::kYarn) {
    low = static_cast<float>(std::max(std::floor(pair_of(rope.beta_fast)), 0.0));
    high = static_cast<float>(
        std::min(std::ceil(pair_of(rope.beta_slow)), static_cast<double>(dim - 1)));
    if (low == high) high += 0.001f;
  }
  for (size_t j = 0; j < num_pairs; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(dim);
    const float wavelength =
        static_cast<float>(std::pow(rope.rope_theta, static_cast<double>(exponent)));
    inv_freq[j] = 1.0f / wavelength;
    if (rope.rope_type == RopeConfig::Type::kDefault) continue;
    // Fast pairs keep their speed, slow ones are slowed by `factor`, and the ones between are
    // mixed.
    const float ramp = std::clamp((static_cast<float>(j) - low) / (high - low), 0.0f, 1.0f);
    const float keep = 1.0f - ramp;
    const float slowed = 1.0f / (static_cast<float>(rope.factor) * wavelength);
    inv_freq[j] = slowed * (1.0f - keep) + inv_freq[j] * keep;
  }
  return inv_freq;
}

float rope_cos_sin_scale(const RopeConfig& rope) {
  if (rope.rope_type == RopeConfig::Type::kDefault) return 1;
  if (rope.mscale == 0 || rope.mscale_all_dim == 0)
    return static_cast<float>(yarn_mscale(rope.factor, 1));
  return static_cast<float>(yarn_mscale(rope.factor, rope.mscale) /
                            yarn_mscale(rope.factor, rope.mscale_all_dim));
}

float attention_scale(const ModelConfig& config) {
  const double scale = 1 / std::sqrt(static_cast<double>(config.attention.qk_head_dim()));
  const RopeConfig& rope = config.rope;
  if (rope.rope_type == RopeConfig::Type::kDefault || rope.mscale_all_dim == 0)
    return static_cast<float>(scale);
  const double mscale = yarn_mscale(rope.factor, rope.mscale_all_dim);
  return static_cast<float>(scale * mscale * mscale);
}

}  // namespace indexcache
