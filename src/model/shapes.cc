#include "model/shapes.h"

#include "base/error.h"

namespace indexcache {

namespace {

struct Shape {
  const char* name;
  ModelType model_type;
  const char* plan;  // "" is all full
  int64_t num_hidden_layers, first_k_dense_replace, num_nextn_predict_layers;
  int64_t hidden_size, intermediate_size, vocab_size, max_position_embeddings;
  double rms_norm_eps;
  AttentionConfig attention;  // heads, q_lora, kv_lora, nope, rope, v
  IndexerConfig indexer;      // heads, dim, top-k, interleaved rope
  MoeConfig moe;  // routed, shared, per token, width, groups, groups kept, normalised, scaling
  RopeConfig rope;
};

constexpr ModelType kGlm = ModelType::kGlmMoeDsa;

RopeConfig plain_rope(double rope_theta) {
  RopeConfig rope;
  rope.rope_theta = rope_theta;
  return rope;
}

RopeConfig deepseek_rope() {
  RopeConfig rope;
  rope.rope_type = RopeConfig::Type::kYarn;
  rope.rope_theta = 1e4;
  rope.factor = 40;
  rope.original_max_position_embeddings = 4096;
  rope.beta_fast = 32;
  rope.beta_slow = 1;
  rope.mscale = 1;
  rope.mscale_all_dim = 1;
  return rope;
}

const std::vector<Shape>& shapes() {
  // clang-format off
  static const std::vector<Shape> table = {
      {"tiny", kGlm, "", 8, 1, 0, 256, 512, 512, 131072, 1e-5,
       {8, 128, 128, 32, 32, 32}, {16, 64, 256, true}, {8, 1, 2, 128, 1, 1, true, 2.5}, plain_rope(1e6)},
      {"peer-a", kGlm, "FSSSFSSS", 8, 1, 0, 512, 1024, 512, 131072, 1e-5,
       {8, 256, 128, 64, 32, 64}, {8, 64, 256, true}, {8, 1, 2, 256, 1, 1, true, 2.5}, plain_rope(1e6)},
      {"peer-b", kGlm, "FFFSSS", 6, 1, 0, 1024, 2048, 512, 131072, 1e-5,
       {16, 512, 512, 192, 64, 256}, {32, 128, 2048, true}, {8, 1, 2, 512, 1, 1, true, 2.5}, plain_rope(1e6)},
      {"glm-4.7-flash-dsa", kGlm, "", 47, 1, 0, 2048, 10240, 154880, 202752, 1e-5,
       {20, 768, 512, 192, 64, 256}, {32, 128, 2048, true}, {64, 1, 4, 1536, 1, 1, true, 1.8}, plain_rope(1e6)},
      {"glm-5", kGlm, "", 78, 3, 1, 6144, 12288, 154880, 202752, 1e-5,
       {64, 2048, 512, 192, 64, 256}, {32, 128, 2048, true}, {256, 1, 8, 2048, 1, 1, true, 2.5}, plain_rope(1e6)},
      {"glm-5.2", kGlm, "FFFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSSFSSS",
       78, 3, 1, 6144, 12288, 154880, 1048576, 1e-5,
       {64, 2048, 512, 192, 64, 256}, {32, 128, 2048, true}, {256, 1, 8, 2048, 1, 1, true, 2.5}, plain_rope(8e6)},
      {"deepseek-v3.2", ModelType::kDeepseekV32, "", 61, 3, 1, 7168, 18432, 129280, 163840, 1e-6,
       {128, 1536, 512, 128, 64, 128}, {64, 128, 2048, false}, {256, 1, 8, 2048, 8, 4, true, 2.5}, deepseek_rope()},
  };
  // clang-format on
  return table;
}

ModelConfig build(const Shape& shape) {
  ModelConfig config;
  config.model_type = shape.model_type;
  config.num_hidden_layers = shape.num_hidden_layers;
  config.num_nextn_predict_layers = shape.num_nextn_predict_layers;
  config.hidden_size = shape.hidden_size;
  config.intermediate_size = shape.intermediate_size;
  config.vocab_size = shape.vocab_size;
  config.max_position_embeddings = shape.max_position_embeddings;
  config.rms_norm_eps = shape.rms_norm_eps;
  config.attention = shape.attention;
  config.indexer = shape.indexer;
  config.moe = shape.moe;
  config.rope = shape.rope;
  config.dtype = "bfloat16";
  for (int64_t l = 0; l < shape.num_hidden_layers; ++l) {
    config.mlp_layer_types.push_back(l < shape.first_k_dense_replace ? MlpType::kDense
                                                                     : MlpType::kSparse);
  }
  const int num_layers = static_cast<int>(shape.num_hidden_layers);
  const std::string plan = shape.plan;
  config.index_plan =
      plan.empty() ? all_full_plan(num_layers) : plan_from_string(plan, num_layers, shape.name);
  // Through the parser, so that a shape obeys every rule that a file must, and has its fingerprint.
  return parse_config(config_json(config), shape.name);
}

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const Shape& shape : shapes()) names.push_back(shape.name);
  return names;
}

ModelConfig named_shape(const std::string& name) {
  std::string names;
  for (const Shape& shape : shapes()) {
    if (name == shape.name) return build(shape);
    names += fmt::format("{}{}", names.empty() ? "" : ", ", shape.name);
  }
  fail("unknown shape \"{}\", expected one of {}", printable(name), names);
}

}  // namespace indexcache
