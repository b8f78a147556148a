// Indexer adapters in the engine and through the program: trained indexers laid over a base model
// that has its own, others, or none.

#include <cstring>
#include <fstream>

#include "base/json.h"
#include "checkpoint/indexer_adapter.h"
#include "checkpoint/test_files.h"
#include "search/loss_settings.h"
#include "tests/golden.h"
#include "tests/program.h"
#include "tests/small_model.h"

namespace indexcache {
namespace {

constexpr const char* kPlan = "FSFS";
constexpr int64_t kTokens = 60;  // beyond index_topk, so that selections matter

bool is_indexer(const std::string& name) { return name.find(".indexer.") != std::string::npos; }

// What a test changes in an adapter that would fit.
struct Spoil {
  std::string plan = kPlan;
  std::string fingerprint;           // empty: the model's
  std::string left_out, cut, added;  // names of tensors
};

// The indexers that `from` has of the full layers of the plan, as a file.
void write_adapter(const std::string& path, const ModelSource& from, const Spoil& spoil = {}) {
  IndexerAdapter adapter;
  adapter.plan = spoil.plan;
  adapter.model_fingerprint =
      spoil.fingerprint.empty() ? from.config.fingerprint : spoil.fingerprint;
  adapter.how = "{}";
  std::vector<TensorSpec> specs;
  for (TensorSpec spec : list_tensors(from.checkpoint)) {
    bool brought = false;
    for (size_t layer = 0; layer < spoil.plan.size(); ++layer) {
      brought |= spoil.plan[layer] == 'F' &&
                 spec.name.starts_with(indexer_prefix(static_cast<int64_t>(layer)));
    }
    if (!brought || spec.name == spoil.left_out) continue;
    if (spec.name == spoil.cut) --spec.shape[0];
    specs.push_back(spec);
  }
  if (!spoil.added.empty()) specs.push_back({spoil.added, DType::kF32, {3}});
  write_indexer_adapter(path, adapter, specs, [&](const TensorSpec& spec, const ByteSink& sink) {
    const std::vector<uint8_t> zeros(spec.num_bytes());
    const TensorView* view = from.checkpoint.find(spec.name);
    sink(view == nullptr ? std::span<const uint8_t>(zeros)
                         : std::span(view->data, spec.num_bytes()));
  });
}

// The same model without any indexer.
ModelSource without_indexers(const ModelSource& model) {
  ModelSource bare{model.config, {}, true};
  for (const auto& [name, view] : model.checkpoint.tensors()) {
    if (is_indexer(name)) continue;
    Tensor tensor(view.dtype, view.shape);
    std::memcpy(tensor.memory.data(), view.data, static_cast<size_t>(view.num_bytes()));
    bare.checkpoint.add(name, std::move(tensor));
  }
  return bare;
}

RunOptions options_of(const std::string& indexers, const std::string& plan = "") {
  RunOptions options{.num_threads = 2, .context = 128, .batch_tokens = 23};
  options.indexers = indexers;
  options.plan = plan;
  return options;
}

Trace trace_of(const ModelSource& model, const RunOptions& options) {
  Engine engine(model, options);
  SequenceCache sequence;
  return run_traced(engine, sequence, small_tokens(5, kTokens));
}

class Adapter : public testing::Test {
 protected:
  // Another seed: the same shapes, other weights.
  const ModelSource model_ = small_model("FFFF"), other_ = small_model("FFFF", 77);
  const TempFolder folder_;
  const std::string path_ = folder_ / "indexers.safetensors";

  std::string refusal(const RunOptions& options) {
    return error_of([&] { Engine engine(model_, options); });
  }
};

TEST_F(Adapter, OfTheModelsOwnIndexersChangesNothing) {
  write_adapter(path_, model_);
  const Trace own = trace_of(model_, options_of("", kPlan));
  const Trace laid = trace_of(model_, options_of(path_));
  EXPECT_EQ(laid.logits, own.logits);
  EXPECT_EQ(laid.positions, own.positions);
  // Nor does it matter what indexers lay below.
  const Trace over_none = trace_of(without_indexers(model_), options_of(path_));
  EXPECT_EQ(over_none.logits, own.logits);
}

TEST_F(Adapter, ItsWeightsSelect) {
  write_adapter(path_, other_);
  const Trace own = trace_of(model_, options_of("", kPlan));
  const Trace laid = trace_of(model_, options_of(path_));
  ASSERT_EQ(laid.positions.size(), 2u);
  EXPECT_NE(laid.positions.at(0), own.positions.at(0));
  EXPECT_NE(laid.positions.at(2), own.positions.at(2));
  EXPECT_NE(laid.logits, own.logits);
}

TEST_F(Adapter, PlanInForce) {
  write_adapter(path_, other_);
  Engine engine(model_, options_of(path_));
  EXPECT_EQ(to_string(engine.model.plan), kPlan);
  EXPECT_EQ(to_string(widest_plan(model_, options_of(path_))), kPlan);
  EXPECT_EQ(to_string(widest_plan(model_, options_of(""))), "FFFF");
  Engine narrow(model_, options_of(path_, "FSSS"));
  EXPECT_EQ(to_string(narrow.model.plan), "FSSS");
  EXPECT_EQ(narrow.model.weights.layers[2].indexer.wk.data, nullptr);
  const std::string error = refusal(options_of(path_, "FFFF"));
  expect_contains(error, {"indexers.safetensors", "FFFF", "2 layers", "no indexer weights: 1, 3"});
}

TEST_F(Adapter, MemoryIsThatOfTheWeightsInUse) {
  write_adapter(path_, other_);
  const MemoryPlan own = Engine(model_, options_of("", kPlan)).memory;
  for (const ModelSource* base : {&model_, &other_}) {
    const MemoryPlan laid = Engine(*base, options_of(path_)).memory;
    EXPECT_EQ(laid.weights_bytes, own.weights_bytes);
    EXPECT_EQ(laid.total(), own.total());
  }
  EXPECT_EQ(Engine(without_indexers(model_), options_of(path_)).memory.total(), own.total());
  EXPECT_EQ(Engine(model_, options_of(path_, "FSSS")).memory.total(),
            Engine(model_, options_of("", "FSSS")).memory.total());
}

TEST_F(Adapter, OfAnotherModelIsRefusedUnlessForced) {
  const std::string fingerprint(64, 'a');
  write_adapter(path_, model_, {.fingerprint = fingerprint});
  RunOptions options = options_of(path_);
  expect_contains(refusal(options), {"indexers.safetensors", "model_fingerprint", fingerprint,
                                     model_.config.fingerprint});
  options.force_plan = true;
  testing::internal::CaptureStderr();
  const Trace laid = trace_of(model_, options);
  const std::string said = testing::internal::GetCapturedStderr();
  expect_contains(said, {"warning", fingerprint, model_.config.fingerprint});
  EXPECT_EQ(laid.logits, trace_of(model_, options_of("", kPlan)).logits);
}

TEST_F(Adapter, EveryProblemIsListedInOneError) {
  Spoil spoil;
  spoil.left_out = indexer_prefix(0) + "k_norm.bias";
  spoil.cut = indexer_prefix(2) + "wk.weight";
  spoil.added = indexer_prefix(1) + "wq_b.weight";
  write_adapter(path_, model_, spoil);
  // Also where the plan in force does not need the layer.
  for (const char* plan : {"", "FSSS"}) {
    expect_contains(refusal(options_of(path_, plan)),
                    {"indexers.safetensors", spoil.left_out, spoil.cut, "[23, 72]", "[24, 72]",
                     spoil.added, "1 tensors missing", "1 of wrong shape", "1 surplus"});
  }
}

TEST_F(Adapter, MissingLayerIsListed) {
  const ModelSource model = small_model("FSSS");
  // The plan promises layer 2; the file of a narrower model has it not.
  write_adapter(path_, model, {.plan = "FSFS"});
  for (const char* name : {"wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.weight"})
    expect_contains(refusal(options_of(path_)), {indexer_prefix(2) + name, "5 tensors missing"});
}

TEST_F(Adapter, WhatIsNoAdapterIsRefused) {
  write_safetensors(path_, {});
  expect_contains(refusal(options_of(path_)), {"indexers.safetensors", "not a file of trained"});
  folder_.write("text.txt", "words");
  expect_contains(refusal(options_of(folder_ / "text.txt")), {"text.txt"});
  expect_contains(refusal(options_of(folder_ / "nothing")), {"nothing", "not found"});
  for (const char* plan : {"FSF", "SFFF", "FSXS", "FSFSF"}) {
    write_adapter(path_, model_, {.plan = plan});
    expect_contains(refusal(options_of(path_)), {"indexers.safetensors", "\"plan\""});
  }
}

TEST_F(Adapter, SettingsOfALossNameItsContent) {
  const auto settings = [&](const std::string& indexers) {
    StateStore store(1 << 20, "");
    TokenSequences data;
    data.sequences = {small_tokens(9, 40)};
    PlanLoss loss(model_, options_of(indexers), data, &store);
    return loss_settings(model_, loss);
  };
  write_adapter(path_, model_);
  write_adapter(folder_ / "again", model_);
  write_adapter(folder_ / "other", other_);
  EXPECT_FALSE(settings("").contains("indexers_hash"));
  EXPECT_EQ(settings(path_), settings(folder_ / "again"));
  EXPECT_NE(settings(path_), settings(folder_ / "other"));
}

// The program, on a generated model whose layers all have an indexer.
TEST_F(Adapter, EndToEnd) {
  ASSERT_TRUE(program_is_built()) << INDEXCACHE_BINARY << " is absent: build indexcache-cli";
  const auto output = [](const std::vector<std::string>& args) {
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result;
  };
  const std::string base = folder_ / "model", other = folder_ / "other";
  for (const auto& [seed, folder] : {std::pair("1", base), std::pair("2", other)}) {
    output({"synth", "tiny", "--layers", "4", "--weights", "f32", "--weights-seed", seed, "-o",
            folder});
  }
  write_adapter(path_, open_model(base));
  write_adapter(folder_ / "changed", open_model(other));
  Json ids = Json::array();
  for (int i = 0; i < 400; ++i) ids.push_back(i * 7 % 251);
  folder_.write("ids.json", ids.dump());
  std::string text;
  for (int i = 0; i < 300; ++i) text += fmt::format("{} and {} make {}.\n", i, i * 3, i * 4);
  folder_.write("text.txt", text);

  const std::vector<std::string> run = {"run", "-m", base,     "--tokens", folder_ / "ids.json",
                                        "-n",  "4",  "--json", "-t",       "2"};
  const auto tokens = [&](const std::vector<std::string>& more, std::string* said = nullptr) {
    std::vector<std::string> args = run;
    args.insert(args.end(), more.begin(), more.end());
    const ProgramResult result = output(args);
    if (said != nullptr) *said = result.err;
    return parse_json(result.out, "stdout");
  };
  std::string said;
  const Json laid = tokens({"--indexers", path_}, &said);
  expect_contains(said, {"indexers: ", path_, kPlan});
  EXPECT_EQ(laid.at("plan"), kPlan);
  EXPECT_EQ(laid.at("indexers"), path_);
  EXPECT_EQ(laid.at("tokens"), tokens({"--plan", kPlan}).at("tokens"));
  std::vector<std::string> bad = run;
  bad.insert(bad.end(), {"--indexers", path_, "--plan", "1/1"});
  const ProgramResult refused = run_program(bad);
  expect_failure(refused, 1);
  expect_contains(refused.err, {path_, "no indexer weights: 1, 3"});

  EXPECT_EQ(parse_json(output({"inspect", "-m", base, "--indexers", path_, "--json"}).out, "stdout")
                .at("plan"),
            kPlan);

  const std::vector<std::string> data = {
      "-f", folder_ / "text.txt", "--tokens", "600", "--seq", "300", "-t", "2"};
  const auto on_text = [&](std::vector<std::string> args) {
    args.insert(args.end(), data.begin(), data.end());
    return args;
  };
  const std::string changed = folder_ / "changed";
  const Json eval = parse_json(
      output(on_text({"eval", "-m", base, "--json", "--plans", kPlan, "--variant",
                      "same=indexers=" + path_, "--variant", "new=FSFS,indexers=" + changed}))
          .out,
      "stdout");
  const Json& rows = eval.at("variants");
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[1].at("indexers"), "");
  EXPECT_EQ(rows[2].at("plan"), kPlan);
  EXPECT_EQ(rows[2].at("indexers"), path_);
  EXPECT_EQ(rows[2].at("nll"), rows[1].at("nll"));
  EXPECT_EQ(rows[3].at("indexers"), changed);
  EXPECT_NE(rows[3].at("nll"), rows[1].at("nll"));
  const std::string table =
      output(on_text({"eval", "-m", base, "--variant", "new=indexers=" + changed, "--html",
                      folder_ / "eval.html"}))
          .out;
  expect_contains(read_file(folder_ / "eval.html"), {"the model&#39;s", changed});
  expect_contains(table, {"indexers", "the model's", changed});
  const ProgramResult no_file =
      run_program(on_text({"eval", "-m", base, "--variant", "x=1/2,indexers="}));
  expect_failure(no_file, 1);
  expect_contains(no_file.err, {"NAME=PLAN,indexers=FILE"});

  const auto search = [&](const std::string& indexers) {
    return on_text({"search", "-m", base, "--indexers", indexers, "--keep", "1", "--resume", "-o",
                    folder_ / "plan.json"});
  };
  output(search(path_));
  EXPECT_EQ(load_json(folder_ / "plan.json").at("plan"), "FSSS");
  EXPECT_EQ(load_json(folder_ / "plan.json").at("settings").at("indexers"), path_);
  const ProgramResult resumed = run_program(search(changed));
  expect_failure(resumed, 1);
  expect_contains(resumed.err, {"plan.json.journal", "indexers_hash"});

  const ProgramResult overlap =
      output(on_text({"overlap", "-m", base, "--json", "--indexers", path_}));
  EXPECT_EQ(parse_json(overlap.out, "stdout").at("plan"), kPlan);
}

}  // namespace
}  // namespace indexcache
