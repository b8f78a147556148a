// The life of the real server: configuration, signals, requests that outlive it.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "server/server_test_kit.h"
#include "tests/program.h"

namespace indexcache {
namespace {

// A small random model, made once.
const std::string& model_folder() {
  static const std::string folder = [] {
    std::string pattern = ::testing::TempDir() + "/server-XXXXXX";
    std::string path = std::string(mkdtemp(pattern.data())) + "/tiny";
    const ProgramResult made = run_program({"synth", "tiny", "--layers", "4", "-o", path});
    EXPECT_EQ(made.exit_code, 0) << made.err;
    return path;
  }();
  return folder;
}

class Server {
 public:
  explicit Server(std::vector<std::string> flags,
                  const std::vector<std::pair<std::string, std::string>>& environment = {})
      : log_(memfd_create("log", MFD_CLOEXEC)) {
    flags.insert(flags.begin(), "serve");
    std::vector<char*> argv = {const_cast<char*>(INDEXCACHE_BINARY)};
    for (const std::string& flag : flags) argv.push_back(const_cast<char*>(flag.c_str()));
    argv.push_back(nullptr);
    child_ = fork();
    if (child_ == 0) {
      dup2(log_, STDERR_FILENO);
      for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
      execv(INDEXCACHE_BINARY, argv.data());
      _exit(127);
    }
  }
  ~Server() {
    if (child_ > 0) {
      ::kill(child_, SIGKILL);
      waitpid(child_, nullptr, 0);
    }
    ::close(log_);
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  bool wait_for_log(const std::string& text) {
    for (int i = 0; i < 3000; ++i) {
      if (log().find(text) != std::string::npos) return true;
      if (i > 100 && i % 50 == 0 && ::kill(child_, 0) != 0) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  bool ready() {
    if (!wait_for_log("serving ")) return false;
    const std::string text = log();
    const size_t at = text.find("listening on http://127.0.0.1:");
    port_ = static_cast<uint16_t>(std::stoi(text.substr(at + 30)));
    return true;
  }
  std::string log() const { return read_fd(log_); }
  uint16_t port() const { return port_; }
  std::string ask(const std::string& request) {
    RawClient client(port_);
    client.send(request);
    return client.receive(30);
  }
  void signal(int number) { ::kill(child_, number); }
  int exit_code() {
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  int log_;
  pid_t child_ = -1;
  uint16_t port_ = 0;
};

const std::string kLong = post("/v1/completions",
                               R"({"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": true,
                                   "temperature": 0, "stream": true})");

TEST(Serve, CommandLineThenEnvironmentThenFile) {
  const std::string file = model_folder() + "-config.json";
  std::ofstream(file)
      << R"({"port": 0, "served-model-name": "file", "max-running": 3, "api-key": ["k"]})";
  Server server({"--config", file, "-m", model_folder(), "-t", "1", "--max-running", "2"},
                {{"INDEXCACHE_SERVED_MODEL_NAME", "environment"}, {"INDEXCACHE_MAX_RUNNING", "7"}});
  ASSERT_TRUE(server.ready()) << server.log();
  EXPECT_EQ(status_of(server.ask(get("/v1/models"))), 401);
  const std::string models = server.ask(get("/v1/models", "Authorization: Bearer k\r\n"));
  EXPECT_NE(models.find("\"id\":\"environment\""), std::string::npos) << models;
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 0);
}

TEST(Serve, WrongConfiguration) {
  const std::string file = model_folder() + "-wrong.json";
  const auto serve_with = [&](const std::string& json) {
    std::ofstream(file) << json;
    return run_program({"serve", "--config", file, "-m", model_folder(), "--port", "0"});
  };
  const ProgramResult typo = serve_with(R"({"max-runing": 3})");
  expect_failure(typo, 1);
  EXPECT_NE(typo.err.find("max-running"), std::string::npos) << typo.err;
  expect_failure(serve_with(R"({"max-running": 0})"), 1);
  expect_failure(serve_with(R"({"max-running": {}})"), 1);
  expect_failure(serve_with(R"([])"), 1);
  expect_failure(serve_with(R"({"api-key": ""})"), 1);
  expect_failure(run_program({"serve", "-m", model_folder(), "--host", "nowhere"}), 1);
  EXPECT_EQ(run_program({"serve", "--port", "0"}).exit_code, 2);
  EXPECT_EQ(run_program({"serve", "--port", "70000", "-m", "x"}).exit_code, 2);
}

TEST(Serve, PortInUse) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0"});
  ASSERT_TRUE(server.ready()) << server.log();
  const ProgramResult second =
      run_program({"serve", "-m", model_folder(), "--port", std::to_string(server.port())});
  expect_failure(second, 1);
  EXPECT_NE(second.err.find("in use"), std::string::npos) << second.err;
}

TEST(Serve, DrainsOnSigterm) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0"});
  ASSERT_TRUE(server.ready()) << server.log();
  RawClient client(server.port());
  client.send(kLong);
  const std::string head = client.receive(30, true);
  ASSERT_EQ(status_of(head), 200) << server.log();
  RawClient waiting(server.port());
  server.signal(SIGTERM);
  ASSERT_TRUE(server.wait_for_log("no new requests"));
  waiting.send(get("/health"));
  std::string rest;
  for (std::string more; !(more = client.receive(30)).empty();) rest += more;
  EXPECT_NE(rest.find("\"finish_reason\":\"length\""), std::string::npos);
  EXPECT_NE(rest.find("[DONE]"), std::string::npos);
  EXPECT_EQ(server.exit_code(), 0);
  const std::string health = waiting.receive(1);
  EXPECT_TRUE(health.empty() || status_of(health) == 503) << health;
}

TEST(Serve, CutsOffAfterTheTimeout) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0", "--drain-timeout", "0"});
  ASSERT_TRUE(server.ready()) << server.log();
  RawClient client(server.port());
  client.send(kLong);
  ASSERT_EQ(status_of(client.receive(30, true)), 200);
  server.signal(SIGTERM);
  std::string rest;
  for (std::string more; !(more = client.receive(30)).empty();) rest += more;
  const bool complete = rest.find("[DONE]") != std::string::npos;
  EXPECT_TRUE(complete || rest.find("\"error\"") != std::string::npos) << rest;
  EXPECT_EQ(server.exit_code(), 0);
}

TEST(Serve, SecondSignalEndsAtOnce) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0"});
  ASSERT_TRUE(server.ready()) << server.log();
  RawClient client(server.port());
  client.send(kLong);
  ASSERT_EQ(status_of(client.receive(30, true)), 200);
  server.signal(SIGTERM);
  ASSERT_TRUE(server.wait_for_log("no new requests"));
  server.signal(SIGTERM);
  const int code = server.exit_code();
  // The requests may have been faster than the second signal.
  EXPECT_TRUE(code == 128 + SIGTERM || code == 0) << code;
}

TEST(Serve, LogsEscapeAndHidePrompts) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0", "--log-format", "json"});
  ASSERT_TRUE(server.ready() || server.wait_for_log("ready")) << server.log();
  const std::string text = "private \\u001b[31m text";
  server.ask(post("/v1/completions", R"({"prompt": ")" + text + R"(", "max_tokens": 1})"));
  server.ask("GET /a\x1b[31mb HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_TRUE(server.wait_for_log("generated_tokens"));
  EXPECT_EQ(server.log().find("private"), std::string::npos);
  EXPECT_EQ(server.log().find('\x1b'), std::string::npos);
}

}  // namespace
}  // namespace indexcache
