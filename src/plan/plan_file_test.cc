#include "plan/plan_file.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <filesystem>
#include <limits>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/log.h"

namespace indexcache {
namespace {

const std::string kFingerprint(64, 'a');

class PlanFileTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() /
              fmt::format("indexcache-plan-test-{}-{}", getpid(),
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_);
    set_log_enabled(false);
  }
  void TearDown() override {
    std::filesystem::remove_all(folder_);
    set_log_enabled(true);
  }
  std::string path(const char* name) const { return (folder_ / name).string(); }

  std::filesystem::path folder_;
};

PlanFile example() {
  PlanFile file;
  file.plan = "FSFS";
  file.model_fingerprint = kFingerprint;
  file.steps = {{3, 1.25, "FFFS"}, {1, 1.0 / 3, "FSFS"}};
  file.settings = {{"data", "text"}, {"batches", 3}};
  return file;
}

template <class F>
void expect_error(F f, std::initializer_list<const char*> parts) {
  std::string message = "no error";
  try {
    f();
  } catch (const Error& e) {
    message = e.what();
  }
  for (const char* part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
}

TEST_F(PlanFileTest, WhatIsSavedIsLoaded) {
  const PlanFile saved = example();
  save_plan_file(saved, path("p.json"));
  const PlanFile loaded = load_plan_file(path("p.json"));
  EXPECT_EQ(loaded.plan, saved.plan);
  EXPECT_EQ(loaded.model_fingerprint, saved.model_fingerprint);
  EXPECT_EQ(loaded.steps, saved.steps);
  EXPECT_EQ(loaded.settings, saved.settings);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1)
      << "a temporary file was left";
}

TEST_F(PlanFileTest, EveryFaultIsNamed) {
  const auto with = [](const char* key, Json value) {
    Json json = plan_file_json(example());
    json[key] = std::move(value);
    return json;
  };
  const auto with_step = [](const char* key, Json value) {
    Json json = plan_file_json(example());
    json["steps"][1][key] = std::move(value);
    return json;
  };
  struct Case {
    Json json;
    std::vector<const char*> parts;
  };
  const Case cases[] = {
      {Json::array(), {"expected a JSON object"}},
      {with("plan", 3), {"\"plan\" is 3", "a string"}},
      {with("plan", ""), {"\"plan\"", "0 letters", "1 to"}},
      {with("plan", "FSFs"), {"\"plan\"", "position 3"}},
      {with("plan", "SSFS"), {"layer 0"}},
      {with("plan", "FS"), {"\"layer\" is 3", "from 0 to 1"}},
      {with("plan", std::string(5000, 'F')), {"5000 letters", "4096"}},
      {with("model_fingerprint", "abc"), {"model_fingerprint", "64 lower-case hexadecimal"}},
      {with("model_fingerprint", std::string(64, 'A')), {"model_fingerprint"}},
      {with("version", 2), {"\"version\" is 2", "from 1 to 1"}},
      {with("version", "1"), {"version"}},
      {with("steps", 1), {"\"steps\" is 1", "a list"}},
      {with("settings", Json::array()), {"settings", "an object"}},
      {with("losses", 1), {"unknown key \"losses\"", "model_fingerprint"}},
      {with_step("layer", 4), {"entry 1", "\"layer\" is 4", "from 0 to 3"}},
      {with_step("layer", -1), {"entry 1", "layer"}},
      {with_step("loss", "low"), {"entry 1", "loss", "a number"}},
      {with_step("loss", nullptr), {"entry 1", "loss", "a number"}},
      {with_step("plan", "FSF"), {"entry 1", "3 letters", "4 layers"}},
      {with_step("extra", 0), {"entry 1", "unknown key \"extra\""}},
  };
  for (const Case& c : cases) {
    try {
      parse_plan_file(c.json, "p.json");
      ADD_FAILURE() << "accepted: " << c.json.dump();
    } catch (const Error& e) {
      const std::string message = e.what();
      EXPECT_EQ(message.substr(0, 6), "p.json");
      for (const char* part : c.parts) {
        EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
      }
    }
  }
  for (const char* key : {"plan", "model_fingerprint", "steps", "settings", "version"}) {
    Json json = plan_file_json(example());
    json.erase(key);
    expect_error([&] { parse_plan_file(json, "p.json"); }, {key, "missing"});
  }
}

TEST_F(PlanFileTest, WhatCouldNotBeReadBackIsNotWritten) {
  PlanFile file = example();
  file.steps[0].loss = std::numeric_limits<double>::quiet_NaN();
  expect_error([&] { save_plan_file(file, path("p.json")); }, {"loss"});
  EXPECT_FALSE(std::filesystem::exists(path("p.json")));
}

TEST_F(PlanFileTest, SettingsThatAreNotUtf8AreWrittenReadably) {
  PlanFile file = example();
  file.settings["data"] = "caf\xE9.txt";
  save_plan_file(file, path("p.json"));
  EXPECT_EQ(load_plan_file(path("p.json")).settings["data"], "caf\xEF\xBF\xBD.txt");
}

TEST_F(PlanFileTest, ResolveReadsEveryFormOfOverride) {
  save_plan_file(example(), path("p.json"));
  save_plan_file(example(), path("noextension"));
  EXPECT_EQ(to_string(resolve_plan(path("p.json"), 4, kFingerprint)), "FSFS");
  EXPECT_EQ(to_string(resolve_plan(path("noextension"), 4, kFingerprint)), "FSFS");
  EXPECT_EQ(to_string(resolve_plan("FFSF", 4, kFingerprint)), "FFSF");
  EXPECT_EQ(to_string(resolve_plan("1/2", 4, kFingerprint)), "FFSF");
  EXPECT_EQ(to_string(resolve_plan("freq=2,offset=1", 4, kFingerprint)), "FSFS");
  expect_error([&] { resolve_plan(path("absent.json"), 4, kFingerprint); },
               {"absent.json", "cannot open"});
  expect_error([&] { resolve_plan("absent.json", 4, kFingerprint); },
               {"absent.json", "cannot open"});
  expect_error([&] { resolve_plan(folder_.string(), 4, kFingerprint); }, {"a directory"});
  expect_error([&] { resolve_plan("ffsf", 4, kFingerprint); }, {"position 0"});
}

TEST_F(PlanFileTest, PlanOfAnotherModelIsRefusedUnlessForced) {
  save_plan_file(example(), path("p.json"));
  const std::string other(64, 'b');
  expect_error([&] { resolve_plan(path("p.json"), 4, other); },
               {"p.json", "model_fingerprint", kFingerprint.c_str(), other.c_str(), "expected"});
  EXPECT_EQ(to_string(resolve_plan(path("p.json"), 4, other, FingerprintCheck::kForce)), "FSFS");
  expect_error([&] { resolve_plan(path("p.json"), 5, kFingerprint, FingerprintCheck::kForce); },
               {"4 letters", "5 layers"});
}

TEST(ConfigFingerprint, DependsOnTheModelAndNothingElse) {
  const auto of = [](const char* json) { return config_fingerprint(parse_json(json, "test")); };
  const std::string base =
      of(R"({"hidden_size": 64, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})");
  EXPECT_EQ(base.size(), 64u);
  EXPECT_EQ(
      base,
      of(R"({"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "hidden_size": 64.0})"));
  EXPECT_EQ(
      base,
      of(R"({"hidden_size": 64, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                        "index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": "FS",
                        "indexer_types": ["full"], "use_index_cache": true, "dtype": "bfloat16",
                        "torch_dtype": "bfloat16", "transformers_version": "5.17.0", "_name_or_path": "x",
                        "quantization_config": {"quant_method": "fp8"}, "bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": null})"));
  EXPECT_NE(
      base,
      of(R"({"hidden_size": 65, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})"));
  EXPECT_NE(
      base,
      of(R"({"hidden_size": 64, "rope_parameters": {"rope_theta": 2e6, "rope_type": "default"}})"));
  EXPECT_NE(of(R"({"a": [1, 2]})"), of(R"({"a": [2, 1]})"));
  // Pinned: plan files in the world hold these.
  EXPECT_EQ(of("{}"), "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
}

}  // namespace
}  // namespace indexcache
