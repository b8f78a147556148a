#include "plan/index_plan.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "base/rng.h"

namespace indexcache {
namespace {

template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

void expect_error(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
}

std::string from_config(const std::string& json, int num_layers) {
  const Json config = parse_json(json, "test");
  return to_string(plan_from_config(JsonObject(config, "config.json"), num_layers));
}

std::string config_error(const std::string& json, int num_layers) {
  return error_of([&] { from_config(json, num_layers); });
}

TEST(IndexPlan, UniformRuleGivesThePublishedPlans) {
  EXPECT_EQ(to_string(plan_from_freq(4, 2, 10, "t")), "FFSSSFSSSF");
  EXPECT_EQ(to_string(plan_from_freq(2, 2, 6, "t")), "FFSFSF");
  EXPECT_EQ(to_string(plan_from_freq(4, 3, 11, "t")), "FFFSSSFSSSF");
  EXPECT_EQ(to_string(plan_from_freq(4, 1, 8, "t")), "FSSSFSSS");
  EXPECT_EQ(to_string(plan_from_freq(1, 7, 5, "t")), "FFFFF");
  EXPECT_EQ(plan_from_freq(4, 2, 61, "t").num_full(), 16);  // DeepSeek-V3.2
  EXPECT_EQ(plan_from_freq(2, 2, 61, "t").num_full(), 31);
  const IndexPlan glm52 = plan_from_freq(4, 3, 78, "t");
  EXPECT_EQ(glm52.num_full(), 21);
  for (int l = 0; l < 78; ++l)
    EXPECT_EQ(glm52.is_full(l), l < 2 || (l >= 2 && (l - 2) % 4 == 0)) << l;
}

TEST(IndexPlan, SourceIsTheNearestFullLayerBefore) {
  const IndexPlan plan = plan_from_string("FFSSFS", 6, "t");
  EXPECT_EQ(plan.source, (std::vector<int32_t>{0, 1, 1, 1, 4, 4}));
  EXPECT_EQ(plan.num_full(), 3);
}

TEST(IndexPlan, EveryPlanHasTheInvariants) {
  const uint64_t seed = 20260311;
  SCOPED_TRACE(seed);
  Rng rng(seed);
  for (int round = 0; round < 2000; ++round) {
    const int n = 1 + static_cast<int>(rng.below(96));
    std::string letters(static_cast<size_t>(n), 'F');
    for (size_t l = 1; l < letters.size(); ++l) letters[l] = rng.below(2) == 0 ? 'F' : 'S';
    const IndexPlan plan = plan_from_string(letters, n, "t");
    ASSERT_EQ(to_string(plan), letters);
    ASSERT_EQ(plan.num_full(), std::count(letters.begin(), letters.end(), 'F'));
    for (int l = 0; l < n; ++l) {
      const int source = plan.source[static_cast<size_t>(l)];
      ASSERT_LE(source, l);
      ASSERT_TRUE(plan.is_full(source));
      for (int between = source + 1; between <= l; ++between) ASSERT_FALSE(plan.is_full(between));
    }
    Json list = Json::array();
    const bool words = rng.below(2) == 0;
    for (char c : letters) {
      list.push_back(words ? (c == 'F' ? "full" : "shared") : std::string(1, c));
    }
    ASSERT_EQ(plan_from_list(list, n, "t"), plan);
  }
}

TEST(IndexPlan, PatternOfWrongLengthIsRefused) {
  expect_error(config_error(R"({"index_topk_pattern": ")" + std::string(60, 'F') + "\"}", 61),
               {"config.json", "index_topk_pattern", "60 letters", "61 layers", "expected"});
  expect_error(config_error(R"({"index_topk_pattern": "FFFF"})", 3), {"4 letters", "3 layers"});
  expect_error(config_error(R"({"index_topk_pattern": ""})", 3), {"0 letters", "3 layers"});
  expect_error(config_error(R"({"indexer_types": ["full"]})", 3),
               {"indexer_types", "1 entries", "3 layers"});
}

TEST(IndexPlan, FirstLayerSharedIsRefused) {
  for (const char* json :
       {R"({"index_topk_pattern": "SFF"})", R"({"index_topk_pattern": ["S", "F", "F"]})",
        R"({"indexer_types": ["shared", "full", "full"]})"}) {
    expect_error(config_error(json, 3), {"layer 0", "shared", "expected full"});
  }
}

TEST(IndexPlan, OtherLettersAreRefusedWithTheirPosition) {
  expect_error(config_error(R"({"index_topk_pattern": "FFs"})", 3),
               {"\"s\"", "position 2", "F or S"});
  expect_error(config_error(R"({"index_topk_pattern": "F F"})", 3), {"position 1"});
  expect_error(config_error("{\"index_topk_pattern\": \"\xEF\xBB\xBF"
                            "FFF\"}",
                            3),
               {"position 0"});
  expect_error(config_error(R"({"index_topk_pattern": "FF\n"})", 3), {"\\x0a", "position 2"});
  expect_error(config_error(R"({"index_topk_pattern": ["F", "s", "F"]})", 3), {"entry 1", "\"s\""});
  expect_error(config_error(R"({"indexer_types": ["full", 1, "full"]})", 3), {"entry 1 is 1"});
  expect_error(config_error(R"({"indexer_types": ["full", null, "full"]})", 3),
               {"entry 1 is null"});
  expect_error(config_error(R"({"indexer_types": "FFF"})", 3), {"indexer_types", "list"});
  expect_error(config_error(R"({"index_topk_pattern": 3})", 3), {"index_topk_pattern", "is 3"});
  expect_error(config_error(R"({"index_topk_pattern": {}})", 3), {"index_topk_pattern"});
}

TEST(IndexPlan, BadFrequenciesAreRefused) {
  for (const char* freq :
       {"0", "-1", "2.5", "1e9", "1000000000", "\"4\"", "true", "[4]", "18446744073709551615"}) {
    expect_error(config_error(std::string(R"({"index_topk_freq": )") + freq + "}", 8),
                 {"index_topk_freq", "expected an integer from 1"});
  }
  for (const char* offset : {"0", "-3", "1.5", "\"2\"", "1000000000"}) {
    expect_error(
        config_error(
            std::string(R"({"index_topk_freq": 4, "index_skip_topk_offset": )") + offset + "}", 8),
        {"index_skip_topk_offset", "expected an integer from 1"});
    // Without a frequency the offset has no effect, but nonsense is still nonsense.
    expect_error(config_error(std::string(R"({"index_skip_topk_offset": )") + offset + "}", 8),
                 {"index_skip_topk_offset"});
  }
}

TEST(IndexPlan, NullIsAbsent) {
  EXPECT_EQ(from_config("{}", 4), "FFFF");
  EXPECT_EQ(
      from_config(R"({"index_topk_freq": null, "index_topk_pattern": null, "indexer_types": null,
                            "index_skip_topk_offset": null})",
                  4),
      "FFFF");
  EXPECT_EQ(from_config(R"({"index_topk_freq": 4, "index_skip_topk_offset": null})", 6), "FFSSSF");
  EXPECT_EQ(from_config(R"({"index_skip_topk_offset": 3})", 6), "FFFFFF");
  EXPECT_EQ(from_config(R"({"index_topk_freq": null, "index_topk_pattern": "FSS"})", 3), "FSS");
}

TEST(IndexPlan, FieldsThatAgreeAreAccepted) {
  EXPECT_EQ(
      from_config(
          R"({"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": "FFFSSSF",
                            "indexer_types": ["full","full","full","shared","shared","shared","full"]})",
          7),
      "FFFSSSF");
}

TEST(IndexPlan, FieldsThatDisagreeAreRefusedShowingBoth) {
  expect_error(config_error(R"({"index_topk_freq": 4, "index_topk_pattern": "FSSSF"})", 5),
               {"index_topk_pattern", "FSSSF", "index_topk_freq", "FFSSS"});
  expect_error(
      config_error(R"({"index_topk_pattern": "FS", "indexer_types": ["full", "full"]})", 2),
      {"indexer_types", "FF", "index_topk_pattern", "FS"});
  expect_error(config_error(R"({"index_topk_freq": 1, "index_topk_pattern": "FS"})", 2),
               {"index_topk_pattern", "FS", "index_topk_freq", "FF"});
}

TEST(IndexPlan, Overrides) {
  EXPECT_EQ(to_string(plan_from_override("FSSF", 4)), "FSSF");
  EXPECT_EQ(plan_from_override("1/4", 61), plan_from_freq(4, 2, 61, "t"));
  EXPECT_EQ(plan_from_override("1/1", 9), all_full_plan(9));
  EXPECT_EQ(plan_from_override("freq=4", 61), plan_from_freq(4, 2, 61, "t"));
  EXPECT_EQ(plan_from_override("freq=4,offset=3", 78), plan_from_freq(4, 3, 78, "t"));
  EXPECT_EQ(plan_from_override("offset=3,freq=4", 78), plan_from_freq(4, 3, 78, "t"));

  const auto error = [](const char* text) {
    return error_of([&] { plan_from_override(text, 4); });
  };
  expect_error(error(""), {"empty", "expected"});
  expect_error(error("FSS"), {"3 letters", "4 layers"});
  expect_error(error("fssf"), {"\"fssf\"", "position 0"});
  expect_error(error("SFFF"), {"layer 0"});
  for (const char* text : {"2/4", "1/0", "0/4", "1/1000000000", "1/99999999999999999999", "01/4"}) {
    expect_error(error(text), {text, "1/N"});
  }
  expect_error(error("freq=0"), {"freq is 0", "1 to"});
  expect_error(error("freq=4,offset=0"), {"offset is 0"});
  for (const char* text :
       {"freq=", "freq=-1", "freq=2.5", "freq=1e9", "freq= 4", "freq=99999999999999999999"}) {
    expect_error(error(text), {"freq", "expected an integer"});
  }
  expect_error(error("freq=4,freq=4"), {"freq", "twice"});
  expect_error(error("offset=3"), {"without freq"});
  expect_error(error("freq=4,"), {"comma"});
  expect_error(error("freq=4,,offset=2"), {"expected freq=N"});
  expect_error(error("freq=4,step=2"), {"\"step=2\""});
  expect_error(error("="), {"expected freq=N"});
}

TEST(IndexPlan, FullLayerWithoutWeightsIsRefusedListingAll) {
  const IndexPlan plan = plan_from_string("FFSSFS", 6, "t");
  check_indexer_weights(plan, {true, true, false, false, true, false}, "model");
  check_indexer_weights(plan, std::vector<bool>(6, true), "model");
  expect_error(error_of([&] {
                 check_indexer_weights(plan, {true, false, true, true, false, true}, "model");
               }),
               {"model", "FFSSFS", "2 layers", "no indexer weights: 1, 4"});
}

}  // namespace
}  // namespace indexcache
