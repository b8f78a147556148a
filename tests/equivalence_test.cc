// Different ways to the same answer: chunks, batches, threads, implementations, and plans that mean
// the same.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "device/cpu_features.h"
#include "model/synthetic.h"
#include "ops/kit/test_device.h"
#include "tests/golden.h"

namespace indexcache {
namespace {

constexpr int kTokens = 150;
constexpr uint64_t kSeed = 20261123;

// Small, but with every part: dense and sparse layers, odd sizes, contexts well over index_topk.
ModelConfig small_config(const std::string& plan) {
  ModelConfig config;
  config.num_hidden_layers = 5;
  config.hidden_size = 72;
  config.intermediate_size = 100;
  config.vocab_size = 97;
  config.max_position_embeddings = 1024;
  config.mlp_layer_types = {MlpType::kDense, MlpType::kSparse, MlpType::kSparse, MlpType::kSparse,
                            MlpType::kSparse};
  config.attention = {.num_attention_heads = 3,
                      .q_lora_rank = 40,
                      .kv_lora_rank = 36,
                      .qk_nope_head_dim = 20,
                      .qk_rope_head_dim = 8,
                      .v_head_dim = 18};
  config.indexer = {
      .index_n_heads = 5, .index_head_dim = 24, .index_topk = 19, .indexer_rope_interleave = true};
  config.moe = {.n_routed_experts = 6,
                .n_shared_experts = 1,
                .num_experts_per_tok = 2,
                .moe_intermediate_size = 28,
                .routed_scaling_factor = 1.5};
  config.index_plan = plan_from_string(plan, 5, "test");
  return parse_config(config_json(config), "test");
}

ModelSource small_source(const std::string& plan = "FFFFF") {
  const ModelConfig config = small_config(plan);
  return {config, synthetic_checkpoint(config, DType::kF32, kSeed), true};
}

std::vector<int32_t> random_tokens(uint64_t seed, int count = kTokens) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(rng.below(97));
  return tokens;
}

// Every device of this machine.
class Equivalence : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (!can_run(GetParam())) GTEST_SKIP() << "no GPU";
  }

  RunOptions small_options() const {
    return {
        .device = GetParam(), .num_threads = 2, .context = 1024, .compute = ComputeChoice::kF32};
  }
};

INSTANTIATE_TEST_SUITE_P(Devices, Equivalence, testing::Values(Device::kCpu, Device::kCuda),
                         [](const auto& param) { return device_name(param.param); });

Trace trace_of(const ModelSource& source, const RunOptions& options,
               std::span<const int32_t> tokens) {
  Engine engine(source, options);
  SequenceCache sequence;
  return run_traced(engine, sequence, tokens);
}

// Float32 rounding differs with the order of sums; the selections of this model are decided by far
// more.
void expect_close(const Trace& a, const Trace& b) {
  EXPECT_LE(relative_error(a.logits, b.logits), 2e-5);
  EXPECT_EQ(a.positions, b.positions);
}

TEST_P(Equivalence, ChunkedPrefillIsOnePrefill) {
  const ModelSource source = small_source("FFSFS");
  const std::vector<int32_t> tokens = random_tokens(1);
  RunOptions options = small_options();
  const Trace whole = trace_of(source, options, tokens);
  for (const int64_t chunk : {1, 7, 64, 149}) {
    SCOPED_TRACE(chunk);
    options.batch_tokens = chunk;
    expect_close(trace_of(source, options, tokens), whole);
  }
}

// A ragged batch: sequences of different lengths at different depths, some in prefill and some
// decoding, in one pass.
TEST_P(Equivalence, BatchOfSequencesIsTheSequencesAlone) {
  const ModelSource source = small_source("FSFFS");
  Engine engine(source, small_options());
  const int64_t vocab = source.config.vocab_size;
  struct Case {
    std::vector<int32_t> tokens;
    int before;  // tokens already in the cache when the batch is run
  };
  const std::vector<Case> cases = {{random_tokens(2, 90), 70},
                                   {random_tokens(3, 33), 0},
                                   {random_tokens(4, 141), 140},
                                   {random_tokens(5, 1), 0},
                                   {random_tokens(6, 65), 64}};
  std::vector<std::vector<float>> alone;
  for (const Case& c : cases) {
    SequenceCache sequence;
    std::vector<float> logits;
    prefill(engine, sequence, c.tokens, &logits);
    alone.push_back(logits);
    engine.cache.release(sequence);
  }

  std::vector<SequenceCache> caches(cases.size());
  std::vector<BatchSequence> batch;
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::span<const int32_t> tokens(cases[i].tokens);
    const size_t before = static_cast<size_t>(cases[i].before);
    if (before > 0) prefill(engine, caches[i], tokens.first(before), nullptr);
    ASSERT_TRUE(engine.cache.reserve(caches[i], static_cast<int64_t>(tokens.size())));
    batch.push_back({&caches[i], tokens.subspan(before), 1});
  }
  std::vector<float> logits(cases.size() * static_cast<size_t>(vocab));
  forward(engine.exec, engine.model, engine.cache, engine.activations, batch, logits.data());
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::span<const float> row =
        std::span(logits).subspan(i * static_cast<size_t>(vocab), static_cast<size_t>(vocab));
    EXPECT_LE(relative_error(row, alone[i]), 2e-5) << "sequence " << i;
    EXPECT_EQ(caches[i].num_tokens, static_cast<int64_t>(cases[i].tokens.size()));
  }
}

// On a GPU a step of decoding is a recorded graph from its second time on; a step that is timed is
// not. Sequences grow over pages and over index_topk, the plan changes, and a long prompt between
// makes scratch memory grow and move.
TEST_P(Equivalence, RecordedDecodeStepsAreTheStepsThemselves) {
  const ModelSource source = small_source("FSFFS");
  const size_t vocab = static_cast<size_t>(source.config.vocab_size);
  const std::vector<int32_t> tokens = random_tokens(7, 400);
  const auto decode = [&](bool timed) {
    Engine engine(source, small_options());
    std::vector<SequenceCache> caches(3);
    for (size_t i = 0; i < caches.size(); ++i) {
      prefill(engine, caches[i], std::span(tokens).subspan(i, 15 + 47 * i), nullptr);
    }
    std::vector<float> all;
    for (size_t step = 0; step < 12; ++step) {
      engine.model.plan = plan_from_string(step / 3 % 2 == 0 ? "FSFFS" : "FSSFS", 5, "test");
      if (step == 8) {
        SequenceCache other;
        prefill(engine, other, tokens, nullptr);
        engine.cache.release(other);
      }
      std::vector<BatchSequence> batch;
      for (size_t i = 0; i < (step % 2 == 0 ? caches.size() : 1); ++i) {
        CHECK(engine.cache.reserve(caches[i], caches[i].num_tokens + 1));
        batch.push_back({&caches[i], std::span(tokens).subspan(100 + 5 * step + i, 1), 1});
      }
      all.resize(all.size() + batch.size() * vocab);
      ForwardTimes times;
      forward(engine.exec, engine.model, engine.cache, engine.activations, batch,
              all.data() + all.size() - batch.size() * vocab, nullptr, timed ? &times : nullptr);
    }
    return all;
  };
  EXPECT_EQ(decode(false), decode(true));
}

TEST_P(Equivalence, AllFullPlanIsPlainDsaBitForBit) {
  const ModelSource source = small_source();
  const std::vector<int32_t> tokens = random_tokens(7);
  const Trace plain = trace_of(source, small_options(), tokens);
  for (const char* plan : {"FFFFF", "1/1", "freq=1"}) {
    RunOptions options = small_options();
    options.plan = plan;
    const Trace trace = trace_of(source, options, tokens);
    EXPECT_EQ(trace.logits, plain.logits) << plan;
    EXPECT_EQ(trace.hidden, plain.hidden) << plan;
  }
}

// What sharing means: layer l under the plan is layer l run in full and then made to use its
// source's selection.
TEST_P(Equivalence, SharedLayerIsFullLayerForcedToTheSameSelection) {
  const ModelSource source = small_source();
  const std::vector<int32_t> tokens = random_tokens(8);
  RunOptions options = small_options();
  options.plan = "FSFSS";
  const IndexPlan plan = plan_from_string(options.plan, 5, "test");
  const Trace shared = trace_of(source, options, tokens);

  Engine engine(source, small_options());
  std::vector<int32_t> positions, counts;
  Trace forced;
  ForwardTap tap;
  tap.selection = [&](int layer, Selection selection) {
    if (plan.is_full(layer)) {
      positions.assign(selection.positions.begin(), selection.positions.end());
      counts.assign(selection.counts.begin(), selection.counts.end());
    } else {
      std::copy(positions.begin(), positions.end(), selection.positions.begin());
      std::copy(counts.begin(), counts.end(), selection.counts.begin());
    }
  };
  PrefillHooks hooks;
  hooks.tap = &tap;
  hooks.chunk_logits = [&](int64_t, std::span<const float> rows) {
    forced.logits.insert(forced.logits.end(), rows.begin(), rows.end());
  };
  SequenceCache sequence;
  prefill(engine, sequence, tokens, nullptr, hooks);
  EXPECT_EQ(forced.logits, shared.logits);
  EXPECT_NE(shared.logits, trace_of(source, small_options(), tokens).logits)
      << "sharing changed nothing: a weak test";
}

TEST_P(Equivalence, NoQuerySeesTheFuture) {
  const ModelSource source = small_source("FFSFS");
  std::vector<int32_t> tokens = random_tokens(9);
  const Trace before = trace_of(source, small_options(), tokens);
  constexpr size_t kChanged = 100;
  for (size_t t = kChanged; t < tokens.size(); ++t) tokens[t] = (tokens[t] + 1) % 97;
  const Trace after = trace_of(source, small_options(), tokens);
  // Not bit for bit: the future decides how many tokens an expert gets in a pass, and with it the
  // order of sums.
  const size_t past = kChanged * 97;
  const auto rows = [](const Trace& trace) { return std::span(trace.logits); };
  EXPECT_LE(relative_error(rows(before).first(past), rows(after).first(past)), 2e-5);
  EXPECT_GE(relative_error(rows(before).subspan(past), rows(after).subspan(past)), 0.1);
  for (const auto& [layer, positions] : before.positions) {
    const std::vector<int32_t>& changed = after.positions.at(layer);
    EXPECT_TRUE(std::equal(positions.begin(), positions.begin() + kChanged * 19, changed.begin()));
    for (int t = 0; t < kTokens; ++t) {
      for (int j = 0; j < 19; ++j) EXPECT_LE(positions[static_cast<size_t>(t * 19 + j)], t);
    }
  }
}

TEST_P(Equivalence, ThreadsChangeNoBit) {
  const ModelSource source = small_source("FFSFS");
  const std::vector<int32_t> tokens = random_tokens(10);
  for (const ComputeChoice compute : {ComputeChoice::kF32, ComputeChoice::kBF16}) {
    RunOptions options = small_options();
    options.compute = compute;
    options.num_threads = 1;
    const Trace one = trace_of(source, options, tokens);
    for (const int threads : {2, 3, 5}) {
      options.num_threads = threads;
      EXPECT_EQ(trace_of(source, options, tokens).logits, one.logits) << threads << " threads";
    }
  }
}

// int8 indexer keys are read back from the cache as they were written, whatever the chunks and
// threads.
TEST_P(Equivalence, Int8IndexerKeysDoNotDependOnChunks) {
  const ModelSource source = small_source("FFSFS");
  const std::vector<int32_t> tokens = random_tokens(14);
  RunOptions options = small_options();
  const Trace f32 = trace_of(source, options, tokens);
  options.indexer_keys = IndexerKeys::kI8;
  const Trace whole = trace_of(source, options, tokens);
  EXPECT_NE(whole.positions, f32.positions) << "the option did nothing";
  for (const int64_t chunk : {1, 7, 64}) {
    SCOPED_TRACE(chunk);
    options.batch_tokens = chunk;
    options.num_threads = chunk == 7 ? 3 : 2;
    expect_close(trace_of(source, options, tokens), whole);
  }
}

// fp8 latents, of a model that has whole blocks of them: read back as they were written, whatever
// the chunks and the device. Float32 rounding may carry a few elements over the border between two
// e4m3 numbers, an eighth apart: far less than rounding them all does.
TEST_P(Equivalence, Fp8LatentsDoNotDependOnChunks) {
  ModelConfig config = small_config("FFSFS");
  config.attention.kv_lora_rank = 128;
  config = parse_config(config_json(config), "test");
  const ModelSource source{config, synthetic_checkpoint(config, DType::kF32, kSeed), true};
  const std::vector<int32_t> tokens = random_tokens(15, 100);
  RunOptions options = small_options();
  const Trace f32 = trace_of(source, options, tokens);
  options.kv_cache = KvCacheType::kFp8;
  const Trace whole = trace_of(source, options, tokens);
  const double rounding = relative_error(whole.logits, f32.logits);
  EXPECT_GT(rounding, 0.005) << "the option did nothing";
  EXPECT_LT(rounding, 0.5);
  const auto expect_few_borders = [&](const Trace& other) {
    EXPECT_LE(relative_error(other.logits, whole.logits), rounding / 100);
    EXPECT_EQ(other.positions, whole.positions);
  };
  for (const int64_t chunk : {7, 64}) {
    SCOPED_TRACE(chunk);
    options.batch_tokens = chunk;
    options.num_threads = chunk == 7 ? 3 : 2;
    expect_few_borders(trace_of(source, options, tokens));
  }
  options = small_options();
  options.device = Device::kCpu;
  options.kv_cache = KvCacheType::kFp8;
  options.forced_ops["store_latent"] = "ref";
  expect_few_borders(trace_of(source, options, tokens));
  std::printf("fp8 latents move the logits by %.2e\n", rounding);
}

TEST_P(Equivalence, Fp8LatentsNeedWholeBlocks) {
  RunOptions options = small_options();
  options.kv_cache = KvCacheType::kFp8;
  try {
    Engine impossible(small_source(), options);
    FAIL() << "36 latent elements have no block of 128";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("kv_lora_rank is 36, expected a multiple of 128"),
              std::string::npos)
        << error.what();
  }
}

// Every implementation of the heavy ops carries the whole model to the same answer.
TEST_P(Equivalence, ImplementationsAgree) {
  const ModelSource source = small_source("FFSFS");
  const std::vector<int32_t> tokens = random_tokens(11);
  const std::vector<const char*> ops = {"matmul",       "index_select",   "sparse_mla",
                                        "rms_norm",     "rope",           "silu_mul",
                                        "store_latent", "store_index_key"};
  RunOptions reference = small_options();
  reference.device = Device::kCpu;
  for (const char* op : ops) reference.forced_ops[op] = "ref";
  const Trace expected = trace_of(source, reference, tokens);
  const std::vector<const char*> names = GetParam() == Device::kCpu
                                             ? std::vector<const char*>{"avx512", "avx2"}
                                             : std::vector<const char*>{"cuda"};
  for (const std::string name : names) {
    if ((name == "avx2" && !cpu_features().avx2) || (name == "avx512" && !cpu_features().avx512)) {
      std::printf("skipped: this CPU has no %s\n", name.c_str());
      continue;
    }
    RunOptions options = small_options();
    for (const char* op : ops) options.forced_ops[op] = name;
    SCOPED_TRACE(name);
    expect_close(trace_of(source, options, tokens), expected);
  }
}

TEST_P(Equivalence, AShippedSharedPlanNeedsNoIndexerAndCannotBeWidened) {
  const ModelSource source = small_source("FFSFS");
  EXPECT_EQ(source.checkpoint.find("model.layers.2.self_attn.indexer.wk.weight"), nullptr);
  Engine engine(source, small_options());
  EXPECT_FALSE(engine.model.weights.layers[2].indexer.wk.present());
  RunOptions wider = small_options();
  wider.plan = "FFFFS";
  try {
    Engine impossible(source, wider);
    FAIL() << "a layer without indexer weights was made full";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("2"), std::string::npos) << error.what();
  }
}

TEST_P(Equivalence, TokensOutsideTheVocabularyAreRefusedAndNothingIsLost) {
  const ModelSource source = small_source();
  Engine engine(source, small_options());
  SequenceCache sequence;
  const std::vector<int32_t> good = random_tokens(12, 40);
  prefill(engine, sequence, good, nullptr);
  for (const int32_t bad : {-1, 97, INT32_MAX}) {
    EXPECT_THROW(prefill(engine, sequence, std::vector<int32_t>{1, bad}, nullptr), Error);
    EXPECT_EQ(sequence.num_tokens, 40);
  }
  EXPECT_THROW(prefill(engine, sequence, random_tokens(13, 1000), nullptr), Error)
      << "over the context";
  std::vector<float> after, alone;
  const std::vector<int32_t> next = {5};
  prefill(engine, sequence, next, &after);
  SequenceCache other;
  std::vector<int32_t> all = good;
  all.push_back(5);
  prefill(engine, other, all, &alone);
  EXPECT_LE(relative_error(after, alone), 2e-5);
}

TEST_P(Equivalence, AStopInThePromptIsCountedAsFarAsItCame) {
  const ModelSource source = small_source();
  RunOptions options = small_options();
  options.batch_tokens = 32;
  Engine engine(source, options);
  std::atomic<bool> stop{false};
  GenerateOptions generation;
  generation.stop = &stop;
  generation.on_prefill = [&](int64_t done, int64_t) { stop = done >= 64; };
  SequenceCache sequence;
  const GenerateResult result = generate(engine, sequence, random_tokens(15), generation);
  EXPECT_EQ(result.finish, GenerateResult::Finish::kInterrupted);
  EXPECT_EQ(result.prompt_tokens, kTokens);
  EXPECT_EQ(result.prefill_tokens, 64);
  EXPECT_EQ(sequence.num_tokens, 64);
  EXPECT_TRUE(result.tokens.empty());
}

}  // namespace
}  // namespace indexcache
