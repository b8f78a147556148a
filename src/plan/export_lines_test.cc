// The lines for every engine, read back as that engine reads them, mean the plan.
#include "plan/export_lines.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "plan/engine_rules.h"
#include "plan/pipeline_stages.h"

namespace indexcache {
namespace {

IndexPlan plan_of(const std::string& letters) {
  return plan_from_string(letters, static_cast<int>(letters.size()), "test");
}

ExportRequest request_for(const std::string& letters, Json config = {{"model_type", "glm_moe_dsa"}},
                          int stages = 1) {
  ExportRequest request;
  request.config = std::move(config);
  request.plan = plan_of(letters);
  request.layer_has_indexer.assign(letters.size(), true);
  request.pipeline_stages = stages;
  return request;
}

// What a person who pastes the lines makes of a config.json: fields out of the printed text, not
// out of `settings`.
Json after_pasting(Json config, const std::vector<std::string>& lines) {
  for (const std::string& line : lines) {
    const size_t quote = line.find('\'');
    const std::string text = quote == std::string::npos
                                 ? "{" + line.substr(0, line.size() - 1) + "}"
                                 : line.substr(quote + 1, line.size() - quote - 2);
    const Json fields = parse_json(text, line);
    for (const auto& [key, value] : fields.items()) config[key] = value;
  }
  return config;
}

void expect_plan(const ExportRequest& request) {
  const std::string plan = to_string(request.plan);
  for (const std::string& engine : export_engines()) {
    const EngineLines lines = export_lines(engine, request);
    ASSERT_EQ(lines.refusal, "") << engine;
    const Json config = after_pasting(request.config, lines.lines);
    ASSERT_EQ(engine_rule(engine).plan(config, request.plan.num_layers()), plan) << engine;
    const bool alone = lines.config_suffices;
    if (alone) {
      ASSERT_EQ(engine_rule(engine).plan(request.config, request.plan.num_layers()), plan);
    }
  }
}

std::string random_letters() {
  std::string letters = "F";
  for (const bool full : *rc::gen::container<std::vector<bool>>(rc::gen::arbitrary<bool>()))
    letters += full ? 'F' : 'S';
  return letters;
}

RC_GTEST_PROP(ExportLines, AnyPlanComesBackFromTheLines, ()) {
  const std::string letters = random_letters();
  const int num_layers = static_cast<int>(letters.size());
  // Whatever the config said before.
  Json config = {{"model_type", "glm_moe_dsa"}};
  const std::string before = random_letters();
  switch (*rc::gen::inRange(0, 5)) {
    case 0:
      config["index_topk_pattern"] = before;
      break;
    case 1:
      config["index_topk_freq"] = *rc::gen::inRange(1, 9);
      config["index_skip_topk_offset"] = *rc::gen::inRange(1, 9);
      break;
    case 2:
      config["index_topk_freq"] = nullptr;
      config["index_skip_topk_offset"] = nullptr;
      break;
    case 3:
      config = config_with_plan(config, all_full_plan(num_layers));
      break;
    default:
      break;
  }
  const ExportRequest request = request_for(letters, config);
  for (const std::string& engine : export_engines()) {
    const EngineLines lines = export_lines(engine, request);
    RC_ASSERT(lines.refusal.empty());
    RC_ASSERT(engine_rule(engine).plan(after_pasting(config, lines.lines), num_layers) == letters);
    if (lines.config_suffices) RC_ASSERT(engine_rule(engine).plan(config, num_layers) == letters);
  }
}

RC_GTEST_PROP(ExportLines, AConfigWithThePlanNeedsNoLines, ()) {
  const std::string letters = random_letters();
  Json config = {{"model_type", "glm_moe_dsa"}, {"index_topk_freq", 4}, {"vocab_size", 3}};
  config = config_with_plan(config, plan_of(letters));
  RC_ASSERT(engines_that_agree(config, plan_of(letters)) == export_engines());
  RC_ASSERT(engine_rule("thudm").plan(config, static_cast<int>(letters.size())) == letters);
  RC_ASSERT(to_string(plan_from_config(JsonObject(config, "config.json"),
                                       static_cast<int>(letters.size()))) == letters);
  RC_ASSERT(config.at("vocab_size") == 3);
  RC_ASSERT(!config.contains("index_topk_freq"));
}

TEST(ExportLines, PublishedPatterns) {
  const Json glm52 = {{"model_type", "glm_moe_dsa"},
                      {"index_topk_freq", 4},
                      {"index_skip_topk_offset", 3},
                      {"index_topk_pattern", nullptr}};
  for (const char* pattern :
       {"FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
        "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
        "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS",
        "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS"}) {
    expect_plan(request_for(pattern));
    expect_plan(request_for(pattern, glm52));
  }
  const std::string own = to_string(plan_from_freq(4, 3, 78, "test"));
  expect_plan(request_for(own, glm52));
  EXPECT_TRUE(export_lines("vllm", request_for(own, glm52)).config_suffices);
}

TEST(ExportLines, TheExactLines) {
  const auto only_line = [](const std::string& engine) {
    const EngineLines lines = export_lines(engine, request_for("FSF"));
    EXPECT_EQ(lines.lines.size(), 1u);
    return lines.lines.at(0);
  };
  EXPECT_EQ(only_line("vllm"),
            R"(--hf-overrides '{"index_topk_pattern":"FSF","use_index_cache":true}')");
  EXPECT_EQ(only_line("sglang"), R"(--json-model-override-args '{"index_topk_pattern":"FSF"}')");
  EXPECT_EQ(only_line("tensorrt-llm"), R"("index_topk_pattern": "FSF",)");
  EXPECT_EQ(only_line("transformers"), R"("indexer_types": ["full","shared","full"],)");
  EXPECT_EQ(only_line("vllm-ascend"), only_line("vllm"));
}

TEST(ExportLines, WhatAnEngineCannotRunIsRefused) {
  ExportRequest request = request_for("FSF", {{"model_type", "deepseek_v32"}});
  const EngineLines lines = export_lines("transformers", request);
  EXPECT_TRUE(lines.lines.empty());
  EXPECT_NE(lines.refusal.find("FFF"), std::string::npos) << lines.refusal;
  EXPECT_NE(lines.refusal.find("glm_moe_dsa"), std::string::npos) << lines.refusal;
  EXPECT_EQ(export_lines("vllm", request).refusal, "");
  EXPECT_EQ(export_lines("transformers", request_for("FFF", request.config)).refusal, "");
  EXPECT_THROW(export_lines("vlm", request), Error);
  request.layer_has_indexer[2] = false;
  EXPECT_THROW(export_lines("vllm", request), Error);
  request = request_for("FSF");
  request.pipeline_stages = 4;
  EXPECT_THROW(export_lines("vllm", request), Error);
}

// vllm-ascend builds an indexer wherever indexer_types does not say "shared".
TEST(ExportLines, AscendIsToldWhichIndexersThereAre) {
  ExportRequest request = request_for("FSSF");
  request.layer_has_indexer = {true, false, true, true};
  EXPECT_EQ(export_lines("vllm-ascend", request).settings.at("indexer_types"),
            Json::array({"full", "shared", "full", "full"}));
  request.config["indexer_types"] = {"full", "shared", "full", "full"};
  EXPECT_FALSE(export_lines("vllm-ascend", request).settings.contains("indexer_types"));
}

bool any_contains(const std::vector<std::string>& texts, const std::string& part) {
  return std::any_of(texts.begin(), texts.end(),
                     [&](const std::string& text) { return text.find(part) != std::string::npos; });
}

TEST(ExportLines, Hazards) {
  ExportRequest request = request_for("FFSSSF", {{"indexer_types", Json::array({"full"})}});
  request.num_mtp_layers = 1;
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm", "vllm-ascend"}) {
    const EngineLines lines = export_lines(engine, request);
    EXPECT_TRUE(any_contains(lines.hazards, "does not read indexer_types")) << engine;
    EXPECT_TRUE(any_contains(lines.hazards, "MTP")) << engine;
    EXPECT_TRUE(lines.environment.empty());
  }
  // Two stages of three layers: the second begins at layer 3, a shared one.
  request.pipeline_stages = 2;
  const EngineLines vllm = export_lines("vllm", request);
  EXPECT_EQ(vllm.environment, std::vector<std::string>{"VLLM_PP_LAYER_PARTITION=5,1"});
  EXPECT_TRUE(any_contains(vllm.hazards, "at layer 3 begins on a shared layer")) << vllm.hazards[0];
  EXPECT_EQ(export_lines("sglang", request).environment,
            std::vector<std::string>{"SGLANG_PP_LAYER_PARTITION=5,1"});
  EXPECT_TRUE(export_lines("transformers", request).environment.empty());
  request.pipeline_stages = 4;  // three full layers
  EXPECT_NE(export_lines("vllm", request).refusal, "");
  EXPECT_EQ(export_lines("sglang", request).refusal, "");
}

// The cut that a deployment of GLM-5.3 (78 layers, freq 4, offset 3) with two stages came to.
TEST(PipelineStages, PublishedCut) {
  const IndexPlan plan = plan_from_freq(4, 3, 78, "test");
  EXPECT_EQ(cut_by_rule(StageRule::kBeforeLast, 78, 2), (std::vector<int>{39, 39}));
  EXPECT_EQ(shared_stage_starts(plan, {39, 39}), std::vector<int>{39});
  EXPECT_TRUE(shared_stage_starts(plan, {42, 36}).empty());
  const auto cut = *cut_on_full_layers(plan, 2);
  EXPECT_EQ(*std::max_element(cut.begin(), cut.end()), 40);  // 38 + 40: shorter than 42 + 36
}

TEST(PipelineStages, WhereTheRemainderGoes) {
  // vLLM's documentation and tests.
  EXPECT_EQ(cut_by_rule(StageRule::kBeforeLast, 61, 4), (std::vector<int>{15, 15, 16, 15}));
  EXPECT_EQ(cut_by_rule(StageRule::kBeforeLast, 22, 4), (std::vector<int>{5, 6, 6, 5}));
  EXPECT_EQ(cut_by_rule(StageRule::kBeforeLast, 5, 3), (std::vector<int>{2, 2, 1}));
  EXPECT_EQ(cut_by_rule(StageRule::kBeforeLast, 3, 2), (std::vector<int>{2, 1}));
  EXPECT_EQ(cut_by_rule(StageRule::kLast, 22, 4), (std::vector<int>{5, 5, 6, 6}));
  EXPECT_EQ(cut_by_rule(StageRule::kFirst, 22, 4), (std::vector<int>{6, 6, 5, 5}));
}

// All cuts of a small model, one by one.
int shortest_longest_stage(const IndexPlan& plan, int start, int stages) {
  const int num_layers = plan.num_layers();
  if (!plan.is_full(start)) return num_layers + 1;
  if (stages == 1) return num_layers - start;
  int best = num_layers + 1;
  for (int next = start + 1; next < num_layers; ++next)
    best = std::min(best, std::max(next - start, shortest_longest_stage(plan, next, stages - 1)));
  return best;
}

RC_GTEST_PROP(PipelineStages, FullLayerCutsAreTheShortest, ()) {
  std::string letters = random_letters().substr(0, 12);
  const IndexPlan plan = plan_of(letters);
  const int stages = *rc::gen::inRange(1, plan.num_layers() + 1);
  const auto cut = cut_on_full_layers(plan, stages);
  RC_ASSERT(cut.has_value() == (plan.num_full() >= stages));
  if (!cut) return;
  RC_ASSERT(static_cast<int>(cut->size()) == stages);
  RC_ASSERT(*std::min_element(cut->begin(), cut->end()) >= 1);
  RC_ASSERT(std::accumulate(cut->begin(), cut->end(), 0) == plan.num_layers());
  RC_ASSERT(shared_stage_starts(plan, *cut).empty());
  RC_ASSERT(*std::max_element(cut->begin(), cut->end()) == shortest_longest_stage(plan, 0, stages));
}

}  // namespace
}  // namespace indexcache
