// Parity with transformers: logits, hidden states, selections and greedy tokens of every golden
// case.

#include "tests/golden.h"

#include "ops/kit/test_device.h"

#include <algorithm>
#include <cmath>

namespace indexcache {
namespace {

// The bound. Float32 rounding through 8 layers stays near 1e-6; a wrong formula is at 1e-2
// and above.
constexpr double kTolerance = 1e-4;

// A case, and the device that it runs on.
struct GoldenParam {
  std::string name;
  Device device;
};

void PrintTo(const GoldenParam& param, std::ostream* out) {
  *out << param.name << " on " << device_name(param.device);
}

class GoldenTest : public testing::TestWithParam<GoldenParam> {
 protected:
  void SetUp() override {
    folder_ = golden_folder(name());
    if (folder_.empty()) GTEST_SKIP() << "no golden case " << name() << " on this machine";
    if (!can_run(device())) GTEST_SKIP() << "no GPU";
  }

  std::unique_ptr<Engine> engine(int64_t batch_tokens,
                                 ComputeChoice compute = ComputeChoice::kF32) {
    source_ = open_model(folder_);
    return std::make_unique<Engine>(
        source_,
        RunOptions{
            .device = device(), .context = 512, .batch_tokens = batch_tokens, .compute = compute});
  }

  const std::string& name() const { return GetParam().name; }
  Device device() const { return GetParam().device; }

  // The emulation of a GPU takes a millisecond a token and layer.
  std::vector<int64_t> chunk_sizes() const {
    if (kCudaIsEmulated && device() == Device::kCuda) return {64};
    return {512, 64, 7, 1};
  }

  void state_drift(ComputeChoice compute, double dense_bound, double least_overlap);
  void expect_overlap(IndexerKeys keys, const char* keys_name, double least);

  std::string folder_;
  ModelSource source_;
};

// Selections of all queries of one layer against the expected ones (positions descending). Returns
// how many rows differ.
int count_differing_rows(const std::vector<int32_t>& ours, const std::vector<int32_t>& expected,
                         int64_t k, int layer) {
  int differing = 0;
  const int64_t rows = static_cast<int64_t>(expected.size()) / k;
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<int32_t> a(ours.begin() + t * k, ours.begin() + (t + 1) * k);
    std::vector<int32_t> b(expected.begin() + t * k, expected.begin() + (t + 1) * k);
    std::sort(a.begin(), a.end());
    std::sort(b.begin(), b.end());
    if (a == b) continue;
    ++differing;
    std::vector<int32_t> only_ours, only_expected;
    std::set_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(only_ours));
    std::set_difference(b.begin(), b.end(), a.begin(), a.end(), std::back_inserter(only_expected));
    std::printf("layer %d query %d: %zu positions differ, first %d for %d\n", layer,
                static_cast<int>(t), only_ours.size(), only_ours.empty() ? -1 : only_ours[0],
                only_expected.empty() ? -1 : only_expected[0]);
  }
  return differing;
}

// How much of the expected selections (positions in any order) is in ours (ascending), over the
// queries that choose: those that see more than k tokens.
struct Overlap {
  double shared = 0, total = 0;

  void add(std::span<const int32_t> ours, const std::vector<int32_t>& expected, int64_t k) {
    for (auto at = k * k; at < std::ssize(expected); at += k) {
      std::vector<int32_t> a(ours.begin() + at, ours.begin() + at + k);
      std::vector<int32_t> b(expected.begin() + at, expected.begin() + at + k), both;
      std::sort(b.begin(), b.end());
      std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
      shared += static_cast<double>(both.size());
      total += static_cast<double>(k);
    }
  }
  double share() const { return shared / total; }
};

void force_selection(const std::vector<int32_t>& expected, int64_t k, Selection selection) {
  for (size_t t = 0; t < selection.counts.size(); ++t) {
    int32_t* row = selection.positions.data() + t * static_cast<size_t>(k);
    std::copy_n(expected.begin() + static_cast<int64_t>(t) * k, k, row);
    std::sort(row, row + selection.counts[t]);  // positions come first in the file, padding last
  }
}

TEST_P(GoldenTest, MatchesTransformers) {
  const Golden golden(folder_);
  const std::vector<int32_t> tokens = golden.integers("input_ids");
  for (const int64_t batch_tokens : chunk_sizes()) {
    SCOPED_TRACE(testing::Message() << "chunks of " << batch_tokens);
    auto e = engine(batch_tokens);
    SequenceCache sequence;
    const Trace trace = run_traced(*e, sequence, tokens);

    const double logits_error = relative_error(trace.logits, golden.floats("logits"));
    EXPECT_LE(logits_error, kTolerance);
    double hidden_error = 0;
    for (size_t i = 0; i < trace.hidden.size(); ++i) {
      hidden_error =
          std::max(hidden_error,
                   relative_error(trace.hidden[i], golden.floats(fmt::format("hidden.{}", i))));
    }
    EXPECT_LE(hidden_error, kTolerance);

    // The cases are built so that every selection is decided by far more than float32 rounding
    // (about.json, smallest_selection_gap), so none may differ.
    int rows = 0, differing = 0;
    for (const auto& [layer, positions] : trace.positions) {
      const std::vector<int32_t> expected = golden.integers(fmt::format("topk.{}", layer));
      ASSERT_EQ(positions.size(), expected.size());
      differing +=
          count_differing_rows(positions, expected, e->model.config.indexer.index_topk, layer);
      rows += static_cast<int>(tokens.size());
    }
    EXPECT_EQ(differing, 0);
    EXPECT_EQ(static_cast<int>(trace.positions.size()), e->model.plan.num_full());
    std::printf("%-18s chunk %3d: logits %.1e, hidden %.1e, %d of %d selections differ\n",
                name().c_str(), static_cast<int>(batch_tokens), logits_error, hidden_error,
                differing, rows);
  }
}

// The prompt in prefill, its last token in decode, and its first half, all in one pass: each row is
// the one that transformers computed for the prompt alone.
TEST_P(GoldenTest, BatchedTogetherMatches) {
  const Golden golden(folder_);
  const std::vector<int32_t> tokens = golden.integers("input_ids");
  const std::span<const int32_t> all(tokens);
  const int64_t S = std::ssize(tokens), half = S / 2;
  source_ = open_model(folder_);
  Engine e(source_, {.device = device(),
                     .context = 1024,
                     .cache_tokens = 2048,
                     .batch_tokens = 1024,
                     .compute = ComputeChoice::kF32});
  SequenceCache whole, decoding, shorter;
  prefill(e, decoding, all.first(tokens.size() - 1), nullptr);
  ASSERT_TRUE(e.cache.reserve(decoding, S));
  ASSERT_TRUE(e.cache.reserve(whole, S));
  ASSERT_TRUE(e.cache.reserve(shorter, half));
  std::vector<BatchSequence> batch = {{&whole, all, S},
                                      {&decoding, all.last(1), 1},
                                      {&shorter, all.first(static_cast<size_t>(half)), half}};
  const auto vocab = static_cast<size_t>(e.model.config.vocab_size);
  std::vector<float> logits(static_cast<size_t>(S + 1 + half) * vocab);
  forward(e.exec, e.model, e.cache, e.activations, batch, logits.data());

  const std::vector<float> expected = golden.floats("logits");
  const std::span<const float> want(expected), got(logits);
  const size_t rows = tokens.size() * vocab, half_rows = static_cast<size_t>(half) * vocab;
  EXPECT_LE(relative_error(got.first(rows), want), kTolerance);
  EXPECT_LE(relative_error(got.subspan(rows, vocab), want.last(vocab)), kTolerance);
  EXPECT_LE(relative_error(got.last(half_rows), want.first(half_rows)), kTolerance);
}

TEST_P(GoldenTest, GreedyTokensAndLossMatch) {
  const Golden golden(folder_);
  const std::vector<int32_t> tokens = golden.integers("input_ids"),
                             greedy = golden.integers("greedy");
  auto e = engine(128);
  SequenceCache sequence;
  GenerateOptions options;
  options.max_tokens = static_cast<int64_t>(greedy.size());
  EXPECT_EQ(generate(*e, sequence, tokens, options).tokens, greedy);

  e->cache.release(sequence);
  const Trace trace = run_traced(*e, sequence, tokens);
  double nll = 0;
  const size_t vocab = static_cast<size_t>(e->model.config.vocab_size);
  for (size_t t = 0; t + 1 < tokens.size(); ++t) {
    nll +=
        negative_log_likelihood(std::span(trace.logits).subspan(t * vocab, vocab), tokens[t + 1]);
  }
  double expected;
  std::memcpy(&expected, golden.tensor("mean_nll").data, sizeof(expected));
  EXPECT_NEAR(nll / static_cast<double>(tokens.size() - 1), expected, 1e-5);
}

// bf16 weights, cache and products against the float32 answer: the drift is measured and stated.
// Random weights are the worst case for it: their scores lie close, so that rounding turns
// selections and routing, and a turned expert moves the output as no rounding does. So the drift of
// the logits is stated, and what is bounded is the drift of the dense layers at the front under the
// float32 selections: about ten roundings of 2^-9 a layer that add up as a random walk, 6e-3.
TEST_P(GoldenTest, Bf16DriftIsStated) { state_drift(ComputeChoice::kBF16, 2 * 6e-3, 0.75); }

// The same where products round their input to e4m3, a relative error of up to 2^-4 an element,
// 2.6% in the mean square: six products of a layer make 6% of what it adds.
class GoldenFp8Test : public GoldenTest {};
INSTANTIATE_TEST_SUITE_P(Cases, GoldenFp8Test,
                         testing::Values(GoldenParam{"glm-dsa-fp8", Device::kCuda}));
TEST_P(GoldenFp8Test, ProductsDriftIsStated) { state_drift(ComputeChoice::kFP8, 2 * 6e-2, 0.5); }

void GoldenTest::state_drift(ComputeChoice compute, double dense_bound, double least_overlap) {
  const Golden golden(folder_);
  const std::vector<int32_t> tokens = golden.integers("input_ids");
  auto e = engine(512, compute);
  const int64_t k = e->model.config.indexer.index_topk;
  SequenceCache sequence;
  const Trace own = run_traced(*e, sequence, tokens);
  Overlap overlap;
  for (const auto& [layer, positions] : own.positions) {
    overlap.add(positions, golden.integers(fmt::format("topk.{}", layer)), k);
  }

  ForwardTap force;
  force.selection = [&](int layer, Selection selection) {
    force_selection(golden.integers(fmt::format("topk.{}", layer)), k, selection);
  };
  std::vector<float> logits, dense_hidden;
  const auto& types = e->model.config.mlp_layer_types;
  const int num_dense =
      static_cast<int>(std::find(types.begin(), types.end(), MlpType::kSparse) - types.begin());
  force.hidden = [&](int index, std::span<const float> rows) {
    if (index == num_dense) dense_hidden.assign(rows.begin(), rows.end());
  };
  PrefillHooks hooks;
  hooks.tap = &force;
  hooks.chunk_logits = [&](int64_t, std::span<const float> rows) {
    logits.assign(rows.begin(), rows.end());
  };
  e->cache.release(sequence);
  prefill(*e, sequence, tokens, nullptr, hooks);

  const std::vector<float> expected = golden.floats("logits");
  const double dense_error =
      relative_error(dense_hidden, golden.floats(fmt::format("hidden.{}", num_dense)));
  std::printf(
      "%-18s %s: logits %.2e (%.2e with float32 selections), after %d dense layers %.1e, overlap "
      "of selections %.3f\n",
      name().c_str(), compute_name(e->model.compute), relative_error(own.logits, expected),
      relative_error(logits, expected), num_dense, dense_error, overlap.share());
  EXPECT_LE(dense_error, dense_bound * num_dense);
  EXPECT_GE(overlap.share(), least_overlap);
}

// int8 and e4m3 indexer keys under float32 products. Each layer's selection is taken as it is and
// then made the expected one, so that what differs is what int8 turned in that layer, not what came
// of it before. Steps of a 127th of the largest element, about three deviations, move a product by
// about 1% of its spread, and so turn near half a percent of a selection; the floor is four times
// that. e4m3 has steps of an eighth to a sixteenth of each element, which move a product by about
// 4%: four times as much, and so is the floor below 1. The floor of the whole is for int8 the one
// of bf16: turned selections and experts move the layers after them. For e4m3 the whole is printed
// alone: how a random model carries on four times as many turned positions says nothing of the
// keys.
TEST_P(GoldenTest, Int8IndexerKeysTurnFewSelections) {
  expect_overlap(IndexerKeys::kI8, "int8", 0.98);
}

TEST_P(GoldenTest, Fp8IndexerKeysTurnFewSelections) {
  expect_overlap(IndexerKeys::kFp8, "fp8", 0.92);
}

void GoldenTest::expect_overlap(IndexerKeys keys, const char* keys_name, double least) {
  const Golden golden(folder_);
  const std::vector<int32_t> tokens = golden.integers("input_ids");
  source_ = open_model(folder_);
  Engine e(source_, {.device = device(),
                     .context = 512,
                     .batch_tokens = 512,
                     .compute = ComputeChoice::kF32,
                     .indexer_keys = keys});
  const int64_t k = e.model.config.indexer.index_topk;
  Overlap forced;
  ForwardTap tap;
  tap.selection = [&](int layer, Selection selection) {
    const std::vector<int32_t> expected = golden.integers(fmt::format("topk.{}", layer));
    forced.add(selection.positions, expected, k);
    force_selection(expected, k, selection);
  };
  SequenceCache sequence;
  prefill(e, sequence, tokens, nullptr, {.tap = &tap});
  e.cache.release(sequence);

  Overlap own;
  const Trace trace = run_traced(e, sequence, tokens);
  for (const auto& [layer, positions] : trace.positions) {
    own.add(positions, golden.integers(fmt::format("topk.{}", layer)), k);
  }
  std::printf(
      "%-18s %s indexer keys: overlap of selections %.4f a layer, %.4f with what layers before "
      "turned, logits %.2e\n",
      name().c_str(), keys_name, forced.share(), own.share(),
      relative_error(trace.logits, golden.floats("logits")));
  EXPECT_GE(forced.share(), least);
  if (keys == IndexerKeys::kI8) {
    EXPECT_GE(own.share(), 0.75);
  }
}

std::vector<GoldenParam> golden_params() {
  std::vector<GoldenParam> params;
  for (const Device device : {Device::kCpu, Device::kCuda}) {
    for (const std::string& name : kGoldenCases) params.push_back({name, device});
  }
  return params;
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenTest, testing::ValuesIn(golden_params()),
                         [](const auto& param) {
                           std::string name =
                               param.param.name + "_" + device_name(param.param.device);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace indexcache
