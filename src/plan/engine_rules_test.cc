// Our rule held to every engine's: equal on all configs that we accept, and the known differences
// pinned where they pass what we refuse.
#include "plan/engine_rules.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "base/rng.h"
#include "plan/index_plan.h"

namespace indexcache {
namespace {

// Published plans (IndexCache paper, appendix B; the GLM-5 ones also in the authors' and SGLang's
// repositories).
const std::string k30bHalf = "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF";
const std::string k30bQuarter = "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS";
const std::string k30bEighth = "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS";
const std::string kGlm5Half =
    "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS";
const std::string kGlm5Quarter =
    "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS";

std::string run(const char* engine, const Json& config, int num_layers) {
  try {
    return engine_rule(engine).plan(config, num_layers);
  } catch (const Error& e) {
    return e.what();
  }
}

std::string ours(const Json& config, int num_layers) {
  return to_string(plan_from_config(JsonObject(config, "config.json"), num_layers));
}

TEST(EngineRules, PublishedPatternsReadTheSameEverywhere) {
  const std::pair<const std::string*, int> published[] = {
      {&k30bHalf, 24}, {&k30bQuarter, 12}, {&k30bEighth, 7}, {&kGlm5Half, 40}, {&kGlm5Quarter, 22}};
  for (const auto& [pattern, num_full] : published) {
    const int num_layers = static_cast<int>(pattern->size());
    const Json config = {{"index_topk_pattern", *pattern}};
    EXPECT_EQ(plan_from_string(*pattern, num_layers, "t").num_full(), num_full);
    EXPECT_EQ(ours(config, num_layers), *pattern);
    for (const EngineRule& rule : engine_rules())
      EXPECT_EQ(rule.plan(config, num_layers), *pattern) << rule.name;
  }
}

// vLLM's documentation shows this as a plan for DeepSeek-V3.2. It is the head of the GLM-5 plan: no
// plan for that model.
TEST(EngineRules, TheDocumentedV32PatternIsTheHeadOfTheGlm5Plan) {
  EXPECT_EQ(plan_from_string(kGlm5Half.substr(0, 61), 61, "t").num_full(), 32);
}

TEST(EngineRules, PublishedPatternsAreNestedAsAGreedySearchGives) {
  const auto nested = [](const std::string& few, const std::string& many) {
    for (size_t l = 0; l < few.size(); ++l) {
      if (few[l] == 'F' && many[l] != 'F') return false;
    }
    return few.size() == many.size();
  };
  EXPECT_TRUE(nested(k30bEighth, k30bQuarter));
  EXPECT_TRUE(nested(k30bQuarter, k30bHalf));
  EXPECT_TRUE(nested(kGlm5Quarter, kGlm5Half));
}

TEST(EngineRules, ShippedModelsReadTheSameEverywhere) {
  const Json glm52 = {{"model_type", "glm_moe_dsa"},
                      {"index_topk_freq", 4},
                      {"index_skip_topk_offset", 3},
                      {"index_topk_pattern", nullptr}};
  for (const EngineRule& rule : engine_rules()) {
    // The authors' patch is older than the offset: it runs GLM-5.2 with another plan.
    if (std::string(rule.name) == "thudm") continue;
    const std::string plan = rule.plan(glm52, 78);
    EXPECT_EQ(plan, ours(glm52, 78)) << rule.name;
    EXPECT_EQ(std::count(plan.begin(), plan.end(), 'F'), 21) << rule.name;
  }
  const Json v32 = {{"index_topk_freq", 4}};
  for (const EngineRule& rule : engine_rules()) {
    const std::string plan = rule.plan(v32, 61);
    EXPECT_EQ(plan, ours(v32, 61)) << rule.name;
    EXPECT_EQ(std::count(plan.begin(), plan.end(), 'F'), 16) << rule.name;
  }
}

TEST(EngineRules, EqualOnEveryConfigThatWeAccept) {
  const uint64_t seed = 2603;
  SCOPED_TRACE(seed);
  Rng rng(seed);
  for (int round = 0; round < 3000; ++round) {
    const int num_layers = 1 + static_cast<int>(rng.below(96));
    Json config = {{"model_type", "glm_moe_dsa"}};
    if (rng.below(2) == 0) {
      config["index_topk_freq"] = 1 + rng.below(12);
      config["index_skip_topk_offset"] = 1 + rng.below(6);
    } else {
      std::string pattern(static_cast<size_t>(num_layers), 'F');
      for (size_t l = 1; l < pattern.size(); ++l) pattern[l] = rng.below(3) == 0 ? 'F' : 'S';
      config["index_topk_pattern"] = pattern;
    }
    const std::string expected = ours(config, num_layers);
    for (const EngineRule& rule : engine_rules()) {
      const bool knows_offset = std::string(rule.name) != "thudm";
      if (!knows_offset && config.value("index_skip_topk_offset", 2) != 2) continue;
      ASSERT_EQ(rule.plan(config, num_layers), expected) << rule.name << " " << config.dump();
    }
  }
}

struct Difference {
  const char* what;
  const char* config;
  int num_layers;
  const char* vllm;
  const char* sglang;
  const char* tensorrt_llm;
  const char* transformers;
  const char* thudm;
};

TEST(EngineRules, WhereTheEnginesDiffer) {
  const Difference table[] = {
      {"words in a list", R"({"index_topk_pattern": ["full", "shared", "full"]})", 3, "FFF", "FFF",
       "FFF", "FSF", "FFF"},
      {"letters in a list", R"({"index_topk_pattern": ["F", "S", "F"]})", 3, "FSF", "FSF", "FSF",
       "transformers raises ValueError", "FSF"},
      {"lower case", R"({"index_topk_pattern": "FsF"})", 3, "FFF", "FFF", "FSF",
       "transformers raises KeyError", "FFF"},
      {"too short", R"({"index_topk_pattern": "FS"})", 3, "FSF", "FSF", "FSF",
       "transformers raises IndexError", "the THUDM patch raises IndexError"},
      {"too long", R"({"index_topk_pattern": "FSFS"})", 3, "FSF", "FSF", "FSF", "FSF", "FSF"},
      {"empty", R"({"index_topk_pattern": ""})", 2, "FF", "FF", "FF",
       "transformers raises IndexError", "the THUDM patch raises IndexError"},
      {"layer 0 shared", R"({"index_topk_pattern": "SSF"})", 3, "SSF", "SSF", "FSF", "SSF", "SSF"},
      {"code points, not bytes", R"({"index_topk_pattern": "é" })", 1, "F", "F", "F",
       "transformers raises KeyError", "F"},
      {"freq null", R"({"index_topk_freq": null})", 3, "vLLM raises TypeError", "FFF", "FFF",
       "transformers raises TypeError", "the THUDM patch raises TypeError"},
      {"freq 0", R"({"index_topk_freq": 0})", 3, "vLLM raises ZeroDivisionError",
       "SGLang raises ZeroDivisionError", "FFF", "FFF", "the THUDM patch raises ZeroDivisionError"},
      {"freq negative", R"({"index_topk_freq": -2})", 5, "FFSFS", "FFSFS", "FFFFF", "FFFFF",
       "FFSFS"},
      {"freq a fraction", R"({"index_topk_freq": 2.5})", 7, "FFSSSSF", "FFSSSSF", "FFSSSSF",
       "FFSSSSF", "FFSSSSF"},
      {"freq a string", R"({"index_topk_freq": "4"})", 3, "vLLM raises TypeError",
       "SGLang raises TypeError", "TensorRT-LLM raises TypeError", "transformers raises TypeError",
       "the THUDM patch raises TypeError"},
      {"offset 0", R"({"index_topk_freq": 4, "index_skip_topk_offset": 0})", 5, "SSSFS",
       "SGLang raises ValueError", "FSSFS", "SSSFS", "FFSSS"},
      {"offset 3", R"({"index_topk_freq": 4, "index_skip_topk_offset": 3})", 7, "FFFSSSF",
       "FFFSSSF", "FFFSSSF", "FFFSSSF", "FFSSSFS"},
      {"indexer_types", R"({"indexer_types": ["full", "shared", "shared"]})", 3, "FFF", "FFF",
       "FFF", "FSS", "FFF"},
      {"deepseek_v32", R"({"model_type": "deepseek_v32", "index_topk_pattern": "FSS"})", 3, "FSS",
       "FSS", "FSS", "FFF", "FSS"},
      {"pattern and freq", R"({"index_topk_freq": 2, "index_topk_pattern": "FSS"})", 3, "FSS",
       "FSS", "FSS", "FSS", "FSS"},
      {"pattern a number", R"({"index_topk_pattern": 4})", 3, "vLLM raises TypeError",
       "SGLang raises TypeError", "TensorRT-LLM raises TypeError", "transformers raises TypeError",
       "the THUDM patch raises TypeError"},
  };
  for (const Difference& row : table) {
    SCOPED_TRACE(row.what);
    const Json config = parse_json(row.config, "test");
    const auto expect = [&](const char* engine, const std::string& expected) {
      const std::string found = run(engine, config, row.num_layers);
      EXPECT_EQ(found.substr(0, expected.size()), expected) << engine << ": " << found;
      if (expected.find(' ') == std::string::npos) {
        EXPECT_EQ(found, expected) << engine;
      }
    };
    expect("vllm", row.vllm);
    expect("sglang", row.sglang);
    expect("tensorrt-llm", row.tensorrt_llm);
    expect("transformers", row.transformers);
    expect("thudm", row.thudm);
  }
}

TEST(EngineRules, UnknownEngineIsAnError) {
  try {
    engine_rule("vlm");
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(
        std::string(e.what()).find("vllm, sglang, tensorrt-llm, transformers, vllm-ascend, thudm"),
        std::string::npos);
  }
}

}  // namespace
}  // namespace indexcache
