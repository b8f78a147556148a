// Whole training runs on a small model: stages, resume, and what happens when something is wrong.
#include "train/trainer.h"

//
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "base/atomic_file.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/rng.h"
#include "checkpoint/indexer_adapter.h"
#include "tests/golden.h"
#include "train/batch_sampler.h"
#include "train/train_log.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

class Trainer : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("trainer_test.{}", getpid());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    set_log_enabled(false);
    write_tokens("text.tokens", 40, 200, 1);
    write_tokens("tasks.tokens", 60, 90, 10);
    // The golden model's config, made smaller: 4 layers, top 16.
    Json config = load_json(golden_folder("glm-dsa-shared") + "/config.json");
    config["num_hidden_layers"] = 4;
    config["indexer_types"] = {"full", "full", "full", "full"};
    config["mlp_layer_types"] = {"dense", "sparse", "sparse", "sparse"};
    config["first_k_dense_replace"] = 1;
    config["index_topk"] = 16;
    config.erase("layer_types");
    config.erase("index_topk_freq");
    config.erase("index_skip_topk_offset");
    config.erase("index_topk_pattern");
    write_text_file(path("config.json"), config.dump());
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  // Documents of 20 of the 320 tokens, in which the second half repeats the first; `weight` for
  // that half.
  void write_tokens(const std::string& name, int documents, size_t length, uint8_t weight) {
    Rng rng(99 + length);
    TokenFileWriter writer(path(name), 320);
    for (int d = 0; d < documents; ++d) {
      std::vector<int32_t> tokens(length);
      for (size_t i = 0; i < length; ++i)
        tokens[i] = i < length / 2 ? static_cast<int32_t>(rng.below(20)) : tokens[i - length / 2];
      std::vector<uint8_t> weights(length, 1);
      std::fill(weights.begin() + static_cast<ptrdiff_t>(length / 2), weights.end(), weight);
      writer.add(tokens, weights);
    }
    writer.finish("{}");
  }

  TrainOptions options(Stage stage, const std::string& out) const {
    TrainOptions o;
    o.stage = stage;
    o.out = path(out);
    o.data = {{path("text.tokens"), 0.5}, {path("tasks.tokens"), 0.5}};
    o.held_out = {{"text", path("text.tokens")}};
    o.held_out_tokens = 300;
    o.held_out_every = 3;
    o.steps = 6;
    o.sequence = {{64, 3}, {128, 0}};
    o.batch_tokens = 256;
    o.micro_tokens = 128;
    o.lr_warmup_steps = 2;
    o.save_every = 2;
    o.log_every = 1;
    if (stage == Stage::kPretrain) {
      o.config = path("config.json");
    } else {
      o.model = path("pretrained/model");
    }
    return o;
  }

  void pretrain() { ASSERT_EQ(train(options(Stage::kPretrain, "pretrained")), TrainResult::kDone); }

  std::vector<double> losses(const std::string& out) const {
    std::vector<double> all;
    for (const TrainRow& row : read_train_log(path(out) + "/log.csv").steps) {
      all.push_back(row.loss);
      all.push_back(row.indexer_loss);
    }
    return all;
  }

  std::string error_of(const TrainOptions& o) const {
    try {
      train(o);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(Trainer, EveryStageLowersItsOwnLoss) {
  TrainOptions o = options(Stage::kPretrain, "pretrained");
  o.steps = 30;
  o.sequence = {{64, 0}};
  o.lr = 5e-3;
  train(o);
  const auto history = read_train_log(path("pretrained/log.csv")).steps;
  EXPECT_LT(history.back().loss, history.front().loss - 1);
  EXPECT_TRUE(fs::exists(path("pretrained/loss.html")));

  o = options(Stage::kWarmup, "warm");
  o.steps = 30;
  o.indexer_lr = 5e-3;
  o.sequence = {{128, 0}};
  train(o);
  const auto warm = read_train_log(path("warm/log.csv"));
  EXPECT_LT(warm.held_out.back().indexer_loss, warm.held_out.front().indexer_loss);
  EXPECT_LT(warm.steps.back().indexer_loss, warm.steps.front().indexer_loss);

  // The backbone of a warm-up is the one that it started from, bit for bit (both saved as f32).
  const Checkpoint before = Checkpoint::open(path("pretrained/model"));
  const Checkpoint after = Checkpoint::open(path("warm/model"));
  int indexers = 0;
  for (const auto& [name, view] : before.tensors()) {
    const bool same = std::equal(view.data, view.data + view.num_bytes(), after.find(name)->data);
    if (name.find(".indexer.") == std::string::npos) {
      EXPECT_TRUE(same) << name;
    } else {
      indexers += same ? 0 : 1;
    }
  }
  EXPECT_GE(indexers, 4 * 4);

  o = options(Stage::kSparse, "sparse");
  o.model = path("warm/model");
  EXPECT_EQ(train(o), TrainResult::kDone);
  EXPECT_TRUE(fs::exists(path("sparse/model/model.safetensors")));
}

// The run of the next test that dies as by SIGKILL once step 4 is saved: whatever came after is
// lost. A program of its own, because OpenMP's threads do not survive a fork of one that has
// trained.
TEST_F(Trainer, DISABLED_RunThatIsCut) {
  if (std::getenv("CUT_RUN_FOLDER") == nullptr) GTEST_SKIP() << "a part of the next test";
  fs::remove_all(folder_);
  folder_ = std::getenv("CUT_RUN_FOLDER");
  const std::string out = std::getenv("CUT_RUN_OUT");
  std::thread([saved = path(out) + "/steps/4/state.json"] {
    while (!fs::exists(saved)) usleep(1000);
    raise(SIGKILL);
  }).detach();
  try {
    train(options(static_cast<Stage>(std::stoi(std::getenv("CUT_RUN_STAGE"))), out));
    pause();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  _exit(1);  // the folder is the other program's
}

TEST_F(Trainer, ResumeSeesWhatAnUninterruptedRunSaw) {
  pretrain();
  for (const Stage stage : {Stage::kPretrain, Stage::kWarmup, Stage::kSparse}) {
    const std::string number = std::to_string(static_cast<int>(stage)), whole = "whole" + number,
                      cut = "cut" + number;
    train(options(stage, whole));
    const pid_t child = fork();
    if (child == 0) {
      setenv("CUT_RUN_FOLDER", folder_.c_str(), 1);
      setenv("CUT_RUN_OUT", cut.c_str(), 1);
      setenv("CUT_RUN_STAGE", number.c_str(), 1);
      execl("/proc/self/exe", "train_test", "--gtest_also_run_disabled_tests",
            "--gtest_filter=Trainer.DISABLED_RunThatIsCut", nullptr);
      _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
    TrainOptions o = options(stage, cut);
    o.resume = true;
    train(o);
    EXPECT_EQ(losses(cut), losses(whole)) << "stage " << number;
    EXPECT_EQ(losses(cut).size(), 12u);
  }
}

// The size that a file may have is limited, so that writing over it fails half-way.
TEST_F(Trainer, AFullDiskKeepsTheLastGoodCheckpoint) {
  TrainOptions o = options(Stage::kPretrain, "pretrained");
  train(o);
  o.out = path("cut");
  o.stop_after_seconds = 1e-9;  // after the first step
  EXPECT_NE(train(o), TrainResult::kDone);
  o.stop_after_seconds = 0;
  o.resume = true;
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  rlimit old;
  getrlimit(RLIMIT_FSIZE, &old);
  const rlimit small = {1 << 16, old.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const std::string error = error_of(o);
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, old_handler);
  EXPECT_NE(error.find("File too large"), std::string::npos) << error;
  EXPECT_NE(error.find("cut"), std::string::npos) << error;
  ASSERT_EQ(train(o), TrainResult::kDone);
  EXPECT_EQ(losses("cut"), losses("pretrained"));
}

TEST_F(Trainer, FrozenBackboneGivesAnAdapter) {
  pretrain();
  TrainOptions o = options(Stage::kSparse, "adapter");
  o.freeze_backbone = true;
  o.plan = "FFSS";
  train(o);
  const IndexerAdapter adapter = open_indexer_adapter(path("adapter/indexers.safetensors"));
  EXPECT_EQ(adapter.plan, "FFSS");
  EXPECT_EQ(adapter.model_fingerprint, load_config(o.model).fingerprint);
  EXPECT_EQ(adapter.tensors.tensors().size(), 2u * 5u);
  EXPECT_FALSE(fs::exists(path("adapter/model")));
}

TEST_F(Trainer, WrongInputIsNamed) {
  pretrain();
  TrainOptions o = options(Stage::kWarmup, "wrong");
  o.plan = "FFS";
  EXPECT_NE(error_of(o).find("3"), std::string::npos) << error_of(o);
  o = options(Stage::kWarmup, "wrong");
  o.sequence = {{16, 0}};
  EXPECT_NE(error_of(o).find("index_topk 16"), std::string::npos) << error_of(o);
  o = options(Stage::kWarmup, "wrong");
  o.data = {{path("absent.tokens"), 1}};
  EXPECT_NE(error_of(o).find("absent.tokens"), std::string::npos) << error_of(o);
  o.data = {{path("config.json"), 1}};
  EXPECT_NE(error_of(o).find("config.json"), std::string::npos) << error_of(o);
  o = options(Stage::kSparse, "wrong");
  o.model = "";
  EXPECT_NE(error_of(o).find("model"), std::string::npos) << error_of(o);

  // A run's folder is not written over, and is not resumed with other settings.
  o = options(Stage::kPretrain, "pretrained");
  EXPECT_NE(error_of(o).find("--resume"), std::string::npos) << error_of(o);
  o.resume = true;
  o.lr = 0.5;
  EXPECT_NE(error_of(o).find("lr"), std::string::npos) << error_of(o);
}

TEST_F(Trainer, NotFiniteStopsAndKeepsTheLastGoodCheckpoint) {
  TrainOptions o = options(Stage::kPretrain, "nan");
  o.steps = 4;
  train(o);
  // A model with one NaN, as a bad disk or a bad learning rate would leave it.
  Checkpoint broken = Checkpoint::open(path("nan/model"));
  std::vector<std::pair<std::string, TensorView>> tensors;
  std::vector<uint8_t> copy;
  for (const auto& [name, view] : broken.tensors()) {
    TensorView changed = view;
    if (name == "model.layers.2.self_attn.o_proj.weight") {
      copy.assign(view.data, view.data + view.num_bytes());
      copy[0] = 0xFF;
      copy[1] = 0x7F;
      changed.data = copy.data();
    }
    tensors.emplace_back(name, changed);
  }
  fs::create_directories(path("broken"));
  write_safetensors(path("broken/model.safetensors"), tensors);
  fs::copy_file(path("nan/model/config.json"), path("broken/config.json"));
  o = options(Stage::kSparse, "from_broken");
  o.model = path("broken");
  const std::string message = error_of(o);
  EXPECT_NE(message.find("step 0"), std::string::npos) << message;
  EXPECT_NE(message.find("model.layers.2.self_attn.o_proj.weight"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(path("from_broken/model")));
  EXPECT_TRUE(fs::exists(path("nan/steps/4/model.safetensors")));
}

TEST_F(Trainer, SamplerKeepsSharesAndWholeTasks) {
  std::vector<DataShare> data;
  data.push_back({TokenFile::open(path("text.tokens")), 3});
  data.push_back({TokenFile::open(path("tasks.tokens")), 1});
  const BatchSampler sampler(std::move(data), 5);
  double text = 0, tasks = 0;
  for (int64_t step = 0; step < 20; ++step) {
    for (const auto& batch : sampler.step(step, 256, 1024, 512)) {
      int64_t tokens = 0;
      for (const BatchDocument& document : batch) {
        const bool task = std::count(document.weights.begin(), document.weights.end(), 10.0f) > 0;
        if (task) {
          EXPECT_EQ(document.tokens.size(), 90u);
        }
        (task ? tasks : text) += static_cast<double>(document.tokens.size());
        tokens += static_cast<int64_t>(document.tokens.size());
      }
      EXPECT_LE(tokens, 512);
    }
  }
  EXPECT_NEAR(text / (text + tasks), 0.75, 0.06);
}

TEST(LearningRate, WarmsUpAndFallsToItsEnd) {
  TrainOptions o;
  o.steps = 100;
  o.lr_warmup_steps = 10;
  o.lr_final = 0.1;
  EXPECT_DOUBLE_EQ(learning_rate_factor(o, 0), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate_factor(o, 9), 1.0);
  EXPECT_NEAR(learning_rate_factor(o, 55), 0.55, 1e-9);
  EXPECT_NEAR(learning_rate_factor(o, 100), 0.1, 1e-9);
}

}  // namespace
}  // namespace indexcache
