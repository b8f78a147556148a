#include "checkpoint/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/log.h"
#include "model/shapes.h"

namespace indexcache {
namespace {

std::string golden_folder() {
  const char* folder = std::getenv("INDEXCACHE_GOLDEN");
  return folder != nullptr ? folder : std::string(INDEXCACHE_SOURCE_DIR) + "/../shared/golden";
}

// GLM-5.2's config.json, the fields that matter, at full size.
Json glm52() {
  Json json = config_json(named_shape("glm-5.2"));
  json.erase("indexer_types");
  json.erase("index_topk_pattern");
  json["index_topk_freq"] = 4;
  json["index_skip_topk_offset"] = 3;
  json["index_topk_pattern"] = nullptr;
  json["index_share_for_mtp_iteration"] = true;
  json["head_dim"] = 192;
  return json;
}

// DeepSeek-V3.2's config.json as the hub has it.
Json v32() {
  return parse_json(R"({
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.44.2", "use_cache": true, "v_head_dim": 128,
    "vocab_size": 129280})",
                    "v32");
}

std::string error_of(const Json& json) {
  try {
    parse_config(json, "config.json");
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

void expect_error(const Json& json, std::initializer_list<const char*> parts) {
  const std::string message = error_of(json);
  EXPECT_EQ(message.substr(0, 11), "config.json") << message;
  for (const char* part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
}

Json with(Json json, const char* key, Json value) {
  json[key] = std::move(value);
  return json;
}

TEST(Config, Glm52) {
  const ModelConfig c = parse_config(glm52(), "glm-5.2");
  EXPECT_EQ(c.model_type, ModelType::kGlmMoeDsa);
  EXPECT_EQ(c.num_hidden_layers, 78);
  EXPECT_EQ(c.num_nextn_predict_layers, 1);
  EXPECT_EQ(c.index_plan.num_full(), 21);
  EXPECT_EQ(c.attention.qk_head_dim(), 256);
  EXPECT_TRUE(c.indexer.indexer_rope_interleave);
  EXPECT_EQ(c.rope.rope_type, RopeConfig::Type::kDefault);
  EXPECT_EQ(c.rope.rope_theta, 8e6);
  EXPECT_FALSE(c.is_moe(2));
  EXPECT_TRUE(c.is_moe(3));
  EXPECT_EQ(c, named_shape("glm-5.2"))
      << "the freq/offset spelling and the shape's list are one plan";
}

TEST(Config, DeepseekV32) {
  const ModelConfig c = parse_config(v32(), "v32");
  EXPECT_EQ(c.model_type, ModelType::kDeepseekV32);
  EXPECT_EQ(c.index_plan, all_full_plan(61));
  EXPECT_FALSE(c.indexer.indexer_rope_interleave);
  EXPECT_EQ(c.rope.rope_type, RopeConfig::Type::kYarn);
  EXPECT_EQ(c.rope.factor, 40);
  EXPECT_EQ(c.rope.original_max_position_embeddings, 4096);
  EXPECT_EQ(c.moe.n_group, 8);
  EXPECT_EQ(c.moe.topk_group, 4);
  ASSERT_TRUE(c.quantization_config.has_value());
  EXPECT_EQ(c.quantization_config->scale_fmt, "ue8m0");
  EXPECT_EQ(c.bos_token_id, 0);
  EXPECT_EQ(c.eos_token_id, std::vector<int32_t>{1});
  EXPECT_EQ(c.dtype, "bfloat16");
  // The fingerprint names the model, not how its weights are stored.
  Json plain = v32();
  plain.erase("quantization_config");
  EXPECT_EQ(parse_config(plain, "plain").fingerprint, c.fingerprint);
}

TEST(Config, AttentionScale) {
  EXPECT_NEAR(attention_scale(parse_config(v32(), "v32")), 0.135234, 5e-7);
  EXPECT_EQ(attention_scale(parse_config(glm52(), "glm")), 0.0625f);
}

TEST(Config, YarnTable) {
  // Published: theta 1e4, 64 dimensions, factor 40 over 4096 positions, beta 32/1 mix the pairs 10
  // to 23.
  const RopeConfig rope = parse_config(v32(), "v32").rope;
  const std::vector<float> found = rope_inv_freq(rope, 64);
  ASSERT_EQ(found.size(), 32u);
  for (int j = 0; j < 32; ++j) {
    const double inv = std::pow(1e4, -2.0 * j / 64);
    const double ramp = std::clamp((j - 10) / 13.0, 0.0, 1.0);
    const double expected = inv / 40 * ramp + inv * (1 - ramp);
    // A handful of f32 roundings.
    EXPECT_NEAR(found[static_cast<size_t>(j)], expected,
                8 * expected * std::numeric_limits<float>::epsilon())
        << j;
  }
  EXPECT_EQ(rope_cos_sin_scale(rope), 1.0f);
}

TEST(Config, DefaultRopeTable) {
  RopeConfig rope;
  rope.rope_theta = 1e6;
  const std::vector<float> found = rope_inv_freq(rope, 16);
  ASSERT_EQ(found.size(), 8u);
  for (int j = 0; j < 8; ++j) {
    const double expected = std::pow(1e6, -2.0 * j / 16);
    EXPECT_NEAR(found[static_cast<size_t>(j)], expected,
                2 * expected * std::numeric_limits<float>::epsilon())
        << j;
  }
  EXPECT_EQ(rope_cos_sin_scale(rope), 1.0f);
}

TEST(Config, MscaleWithoutAllDim) {
  Json json = v32();
  json["rope_scaling"].erase("mscale_all_dim");
  const ModelConfig c = parse_config(json, "v32");
  EXPECT_NEAR(attention_scale(c), 1 / std::sqrt(192.0), 1e-8);
  EXPECT_NEAR(rope_cos_sin_scale(c.rope), 0.1 * std::log(40.0) + 1, 1e-6);
}

TEST(Config, BothSpellingsAreOneModel) {
  Json modern = v32();
  modern.erase("rope_theta");
  modern.erase("rope_scaling");
  modern["rope_parameters"] = v32()["rope_scaling"];
  modern["rope_parameters"].erase("type");
  modern["rope_parameters"]["rope_type"] = "yarn";
  modern["rope_parameters"]["rope_theta"] = 10000.0;
  modern.erase("torch_dtype");
  modern["dtype"] = "bfloat16";
  modern.erase("first_k_dense_replace");
  modern["mlp_layer_types"] = Json::array();
  for (int l = 0; l < 61; ++l) modern["mlp_layer_types"].push_back(l < 3 ? "dense" : "sparse");
  EXPECT_EQ(parse_config(modern, "modern"), parse_config(v32(), "hub"));

  // Both at once, in agreement.
  modern["rope_theta"] = 10000;
  modern["rope_scaling"] = v32()["rope_scaling"];
  modern["first_k_dense_replace"] = 3;
  modern["torch_dtype"] = "bfloat16";
  EXPECT_EQ(parse_config(modern, "both"), parse_config(v32(), "hub"));

  expect_error(with(modern, "rope_theta", 20000),
               {"rope_parameters", "rope_theta", "10000", "20000"});
  expect_error(with(modern, "first_k_dense_replace", 2),
               {"first_k_dense_replace", "is 2", "mlp_layer_types"});
  expect_error(with(modern, "torch_dtype", "float32"), {"torch_dtype", "bfloat16"});
  Json other = modern;
  other["rope_scaling"]["factor"] = 20;
  expect_error(other, {"rope_scaling", "rope_parameters", "disagrees"});
}

TEST(Config, RoundTrips) {
  set_log_enabled(false);
  std::vector<ModelConfig> configs = {parse_config(v32(), "v32"), parse_config(glm52(), "glm")};
  for (const std::string& name : shape_names()) configs.push_back(named_shape(name));
  Json odd = config_json(named_shape("tiny"));
  odd.erase("first_k_dense_replace");
  odd["mlp_layer_types"] = {"sparse", "dense",  "sparse", "dense",
                            "dense",  "sparse", "sparse", "sparse"};
  odd["eos_token_id"] = {5, 7};
  odd["bos_token_id"] = 3;
  odd["indexer_rope_interleave"] = false;
  odd["tie_word_embeddings"] = true;
  odd["index_topk_freq"] = 4;
  odd["quantization_config"] = {{"quant_method", "fp8"},
                                {"weight_block_size", {128, 128}},
                                {"modules_to_not_convert", {"lm_head"}}};
  configs.push_back(parse_config(odd, "odd"));
  Json dense = config_json(named_shape("tiny"));
  dense["first_k_dense_replace"] = 8;
  for (const char* key :
       {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
        "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"}) {
    dense.erase(key);
  }
  configs.push_back(parse_config(dense, "dense"));
  for (const ModelConfig& c : configs) {
    const std::string text = config_json(c).dump();
    EXPECT_EQ(parse_config(parse_json(text, "again"), "again"), c) << text;
  }
  set_log_enabled(true);
}

TEST(Config, Goldens) {
  const std::string folder = golden_folder();
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << "no golden files at " << folder;
  const std::pair<const char*, const char*> plans[] = {{"glm-dsa-full", "FFFFFFFF"},
                                                       {"glm-dsa-shared", "FFFSSSFS"},
                                                       {"glm-dsa-pattern", "FFSFSSFS"},
                                                       {"deepseek-v32-yarn", "FFFFFF"},
                                                       {"glm-dsa-fp8", "FFSSF"}};
  for (const auto& [name, plan] : plans) {
    SCOPED_TRACE(name);
    const ModelConfig c = load_config(folder + "/" + name);
    EXPECT_EQ(to_string(c.index_plan), plan);
    EXPECT_EQ(c, load_config(folder + "/" + name + "/config.json"));
    EXPECT_EQ(c, parse_config(config_json(c), "again"));
    EXPECT_EQ(c.quantization_config.has_value(), std::string(name) == "glm-dsa-fp8");
    EXPECT_EQ(c.rope.rope_type == RopeConfig::Type::kYarn,
              std::string(name) == "deepseek-v32-yarn");
  }
  // One backbone in three files: a plan searched on one fits the others.
  EXPECT_EQ(load_config(folder + "/glm-dsa-full").fingerprint,
            load_config(folder + "/glm-dsa-shared").fingerprint);
  EXPECT_EQ(load_config(folder + "/glm-dsa-full").fingerprint,
            load_config(folder + "/glm-dsa-pattern").fingerprint);
  EXPECT_NE(load_config(folder + "/glm-dsa-full").fingerprint,
            load_config(folder + "/glm-dsa-fp8").fingerprint);
}

TEST(Config, FingerprintIsPinned) {
  // Plan files in the world hold these: a change here orphans them.
  EXPECT_EQ(parse_config(v32(), "v32").fingerprint,
            "99ab4ce5d363ce94dd2b25b8a59980ed538f59b14e9fcb0b387413eea0bb8471");
  EXPECT_EQ(named_shape("glm-5.2").fingerprint,
            "a31e1642b6b29e3ebd31922e65fb4089125f30986f154aa2b53f4aaccdd5d661");
}

struct Fault {
  const char* key;
  Json value;
  std::vector<const char*> parts;
};

TEST(Config, EveryFaultNamesItsKeyAndWhatWasExpected) {
  const Fault faults[] = {
      {"model_type", "llama", {"\"llama\"", "\"glm_moe_dsa\" or \"deepseek_v32\""}},
      {"model_type", 3, {"is 3", "a string"}},
      {"architectures", {"LlamaForCausalLM"}, {"LlamaForCausalLM", "DeepseekV32ForCausalLM"}},
      {"architectures", {"GlmMoeDsaForCausalLM"}, {"DeepseekV32ForCausalLM"}},
      {"num_hidden_layers", 1000000000, {"is 1000000000", "from 1 to 4096"}},
      {"num_hidden_layers", 0, {"from 1"}},
      {"num_hidden_layers", "61", {"\"61\"", "an integer"}},
      {"num_hidden_layers", 61.5, {"61.5", "an integer"}},
      {"num_hidden_layers", true, {"true", "an integer"}},
      {"hidden_size", -1, {"is -1", "from 1"}},
      {"hidden_size", 1000000000, {"from 1 to"}},
      {"vocab_size", 0, {"is 0", "from 1"}},
      {"num_attention_heads", 0, {"from 1"}},
      {"num_key_value_heads", 256, {"is 256", "expected 128"}},
      {"num_key_value_heads", 1, {"is 1", "expected 128"}},
      {"q_lora_rank", nullptr, {"null", "an integer"}},
      {"qk_rope_head_dim", 63, {"is 63", "an even number"}},
      {"kv_lora_rank", 511, {"is 511", "an even number"}},
      {"index_head_dim", 129, {"is 129", "an even number"}},
      {"num_attention_heads", 129, {"is 129", "from 1 to 128"}},
      {"index_topk", 2097152, {"is 2097152", "from 1 to 1048576"}},
      {"qk_rope_head_dim", 0, {"from 2"}},
      {"qk_head_dim", 200, {"is 200", "expected 192"}},
      {"index_head_dim", 32, {"is 32", "at least qk_rope_head_dim", "64"}},
      {"index_topk", 0, {"from 1"}},
      {"index_topk", nullptr, {"null"}},
      {"index_topk_frequency", 4, {"unknown key", "index_topk_freq"}},
      {"indexer_type", 4, {"unknown key", "indexer_types"}},
      {"index_topk_freq", 0, {"is 0", "from 1"}},
      {"index_topk_pattern", std::string(60, 'F'), {"60 letters", "61 layers"}},
      {"indexer_rope_interleave", 1, {"is 1", "true or false"}},
      {"index_share_for_mtp_iteration", "yes", {"true or false"}},
      {"first_k_dense_replace", 62, {"is 62", "from 0 to 61"}},
      {"mlp_layer_types", {"dense"}, {"61 entries"}},
      {"mlp_layer_types",
       std::vector<std::string>(61, "moe"),
       {"entry 0", "\"moe\"", "\"dense\" or \"sparse\""}},
      {"layer_types",
       std::vector<std::string>(61, "full_attention"),
       {"deepseek_sparse_attention"}},
      {"n_routed_experts", 0, {"from 1"}},
      {"n_routed_experts", 255, {"n_group", "a divisor", "255"}},
      {"num_experts_per_tok", 257, {"from 1 to 256"}},
      {"num_experts_per_tok", 200, {"at most the 128 experts of the 4 groups"}},
      {"n_group", 256, {"groups of at least 2"}},
      {"topk_group", 9, {"from 1 to 8"}},
      {"norm_topk_prob", "true", {"true or false"}},
      {"routed_scaling_factor", 0, {"above 0"}},
      {"routed_scaling_factor", -2.5, {"above 0"}},
      {"scoring_func", "softmax", {"\"softmax\"", "\"sigmoid\""}},
      {"topk_method", "greedy", {"\"greedy\"", "\"noaux_tc\""}},
      {"moe_layer_freq", 2, {"is 2", "expected 1"}},
      {"hidden_act", "gelu", {"\"gelu\"", "\"silu\""}},
      {"attention_bias", true, {"is true", "expected false"}},
      {"mlp_bias", true, {"is true", "expected false"}},
      {"partial_rotary_factor", 0.5, {"0.5", "expected 1.0"}},
      {"rope_interleave", false, {"is false", "expected true"}},
      {"rms_norm_eps", 0, {"above 0"}},
      {"rms_norm_eps", "1e-6", {"a number"}},
      {"rope_theta", 0, {"is 0", "above 1"}},
      {"rope_theta", -10000, {"above 1"}},
      {"rope_scaling", 8, {"\"rope_scaling\"", "a JSON object"}},
      {"max_position_embeddings", 0, {"from 1"}},
      {"tie_word_embeddings", 0, {"true or false"}},
      {"num_nextn_predict_layers", -1, {"from 0"}},
      {"eos_token_id", 129280, {"from 0 to 129279"}},
      {"eos_token_id", {1, 129280}, {"from 0 to 129279"}},
      {"eos_token_id", {1, "2"}, {"token ids"}},
      {"eos_token_id", {1, 18446744073709551615u}, {"token ids"}},
      {"bos_token_id", -1, {"from 0 to 129279"}},
      {"torch_dtype", "int8", {"\"int8\"", "\"bfloat16\""}},
      {"quantization_config", "fp8", {"a JSON object"}},
  };
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.key);
    const std::string message = error_of(with(v32(), fault.key, fault.value));
    EXPECT_EQ(message.substr(0, 12), "config.json:") << message;
    if (std::string(fault.key) != "n_routed_experts") {
      EXPECT_NE(message.find(fault.key), std::string::npos) << message;
    }
    EXPECT_NE(message.find("expected"), std::string::npos) << message;
    for (const char* part : fault.parts)
      EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
  }
}

TEST(Config, NestedFaults) {
  const Fault rope_faults[] = {
      {"type", "linear", {"\"linear\"", "\"default\" or \"yarn\""}},
      {"type", 4, {"is 4", "a string"}},
      {"rope_type", "default", {"type", "the same as"}},
      {"factor", 0.5, {"0.5", "from 1"}},
      {"factor", nullptr, {"null", "a number"}},
      {"original_max_position_embeddings", 0, {"from 1"}},
      {"beta_fast", 0, {"above 0"}},
      {"beta_fast", 0.5, {"beta_slow", "at least"}},
      {"mscale", -1, {"from 0"}},
      {"mscale_all_dim", "1", {"a number"}},
      {"attention_factor", 1, {"unknown key", "mscale_all_dim"}},
      {"truncate", false, {"is false", "expected true"}},
      {"partial_rotary_factor", 0.5, {"0.5", "expected 1.0"}},
  };
  for (const Fault& fault : rope_faults) {
    Json json = v32();
    json["rope_scaling"][fault.key] = fault.value;
    expect_error(json, {"rope_scaling", fault.key, "expected"});
    for (const char* part : fault.parts) expect_error(json, {part});
  }
  const Fault quantization_faults[] = {
      {"quant_method", "awq", {"\"awq\"", "\"fp8\""}},
      {"fmt", "e5m2", {"\"e5m2\"", "\"e4m3\""}},
      {"activation_scheme", "static", {"\"static\"", "\"dynamic\""}},
      {"weight_block_size", {64, 128}, {"[64,128]", "[128, 128]"}},
      {"weight_block_size", nullptr, {"null", "[128, 128]"}},
      {"scale_fmt", "float", {"\"float\"", "\"ue8m0\""}},
      {"modules_to_not_convert", {"lm_head", 3}, {"a list of names"}},
      {"modules_to_not_convert", "lm_head", {"a list of names"}},
  };
  for (const Fault& fault : quantization_faults) {
    Json json = v32();
    json["quantization_config"][fault.key] = fault.value;
    expect_error(json, {"quantization_config", fault.key, "expected"});
    for (const char* part : fault.parts) expect_error(json, {part});
  }
}

TEST(Config, MissingKeysAreNamed) {
  for (const char* key : {"model_type",
                          "num_hidden_layers",
                          "hidden_size",
                          "vocab_size",
                          "max_position_embeddings",
                          "rms_norm_eps",
                          "num_attention_heads",
                          "q_lora_rank",
                          "kv_lora_rank",
                          "qk_nope_head_dim",
                          "qk_rope_head_dim",
                          "v_head_dim",
                          "index_n_heads",
                          "index_head_dim",
                          "index_topk",
                          "first_k_dense_replace",
                          "intermediate_size",
                          "n_routed_experts",
                          "num_experts_per_tok",
                          "moe_intermediate_size"}) {
    Json json = v32();
    json.erase(key);
    expect_error(json, {key, "missing"});
  }
  Json json = v32();
  json.erase("rope_scaling");
  EXPECT_EQ(parse_config(json, "t").rope.rope_type, RopeConfig::Type::kDefault);
  json.erase("rope_theta");
  expect_error(json, {"rope_theta", "missing", "rope_parameters"});
}

TEST(Config, TextThatIsNotAConfig) {
  for (const char* text : {"[]", "3", "null", "\"x\""}) {
    expect_error(parse_json(text, "config.json"), {"expected a JSON object"});
  }
  for (const char* text :
       {R"({"a": 1, "a": 2})", R"({"a": 1} // comment)", R"({"a": NaN})", "", "\xEF\xBB\xBF{}"}) {
    EXPECT_THROW(parse_json(text, "config.json"), Error) << text;
  }
}

TEST(Config, CodeFromTheCheckpointIsIgnoredWithOneLine) {
  Json json = with(v32(), "auto_map", {{"AutoModel", "modeling_x.X"}});
  testing::internal::CaptureStderr();
  const ModelConfig c = parse_config(json, "config.json");
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("auto_map"), std::string::npos) << log;
  EXPECT_EQ(std::count(log.begin(), log.end(), '\n'), 1) << log;
  EXPECT_EQ(c, parse_config(v32(), "config.json"));
}

TEST(Config, MissingFileNamesItsPath) {
  const std::string folder = testing::TempDir();
  try {
    load_config(folder + "/indexcache-no-such-model");
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("indexcache-no-such-model"), std::string::npos)
        << e.what();
  }
}

TEST(Shapes, MatchWhatWasPublished) {
  EXPECT_EQ(to_string(named_shape("peer-a").index_plan), "FSSSFSSS");
  EXPECT_EQ(to_string(named_shape("peer-b").index_plan), "FFFSSS");
  EXPECT_EQ(named_shape("glm-5.2").index_plan, plan_from_freq(4, 3, 78, "t"));
  EXPECT_EQ(named_shape("glm-4.7-flash-dsa").num_hidden_layers, 47);
  const ModelConfig deepseek = named_shape("deepseek-v3.2");
  Json hub = v32();
  for (const char* key : {"quantization_config", "bos_token_id", "eos_token_id"}) hub.erase(key);
  EXPECT_EQ(deepseek, parse_config(hub, "v32"));
  try {
    named_shape("glm-6");
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("glm-5.2"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace indexcache
