// search, overlap and eval from end to end: the real program on a generated checkpoint.

#include <sys/file.h>

#include <filesystem>
#include <fstream>

#include "base/json.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/test_files.h"
#include "plan/plan_file.h"
#include "tests/golden.h"
#include "tests/program.h"

namespace indexcache {
namespace {

// index_topk of the generated model is 256.
class Method : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TempFolder;
    model_ = *folder_ / "model";
    if (!program_is_built()) return;
    const ProgramResult made =
        run_program({"synth", "tiny", "--layers", "4", "--weights", "f32", "-o", model_});
    EXPECT_EQ(made.exit_code, 0) << made.err;
    std::string text;
    for (int i = 0; i < 700; ++i)
      text += fmt::format("{} times {} is {}.\n", i, i + 7, i * (i + 7));
    folder_->write("text.txt", text);
    folder_->write("text.jsonl", Json{{"text", text}}.dump() + "\n");
  }
  static void TearDownTestSuite() { delete folder_; }
  void SetUp() override {
    ASSERT_TRUE(program_is_built()) << INDEXCACHE_BINARY << " is absent: build indexcache-cli";
  }

  static std::vector<std::string> args(const std::string& command, std::vector<std::string> more,
                                       const std::string& file = "text.txt") {
    std::vector<std::string> all = {command, "-m", model_, "-f", *folder_ / file, "-t", "1"};
    for (const auto& [flag, value] : {std::pair("--tokens", "900"), std::pair("--seq", "300")}) {
      if (std::find(more.begin(), more.end(), flag) == more.end())
        all.insert(all.end(), {flag, value});
    }
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  static std::string output(const std::vector<std::string>& arguments) {
    const ProgramResult result = run_program(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_TRUE(error_lines(result.err).empty()) << result.err;
    return result.out;
  }
  static std::string path(const std::string& name) { return *folder_ / name; }

  static TempFolder* folder_;
  static std::string model_;
};
TempFolder* Method::folder_ = nullptr;
std::string Method::model_;

TEST_F(Method, SearchWritesThePlanAndItsPath) {
  const std::string out = output(args("search", {"-o", path("plan.json"), "--keep", "1"}));
  EXPECT_NE(out.find("layer-forwards"), std::string::npos) << out;
  EXPECT_NE(out.find("evenly spaced"), std::string::npos) << out;
  const PlanFile file = load_plan_file(path("plan.json"));
  EXPECT_EQ(file.plan, "FSSS");
  ASSERT_EQ(file.steps.size(), 3u);
  EXPECT_EQ(file.steps.back().plan, file.plan);
  EXPECT_EQ(file.settings.at("loss"), file.steps.back().loss);
  EXPECT_EQ(file.settings.at("data").at("tokens"), 900);

  // The path holds every retention.
  output({"search", "--take", path("plan.json"), "--keep", "1/2", "-o", path("half.json")});
  const PlanFile half = load_plan_file(path("half.json"));
  EXPECT_EQ(half.plan, file.steps[1].plan);
  output(args("search", {"-o", path("two.json"), "--keep", "2"}));
  EXPECT_EQ(load_plan_file(path("two.json")).plan, half.plan);

  // Or as far as a budget goes.
  PlanFile rising = file;
  rising.settings["all_full_loss"] = 2.0;
  for (size_t i = 0; i < 3; ++i) rising.steps[i].loss = 2.0 + 0.004 * static_cast<double>(i + 1);
  save_plan_file(rising, path("rising.json"));
  const auto within = [&](const std::string& budget) {
    output({"search", "--take", path("rising.json"), "--budget", budget, "-o", path("taken.json")});
    return load_plan_file(path("taken.json")).plan;
  };
  EXPECT_EQ(within("0.2%"), file.steps[0].plan);
  EXPECT_EQ(within("0.5%"), file.steps[1].plan);
  EXPECT_EQ(within("50%"), file.steps[2].plan);
  const ProgramResult none = run_program(
      {"search", "--take", path("rising.json"), "--budget", "0.1%", "-o", path("taken.json")});
  expect_failure(none, 1);
  EXPECT_NE(none.err.find("0.1%"), std::string::npos) << none.err;

  // Other commands take it, and its loss is the one that they measure.
  const Json eval =
      parse_json(output(args("eval", {"--plans", path("plan.json") + ",1/2", "--json"})), "stdout");
  const Json& rows = eval.at("variants");
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[1].at("plan"), "FSSS");
  EXPECT_NEAR(rows[0].at("nll").at("mean").get<double>(),
              file.settings.at("all_full_loss").get<double>(), 1e-12);
  EXPECT_NEAR(rows[1].at("nll").at("mean").get<double>(), file.settings.at("loss").get<double>(),
              1e-12);
}

TEST_F(Method, SearchSaysWhatItDoesAsJson) {
  const std::string out =
      output(args("search", {"-o", path("events.json"), "--json", "--fast", "--refine"}));
  std::vector<std::string> events;
  for (size_t begin = 0; begin < out.size(); begin = out.find('\n', begin) + 1) {
    const Json event = parse_json(out.substr(begin, out.find('\n', begin) - begin), "an event");
    if (event.at("event") != "progress") events.push_back(event.at("event"));
    if (event.at("event") == "done") {
      EXPECT_EQ(event.at("plan"), load_plan_file(path("events.json")).plan);
      EXPECT_LT(event.at("layer_forwards"), event.at("plain_layer_forwards"));
    }
  }
  ASSERT_GE(events.size(), 5u);
  EXPECT_EQ(events.front(), "start");
  EXPECT_EQ(events[1], "step");
  EXPECT_EQ(events.back(), "done");
}

TEST_F(Method, SearchKilledAtAnyMomentGoesOnToTheSameFile) {
  const std::vector<std::string> common = {"--keep", "1", "--refine", "--compare", "1/2"};
  const auto with = [&](const std::string& plan, bool resume) {
    std::vector<std::string> more = common;
    more.insert(more.end(), {"-o", path(plan)});
    if (resume) more.push_back("--resume");
    return args("search", more);
  };
  output(with("whole.json", false));
  const std::string whole = read_file(path("whole.json"));
  int killed = 0;
  double seconds = 0.1;
  for (; killed < 60; ++killed) {
    const ProgramResult part = run_program(with("parts.json", true), {.kill_after = seconds});
    if (part.exit_code == 0) break;
    EXPECT_EQ(part.signal, SIGKILL) << part.err;
    EXPECT_FALSE(std::filesystem::exists(path("parts.json")));
    seconds += 0.05;
  }
  EXPECT_GE(killed, 2);
  EXPECT_LT(killed, 60);
  EXPECT_EQ(read_file(path("parts.json")), whole);
  // Again over the finished journal: nothing is computed, nothing differs.
  output(with("parts.json", true));
  EXPECT_EQ(read_file(path("parts.json")), whole);
}

TEST_F(Method, SearchResumesOnlyItsOwn) {
  const std::string plan = path("own.json");
  output(args("search", {"-o", plan, "--keep", "3"}));
  ProgramResult result = run_program(args("search", {"-o", plan, "--keep", "3"}));
  expect_failure(result, 1);
  expect_contains(result.err, {"own.json.journal", "--resume"});
  struct Case {
    std::vector<std::string> more;
    std::string word;
  };
  const std::vector<Case> cases = {{{"--seed", "2"}, "data_hash"},
                                   {{"-b", "100"}, "batch_tokens"},
                                   {{"--dtype", "bf16"}, "compute"},
                                   {{"--force", "rope=ref"}, "forced"}};
  for (const Case& c : cases) {
    std::vector<std::string> more = {"-o", plan, "--keep", "3", "--resume"};
    more.insert(more.end(), c.more.begin(), c.more.end());
    result = run_program(args("search", more));
    expect_failure(result, 1);
    expect_contains(result.err, {"own.json.journal", "differ", c.word});
  }
  // Another model of the same shape.
  const std::string other = path("other");
  output(
      {"synth", "tiny", "--layers", "4", "--weights", "f32", "--weights-seed", "2", "-o", other});
  std::vector<std::string> arguments = args("search", {"-o", plan, "--keep", "3", "--resume"});
  arguments[2] = other;
  result = run_program(arguments);
  expect_failure(result, 1);
  expect_contains(result.err, {"weights_hash"});
  // A longer path is no other search.
  output(args("search", {"-o", plan, "--keep", "1", "--resume"}));
  EXPECT_EQ(load_plan_file(plan).steps.size(), 3u);
}

TEST_F(Method, TwoSearchesDoNotShareAJournal) {
  const std::string plan = path("shared.json"), journal = plan + ".journal";
  output(args("search", {"-o", plan, "--keep", "3"}));
  const std::string before = read_file(journal);
  const int held = open(journal.c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(flock(held, LOCK_EX | LOCK_NB), 0);
  const std::vector<std::string> again = args("search", {"-o", plan, "--keep", "3", "--resume"});
  const ProgramResult result = run_program(again);
  expect_failure(result, 1);
  expect_contains(result.err, {"shared.json.journal", "in use by another search"});
  EXPECT_EQ(read_file(journal), before);
  // The lock goes with who held it, however that ended.
  close(held);
  output(again);
}

TEST_F(Method, TextAndJsonLinesAreTheSameText) {
  const std::string text = output(args("overlap", {"--json"}));
  Json a = parse_json(text, "stdout");
  Json b = parse_json(output(args("overlap", {"--json"}, "text.jsonl")), "stdout");
  EXPECT_EQ(a.at("data").at("sha256"), b.at("data").at("sha256"));
  EXPECT_EQ(a.at("overlap"), b.at("overlap"));
  EXPECT_EQ(a.at("overlap").size(), 4u);
  EXPECT_EQ(a.at("num_queries"), 3 * 44);
  output(args("overlap", {"--csv", "-o", path("overlap.csv")}));
  EXPECT_TRUE(read_file(path("overlap.csv")).starts_with("layer_a,layer_b,overlap,"));
}

// Dense attention is the model whose index_topk is the context.
TEST_F(Method, EvalShowsDenseAttentionBesideTheModel) {
  const std::string folder = path("all_selected");
  std::filesystem::copy(model_, folder);
  Json config = load_json(folder + "/config.json");
  config["index_topk"] = 300;
  std::ofstream(folder + "/config.json") << config;
  std::vector<std::string> wide = args("eval", {"--json"});
  wide[2] = folder;
  const Json expected = parse_json(output(wide), "stdout").at("variants")[0];
  const Json rows = parse_json(output(args("eval", {"--plans", "dense,1/2", "--variant",
                                                    "all the tokens=dense", "--json"})),
                               "stdout")
                        .at("variants");
  ASSERT_EQ(rows.size(), 4u);
  for (const size_t row : {1, 3}) {
    EXPECT_EQ(rows[row].at("nll"), expected.at("nll"));
    EXPECT_EQ(rows[row].at("index_topk"), 300);
  }
  EXPECT_NE(rows[0].at("nll"), expected.at("nll"));
  EXPECT_EQ(rows[0].at("index_topk"), 256);
}

// The loss of `eval` is the mean_nll of `logits`.
TEST_F(Method, EvalAgreesWithLogits) {
  const Json eval =
      parse_json(output(args("eval", {"--tokens", "300", "--plans", "FSSF", "--json"})), "stdout");
  // The same tokens through the other door: the text is its bytes.
  const std::string text = read_file(path("text.txt"));
  for (size_t window = 0; window + 300 <= text.size(); window += 300) {
    Json ids = Json::array();
    for (size_t i = 0; i < 300; ++i) ids.push_back(static_cast<uint8_t>(text[window + i]));
    folder_->write("ids.json", ids.dump());
    output({"logits", "-m", model_, "-t", "1", "--tokens", path("ids.json"), "--plan", "FSSF", "-o",
            path("out.safetensors")});
    const Checkpoint file = Checkpoint::open(path("out.safetensors"));
    double mean_nll;
    std::memcpy(&mean_nll, file.find("mean_nll")->data, sizeof(mean_nll));
    if (eval.at("variants")[1].at("nll").at("mean") == mean_nll) return;
  }
  FAIL() << "no window of the text has the loss of eval";
}

TEST_F(Method, EvalTableAndTasks) {
  const std::vector<std::string> more = {"--plans",    "1/2",   "--variant", "mine=freq=4,offset=3",
                                         "--contexts", "400",   "--samples", "1",
                                         "--tasks",    "single"};
  const auto with = [&](const std::string& flag) {
    std::vector<std::string> all = more;
    if (!flag.empty()) all.push_back(flag);
    return output(args("eval", all));
  };
  const std::string table = with("");
  expect_contains(table, {"all", "1/2", "mine", "@400", "top-1"});
  const Json json = parse_json(with("--json"), "stdout");
  EXPECT_EQ(json.at("variants")[2].at("plan"), "FFFS");
  EXPECT_EQ(json.at("variants")[2].at("tasks")[0].at("asked"), 1);
  const std::string csv = with("--csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 4);
  EXPECT_NE(csv.find("single_400"), std::string::npos);
}

TEST_F(Method, ReportsAreWritten) {
  output(args("search", {"-o", path("page.json"), "--html", path("search.html")}));
  output(
      args("overlap", {"--json", "-o", path("page_overlap.json"), "--html", path("overlap.html")}));
  output({"report", path("page.json"), path("page_overlap.json"), "-o", path("report.html")});
  for (const char* name : {"search.html", "overlap.html", "report.html"}) {
    const std::string page = read_file(path(name));
    EXPECT_TRUE(page.starts_with("<!doctype html>")) << name;
    EXPECT_TRUE(page.ends_with("</html>\n")) << name;
  }
  EXPECT_NE(read_file(path("report.html")).find("indexcache overlap -m"), std::string::npos);
  folder_->write("strange.json", "{\"a\": 1}");
  const ProgramResult result =
      run_program({"report", path("strange.json"), "-o", path("strange.html")});
  expect_failure(result, 1);
  expect_contains(result.err, {"strange.json"});
  EXPECT_FALSE(std::filesystem::exists(path("strange.html")));
}

TEST_F(Method, FailuresAreOneLineAndOne) {
  folder_->write("bad.jsonl", "{\"text\": \"fine\"}\n{\"words\": 1}\n");
  folder_->write("latin.txt", std::string(2000, '\xe9'));
  folder_->write("empty.txt", "");
  struct Case {
    std::vector<std::string> args;
    std::vector<std::string> words;
  };
  const std::string plan = path("never.json");
  const std::vector<Case> cases = {
      {args("search", {"-o", plan}, "nowhere.txt"), {"nowhere.txt"}},
      {args("search", {"-o", plan}, "bad.jsonl"), {"bad.jsonl", "line 2", "text"}},
      {args("search", {"-o", plan}, "latin.txt"), {"UTF-8"}},
      {args("search", {"-o", plan}, "empty.txt"), {"0 tokens", "3"}},
      {args("search", {"-o", plan, "--tokens", "1000000"}), {"1000200", "sequences"}},
      {args("search", {"-o", plan, "--seq", "256"}), {"256", "index_topk"}},
      {args("search", {"-o", plan, "--keep", "5"}), {"--keep", "5", "4"}},
      {args("search", {"-o", plan, "--keep", "2/3"}), {"--keep", "2/3"}},
      {args("search", {"-o", plan, "--budget", "0.5"}), {"--budget", "0.5%"}},
      {args("search", {"-o", plan, "--blocks", "5"}), {"--blocks"}},
      {args("search", {"-o", plan, "--plan", "1/2"}), {"--plan"}},
      {args("search", {"-o", "/no/such/folder/plan.json"}), {"/no/such/folder"}},
      {args("search", {"-o", plan, "--cache-folder", "/no/such/folder"}), {"/no/such/folder"}},
      {{"search", "-f", path("text.txt"), "-o", plan}, {"-m"}},
      {{"search", "-m", model_, "-o", plan}, {"-f"}},
      {{"search", "--take", path("nothing.json"), "-o", plan}, {"nothing.json"}},
      // Before anything is read.
      {args("search", {"-o", "/no/such/folder/x"}, "nowhere.txt"), {"/no/such/folder"}},
      {args("overlap", {"-o", "/no/such/folder/x"}, "nowhere.txt"), {"/no/such/folder"}},
      {args("eval", {"-o", "/no/such/folder/x"}, "nowhere.txt"), {"/no/such/folder"}},
      {args("search", {"-o", path("text.txt")}), {"text.txt", "another file"}},
      {args("eval", {"--html", path("text.txt")}), {"text.txt", "another file"}},
      {{"report", path("bad.jsonl"), "-o", path("bad.jsonl")}, {"bad.jsonl", "another file"}},
      {args("overlap", {"--seq", "200"}), {"200", "index_topk"}},
      {args("eval", {"--tasks", "chess"}), {"chess", "multikey", "copy"}},
      {args("eval", {"--variant", "x"}), {"NAME=PLAN"}},
      {args("eval", {"--plans", "FFSSS"}), {"FFSSS"}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(Json(c.args).dump());
    const ProgramResult result = run_program(c.args);
    expect_failure(result, 1);
    expect_contains(result.err, c.words);
    EXPECT_FALSE(std::filesystem::exists(plan));
    std::filesystem::remove(plan + ".journal");
  }
  expect_failure(run_program({"search", "-m", model_}), 2);
  expect_failure(run_program(args("search", {"-o", plan, "--confidence", "2"})), 2);
}

}  // namespace
}  // namespace indexcache
