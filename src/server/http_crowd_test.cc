// Many clients at once, and what long requests of some do to the others.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <optional>

#include "server/server_test_kit.h"

namespace indexcache {
namespace {

const std::string kGood = post("/v1/completions", R"({"prompt": "hello", "temperature": 0})");

AppOptions with_connections(int64_t connections) {
  AppOptions options;
  options.limits.connections = connections;
  options.limits.header_seconds = options.limits.idle_seconds = 600;
  return options;
}

TEST(HttpServer, BusyConnectionsAreNotClosedForOthers) {
  TestServer server(with_connections(20));
  std::vector<std::unique_ptr<RawClient>> busy;
  for (int i = 0; i < 20; ++i) {
    busy.push_back(std::make_unique<RawClient>(server.http.port()));
    busy.back()->send(kGood.substr(0, 1));
  }
  const std::string refused = server.ask(get("/health"));
  EXPECT_EQ(status_of(refused), 503);
  EXPECT_NE(refused.find("too_many_connections"), std::string::npos) << refused;
  EXPECT_NE(refused.find("\r\nRetry-After: 1\r\n"), std::string::npos) << refused;
  for (const auto& client : busy) {
    client->send(kGood.substr(1));
    EXPECT_EQ(status_of(client->receive()), 200);
  }
  EXPECT_EQ(status_of(server.ask(get("/health"))), 200);
}

// Lowers how many files this process may open, for as long as it lives.
class FewDescriptors {
 public:
  explicit FewDescriptors(rlim_t count) {
    getrlimit(RLIMIT_NOFILE, &before_);
    const rlimit few = {count, before_.rlim_max};
    setrlimit(RLIMIT_NOFILE, &few);
  }
  ~FewDescriptors() { setrlimit(RLIMIT_NOFILE, &before_); }
  FewDescriptors(const FewDescriptors&) = delete;
  FewDescriptors& operator=(const FewDescriptors&) = delete;

 private:
  rlimit before_ = {};
};

TEST(HttpServer, ConnectionsFitUnderTheLimitOfOpenFiles) {
  testing::internal::CaptureStderr();
  std::optional<FewDescriptors> few(40);
  TestServer server(with_connections(1024));
  few.reset();
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("at most 20 connections, not 1024"), std::string::npos) << log;
  std::vector<std::unique_ptr<RawClient>> busy;
  for (int i = 0; i < 20; ++i) {
    busy.push_back(std::make_unique<RawClient>(server.http.port()));
    busy.back()->send("G");
  }
  EXPECT_EQ(status_of(server.ask(kGood)), 503);
  busy.pop_back();
  for (int i = 0; i < 500 && status_of(server.ask(kGood)) != 200; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_EQ(status_of(server.ask(kGood)), 200);
}

// The rest of the program may have taken them all.
TEST(HttpServer, IdleConnectionsGiveUpTheLastDescriptors) {
  TestServer server(with_connections(1024));
  RawClient first(server.http.port()), second(server.http.port()), third(server.http.port());
  for (RawClient* client : {&first, &second, &third}) {
    client->send(kGood);
    EXPECT_EQ(status_of(client->receive()), 200);
  }
  const int next = dup(STDERR_FILENO);
  close(next);
  const FewDescriptors few(static_cast<rlim_t>(next) + 1);
  RawClient late(server.http.port());
  late.send(kGood);
  EXPECT_EQ(status_of(late.receive()), 200);
  // One for the new connection, and one that accept() wants before it looks for the next.
  EXPECT_TRUE(first.closed_by_peer());
  EXPECT_TRUE(second.closed_by_peer());
  third.send(kGood);
  EXPECT_EQ(status_of(third.receive()), 200);
}

// Memory does not grow with the number of clients that send large bodies.
TEST(HttpServer, LargeBodiesAtOnceAreBounded) {
  AppOptions options;
  options.limits.body_bytes = 1 << 20;
  options.limits.bodies_bytes = 2 << 20;
  TestServer server(options);
  const std::string before = without_ids(body_of(server.ask(kGood)));
  const std::string head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n";
  const std::string whole = R"({"prompt": "a")" + std::string((1 << 20) - 15, ' ') + "}";
  ASSERT_EQ(whole.size(), size_t{1} << 20);
  RawClient first(server.http.port()), second(server.http.port()), third(server.http.port());
  first.send(head + "Content-Length: 1048576\r\n\r\n");
  EXPECT_EQ(status_of(first.receive()), 100);
  second.send(head + "Transfer-Encoding: chunked\r\n\r\n");
  EXPECT_EQ(status_of(second.receive()), 100);
  third.send(head + "Content-Length: 1048576\r\n\r\n");
  const std::string refused = third.receive();
  EXPECT_EQ(status_of(refused), 503) << refused;
  EXPECT_NE(refused.find("\r\nRetry-After: 1\r\n"), std::string::npos) << refused;
  EXPECT_EQ(without_ids(body_of(server.ask(kGood))), before) << "small ones still come through";
  second.close();
  first.send(whole);
  EXPECT_EQ(status_of(first.receive(60)), 200);
  EXPECT_EQ(status_of(server.ask(post("/tokenize", whole), 60)), 200);
  EXPECT_EQ(without_ids(body_of(server.ask(kGood))), before);
}

// Each kind of request that takes longer has a thread of its own: while the thread of one is kept,
// the others are answered. A single thread would answer none of them.
TEST(HttpServer, CompletionsAndLongBodiesDoNotWaitForEachOther) {
  TestServer server;
  const std::string before = without_ids(body_of(server.ask(kGood)));
  const size_t most = 4096 * byte_model(nullptr)->longest_token;
  const std::string largest = post("/tokenize", R"({"prompt": ")" + std::string(most, 'a') + "\"}");
  const std::string large = post("/v1/completions", R"({"prompt": "hello", "temperature": 0)" +
                                                        std::string(1 << 20, ' ') + "}");
  const std::string large_and_wrong =
      post("/v1/completions",
           R"({"prompt": "hello", "temperature": 3)" + std::string(1 << 20, ' ') + "}");
  const std::string small_and_wrong = post("/v1/completions", "{}");
  const auto expect_answers_beside = [&](const std::string& kept,
                                         const std::vector<std::pair<std::string, int>>& others) {
    const int64_t num_submits = server.generator.num_submits;
    RawClient client(server.http.port());
    {
      const std::lock_guard closed(server.generator.gate);
      client.send(kept);
      for (int i = 0; i < 1000 && server.generator.num_submits == num_submits; ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      ASSERT_EQ(server.generator.num_submits, num_submits + 1);
      for (const auto& [request, status] : others)
        EXPECT_EQ(status_of(server.ask(request)), status) << request.substr(0, 100);
    }
    EXPECT_EQ(without_ids(body_of(client.receive())), before);
  };
  expect_answers_beside(kGood, {{largest, 200}, {large_and_wrong, 400}});
  expect_answers_beside(large, {{largest, 200}, {small_and_wrong, 400}});
}

// Bodies of others are read and cut into tokens meanwhile.
TEST(HttpServer, HealthWaitsForNoBody) {
  TestServer server;
  RawClient busy(server.http.port());
  {
    const std::lock_guard closed(server.generator.gate);
    busy.send(kGood);
    for (int i = 0; i < 1000 && server.generator.num_submits == 0; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    ASSERT_EQ(server.generator.num_submits, 1);
    for (const char* path : {"/health", "/metrics", "/v1/models"})
      EXPECT_EQ(status_of(server.ask(get(path))), 200) << path;
  }
  EXPECT_EQ(status_of(busy.receive()), 200);
}

}  // namespace
}  // namespace indexcache
