// The life of the real server: configuration, signals, requests that outlive it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "tests/server_process.h"

namespace indexcache {
namespace {

// Far more tokens than anything here waits for.
const std::string kEndless =
    R"({"prompt": [5, 6, 7], "max_tokens": 4000, "ignore_eos": true, "n": 128)";

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

TEST(Serve, TheFileItselfFromTheEnvironment) {
  const std::string file = model_folder() + "-from-environment.json";
  std::ofstream(file) << R"({"port": 0, "threads": 1, "served-model-name": "file"})";
  Server server({"-m", model_folder()},
                {{"INDEXCACHE_CONFIG", file}, {"INDEXCACHE_NO_ACCESS_LOG", "true"}});
  ASSERT_TRUE(server.ready()) << server.log();
  EXPECT_NE(server.ask(get("/v1/models")).find("\"id\":\"file\""), std::string::npos);
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 0);
  EXPECT_EQ(server.log().find("/v1/models"), std::string::npos) << server.log();
}

// A container's first process gets only the signals that it asked for.
TEST(Serve, DrainsAsTheFirstProcessOfAContainer) {
  constexpr int kNoNamespaces = 77;
  Server server({"-m", model_folder(), "-t", "1", "--port", "0"}, {}, [] {
    if (unshare(CLONE_NEWPID) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWPID) != 0)
      _exit(kNoNamespaces);
    static pid_t first;
    first = fork();
    if (first == 0) return;
    ::signal(SIGTERM, [](int number) { ::kill(first, number); });
    int status = 0;
    while (waitpid(first, &status, 0) < 0 && errno == EINTR) continue;
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 99);
  });
  if (!server.ready()) {
    ASSERT_EQ(server.exit_code(), kNoNamespaces) << server.log();
    GTEST_SKIP() << "no PID namespaces here";
  }
  EXPECT_EQ(status_of(server.ask(get("/health"))), 200);
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 0) << server.log();
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
  client.send(post("/v1/completions",
                   R"({"prompt": [5, 6, 7], "max_tokens": 3000, "ignore_eos": true,
                       "temperature": 0, "stream": true})"));
  ASSERT_EQ(status_of(client.receive(30, true)), 200) << server.log();
  RawClient waiting(server.port());
  server.signal(SIGTERM);
  ASSERT_TRUE(server.wait_for_log("no new requests"));
  waiting.send(get("/health"));
  const std::string health = waiting.receive(30);
  EXPECT_EQ(status_of(health), 503) << health;
  EXPECT_NE(health.find("shutting down"), std::string::npos) << health;
  std::string rest;
  for (std::string more; !(more = client.receive(30)).empty();) rest += more;
  EXPECT_NE(rest.find("\"finish_reason\":\"length\""), std::string::npos);
  EXPECT_NE(rest.find("[DONE]"), std::string::npos);
  EXPECT_EQ(server.exit_code(), 0);
}

// Nobody takes half an answer for a whole one.
TEST(Serve, CutsOffAfterTheTimeout) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0", "--drain-timeout", "1"});
  ASSERT_TRUE(server.ready()) << server.log();
  RawClient stream(server.port()), whole(server.port());
  whole.send(post("/v1/completions", kEndless + "}"));
  stream.send(post("/v1/completions", kEndless + R"(, "stream": true})"));
  ASSERT_EQ(status_of(stream.receive(30, true)), 200);
  server.signal(SIGTERM);
  const double begin = monotonic_seconds();
  std::string rest;
  for (std::string more; !(more = stream.receive(30)).empty();) rest += more;
  EXPECT_NE(rest.find("\"error\""), std::string::npos) << rest.substr(0, 1000);
  EXPECT_NE(rest.find("shutting_down"), std::string::npos);
  EXPECT_EQ(rest.find("[DONE]"), std::string::npos);
  EXPECT_EQ(rest.find("\"finish_reason\":\"length\""), std::string::npos);
  const std::string answer = whole.receive(30);
  EXPECT_EQ(status_of(answer), 503) << answer;
  EXPECT_EQ(server.exit_code(), 0);
  EXPECT_NE(server.log().find("some requests were cut off"), std::string::npos) << server.log();
  EXPECT_GE(monotonic_seconds() - begin, 1);
  EXPECT_LT(monotonic_seconds() - begin, 15) << "a second each to drain and to say so";
}

TEST(Serve, SecondSignalEndsAtOnce) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0", "--drain-timeout", "600"});
  ASSERT_TRUE(server.ready()) << server.log();
  RawClient client(server.port());
  client.send(post("/v1/completions", kEndless + R"(, "stream": true})"));
  ASSERT_EQ(status_of(client.receive(30, true)), 200);
  server.signal(SIGTERM);
  ASSERT_TRUE(server.wait_for_log("no new requests"));
  const double begin = monotonic_seconds();
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 128 + SIGTERM);
  EXPECT_LT(monotonic_seconds() - begin, 10);
}

TEST(Serve, LogsEscapeAndHidePrompts) {
  Server server({"-m", model_folder(), "-t", "1", "--port", "0", "--log-format", "json"});
  ASSERT_TRUE(server.ready() || server.wait_for_log("ready")) << server.log();
  const std::string good = post("/v1/completions", R"({"prompt": "a", "temperature": 0})");
  const std::string before = without_ids(body_of(server.ask(good)));
  const std::string text = "private \\u001b[31m text";
  server.ask(post("/v1/completions", R"({"prompt": ")" + text + R"(", "max_tokens": 1})"));
  server.ask("GET /a\x1b[31mb HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_TRUE(server.wait_for_log("generated_tokens"));
  EXPECT_EQ(server.log().find("private"), std::string::npos);
  EXPECT_EQ(server.log().find('\x1b'), std::string::npos);
  EXPECT_EQ(without_ids(body_of(server.ask(good))), before);
}

// Each line of a text; they are parsed, so that what is no JSON fails the test.
std::vector<Json> json_lines(const std::string& text) {
  std::vector<Json> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (!Json::accept(line)) {
      ADD_FAILURE() << "no JSON: " << line;
    } else {
      lines.push_back(Json::parse(line));
      EXPECT_TRUE(lines.back().is_object()) << line;
    }
  }
  return lines;
}

// From the first line to the last, whoever writes it.
TEST(Serve, EveryLineOfAJsonLogIsAnObject) {
  const std::string folder = model_folder() + "-no-tokenizer";
  std::filesystem::copy(model_folder(), folder, std::filesystem::copy_options::recursive);
  std::filesystem::remove(folder + "/tokenizer.json");
  Json config = load_json(folder + "/config.json");
  config["auto_map"] = {{"AutoModel", "x.py"}};
  std::ofstream(folder + "/config.json") << config;
  const std::vector<std::string> flags = {"-m", folder, "-t", "1", "--port", "0"};
  Server server(flags, {{"INDEXCACHE_LOG_FORMAT", "json"}});
  ASSERT_TRUE(server.ready()) << server.log();
  server.ask(post("/v1/completions", R"({"prompt": [5, 6, 7], "max_tokens": 2})"));
  server.ask(get("/nowhere"));
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 0);
  std::map<std::string, int> events;
  for (const Json& line : json_lines(server.log())) ++events[line.value("event", "(none)")];
  EXPECT_EQ(events["request"], 2);
  EXPECT_GE(events["info"], 4) << "what the engine is, and that auto_map is ignored";
  for (const char* event : {"warning", "listening", "ready", "draining", "stopped"})
    EXPECT_EQ(events[event], 1) << event << server.log();

  // What ends the program before it serves, too.
  for (const char* wrong : {"--host", "--indexers"}) {
    const ProgramResult result =
        run_program({"serve", "-m", folder, "--port", "0", "--log-format", "json", wrong, "/x"});
    EXPECT_EQ(result.exit_code, 1);
    const std::vector<Json> lines = json_lines(result.err);
    ASSERT_FALSE(lines.empty());
    EXPECT_EQ(lines.back()["event"], "error") << result.err;
  }
  std::filesystem::remove_all(folder);
}

// Asked for, a prompt stays on its line whatever it holds, and so does every other text of a
// client.
TEST(Serve, LoggedPromptsForgeNoLine) {
  for (const char* format : {"text", "json"}) {
    Server server(
        {"-m", model_folder(), "-t", "1", "--port", "0", "--log-prompts", "--log-format", format});
    ASSERT_TRUE(server.ready() || server.wait_for_log("ready")) << server.log();
    const std::string evil = R"(begin\n2026-01-01T00:00:00.000Z forged\r\u001b[2J\u0000 end)";
    server.ask(post("/v1/completions", R"({"prompt": ")" + evil +
                                           R"(", "max_tokens": 1, "user": ")" + evil + R"("})"));
    server.ask(post("/v1/completions", R"({"prompt": "x", "model": ")" + evil + R"("})"));
    EXPECT_TRUE(server.wait_for_log(" end")) << server.log();
    EXPECT_EQ(server.log().find("\n2026-01-01"), std::string::npos) << server.log();
    for (const char c : server.log())
      EXPECT_TRUE(c == '\n' || static_cast<uint8_t>(c) >= 0x20) << static_cast<int>(c);
  }
}

// Who read the log is gone: the server goes on.
TEST(Serve, OutlivesTheReaderOfItsLog) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  Server server({"-m", model_folder(), "-t", "1", "--port", "0"}, {},
                [&] { dup2(ends[1], STDERR_FILENO); });
  ::close(ends[1]);
  std::string log;
  char bytes[4096];
  for (ssize_t n;
       log.find("serving ") == std::string::npos && (n = read(ends[0], bytes, 4096)) > 0;)
    log.append(bytes, static_cast<size_t>(n));
  ::close(ends[0]);
  const size_t at = log.find("listening on http://127.0.0.1:");
  ASSERT_NE(at, std::string::npos) << log;
  RawClient client(static_cast<uint16_t>(std::stoi(log.substr(at + 30))));
  for (int i = 0; i < 3; ++i) {
    client.send(get("/health"));
    EXPECT_EQ(status_of(client.receive()), 200);
  }
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 0);
}

}  // namespace
}  // namespace indexcache
