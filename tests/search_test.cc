// The search for a plan against the plain algorithm: every candidate of every step run from the
// first layer to the last, as the paper writes it.

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "base/json.h"
#include "checkpoint/test_files.h"
#include "engine/sampler.h"
#include "search/greedy.h"
#include "tests/small_model.h"

namespace indexcache {
namespace {

constexpr int64_t kTokens = 60;  // over index_topk 19

RunOptions options_of() {
  return {.num_threads = 1, .batch_tokens = 32, .compute = ComputeChoice::kF32};
}

TokenSequences sequences_of(size_t count, uint64_t seed = 1) {
  TokenSequences data;
  for (size_t i = 0; i < count; ++i)
    data.sequences.push_back(small_tokens(seed * 1000 + i, kTokens));
  data.hash = "test";
  return data;
}

// The plain algorithm: an engine a plan, whole prefills, nothing shared with the search.
struct Plain {
  const ModelSource& source;
  const TokenSequences& data;
  int64_t layer_forwards = 0;
  std::map<std::string, double> known = {};

  double loss(const std::string& plan) {
    RunOptions options = options_of();
    options.plan = plan;
    options.context = kTokens;
    Engine engine(source, options);
    double total = 0;
    for (const std::vector<int32_t>& tokens : data.sequences) {
      double nll = 0;
      std::vector<double> chunk;
      PrefillHooks hooks;
      hooks.chunk_logits = [&](int64_t first, std::span<const float> rows) {
        double sum = 0;
        for (int64_t i = 0; i * kSmallVocab < static_cast<int64_t>(rows.size()); ++i) {
          if (first + i + 1 == kTokens) break;
          sum += negative_log_likelihood(
              rows.subspan(static_cast<size_t>(i * kSmallVocab), kSmallVocab),
              tokens[static_cast<size_t>(first + i + 1)]);
        }
        nll += sum;
      };
      SequenceCache sequence;
      prefill(engine, sequence, tokens, nullptr, hooks);
      engine.cache.release(sequence);
      total += nll;
    }
    layer_forwards += static_cast<int64_t>(plan.size() * data.sequences.size());
    return known[plan] = total / static_cast<double>(data.num_targets());
  }

  struct Step {
    int layer;
    double loss;
    std::string plan;
  };
  std::vector<Step> search(int keep) {
    std::string plan(static_cast<size_t>(source.config.num_hidden_layers), 'F');
    std::vector<Step> steps;
    for (int full = static_cast<int>(plan.size()); full > keep; --full) {
      Step best{-1, INFINITY, ""};
      for (size_t layer = 1; layer < plan.size(); ++layer) {
        if (plan[layer] == 'S') continue;
        std::string candidate = plan;
        candidate[layer] = 'S';
        const double candidate_loss = loss(candidate);
        if (candidate_loss < best.loss) best = {static_cast<int>(layer), candidate_loss, candidate};
      }
      plan = best.plan;
      steps.push_back(best);
    }
    return steps;
  }
};

SearchResult run_search(const ModelSource& source, const TokenSequences& data,
                        const SearchOptions& options, uint64_t store_bytes = 1 << 30,
                        const std::string& folder = "", const SearchEvents& events = {}) {
  StateStore store(store_bytes, folder);
  PlanLoss model(source, options_of(), data, &store);
  LossJournal journal("", {}, data.sequences.size(), false);
  return search_plan(model, journal, options, events);
}

void expect_same(const SearchResult& found, const std::vector<Plain::Step>& plain) {
  ASSERT_EQ(found.steps.size(), plain.size());
  for (size_t i = 0; i < plain.size(); ++i) {
    EXPECT_EQ(found.steps[i].layer, plain[i].layer) << "step " << i;
    EXPECT_EQ(found.steps[i].loss, plain[i].loss) << "step " << i;  // to the last bit
    EXPECT_EQ(to_string(found.steps[i].plan), plain[i].plan) << "step " << i;
  }
}

TEST(Search, IsThePlainSearchBitForBitAtLessThanHalfTheWork) {
  const ModelSource source = small_model("FFFFFFFF");
  const TokenSequences data = sequences_of(3);
  Plain plain{source, data};
  const auto steps = plain.search(1);
  const SearchResult found = run_search(source, data, {});
  expect_same(found, steps);
  EXPECT_EQ(found.plain_layer_forwards, plain.layer_forwards);
  EXPECT_EQ(found.start_loss, plain.loss("FFFFFFFF"));
  EXPECT_EQ(found.loss, found.steps.back().loss);
  EXPECT_EQ(to_string(found.plan), "FSSSSSSS");
  EXPECT_LT(found.layer_forwards, plain.layer_forwards / 2);
  std::printf("layer-forwards: %lld of %lld\n", static_cast<long long>(found.layer_forwards),
              static_cast<long long>(plain.layer_forwards));
}

// Room changes the work, never the result: no room at all, some, a file.
TEST(Search, RoomForStatesChangesTheWorkAlone) {
  const ModelSource source = small_model("FFFFFF");
  const TokenSequences data = sequences_of(2);
  const TempFolder folder;
  const SearchResult all = run_search(source, data, {});
  uint64_t state_bytes = 0;
  {
    StateStore store(0);
    state_bytes = PlanLoss(source, options_of(), data, &store).state_bytes();
  }
  int64_t before = INT64_MAX;
  for (const uint64_t states : {0, 3, 10, 14, 24, 60}) {
    SCOPED_TRACE(states);
    const SearchResult some =
        run_search(source, data, {}, states * state_bytes, states % 20 == 0 ? folder.path() : "");
    ASSERT_EQ(some.steps.size(), all.steps.size());
    for (size_t i = 0; i < all.steps.size(); ++i) {
      EXPECT_EQ(some.steps[i].loss, all.steps[i].loss);
      EXPECT_EQ(some.steps[i].plan, all.steps[i].plan);
    }
    EXPECT_LE(some.layer_forwards, before);
    EXPECT_LT(some.layer_forwards, all.plain_layer_forwards);
    before = some.layer_forwards;
  }
  EXPECT_EQ(before, all.layer_forwards);
}

TEST(Search, StopsWhereItIsTold) {
  const ModelSource source = small_model("FFFFFF");
  const TokenSequences data = sequences_of(2);
  const SearchResult whole = run_search(source, data, {});
  const SearchResult half = run_search(source, data, {.keep_full = 3});
  ASSERT_EQ(half.steps.size(), 3u);
  EXPECT_EQ(half.plan, whole.steps[2].plan) << "the path is nested";
  EXPECT_EQ(half.plan.num_full(), 3);

  // A budget that the second step just meets.
  double budget = std::max(whole.steps[0].loss, whole.steps[1].loss) / whole.start_loss - 1 + 1e-12;
  if (whole.steps[2].loss > whole.start_loss * (1 + budget)) {
    const SearchResult within = run_search(source, data, {.budget = budget});
    EXPECT_EQ(within.plan, whole.steps[1].plan);
    EXPECT_EQ(within.loss, whole.steps[1].loss);
    EXPECT_EQ(within.steps.size(), 3u) << "the step over the budget is recorded too";
  }
  const SearchResult none = run_search(source, data, {.budget = -1});
  EXPECT_EQ(none.plan, all_full_plan(6));
  EXPECT_EQ(none.loss, none.start_loss);
}

TEST(Search, StartsFromTheLayersThatHaveAnIndexer) {
  const ModelSource source = small_model("FFSFFS");
  const SearchResult found = run_search(source, sequences_of(2), {.keep_full = 2});
  EXPECT_EQ(found.plan.num_full(), 2);
  EXPECT_FALSE(found.plan.is_full(2));
  EXPECT_FALSE(found.plan.is_full(5));
}

TEST(Search, BlocksKeepTheirFirstLayerFull) {
  const ModelSource source = small_model("FFFFFFFF");
  const TokenSequences data = sequences_of(2);
  const SearchResult found = run_search(source, data, {.block_starts = {0, 3, 6}});
  EXPECT_EQ(to_string(found.plan), "FSSFSSFS");
  EXPECT_EQ(found.steps.size(), 5u);
  // Block by block, and each step is the best of its block given the plan before it.
  Plain plain{source, data};
  std::string before = "FFFFFFFF";
  const std::vector<std::vector<size_t>> turns = {{1, 2}, {4, 5}, {7}, {1, 2}, {4, 5}};
  for (size_t i = 0; i < found.steps.size(); ++i) {
    const SearchStep& step = found.steps[i];
    double best = INFINITY;
    for (const size_t layer : turns[i]) {
      if (before[layer] == 'S') continue;
      std::string candidate = before;
      candidate[layer] = 'S';
      best = std::min(best, plain.loss(candidate));
    }
    EXPECT_EQ(step.loss, best) << "step " << i;
    before = to_string(step.plan);
  }
}

// A small test of two things: nothing is dropped that matters here, and less is run.
TEST(Search, FastIsCheaperAndReportsItsLoss) {
  const ModelSource source = small_model("FFFFFFFF");
  const TokenSequences data = sequences_of(16);
  const SearchResult exact = run_search(source, data, {.keep_full = 2});
  const SearchResult fast = run_search(source, data, {.keep_full = 2, .confidence = 0.9});
  EXPECT_LT(fast.layer_forwards, exact.layer_forwards);
  EXPECT_EQ(fast.plan.num_full(), 2);
  Plain plain{source, data};
  EXPECT_EQ(fast.loss, plain.loss(to_string(fast.plan))) << "the loss is over all sequences";
  std::printf("fast %s %.6f (%lld), exact %s %.6f (%lld layer-forwards), difference %.4f%%\n",
              to_string(fast.plan).c_str(), fast.loss, static_cast<long long>(fast.layer_forwards),
              to_string(exact.plan).c_str(), exact.loss,
              static_cast<long long>(exact.layer_forwards), 100 * (fast.loss / exact.loss - 1));
  EXPECT_LT(fast.loss / exact.loss - 1, 0.005);
}

TEST(Search, SwapsEndWhereNoSwapLowersTheLoss) {
  const ModelSource source = small_model("FFFFFFF");
  const TokenSequences data = sequences_of(2);
  for (const uint64_t room : {uint64_t{0}, uint64_t{1} << 30}) {
    const SearchResult found = run_search(source, data, {.keep_full = 3, .refine = true}, room);
    EXPECT_EQ(found.plan.num_full(), 3);
    EXPECT_LE(found.loss, found.steps.back().loss);
    double before = found.steps.back().loss;
    for (const SearchStep& swap : found.swaps) {
      EXPECT_LT(swap.loss, before);
      before = swap.loss;
    }
    Plain plain{source, data};
    const std::string plan = to_string(found.plan);
    EXPECT_EQ(found.loss, plain.loss(plan));
    for (size_t i = 1; i < plan.size(); ++i) {
      for (size_t j = 1; j < plan.size(); ++j) {
        if (plan[i] == plan[j]) continue;
        std::string swapped = plan;
        std::swap(swapped[i], swapped[j]);
        EXPECT_GE(plain.loss(swapped), found.loss) << swapped;
      }
    }
  }
}

TEST(Search, AFlatOrInvalidMetricEndsIt) {
  const ModelSource source = small_model("FFFF");
  TokenSequences data;
  data.sequences = {small_tokens(1, 19)};  // no query sees more than index_topk tokens
  EXPECT_NE(error_of([&] { run_search(source, data, {}); }).find("flat"), std::string::npos);
  EXPECT_EQ(run_search(source, data, {.accept_flat = true}).plan.num_full(), 1);

  ModelSource broken = small_model("FFFF");
  const TensorView* head = broken.checkpoint.find("lm_head.weight");
  const float nan = NAN;
  std::memcpy(const_cast<uint8_t*>(head->data), &nan, sizeof(nan));
  expect_contains(error_of([&] { run_search(broken, sequences_of(1), {}); }),
                  {"nan", "FFFF", "no plan"});
}

TEST(Search, AnInterruptedSearchGoesOnToTheSameEnd) {
  const ModelSource source = small_model("FFFFFF");
  const TokenSequences data = sequences_of(3);
  const TempFolder folder;
  const Json settings = {{"data", "x"}};
  for (const std::optional<double> confidence : {std::optional<double>(), std::optional(0.9)}) {
    const SearchOptions options{.confidence = confidence, .refine = true};
    const SearchResult whole = run_search(source, data, options);
    const std::string path = folder / (confidence ? "fast.journal" : "exact.journal");
    std::atomic<bool> stop{false};
    int64_t measured = 0;
    int parts = 0;
    SearchEvents events;
    events.stop = &stop;
    events.progress = [&](const SearchProgress&) { stop = ++measured == 7 * (parts + 1); };
    SearchResult result;
    do {
      stop = false;
      StateStore store(1 << 30);
      PlanLoss model(source, options_of(), data, &store);
      LossJournal journal(path, settings, data.sequences.size(), true);
      measured = 0;
      result = search_plan(model, journal, options, events);
      if (result.interrupted) {  // and the last line is torn, as a kill may leave it
        std::ofstream(path, std::ios::app) << "{\"plan\": \"FF";
      }
    } while (result.interrupted && ++parts < 500);
    EXPECT_FALSE(result.interrupted);
    EXPECT_GT(parts, 3);
    EXPECT_EQ(result.plan, whole.plan);
    EXPECT_EQ(result.loss, whole.loss);
    ASSERT_EQ(result.steps.size(), whole.steps.size());
    for (size_t i = 0; i < whole.steps.size(); ++i)
      EXPECT_EQ(result.steps[i].loss, whole.steps[i].loss);
  }
}

TEST(Search, EvenPlansAreEven) {
  EXPECT_EQ(to_string(even_plan(8, 2)), "FSSSFSSS");
  EXPECT_EQ(to_string(even_plan(7, 3)), "FSFSFSS");
  EXPECT_EQ(to_string(even_plan(5, 5)), "FFFFF");
  EXPECT_EQ(to_string(even_plan(5, 1)), "FSSSS");
}

}  // namespace
}  // namespace indexcache
