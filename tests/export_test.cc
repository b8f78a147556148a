// `export` end to end: the slim checkpoint runs as the source does, the GGUF file holds what the
// contract asks for, and a failure leaves nothing behind.

#include <cmath>
#include <cstring>
#include <set>

#include "base/log.h"
#include "checkpoint/block_scales.h"
#include "checkpoint/test_files.h"
#include "model/gguf_model.h"
#include "model/shapes.h"
#include "model/slim_checkpoint.h"
#include "model/synthetic.h"
#include "plan/engine_rules.h"
#include "plan/export_lines.h"
#include "tests/gguf_reader.h"
#include "tests/golden.h"
#include "tests/program.h"
#include "text/byte_level.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kSeed = 3;
constexpr const char* kPlan = "FSSF";

ModelConfig small_config(ModelType type = ModelType::kGlmMoeDsa) {
  ModelConfig config = named_shape("tiny");
  config.model_type = type;
  config.indexer.indexer_rope_interleave = type == ModelType::kGlmMoeDsa;
  config.num_hidden_layers = 4;
  config.mlp_layer_types.resize(4);
  config.index_plan = all_full_plan(4);
  config.indexer.index_topk = 32;
  config.vocab_size = 300;
  config.eos_token_id = {256, 258};
  return config;
}

// A checkpoint of several shards, with the small files of a model.
std::string write_model(const TempFolder& temp, DType dtype = DType::kBF16,
                        const ModelConfig& config = small_config()) {
  const std::string folder = temp / "model";
  write_synthetic_checkpoint(config, dtype, kSeed, 2 << 20, folder);
  temp.write("model/tokenizer.json", byte_level_tokenizer_json(280));
  temp.write("model/chat_template.jinja", "{{ messages }}");
  temp.write("model/LICENSE", "text");
  temp.write("model/modeling.py", "code");
  return folder;
}

std::vector<float> logits_of(const std::string& folder, const std::string& plan) {
  const ModelSource source = open_model(folder);
  RunOptions options;
  options.plan = plan;
  options.context = 128;
  options.num_threads = 2;
  Engine engine(source, options);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 100; ++i) tokens.push_back(i * i * 7 % 300);
  SequenceCache sequence;
  return run_traced(engine, sequence, tokens).logits;
}

std::vector<std::string> entries(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

class Export : public testing::Test {
 protected:
  void SetUp() override { set_log_enabled(false); }
  void TearDown() override { set_log_enabled(true); }
  TempFolder temp_;
};

TEST_F(Export, SlimCheckpointRunsAsTheSourceDoes) {
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    const TempFolder temp;
    ModelConfig config = small_config();
    if (dtype == DType::kF8E4M3) config.quantization_config = QuantizationConfig{};
    const std::string model = write_model(temp, dtype, config), slim = temp / "slim";
    const ModelSource source = open_model(model);
    const IndexPlan plan = plan_from_string(kPlan, 4, "test");
    const SlimCheckpoint written =
        write_slim_checkpoint(model, source.checkpoint, source.config, plan, slim);

    // Exactly the shared layers' indexers are gone, and every other tensor is as it was.
    const ModelSource copy = open_model(slim);
    EXPECT_EQ(to_string(copy.config.index_plan), kPlan);
    EXPECT_EQ(copy.config.fingerprint, source.config.fingerprint);
    uint64_t saved = 0;
    for (const auto& [name, view] : source.checkpoint.tensors()) {
      const bool shared_indexer = name.starts_with("model.layers.1.self_attn.indexer.") ||
                                  name.starts_with("model.layers.2.self_attn.indexer.");
      const TensorView* found = copy.checkpoint.find(name);
      ASSERT_EQ(found == nullptr, shared_indexer) << name;
      if (shared_indexer) saved += static_cast<uint64_t>(view.num_bytes());
      if (found != nullptr) {
        ASSERT_TRUE(same_bytes(*found, view)) << name;
        EXPECT_EQ(fs::path(copy.checkpoint.file_of(*found)).filename(),
                  fs::path(source.checkpoint.file_of(view)).filename());
      }
    }
    EXPECT_GT(saved, 0u);
    EXPECT_EQ(written.tensors.left_out_bytes, saved);
    EXPECT_EQ(copy.checkpoint.total_bytes + saved, source.checkpoint.total_bytes);
    EXPECT_EQ(copy.checkpoint.has_index(), source.checkpoint.has_index());
    EXPECT_EQ(entries(temp.path()), (std::vector<std::string>{"model", "slim"}));
    for (const char* name : {"tokenizer.json", "chat_template.jinja", "LICENSE"})
      EXPECT_EQ(read_file(slim + "/" + name), read_file(model + "/" + name)) << name;
    EXPECT_EQ(written.left_out, std::vector<std::string>{"modeling.py"});

    const std::vector<float> expected = logits_of(model, kPlan), found = logits_of(slim, "");
    ASSERT_EQ(found.size(), expected.size());
    EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0);
    EXPECT_NE(logits_of(model, "FFFF"), expected) << "the plan should matter at 100 tokens";
    EXPECT_THROW(logits_of(slim, "FFSF"), Error);
    EXPECT_EQ(engines_that_agree(load_json(slim + "/config.json"), plan), export_engines());
  }
}

TEST_F(Export, SlimCheckpointOfAGoldenCase) {
  const std::string folder = golden_folder("glm-dsa-full");
  if (folder.empty()) GTEST_SKIP() << "no golden files here (INDEXCACHE_GOLDEN)";
  const ModelSource source = open_model(folder);
  const int num_layers = static_cast<int>(source.config.num_hidden_layers);
  const IndexPlan plan = plan_from_freq(2, 1, num_layers, "test");
  write_slim_checkpoint(folder, source.checkpoint, source.config, plan, temp_ / "slim");
  const ModelSource copy = open_model(temp_ / "slim");
  EXPECT_EQ(copy.config.index_plan, plan);
  EXPECT_LT(copy.checkpoint.total_bytes, source.checkpoint.total_bytes);
}

// element (i, j) of a matrix of the checkpoint, block scales applied
float element(const Checkpoint& checkpoint, const std::string& name, int64_t row, int64_t col) {
  const TensorView& view = *checkpoint.find(name);
  const int64_t cols = view.shape.back();
  float value = element_as_f32(view, row * cols + col);
  if (const TensorView* scales = checkpoint.find(scale_name(name)))
    value *= element_as_f32(*scales, row / 128 * scales->shape[1] + col / 128);
  return value;
}

TEST_F(Export, GgufHoldsTheModel) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
    const TempFolder temp;
    ModelConfig config = small_config();
    if (dtype == DType::kF8E4M3) config.quantization_config = QuantizationConfig{};
    const std::string folder = write_model(temp, dtype, config);
    const ModelSource source = open_model(folder);
    const IndexPlan plan = plan_from_string(kPlan, 4, "test");
    const GgufModel model =
        gguf_model(source.checkpoint, source.config, plan, GgmlType::kF32, "name");
    write_gguf_model(model, {{"tokenizer.ggml.model", std::string("no_vocab")}}, temp / "x.gguf");
    const std::string bytes = read_file(temp / "x.gguf");
    const ReadGguf file = GgufReader(bytes).read();

    const Json expected = {{"general.architecture", "glm-dsa"},
                           {"glm-dsa.block_count", 4},
                           {"glm-dsa.embedding_length", 256},
                           {"glm-dsa.feed_forward_length", 512},
                           {"glm-dsa.vocab_size", 300},
                           {"glm-dsa.context_length", config.max_position_embeddings},
                           {"glm-dsa.attention.head_count", 8},
                           {"glm-dsa.attention.head_count_kv", 1},
                           {"glm-dsa.attention.q_lora_rank", 128},
                           {"glm-dsa.attention.kv_lora_rank", 128},
                           {"glm-dsa.attention.key_length", 160},
                           {"glm-dsa.attention.value_length", 128},
                           {"glm-dsa.attention.key_length_mla", 64},
                           {"glm-dsa.attention.value_length_mla", 32},
                           {"glm-dsa.rope.dimension_count", 32},
                           {"glm-dsa.attention.indexer.head_count", 16},
                           {"glm-dsa.attention.indexer.key_length", 64},
                           {"glm-dsa.attention.indexer.top_k", 32},
                           {"glm-dsa.attention.indexer.types", {true, false, false, true}},
                           {"glm-dsa.leading_dense_block_count", 1},
                           {"glm-dsa.expert_count", 8},
                           {"glm-dsa.expert_used_count", 2},
                           {"glm-dsa.expert_shared_count", 1},
                           {"glm-dsa.expert_feed_forward_length", 128},
                           {"glm-dsa.expert_gating_func", 2},
                           {"glm-dsa.expert_weights_norm", true},
                           {"glm-dsa.expert_weights_scale", 2.5},
                           {"tokenizer.ggml.model", "no_vocab"}};
    for (const auto& [key, value] : expected.items()) {
      ASSERT_TRUE(file.metadata.contains(key)) << key;
      EXPECT_EQ(file.metadata.at(key), value) << key;
    }
    EXPECT_NEAR(file.metadata.at("glm-dsa.attention.layer_norm_rms_epsilon").get<double>(),
                config.rms_norm_eps, 1e-12);
    EXPECT_EQ(file.metadata.at("glm-dsa.rope.freq_base"), config.rope.rope_theta);

    const Checkpoint& from = source.checkpoint;
    const auto at = [&](const std::string& name, size_t i) {
      return file.tensors.at(name).values.at(i);
    };
    const auto dims = [&](const std::string& name) { return file.tensors.at(name).dims; };
    using Dims = std::vector<uint64_t>;
    EXPECT_EQ(dims("token_embd.weight"), (Dims{256, 300}));
    EXPECT_EQ(dims("blk.0.attn_k_b.weight"), (Dims{32, 128, 8}));
    EXPECT_EQ(dims("blk.0.attn_v_b.weight"), (Dims{128, 32, 8}));
    EXPECT_EQ(dims("blk.1.ffn_gate_exps.weight"), (Dims{256, 128, 8}));
    EXPECT_EQ(dims("blk.1.ffn_down_exps.weight"), (Dims{128, 256, 8}));
    EXPECT_EQ(dims("blk.0.ffn_down.weight"), (Dims{512, 256}));
    EXPECT_EQ(dims("blk.3.indexer.attn_q_b.weight"), (Dims{128, 16 * 64}));
    for (const char* name : {"blk.1.indexer.proj.weight", "blk.2.indexer.k_norm.bias"})
      EXPECT_FALSE(file.tensors.contains(name)) << name;
    // Every element of both halves of kv_b_proj, [nope 32 | v 32] a head.
    const std::string kv_b = "model.layers.2.self_attn.kv_b_proj.weight";
    for (int64_t h = 0; h < 8; ++h) {
      for (int64_t r = 0; r < 128; ++r) {
        for (int64_t n = 0; n < 32; ++n) {
          ASSERT_EQ(at("blk.2.attn_k_b.weight", static_cast<size_t>((h * 128 + r) * 32 + n)),
                    element(from, kv_b, h * 64 + n, r));
          ASSERT_EQ(at("blk.2.attn_v_b.weight", static_cast<size_t>((h * 32 + n) * 128 + r)),
                    element(from, kv_b, h * 64 + 32 + n, r));
        }
      }
    }
    for (int64_t r = 0; r < 128; ++r) {
      ASSERT_EQ(at("blk.3.ffn_up_exps.weight", static_cast<size_t>((5 * 128 + r) * 256 + 9)),
                element(from, "model.layers.3.mlp.experts.5.up_proj.weight", r, 9));
      ASSERT_EQ(at("blk.3.attn_q_a.weight", static_cast<size_t>(r * 256 + 200)),
                element(from, "model.layers.3.self_attn.q_a_proj.weight", r, 200));
    }
    EXPECT_EQ(at("blk.3.indexer.k_norm.bias", 7),
              element_as_f32(*from.find("model.layers.3.self_attn.indexer.k_norm.bias"), 7));
    EXPECT_EQ(at("blk.3.exp_probs_b.bias", 7),
              element_as_f32(*from.find("model.layers.3.mlp.gate.e_score_correction_bias"), 7));
  }
}

TEST_F(Export, GgufTypes) {
  const std::string folder = write_model(temp_, DType::kF32);
  for (const auto& [type, number, file_type] :
       {std::tuple("f16", 1u, 1u), std::tuple("bf16", 30u, 32u), std::tuple("q8_0", 8u, 7u)}) {
    const std::string path = temp_ / (std::string(type) + ".gguf");
    const ProgramResult made = run_program(
        {"export", "-m", folder, "--plan", kPlan, "--gguf", path, "--type", type, "--json"});
    ASSERT_EQ(made.exit_code, 0) << made.err;
    const Json out = parse_json(made.out, "stdout");
    EXPECT_EQ(out.at("gguf").at("num_bytes"), fs::file_size(path));
    const std::string bytes = read_file(path);
    const ReadGguf file = GgufReader(bytes).read();
    EXPECT_EQ(file.metadata.at("general.file_type"), file_type);
    for (const auto& [name, tensor] : file.tensors) {
      const bool f32 = tensor.dims.size() == 1 || name.ends_with("ffn_gate_inp.weight") ||
                       name.ends_with("indexer.proj.weight");
      EXPECT_EQ(tensor.type, f32 ? 0u : number) << name;
    }
    // The tokenizer: 256 bytes, 24 special tokens, and padding up to the embedding's 300 rows.
    const Json& tokens = file.metadata.at("tokenizer.ggml.tokens");
    const Json& types = file.metadata.at("tokenizer.ggml.token_type");
    ASSERT_EQ(tokens.size(), 300u);
    ASSERT_EQ(types.size(), 300u);
    EXPECT_EQ(std::set<std::string>(tokens.begin(), tokens.end()).size(), 300u);
    EXPECT_EQ(tokens[256], "<|endoftext|>");
    EXPECT_EQ(types[65], 1);
    EXPECT_EQ(types[256], 3);
    EXPECT_EQ(types[299], 5);
    EXPECT_EQ(file.metadata.at("tokenizer.ggml.model"), "gpt2");
    EXPECT_EQ(file.metadata.at("tokenizer.ggml.eos_token_id"), 256);
    EXPECT_EQ(file.metadata.at("tokenizer.ggml.eot_token_id"), 258);
    EXPECT_EQ(file.metadata.at("tokenizer.chat_template"), "{{ messages }}");
  }
}

TEST_F(Export, GgufRefusesWhatLlamaCppCannotRun) {
  const auto refusal = [](ModelConfig config, const std::string& plan) {
    const Checkpoint checkpoint = synthetic_checkpoint(config, DType::kBF16, kSeed);
    return error_of([&] {
      gguf_model(checkpoint, config, plan_from_string(plan, 4, "test"), GgmlType::kF16, "x");
    });
  };
  EXPECT_EQ(refusal(small_config(), kPlan), "(no error)");
  const ModelConfig deepseek = small_config(ModelType::kDeepseekV32);
  EXPECT_EQ(refusal(deepseek, "FFFF"), "(no error)");
  expect_contains(refusal(deepseek, kPlan), {"FSSF", "deepseek32"});
  ModelConfig config = small_config();
  config.indexer.indexer_rope_interleave = false;
  expect_contains(refusal(config, kPlan), {"indexer_rope_interleave"});
  config = small_config();
  config.indexer.index_head_dim = 96;
  expect_contains(refusal(config, kPlan), {"index_head_dim", "96"});
  config = small_config();
  config.mlp_layer_types = {MlpType::kSparse, MlpType::kDense, MlpType::kSparse, MlpType::kSparse};
  expect_contains(refusal(config, kPlan), {"dense"});
  config = small_config();
  config.rope.rope_type = RopeConfig::Type::kYarn;
  config.rope.factor = 4;
  config.rope.original_max_position_embeddings = 128;
  expect_contains(refusal(config, kPlan), {"mscale"});
}

// Each failure names its cause and leaves the folder as it was.
TEST_F(Export, FaultsLeaveNothingBehind) {
  const std::string model = write_model(temp_);
  temp_.write("there/file", "kept");
  temp_.write("there.gguf", "kept");
  temp_.write("plan.json", "{}");
  const std::vector<std::string> before = entries(temp_.path());
  const auto expect_refused = [&](std::vector<std::string> args, const std::string& part) {
    args.insert(args.begin(), {"export", "-m", model});
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 1) << result.out;
    EXPECT_EQ(result.signal, 0);
    EXPECT_EQ(error_lines(result.err).size(), 1u) << result.err;
    EXPECT_NE(result.err.find(part), std::string::npos) << result.err;
    EXPECT_EQ(entries(temp_.path()), before) << result.err;
  };
  for (const auto& [flag, there] :
       {std::pair("--checkpoint", temp_ / "there"), std::pair("--gguf", temp_ / "there.gguf")}) {
    const std::string to = temp_ / "new";
    expect_refused({flag, there}, "already there");
    expect_refused({flag, temp_ / "no/such/folder"}, "No such file");
    expect_refused({flag, temp_ / "there.gguf/x"}, "Not a directory");
    expect_refused({flag, to, "--plan", "FSS"}, "3 letters");
    expect_refused({flag, to, "--plan", temp_ / "plan.json"}, "plan.json");
  }
  EXPECT_EQ(read_file(temp_ / "there.gguf"), "kept");
  EXPECT_EQ(entries(temp_ / "there"), std::vector<std::string>{"file"});
  expect_refused({"--plan", kPlan, "--engine", "vllm", "--pp", "3"}, "at most 2 stages");

  // A small file that leads out of the model's folder.
  fs::create_symlink(temp_ / "plan.json", model + "/secret.json");
  expect_refused({"--checkpoint", temp_ / "new"}, "secret.json");
  fs::remove(model + "/secret.json");

  // A plan that needs indexers which a slim checkpoint lacks.
  const ProgramResult made =
      run_program({"export", "-m", model, "--plan", kPlan, "--checkpoint", temp_ / "slim"});
  ASSERT_EQ(made.exit_code, 0) << made.err;
  EXPECT_NE(made.out.find("saved "), std::string::npos) << made.out;
  for (const char* flag : {"--checkpoint", "--gguf"}) {
    const ProgramResult result =
        run_program({"export", "-m", temp_ / "slim", "--plan", "FFSF", flag, temp_ / "new"});
    EXPECT_EQ(result.exit_code, 1);
    EXPECT_NE(result.err.find("no indexer weights: 1"), std::string::npos) << result.err;
    EXPECT_FALSE(fs::exists(temp_ / "new"));
  }
}

// A full disk: the size that a file may have is limited, and writing over it fails half-way.
TEST_F(Export, AFullDiskLeavesNothingBehind) {
  const std::string model = write_model(temp_);
  const std::vector<std::string> before = entries(temp_.path());
  rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small = {1 << 20, old.rlim_max};
  for (const char* flag : {"--checkpoint", "--gguf"}) {
    setrlimit(RLIMIT_FSIZE, &small);
    const ProgramResult result = run_program({"export", "-m", model, flag, temp_ / "new"});
    setrlimit(RLIMIT_FSIZE, &old);
    EXPECT_EQ(result.exit_code, 1) << result.out;
    EXPECT_EQ(result.signal, 0);
    EXPECT_NE(result.err.find("File too large"), std::string::npos) << result.err;
    EXPECT_EQ(entries(temp_.path()), before);
  }
}

TEST_F(Export, JsonOfTheLines) {
  const std::string model = write_model(temp_);
  const ProgramResult result = run_program({"export", "-m", model, "--plan", kPlan, "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json out = parse_json(result.out, "stdout");
  EXPECT_EQ(out.at("plan"), kPlan);
  ASSERT_EQ(out.at("engines").size(), export_engines().size());
  for (const Json& engine : out.at("engines")) {
    Json config = load_json(model + "/config.json");
    for (const auto& [key, value] : engine.at("settings").items()) config[key] = value;
    EXPECT_EQ(engine_rule(engine.at("engine").get<std::string>()).plan(config, 4), kPlan);
  }
  EXPECT_EQ(run_program({"export", "-m", model, "--engine", "vlm"}).exit_code, 2);
}

}  // namespace
}  // namespace indexcache
