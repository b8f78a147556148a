// Checkpoints in every stored type and shape that the hub has: the same model gives the same
// answer, and what does not fit is listed.

#include <gtest/gtest.h>

#include <cstring>

#include "base/log.h"
#include "checkpoint/block_scales.h"
#include "model/shapes.h"
#include "model/synthetic.h"
#include "tests/golden.h"

namespace indexcache {
namespace {

constexpr uint64_t kSeed = 7;

ModelConfig two_layers(const std::string& plan = "FF") {
  ModelConfig config = named_shape("tiny");
  config.num_hidden_layers = 2;
  config.mlp_layer_types.resize(2);
  config.index_plan = plan_from_string(plan, 2, "test");
  config.indexer.index_topk = 16;
  return parse_config(config_json(config), "test");
}

std::vector<float> logits_of(const ModelSource& source) {
  Engine engine(source, {.num_threads = 1, .context = 128, .compute = ComputeChoice::kF32});
  std::vector<int32_t> tokens;
  Rng rng(kSeed);
  for (int i = 0; i < 60; ++i)
    tokens.push_back(
        static_cast<int32_t>(rng.below(static_cast<uint64_t>(source.config.vocab_size))));
  SequenceCache sequence;
  return run_traced(engine, sequence, tokens).logits;
}

// The same numbers as float32 tensors, so that only the stored type differs.
Checkpoint widened(const Checkpoint& checkpoint) {
  Checkpoint out;
  for (const auto& [name, view] : checkpoint.tensors()) {
    if (name.ends_with("_scale_inv")) continue;
    std::vector<float> values = to_f32(view);
    if (view.dtype == DType::kF8E4M3) {
      values = dequantize_blocks(view,
                                 read_block_scales(view, *checkpoint.find(scale_name(name)), name));
    }
    Tensor tensor(DType::kF32, view.shape);
    std::memcpy(tensor.memory.data(), values.data(), values.size() * sizeof(float));
    out.add(name, std::move(tensor));
  }
  return out;
}

TEST(StoredTypes, GiveTheSameAnswer) {
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF8E4M3}) {
    SCOPED_TRACE(dtype_name(dtype));
    ModelSource stored{two_layers(), synthetic_checkpoint(two_layers(), dtype, kSeed), true};
    const ModelSource wide{stored.config, widened(stored.checkpoint), true};
    if (dtype == DType::kF8E4M3) stored.config.quantization_config.emplace();
    EXPECT_LE(relative_error(logits_of(stored), logits_of(wide)), 1e-6);
  }
}

TEST(StoredTypes, ConfigAndTensorsMustAgreeOnFp8) {
  ModelSource source{two_layers(), synthetic_checkpoint(two_layers(), DType::kF8E4M3, kSeed), true};
  EXPECT_THROW(logits_of(source), Error) << "fp8 tensors, no quantization_config";
  ModelSource plain{two_layers(), synthetic_checkpoint(two_layers(), DType::kBF16, kSeed), true};
  plain.config.quantization_config.emplace();
  EXPECT_THROW(logits_of(plain), Error) << "quantization_config, no fp8 tensors";
}

TEST(Weights, TiedHeadIsTheEmbedding) {
  ModelSource separate{two_layers(), synthetic_checkpoint(two_layers(), DType::kF32, kSeed), true};
  ModelSource tied{two_layers(), {}, true};
  tied.config.tie_word_embeddings = true;
  Checkpoint same_head;
  for (const auto& [name, view] : separate.checkpoint.tensors()) {
    const TensorView& source =
        name == "lm_head.weight" ? *separate.checkpoint.find("model.embed_tokens.weight") : view;
    for (Checkpoint* checkpoint : {&same_head, &tied.checkpoint}) {
      if (checkpoint == &tied.checkpoint && name == "lm_head.weight") continue;
      Tensor tensor(source.dtype, source.shape);
      std::memcpy(tensor.memory.data(), source.data, static_cast<size_t>(source.num_bytes()));
      checkpoint->add(name, std::move(tensor));
    }
  }
  separate.checkpoint = std::move(same_head);
  EXPECT_EQ(logits_of(tied), logits_of(separate));
}

TEST(Weights, MtpLayersAreSkipped) {
  ModelSource source{two_layers(), synthetic_checkpoint(two_layers(), DType::kF32, kSeed), true};
  const std::vector<float> before = logits_of(source);
  for (const char* name :
       {"model.layers.2.eh_proj.weight", "model.layers.2.self_attn.indexer.wk.weight"}) {
    source.checkpoint.add(name, Tensor(DType::kF32, {3, 3}));
  }
  testing::internal::CaptureStderr();
  EXPECT_EQ(logits_of(source), before);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("2 tensors"), std::string::npos) << said;
  EXPECT_NE(said.find("MTP"), std::string::npos) << said;
}

TEST(Weights, EveryProblemIsListedInOneError) {
  const ModelConfig config = two_layers("FS");
  const Checkpoint good = synthetic_checkpoint(config, DType::kF32, kSeed);
  Checkpoint broken;
  for (const auto& [name, view] : good.tensors()) {
    if (name == "model.norm.weight" || name == "model.layers.1.mlp.experts.3.up_proj.weight")
      continue;
    const bool narrow = name == "model.layers.0.self_attn.q_a_proj.weight";
    const bool integer = name == "model.layers.1.input_layernorm.weight";
    Tensor tensor(integer ? DType::kI32 : view.dtype,
                  narrow ? Shape{view.shape[0], view.shape[1] - 1} : view.shape);
    broken.add(name, std::move(tensor));
  }
  broken.add("model.layers.0.self_attn.q_norm.weight", Tensor(DType::kF32, {4}));
  const ModelSource source{config, std::move(broken), true};
  try {
    logits_of(source);
    FAIL() << "a broken checkpoint was bound";
  } catch (const Error& error) {
    const std::string message = error.what();
    for (const char* name : {"model.norm.weight", "layers.1.mlp.experts.3.up_proj.weight",
                             "layers.0.self_attn.q_a_proj.weight", "[128, 255]", "[128, 256]",
                             "layers.1.input_layernorm.weight", "I32", "q_norm"}) {
      EXPECT_NE(message.find(name), std::string::npos) << name << " is not in:\n" << message;
    }
  }
}

}  // namespace
}  // namespace indexcache
