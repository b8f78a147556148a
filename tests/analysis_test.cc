// Overlap and evaluation against obvious computations on the same model.

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <set>

#include "analysis/eval_tasks.h"
#include "analysis/eval_text.h"
#include "analysis/overlap.h"
#include "analysis/report.h"
#include "analysis/svg.h"
#include "base/rng.h"
#include "checkpoint/test_files.h"
#include "tests/golden.h"
#include "tests/small_model.h"
#include "text/byte_level.h"

namespace indexcache {
namespace {

constexpr int64_t kTopk = 19;

RunOptions options_of(int64_t context) {
  return {.num_threads = 1, .context = context, .batch_tokens = 32, .compute = ComputeChoice::kF32};
}

std::vector<std::vector<int32_t>> sequences_of(size_t count, int64_t length) {
  std::vector<std::vector<int32_t>> sequences;
  for (size_t i = 0; i < count; ++i) sequences.push_back(small_tokens(50 + i, length));
  return sequences;
}

TEST(Overlap, IsTheNaiveMean) {
  const ModelSource source = small_model("FFSFF");
  const auto sequences = sequences_of(3, 75);
  Engine engine(source, options_of(75));
  const Overlap found = measure_overlap(engine, sequences);
  EXPECT_EQ(found.layers, (std::vector<int>{0, 1, 3, 4}));
  EXPECT_EQ(found.num_queries, 3 * (75 - kTopk));

  std::vector<std::vector<double>> shares(16);
  for (const auto& tokens : sequences) {
    Engine fresh(source, options_of(75));
    SequenceCache cache;
    const Trace trace = run_traced(fresh, cache, tokens);
    for (size_t i = 0; i < 4; ++i) {
      for (size_t j = 0; j < 4; ++j) {
        double sum = 0;
        for (int64_t t = kTopk; t < 75; ++t) {
          const auto row = [&](size_t layer) {
            const auto begin = trace.positions.at(found.layers[layer]).begin() + t * kTopk;
            return std::set<int32_t>(begin, begin + kTopk);
          };
          const std::set<int32_t> a = row(i), b = row(j);
          for (const int32_t position : a) sum += b.contains(position);
        }
        shares[i * 4 + j].push_back(sum / static_cast<double>(kTopk * (75 - kTopk)));
      }
    }
  }
  for (size_t p = 0; p < 16; ++p) {
    const double mean = (shares[p][0] + shares[p][1] + shares[p][2]) / 3;
    double squares = 0;
    for (const double share : shares[p]) squares += (share - mean) * (share - mean);
    EXPECT_NEAR(found.mean[p], mean, 1e-12);
    EXPECT_NEAR(found.standard_error[p], std::sqrt(squares / 2 / 3), 1e-12);
  }
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(found.at(i, i), 1);
  EXPECT_LT(found.at(0, 3), 1);
  EXPECT_NEAR(adjacent_mean(found), (found.at(0, 1) + found.at(1, 2) + found.at(2, 3)) / 3, 1e-12);
  double chance = 0;
  for (int visible = kTopk + 1; visible <= 75; ++visible) chance += 19.0 / visible / (75 - 19);
  EXPECT_NEAR(found.chance, chance, 1e-12);

  const Json json = overlap_json(found);
  EXPECT_EQ(json.at("overlap")[0][3], found.at(0, 3));
  EXPECT_EQ(json.at("layers").size(), 4u);
  EXPECT_EQ(std::ranges::count(overlap_csv(found), '\n'), 17);
  EXPECT_NE(overlap_text(found).find(" 100"), std::string::npos);
}

TEST(Overlap, ShortSequencesAreAnError) {
  const ModelSource source = small_model("FF");
  Engine engine(source, options_of(64));
  expect_contains(error_of([&] { measure_overlap(engine, sequences_of(1, kTopk)); }),
                  {"19", "index_topk"});
}

TEST(Overlap, ClustersAreTheBlocksOfTheMatrix) {
  Overlap overlap;
  overlap.layers = {0, 1, 2, 3, 4, 5};
  for (int i = 0; i < 6; ++i) {
    for (int j = 0; j < 6; ++j) {
      const bool together =
          (i < 1 && j < 1) || (i >= 1 && i < 4 && j >= 1 && j < 4) || (i >= 4 && j >= 4);
      overlap.mean.push_back(i == j ? 1 : together ? 0.8 : 0.3);
      overlap.standard_error.push_back(0);
    }
  }
  using Groups = std::vector<std::pair<size_t, size_t>>;
  EXPECT_EQ(overlap_clusters(overlap, 0.6), (Groups{{0, 0}, {1, 3}, {4, 5}}));
  EXPECT_EQ(overlap_clusters(overlap, 0.9).size(), 6u);
  EXPECT_EQ(overlap_clusters(overlap, 0.1), (Groups{{0, 5}}));
}

struct Naive {
  double nll = 0, kl = 0, same_top = 0;
};

// One sequence under one plan, against the logits of the reference.
Naive naive_scores(const std::vector<float>& reference, const std::vector<float>& logits,
                   const std::vector<int32_t>& tokens) {
  Naive out;
  for (size_t t = 0; t + 1 < tokens.size(); ++t) {
    const float* p = reference.data() + t * kSmallVocab;
    const float* q = logits.data() + t * kSmallVocab;
    long double sum_p = 0, sum_q = 0;
    for (int i = 0; i < kSmallVocab; ++i) {
      sum_p += expl(p[i]);
      sum_q += expl(q[i]);
    }
    out.nll += static_cast<double>(logl(sum_q) - q[tokens[t + 1]]);
    for (int i = 0; i < kSmallVocab; ++i)
      out.kl +=
          static_cast<double>(expl(p[i]) / sum_p * ((p[i] - logl(sum_p)) - (q[i] - logl(sum_q))));
    out.same_top +=
        std::max_element(p, p + kSmallVocab) - p == std::max_element(q, q + kSmallVocab) - q;
  }
  return out;
}

TEST(EvalText, IsTheNaiveComputation) {
  const ModelSource source = small_model("FFFFF");
  const auto sequences = sequences_of(3, 70);
  Engine engine(source, options_of(70));
  const std::vector<std::string> plans = {"FFFFF", "FSFSS", "FSSSS"};
  std::vector<Variant> variants;
  for (const std::string& plan : plans)
    variants.push_back({plan, plan_from_string(plan, 5, "test"), &engine});
  const std::vector<TextScore> scores = score_text(variants, sequences, 414);

  for (size_t v = 0; v < plans.size(); ++v) {
    SCOPED_TRACE(plans[v]);
    std::vector<Naive> naive;
    double base = 0;
    for (const auto& tokens : sequences) {
      const auto logits_of = [&](const std::string& plan) {
        RunOptions options = options_of(70);
        options.plan = plan;
        Engine fresh(source, options);
        SequenceCache cache;
        return run_traced(fresh, cache, tokens).logits;
      };
      const std::vector<float> reference = logits_of("FFFFF");
      naive.push_back(naive_scores(reference, logits_of(plans[v]), tokens));
      base += naive_scores(reference, reference, tokens).nll;
    }
    Naive sum;
    for (const Naive& each : naive) {
      sum.nll += each.nll / 207;
      sum.kl += each.kl / 207;
      sum.same_top += each.same_top / 207;
    }
    EXPECT_NEAR(scores[v].nll.mean, sum.nll, 1e-12);
    EXPECT_NEAR(scores[v].kl.mean, sum.kl, 1e-12);
    EXPECT_NEAR(scores[v].top1_agreement.mean, sum.same_top, 1e-12);
    EXPECT_NEAR(scores[v].nll_increase.mean, sum.nll - base / 207, 1e-12);
    EXPECT_NEAR(scores[v].perplexity(), std::exp(sum.nll), 1e-10);
    EXPECT_NEAR(scores[v].bits_per_byte, sum.nll * 207 / std::numbers::ln2 / 414, 1e-12);
    double squares = 0;
    for (const Naive& each : naive) squares += std::pow(each.nll / 69 - sum.nll, 2);
    EXPECT_NEAR(scores[v].nll.error, std::sqrt(squares / 2 / 3), 1e-12);
    EXPECT_EQ(scores[v].kl.mean > 1e-4, v > 0);
  }
  EXPECT_EQ(scores[0].kl.mean, 0);
  EXPECT_EQ(scores[0].top1_agreement.mean, 1);
  EXPECT_EQ(scores[0].nll_increase.mean, 0);
}

// The tokens and the loss of a golden case are transformers' own.
TEST(EvalText, PerplexityIsThatOfTransformers) {
  for (const std::string& name : kGoldenCases) {
    const std::string folder = golden_folder(name);
    if (folder.empty()) continue;
    SCOPED_TRACE(name);
    const Golden golden(folder);
    const ModelSource source = open_model(folder);
    const std::vector<std::vector<int32_t>> sequences = {golden.integers("input_ids")};
    RunOptions options = options_of(static_cast<int64_t>(sequences[0].size()));
    options.batch_tokens = 512;
    Engine engine(source, options);
    const Variant variant = {"as shipped", engine.model.plan, &engine};
    const TextScore score = score_text({variant}, sequences, 1)[0];
    EXPECT_NEAR(score.nll.mean, golden.floats("mean_nll")[0], 1e-5);
  }
}

// A model of random weights answers nothing right; that an answer counts is seen with the answer
// that the model itself gives.
TEST(EvalTasks, SameSeedSameScoreAndNothingRightByChance) {
  ModelConfig config = small_model_config("FFF");
  config.vocab_size = 260;
  config = parse_config(config_json(config), "test");
  const ModelSource source{config, synthetic_checkpoint(config, DType::kF32, 3), true};
  const Tokenizer tokenizer = Tokenizer::parse(byte_level_tokenizer_json(260), "test");
  Engine engine(source, options_of(1024));
  const std::vector<Variant> variants = {{"all", all_full_plan(3), &engine},
                                         {"one", plan_from_string("FSS", 3, "test"), &engine}};
  std::string text;
  for (int i = 0; i < 400; ++i) text += fmt::format("line {} of plain filler text.\n", i * 7919);
  const TaskFiller filler({text}, count_bytes(1));
  const TaskPlan plan{{TaskKind::kSingleNeedle, TaskKind::kMultiKey}, {300, 500}, 2, 5};
  const std::vector<TaskScore> scores = score_tasks(variants, plan, filler, tokenizer);
  ASSERT_EQ(scores.size(), 4u);
  for (const TaskScore& score : scores) EXPECT_EQ(score.right, (std::vector<int64_t>{0, 0}));
  EXPECT_EQ(scores[0].context, 300);
  EXPECT_EQ(scores[3].kind, TaskKind::kMultiKey);
}

Json plan_file_of_test() {
  return {{"version", 1},
          {"plan", "FSSF"},
          {"model_fingerprint", std::string(64, 'a')},
          {"settings",
           {{"all_full_loss", 2.0},
            {"loss", 2.02},
            {"compared",
             {{{"name", "<script>alert(1)</script>"},
               {"plan", "FFSF"},
               {"loss", 2.1},
               {"standard_error", 0.01}}}}}},
          {"steps",
           {{{"layer", 2}, {"loss", 2.01}, {"plan", "FFSF"}},
            {{"layer", 1}, {"loss", 2.02}, {"plan", "FSSF"}}}}};
}

TEST(Report, IsOnePageWithEverySection) {
  Overlap overlap;
  overlap.layers = {0, 1, 2, 3};
  overlap.mean.assign(16, 0.5);
  overlap.standard_error.assign(16, 0);
  overlap.index_topk = 19;
  const Json estimate = {{"mean", 1.5}, {"standard_error", 0.1}};
  const Json eval = {
      {"command", "indexcache eval '<x>'"},
      {"variants",
       {{{"name", "all & more"},
         {"plan", "FFFF"},
         {"num_full", 4},
         {"nll", estimate},
         {"perplexity", 4.5},
         {"bits_per_byte", 1.1},
         {"nll_increase", estimate},
         {"kl", estimate},
         {"top1_agreement", estimate},
         {"tasks", {{{"task", "single"}, {"context", 512}, {"right", 1}, {"asked", 2}}}}}}}};
  Json other = eval.at("variants")[0];
  other["name"] = "no tasks";
  other["tasks"] = Json::array();
  Json both = eval;
  both["variants"].push_back(other);
  const Json bench = {{{"plan", "FSSF"},
                       {"num_full", 2},
                       {"context", 4096},
                       {"prefill_s", 1.25},
                       {"decode_tok_s", 80.0},
                       {"indexer_share", 0.3}}};
  const std::string page = report_html("A < B", {{"plan", plan_file_of_test()},
                                                 {"overlap", overlap_json(overlap)},
                                                 {"eval", both},
                                                 {"bench", bench}});
  expect_contains(
      page, {"<title>A &lt; B</title>", "2 full layers of 4", "+1.000%", "Overlap of selections",
             "all &amp; more", "single @512", "1.250", "indexcache eval &#39;&lt;x&gt;&#39;",
             "class=\"group\"", "all &amp; more @512: 50%"});
  const std::string tasks = page.substr(page.find("Long-context tasks"));
  EXPECT_EQ(tasks.find("no tasks"), std::string::npos);
  EXPECT_EQ(page.find("<script"), std::string::npos);
  EXPECT_EQ(page.find("http"), std::string::npos) << "the page asks the network for something";
  EXPECT_EQ(page.find("nan"), std::string::npos);
}

TEST(Report, WhatItCannotReadIsAnError) {
  const auto message = [](const Json& json) {
    return error_of([&] { report_html("t", {{"file.json", json}}); });
  };
  expect_contains(message(Json{{"x", 1}}), {"file.json", "plan file"});
  expect_contains(message(Json::array()), {"file.json"});
  Json plan = plan_file_of_test();
  plan["settings"].erase("all_full_loss");
  expect_contains(message(plan), {"file.json", "all_full_loss"});
  plan = plan_file_of_test();
  plan["settings"]["all_full_loss"] = 0;
  expect_contains(message(plan), {"all_full_loss"});
  expect_contains(message(Json{{"overlap", {{1, 2}}}, {"layers", {0}}}), {"square"});
  expect_contains(message(Json{{"overlap", {{2}}}, {"layers", {0}}}), {"square"});
  expect_contains(message(Json{{"variants", {{{"name", 1}}}}}), {"name"});
}

TEST(Svg, ChartsOfNothingAreNothing) {
  EXPECT_EQ(line_chart({"x", "y", {}}), "");
  EXPECT_EQ(line_chart({"x", "y", {{"s", {}}}}), "");
  EXPECT_EQ(heat_map({}), "");
  EXPECT_NE(line_chart({"x", "y", {{"s", {{1, 5}}}}}).find("<circle"), std::string::npos);
  // Lines of one colour differ in their dashes.
  EXPECT_EQ(line_chart({"x", "y", std::vector<Series>(6, {"s", {{1, 5}}})}).find(" again\""),
            std::string::npos);
  EXPECT_NE(line_chart({"x", "y", std::vector<Series>(7, {"s", {{1, 5}}})}).find("c0 again"),
            std::string::npos);
}

}  // namespace
}  // namespace indexcache
