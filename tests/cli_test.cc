// The real program from end to end: results, formats that others read, exit codes.
#include <poll.h>
#include <pty.h>

#include <cstring>
#include <fstream>

#include "base/json.h"
#include "checkpoint/test_files.h"
#include "tests/golden.h"
#include "tests/program.h"

namespace indexcache {
namespace {

// One generated checkpoint for all tests: index_topk 256, plan FS.
class Cli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TempFolder;
    model_ = *folder_ / "model";
    if (!program_is_built()) return;
    const ProgramResult made =
        run_program({"synth", "tiny", "--layers", "2", "--plan", "FS", "-o", model_});
    EXPECT_EQ(made.exit_code, 0) << made.err;
    EXPECT_EQ(made.out, "");
    Json ids = Json::array();
    for (int i = 0; i < 300; ++i) ids.push_back(i * 7 % 256);
    folder_->write("ids.json", ids.dump());
  }
  static void TearDownTestSuite() { delete folder_; }
  void SetUp() override {
    ASSERT_TRUE(program_is_built()) << INDEXCACHE_BINARY << " is absent: build indexcache-cli";
  }

  // A successful run's stdout.
  static std::string output(const std::vector<std::string>& args, const std::string& input = "") {
    const ProgramResult result = run_program(args, {.input = input});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_TRUE(error_lines(result.err).empty()) << result.err;
    return result.out;
  }
  static Json output_json(const std::vector<std::string>& args) {
    return parse_json(output(args), "stdout");
  }
  static std::vector<std::string> run_args(std::vector<std::string> more) {
    std::vector<std::string> args = {"run", "-m", model_};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }

  static TempFolder* folder_;
  static std::string model_;
};
TempFolder* Cli::folder_ = nullptr;
std::string Cli::model_;

TEST_F(Cli, HelpAndVersion) {
  EXPECT_TRUE(output({"--version"}).starts_with("indexcache "));
  for (const char* command : {"run", "serve", "bench", "logits", "inspect", "export", "search",
                              "overlap", "eval", "report", "synth", "train"}) {
    const std::string help = output({command, "--help"});
    EXPECT_NE(help.find("Example: indexcache " + std::string(command)), std::string::npos) << help;
  }
}

TEST_F(Cli, InspectJsonKeepsItsContract) {
  const Json out = output_json({"inspect", "-m", model_, "--json"});
  EXPECT_EQ(out.at("architecture"), "GlmMoeDsaForCausalLM");
  EXPECT_EQ(out.at("num_hidden_layers"), 2);
  EXPECT_EQ(out.at("plan"), "FS");
  // Two layers of bf16 latents and one of indexer keys: 2 * (128 + 32) * 2 + 64 * 2 bytes.
  EXPECT_EQ(out.at("cache_bytes_per_token"), 768);
  EXPECT_EQ(out.at("indexer_keys"), "bf16");
  // int8 indexer keys: 64 bytes and a scale of 4.
  const Json int8 = output_json({"inspect", "-m", model_, "--json", "--indexer-keys", "i8"});
  EXPECT_EQ(int8.at("cache_bytes_per_token"), 768 - 2 * 64 + 64 + 4);
  EXPECT_EQ(int8.at("indexer_keys"), "i8");
  // fp8 latents: 128 bytes, one scale of 4, 32 bf16.
  const Json fp8 = output_json({"inspect", "-m", model_, "--json", "--kv-cache", "fp8"});
  EXPECT_EQ(fp8.at("cache_bytes_per_token"), 2 * (128 + 4 + 64) + 128);
  EXPECT_EQ(fp8.at("kv_cache"), "fp8");
  EXPECT_EQ(out.at("kv_cache"), "bf16");
  EXPECT_GT(out.at("weights_bytes").get<uint64_t>(), 3u << 20);
  EXPECT_LE(out.at("weights_bytes").get<uint64_t>(),
            std::filesystem::file_size(model_ + "/model.safetensors"));
  const Json shape = output_json({"inspect", "--synthetic", "glm-5.2", "--plan", "1/4", "--json"});
  EXPECT_EQ(shape.at("num_hidden_layers"), 78);
  EXPECT_EQ(shape.at("plan").get<std::string>().size(), 78u);
  EXPECT_NE(output({"inspect", "-m", model_, "--tensors"}).find("model.embed_tokens.weight"),
            std::string::npos);
}

TEST_F(Cli, InspectVerifiesSumsThatSha256sumAccepts) {
  const std::string sums = folder_->write("sums", output({"inspect", "-m", model_, "--sha256"}));
  const std::string check = "cd " + model_ + " && sha256sum --check --strict --quiet " + sums;
  EXPECT_EQ(std::system(check.c_str()), 0);
  EXPECT_NE(output({"inspect", "-m", model_, "--verify", sums}).find("plan          FS"),
            std::string::npos);
}

TEST_F(Cli, GreedyIsRepeatable) {
  const std::string ids = *folder_ / "ids.json";
  const std::string text = output(run_args({"-p", "hello", "-n", "8"}));
  EXPECT_EQ(output(run_args({"-p", "hello", "-n", "8"})), text);
  EXPECT_EQ(output(run_args({"-n", "8"}), "hello"), text) << "prompt from stdin";
  folder_->write("prompt.txt", "hello");
  EXPECT_EQ(output(run_args({"-f", *folder_ / "prompt.txt", "-n", "8"})), text);
  const Json tokens = output_json(run_args({"--tokens", ids, "-n", "8"}));
  ASSERT_EQ(tokens.size(), 8u);
  EXPECT_EQ(output_json(run_args({"--tokens", ids, "-n", "8", "-t", "1"})), tokens);
  EXPECT_EQ(output_json(run_args({"--tokens", ids, "-n", "8", "--indexer-keys", "auto"})), tokens);
  const std::vector<std::string> int8 =
      run_args({"--tokens", ids, "-n", "8", "--indexer-keys", "i8"});
  EXPECT_EQ(output_json(int8).size(), 8u);
  const std::vector<std::string> fp8 = run_args({"--tokens", ids, "-n", "8", "--kv-cache", "fp8"});
  EXPECT_EQ(output_json(fp8).size(), 8u);
  EXPECT_EQ(output_json(fp8), output_json(fp8));
  EXPECT_EQ(output_json(int8), output_json(int8));
  EXPECT_EQ(output_json(run_args({"--tokens", ids, "-n", "1"})), Json::array({tokens[0]}));
  EXPECT_EQ(output(run_args({"--tokens", ids, "-n", "0"})), "[]\n");
  EXPECT_EQ(output(run_args({"-p", "hello", "-n", "0"})), "\n");
}

TEST_F(Cli, RunJson) {
  const std::string ids = *folder_ / "ids.json";
  const Json tokens = output_json(run_args({"--tokens", ids, "-n", "5"}));
  const Json out = output_json(run_args({"--tokens", ids, "-n", "5", "--json"}));
  EXPECT_EQ(out.at("tokens"), tokens);
  EXPECT_EQ(out.at("finish_reason"), "length");
  EXPECT_EQ(out.at("plan"), "FS");
  EXPECT_EQ(out.at("prompt_tokens"), 300);
  EXPECT_GT(out.at("prefill_s").get<double>(), 0);
  EXPECT_GT(out.at("peak_rss_bytes").get<uint64_t>(), 1u << 20);
  const Json text = output_json(run_args({"-p", "hello", "-n", "5", "--json"}));
  EXPECT_EQ(text.at("text").get<std::string>() + "\n",
            output(run_args({"-p", "hello", "-n", "5"})));
  const Json full = output_json(run_args({"--tokens", ids, "-n", "9", "-c", "304", "--json"}));
  EXPECT_EQ(full.at("finish_reason"), "context_full");
}

TEST_F(Cli, SamplingRepeatsWithItsSeed) {
  const auto sample = [&](const std::string& seed) {
    return output_json(
               run_args({"-p", "hello", "-n", "16", "--temp", "1.5", "--seed", seed, "--json"}))
        .at("tokens");
  };
  EXPECT_EQ(sample("7"), sample("7"));
  EXPECT_NE(sample("7"), sample("8"));
}

TEST_F(Cli, TooLittleAddressSpaceIsAnError) {
  if (!kLimitAddressSpace) GTEST_SKIP() << "the sanitizer needs it all";
  int num_failed = 0;
  for (uint64_t mib = 64; mib <= 256; mib += 16) {
    const ProgramResult result =
        run_program(run_args({"-p", "hello", "-n", "2"}), {.address_space = mib << 20});
    EXPECT_EQ(result.signal, 0) << mib << " MiB: " << result.err;
    if (result.exit_code == 0) continue;
    expect_failure(result, 1);
    ++num_failed;
  }
  EXPECT_GT(num_failed, 0);
  EXPECT_EQ(run_program(run_args({"-p", "hello", "-n", "2"})).exit_code, 0);
}

TEST_F(Cli, AModelThatNamesNoEndIsAWarning) {
  const auto said = [&](std::vector<std::string> more) {
    return run_program(run_args(std::move(more))).err.find("no eos_token_id") != std::string::npos;
  };
  EXPECT_TRUE(said({"-p", "hello", "-n", "1"}));
  EXPECT_FALSE(said({"-p", "hello", "-n", "1", "--ignore-eos"}));
}

TEST_F(Cli, InterruptEndsTheAnswer) {
  const ProgramResult result = run_program(
      run_args({"-p", "hello", "-n", "100000", "--ignore-eos"}), {.interrupt_on_output = true});
  EXPECT_EQ(result.exit_code, 130) << result.err;
  EXPECT_FALSE(result.timed_out);
  EXPECT_TRUE(result.out.ends_with("\n"));
  EXPECT_NE(result.err.find("tokens/s"), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("stopped by Ctrl-C"), std::string::npos) << result.err;
}

TEST_F(Cli, InterruptInAChatEndsTheAnswerAlone) {
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, nullptr);
  if (child == 0) {
    execl(INDEXCACHE_BINARY, INDEXCACHE_BINARY, "run", "-m", model_.c_str(), "-c", "100000", "-n",
          "50000", "--ignore-eos", nullptr);
    _exit(127);
  }
  std::string shown;
  const auto wait_for = [&](const std::string& text) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    size_t at;
    while ((at = shown.find(text)) == std::string::npos) {
      pollfd waiting = {terminal, POLLIN, 0};
      char bytes[4096];
      if (poll(&waiting, 1, 100) > 0) {
        const ssize_t n = read(terminal, bytes, sizeof bytes);
        if (n <= 0) return false;
        shown.append(bytes, static_cast<size_t>(n));
      }
      if (std::chrono::steady_clock::now() > deadline) return false;
    }
    shown.erase(0, at + text.size());
    return true;
  };
  const auto type = [&](const std::string& keys) {
    EXPECT_EQ(write(terminal, keys.data(), keys.size()), static_cast<ssize_t>(keys.size()));
  };
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(wait_for("> ")) << shown;
    type("hello\n");
    ASSERT_TRUE(wait_for("hello\r\n")) << shown;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    type("\x03");
    ASSERT_TRUE(wait_for("stopped by Ctrl-C")) << shown;
  }
  ASSERT_TRUE(wait_for("> ")) << shown;
  type("\x04");
  int status = 0;
  waitpid(child, &status, 0);
  close(terminal);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(Cli, AReaderThatLeavesEndsItQuietly) {
  const std::string code = *folder_ / "code", said = *folder_ / "said";
  const int done = std::system(fmt::format("{{ {} run -m {} -p hello -n 50000 -c 100000 "
                                           "--ignore-eos 2> {}; echo $? > {}; }} | head -c 1 > {}",
                                           INDEXCACHE_BINARY, model_, said, code, "/dev/null")
                                   .c_str());
  EXPECT_EQ(done, 0);
  EXPECT_EQ(read_file(code), fmt::format("{}\n", 128 + SIGPIPE));
  EXPECT_TRUE(error_lines(read_file(said)).empty()) << read_file(said);
}

TEST_F(Cli, LogitsFileKeepsItsContract) {
  const std::string folder = golden_folder("glm-dsa-shared");
  if (folder.empty()) GTEST_SKIP() << "no golden case glm-dsa-shared on this machine";
  const Golden golden(folder);
  folder_->write("golden.json", Json(golden.integers("input_ids")).dump());
  const std::string path = *folder_ / "out.safetensors";
  EXPECT_EQ(output({"logits", "-m", folder, "--tokens", *folder_ / "golden.json", "-o", path,
                    "--greedy", "16"}),
            "");
  const Golden ours = [&] {
    std::filesystem::create_directories(*folder_ / "ours");
    std::filesystem::rename(path, *folder_ / "ours/expected.safetensors");
    return Golden(*folder_ / "ours");
  }();
  size_t num_expected = 0;
  for (const auto& [name, want] : golden.expected.tensors()) {
    if (name == "input_ids") continue;
    SCOPED_TRACE(std::string(name));
    ++num_expected;
    const TensorView* got = ours.expected.find(name);
    ASSERT_NE(got, nullptr);
    EXPECT_EQ(got->dtype, want.dtype);
    ASSERT_EQ(got->shape, want.shape);
    if (want.dtype == DType::kF32) {
      EXPECT_LE(relative_error(to_f32(*got), to_f32(want)), 1e-4);
    } else if (want.dtype == DType::kF64) {
      EXPECT_NEAR(to_f32(*got)[0], to_f32(want)[0], 1e-5);
    } else {
      EXPECT_EQ(std::memcmp(got->data, want.data, static_cast<size_t>(want.num_bytes())), 0);
    }
  }
  EXPECT_EQ(ours.expected.tensors().size(), num_expected);
}

TEST_F(Cli, BenchRowsKeepTheirContract) {
  const std::vector<std::string> args = {"bench",   "-m", model_, "--contexts", "320,300",
                                         "--plans", "FS", "-n",   "2"};
  auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), args.begin(), args.end());
    return more;
  };
  const Json rows = output_json(with({"--json"}));
  ASSERT_EQ(rows.size(), 2u);
  double prefill_s = 0;
  for (const Json& row : rows) {
    EXPECT_FALSE(row.at("device").get<std::string>().empty());
    EXPECT_EQ(row.at("model"), model_);
    EXPECT_EQ(row.at("context"), &row == &rows[0] ? 300 : 320);
    EXPECT_EQ(row.at("plan"), "FS");
    EXPECT_EQ(row.at("num_full"), 1);
    EXPECT_GT(row.at("prefill_s").get<double>(), prefill_s);
    prefill_s = row.at("prefill_s").get<double>();
    EXPECT_GT(row.at("decode_tok_s").get<double>(), 0);
    EXPECT_GT(row.at("indexer_share").get<double>(), 0);
    EXPECT_LT(row.at("indexer_share").get<double>(), 1);
    EXPECT_GT(row.at("peak_rss_bytes").get<uint64_t>(), 1u << 20);
  }
  const std::string csv = output(with({"--csv"}));
  EXPECT_TRUE(csv.starts_with("device,model,context,plan,num_full,prefill_s,")) << csv;
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 3);
  EXPECT_EQ(output(with({"--json", "-o", *folder_ / "rows.json"})), "");
  EXPECT_EQ(load_json(*folder_ / "rows.json").size(), 2u);
  EXPECT_NE(output(args).find("tokens/s"), std::string::npos);
}

TEST_F(Cli, SynthIsRepeatableAndOverwritesNothing) {
  const std::string again = *folder_ / "again";
  const std::vector<std::string> args = {"synth", "tiny", "--layers", "1", "-o", again};
  output(args);
  const std::string weights = read_file(again + "/model.safetensors");
  expect_failure(run_program(args), 1);
  EXPECT_EQ(read_file(again + "/model.safetensors"), weights);
  const std::string other = *folder_ / "other";
  output({"synth", "tiny", "--layers", "1", "-o", other});
  EXPECT_EQ(read_file(other + "/model.safetensors"), weights);
}

TEST_F(Cli, WrongUseIsTwo) {
  const std::vector<std::vector<std::string>> cases = {
      {},
      {"generate"},
      {"run"},
      {"run", "-m", model_, "--bogus"},
      {"run", "-m", model_, "-p", "x", "-n", "many"},
      {"run", "-m", model_, "-p", "x", "-n", "-1"},
      {"run", "-m", model_, "-p", "x", "-n", "010"},
      {"run", "-m", model_, "-p", "x", "-n", "0x10"},
      {"run", "-m", model_, "-p", "x", "-c", "99999999999999999999"},
      {"run", "-m", model_, "-p", "x", "--seed", "-1"},
      {"run", "-m", model_, "-p", "x", "--seed", "18446744073709551616"},
      {"run", "-m", model_, "-p", "x", "-t", "-1"},
      {"run", "-m", model_, "-p", "x", "-b", "0"},
      {"run", "-m", model_, "-p", "x", "-f", "y"},
      {"run", "-m", model_, "-p", "x", "--device", "tpu"},
      {"run", "-m", model_, "-p", "x", "--dtype", "int3"},
      {"run", "-m", model_, "-p", "x", "--indexer-keys", "int3"},
      {"run", "-m", model_, "-p", "x", "--indexer-keys"},
      {"bench", "-m", model_, "--indexer-keys", "f8"},
      {"bench", "-m", model_, "--kv-cache", "fp16"},
      {"run", "-m", model_, "-p", "x", "--kv-cache"},
      {"logits", "-m", model_, "--tokens", "x", "-o", "y", "--indexer-keys", "I8"},
      {"run", "-m", model_, "-p", "x", "--force", "matmul"},
      {"run", "-m", model_, "-p", "x", "--force", "matmull=ref"},
      {"bench", "-m", model_, "--json", "--csv"},
      {"bench", "-m", model_, "--contexts", "0"},
      {"bench"},
      {"inspect"},
      {"inspect", "-m", model_, "--synthetic", "tiny"},
      {"inspect", "-m", model_, "--sha256", "--json"},
      {"inspect", "--synthetic", "tiny", "--sha256"},
      {"inspect", "--synthetic", "tiny", "--verify", "x"},
      {"logits", "-m", model_},
      {"logits", "-m", model_, "--tokens", "x", "-o", ""},
      {"synth", "tiny"},
  };
  for (const auto& args : cases) {
    SCOPED_TRACE(Json(args).dump());
    const ProgramResult result = run_program(args);
    expect_failure(result, 2);
    EXPECT_FALSE(result.err.empty());
  }
}

TEST_F(Cli, FailuresAreOneLineAndOne) {
  const std::string ids = *folder_ / "ids.json";
  struct Case {
    std::vector<std::string> args;
    const char* word;
  };
  const std::vector<Case> cases = {
      {{"run", "-m", "/no/such/model", "-p", "x"}, "/no/such/model"},
      {{"run", "-m", model_, "-p", ""}, "prompt"},
      {{"run", "-m", model_, "-f", "/no/such/prompt"}, "/no/such/prompt"},
      {{"run", "-m", model_, "-f", ""}, "cannot open"},
      {{"run", "-m", model_, "-f", "/dev/zero"}, "not a regular file"},
      {{"run", "-m", model_, "-p", "x", "--temp", "-1"}, "temperature"},
      {{"run", "-m", model_, "-p", "x", "--top-p", "2"}, "top"},
      {{"run", "-m", model_, "-p", "x", "--temp", "nan"}, "temperature"},
      {{"run", "-m", model_, "-p", "x", "-c", "-5"}, "-5"},
      {{"run", "-m", model_, "-p", "x", "-c", "1000000000"}, "131072"},
      {{"run", "-m", model_, "--tokens", ids, "-c", "10"}, "context"},
      {{"run", "-m", model_, "-p", "x", "--force", "matmul=fast"}, "matmul"},
      {{"logits", "-m", model_, "--tokens", ids, "-o", "/no/such/folder/out"}, "/no/such/folder"},
      {{"logits", "-m", model_, "--tokens", ids, "-o", model_}, "regular file"},
      {{"logits", "-m", model_, "--tokens", ids, "-o", ids}, "another file"},
      // Said before the work, here before the model is opened.
      {{"logits", "-m", "/no/model", "--tokens", ids, "-o", "/no/such/folder/out"}, "/no/such/fol"},
      {{"bench", "-m", "/no/model", "-o", "/no/such/folder/out"}, "/no/such/folder"},
      {{"bench", "-m", "/no/model", "--ops-output", "/no/such/folder/out"}, "/no/such/folder"},
      {{"bench", "-m", model_, "--contexts", "200000", "--plans", "FS"}, "131072"},
      {{"synth", "giant", "-o", *folder_ / "giant"}, "giant"},
      {{"synth", "tiny", "-o", "/proc/nowhere"}, "/proc/nowhere"},
      {{"inspect", "--synthetic", "tiny", "--layers", "99"}, "99"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(Json(c.args).dump());
    const ProgramResult result = run_program(c.args);
    expect_failure(result, 1);
    EXPECT_NE(result.err.find(c.word), std::string::npos) << result.err;
  }
}

}  // namespace
}  // namespace indexcache
