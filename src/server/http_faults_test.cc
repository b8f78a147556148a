// What clients do wrong, on real sockets. After each fault a good request gets the same bytes as
// before it.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "server/server_test_kit.h"

namespace indexcache {
namespace {

const std::string kGood = post("/v1/completions", R"({"prompt": "hello", "temperature": 0})");

class HttpFaults : public ::testing::Test {
 protected:
  static AppOptions options() {
    AppOptions options;
    options.limits.header_seconds = options.limits.body_seconds = 0.5;
    options.limits.idle_seconds = 2;
    options.limits.write_seconds = 1;
    options.limits.body_bytes = 1 << 20;
    options.limits.connections = 50;
    return options;
  }

  void SetUp() override { good_ = good(); }
  void TearDown() override {
    EXPECT_TRUE(server_.generator.wait_until_idle());
    EXPECT_EQ(good(), good_);
  }

  std::string good() {
    const std::string answer = server_.ask(kGood);
    EXPECT_EQ(status_of(answer), 200) << answer;
    return without_ids(body_of(answer));
  }

  void expect_error(const std::string& request, int status) {
    RawClient client(server_.http.port());
    client.send(request);
    const std::string answer = client.receive(5);
    ASSERT_EQ(status_of(answer), status) << request.substr(0, 200) << "\n" << answer;
    const Json body = parse_json(body_of(answer), "answer");
    for (const char* field : {"message", "type", "param", "code"})
      EXPECT_TRUE(body["error"].contains(field)) << answer;
    client.close();
    EXPECT_EQ(good(), good_) << "after " << request.substr(0, 200);
  }

  // Refused, and what follows is not taken for a request: nobody knows where it would begin.
  void expect_last_error(const std::string& request, int status) {
    const std::string shown = request.substr(0, 200);
    RawClient client(server_.http.port());
    client.send(request + get("/health"));
    const std::string answer = client.receive(5);
    ASSERT_EQ(status_of(answer), status) << shown << "\n" << answer;
    EXPECT_NE(answer.find("\r\nConnection: close\r\n"), std::string::npos) << shown << answer;
    const Json body = parse_json(body_of(answer), "answer");
    for (const char* field : {"message", "type", "param", "code"})
      EXPECT_TRUE(body["error"].contains(field)) << answer;
    EXPECT_EQ(client.receive(1), "") << shown;
    EXPECT_TRUE(client.closed_by_peer()) << shown;
    EXPECT_EQ(good(), good_) << "after " << shown;
  }

  TestServer server_{options()};
  std::string good_;
};

TEST_F(HttpFaults, Answers) {
  EXPECT_NE(good_.find("\"text\":\"hellohellohelloh\""), std::string::npos) << good_;
  EXPECT_NE(good_.find("\"finish_reason\":\"length\""), std::string::npos);
}

TEST_F(HttpFaults, WrongRequests) {
  const std::string tail = " HTTP/1.1\r\nHost: localhost\r\n";
  expect_error("GET /nowhere" + tail + "\r\n", 404);
  expect_error("GET //v1/models" + tail + "\r\n", 404);
  expect_error("GET /v1/../metrics" + tail + "\r\n", 404);
  expect_error("GET /%2e%2e/etc/passwd" + tail + "\r\n", 404);
  expect_error("GET http://localhost/v1/models" + tail + "\r\n", 404);
  expect_error("GET /v1/completions" + tail + "\r\n", 405);
  expect_error("DELETE /v1/models" + tail + "\r\n", 405);
  expect_error("OPTIONS /v1/completions" + tail + "\r\n", 405);
  expect_error("GET /" + tail + "Origin: https://evil.example\r\n\r\n", 403);
  expect_error("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403);
  expect_error("POST /v1/completions" + tail + "\r\n", 400);  // no body
  expect_error(post("/v1/completions", "{\"prompt\": "), 400);
  expect_error(post("/v1/chat/completions", "{}"), 400);
  expect_error(post("/tokenize", "{}"), 400);
  expect_error(post("/detokenize", R"({"tokens": [-1]})"), 400);
}

TEST_F(HttpFaults, WrongFramingEndsTheConnection) {
  const std::string tail = " HTTP/1.1\r\nHost: localhost\r\n", head = "POST /v1/completions" + tail;
  expect_last_error("nonsense\r\n\r\n", 400);
  expect_last_error(std::string("GET /\0x", 7) + tail + "\r\n", 400);
  expect_last_error("GET / HTTP/1.1\r\n\r\n", 400);                                // no Host
  expect_last_error("GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n", 400);  // two
  expect_last_error("GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 400);
  expect_last_error(head + "Content-Length: -5\r\n\r\n", 400);
  expect_last_error(head + "Content-Length: 5x\r\n\r\n", 400);
  expect_last_error(head + "Content-Length: 99999999999\r\n\r\n", 413);
  expect_last_error(head + "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", 400);
  expect_last_error(head + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400);
  // A proxy might see a body where the server would see a second request.
  for (const char* coding : {"xchunked", "chunked, identity", "gzip, chunked", "identity",
                             "chunked\r\nTransfer-Encoding: chunked", "\r\n xchunked", ""})
    expect_last_error(head + "Transfer-Encoding: " + coding + "\r\n\r\n0\r\n\r\n", 400);
  expect_last_error("POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                    400);
  expect_last_error(head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400);
  expect_last_error(head + "Transfer-Encoding: chunked\r\n\r\n-1\r\nabc", 400);
  expect_last_error(head + "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n", 400);
  expect_last_error(head + "Transfer-Encoding: chunked\r\n\r\nE8D4A51000\r\nabc", 413);
  // The limit of 1 MiB is that of all chunks together.
  std::string chunks;
  for (int i = 0; i <= (1 << 20) / 64; ++i) chunks += "40\r\n" + std::string(64, ' ') + "\r\n";
  expect_last_error(head + "Transfer-Encoding: chunked\r\n\r\n" + chunks, 413);
  expect_last_error(head + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415);
  expect_last_error("GET /" + tail + "X: " + std::string(10 << 20, 'x') + "\r\n\r\n", 431);
  std::string many;
  for (int i = 0; i < 100000; ++i) many += "a: b\r\n";
  expect_last_error("GET /" + tail + many + "\r\n", 431);
}

TEST_F(HttpFaults, ChunkedBodies) {
  const std::string body = body_of(kGood);
  std::string chunks = fmt::format("{:X};name=value\r\n{}\r\n", 10, body.substr(0, 10));
  for (const char c : body.substr(10)) chunks += fmt::format("1\r\n{}\r\n", c);
  RawClient client(server_.http.port());
  for (const char* end : {"0\r\n\r\n", "0\r\nA-Trailer: x\r\n\r\n"}) {
    client.send(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" +
        chunks + end);
    EXPECT_EQ(without_ids(body_of(client.receive())), good_) << end;
  }
}

TEST_F(HttpFaults, SlowClients) {
  RawClient slow(server_.http.port());
  slow.send("GET /health HTTP/1.1\r\n");
  EXPECT_TRUE(slow.closed_by_peer(3));
  RawClient slow_body(server_.http.port());
  slow_body.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{");
  EXPECT_TRUE(slow_body.closed_by_peer(3));
  RawClient silent(server_.http.port());
  EXPECT_TRUE(silent.closed_by_peer(6));
}

// Each byte comes in time, but the header does not.
TEST_F(HttpFaults, DrippingClients) {
  RawClient client(server_.http.port());
  client.send("GET /health HTTP/1.1\r\nX: ");
  int num_bytes = 0;
  while (num_bytes < 200 && client.send("x") && !client.closed_by_peer(0.01)) {
    ++num_bytes;
    EXPECT_EQ(good(), good_);
  }
  EXPECT_GT(num_bytes, 2) << "a weak test";
  EXPECT_LT(num_bytes, 200);  // the deadline is 0.5 s, and 200 bytes take 2 at least
}

TEST_F(HttpFaults, BodiesCutShort) {
  const std::string head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n";
  for (const char* part :
       {"Content-Length: 50\r\n\r\n{\"prompt\"",
        "Transfer-Encoding: chunked\r\n\r\n9\r\n{\"prompt\"\r\n", "Content-Le"}) {
    RawClient client(server_.http.port());
    client.send(head + part);
    shutdown(client.fd(), SHUT_WR);
    EXPECT_TRUE(client.closed_by_peer()) << part;
    EXPECT_EQ(good(), good_) << "after " << part;
  }
}

// Whoever has been silent the longest makes room.
TEST_F(HttpFaults, ManyIdleConnections) {
  std::vector<std::unique_ptr<RawClient>> idle;
  for (int i = 0; i < 60; ++i) {
    idle.push_back(std::make_unique<RawClient>(server_.http.port()));
    if (i == 0) {  // between two requests is idle too
      idle[0]->send(kGood);
      EXPECT_EQ(status_of(idle[0]->receive()), 200);
    }
  }
  RawClient late(server_.http.port());
  late.send(kGood);
  EXPECT_EQ(without_ids(body_of(late.receive())), good_);
  for (size_t i = 0; i <= 10; ++i) EXPECT_TRUE(idle[i]->closed_by_peer(1)) << i;
  for (size_t i = 11; i < 60; ++i) {
    idle[i]->send(get("/health"));
    EXPECT_EQ(status_of(idle[i]->receive()), 200) << i;
  }
}

TEST_F(HttpFaults, KeepAliveAndPipelining) {
  RawClient client(server_.http.port());
  client.send(kGood + get("/health") + kGood);
  EXPECT_EQ(without_ids(body_of(client.receive())), good_);
  EXPECT_EQ(body_of(client.receive()), R"({"status":"ok"})");
  EXPECT_EQ(without_ids(body_of(client.receive())), good_);
  client.send("HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
  EXPECT_EQ(status_of(client.receive(5, true)), 200);
  client.send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_EQ(status_of(client.receive()), 200);
  EXPECT_TRUE(client.closed_by_peer());
}

TEST_F(HttpFaults, ContinuesWhenAsked) {
  RawClient client(server_.http.port());
  const std::string body = R"({"prompt": "hello", "temperature": 0})";
  client.send(
      "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
      "Content-Length: " +
      std::to_string(body.size()) + "\r\n\r\n");
  EXPECT_EQ(status_of(client.receive()), 100);
  client.send(body);
  EXPECT_EQ(without_ids(body_of(client.receive())), good_);
}

TEST_F(HttpFaults, ByteByByte) {
  RawClient client(server_.http.port());
  for (const char c : kGood) {
    client.send(std::string(1, c));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  EXPECT_EQ(without_ids(body_of(client.receive())), good_);
}

TEST_F(HttpFaults, ClientsThatLeave) {
  for (const char* stream : {"false", "true"}) {
    RawClient client(server_.http.port());
    // Token 0 never gets an answer.
    client.send(post("/v1/completions",
                     std::string(R"({"prompt": [0, 1], "n": 3, "stream": )") + stream + "}"));
    for (int i = 0; i < 300 && server_.generator.stats().running < 3; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_EQ(server_.generator.stats().running, 3);
    client.close();
    EXPECT_TRUE(server_.generator.wait_until_idle());
  }
  EXPECT_EQ(server_.generator.stats().cancelled, 6);
}

// A client that never reads is left after --write-timeout, and its requests with it.
TEST_F(HttpFaults, ClientsThatDoNotRead) {
  server_.generator.step_microseconds = 2000;
  RawClient client(server_.http.port());
  const int small = 4096;
  setsockopt(client.fd(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  client.send(post(
      "/v1/completions",
      R"({"prompt": "abcdefgh", "max_tokens": 4000, "n": 8, "stream": true, "logprobs": 20})"));
  for (int i = 0; i < 1500 && server_.generator.stats().cancelled == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_GT(server_.generator.stats().cancelled, 0);
}

TEST_F(HttpFaults, QueueFull) {
  server_.generator.max_jobs = 2;
  RawClient client(server_.http.port());
  client.send(post("/v1/completions", R"({"prompt": [[0], [0], [5]]})"));
  const std::string answer = client.receive();
  EXPECT_EQ(status_of(answer), 429);
  EXPECT_NE(answer.find("Retry-After: 1\r\n"), std::string::npos) << answer;
  EXPECT_NE(answer.find("Retry-After-Ms: 250\r\n"), std::string::npos) << answer;
  EXPECT_EQ(server_.generator.stats().running, 0);  // none of the three is left behind
}

TEST_F(HttpFaults, NoMemoryForTheThirdAnswer) {
  server_.generator.until_bad_alloc = 2;
  const std::string answer = server_.ask(post("/v1/completions", R"({"prompt": [0], "n": 3})"));
  EXPECT_EQ(status_of(answer), 503) << answer;
  EXPECT_NE(answer.find("out_of_memory"), std::string::npos) << answer;
  EXPECT_NE(answer.find("Retry-After: 1\r\n"), std::string::npos) << answer;
  EXPECT_EQ(server_.generator.stats().running, 0);  // none of the two is left behind
  EXPECT_EQ(server_.generator.stats().cancelled, 2);
}

TEST_F(HttpFaults, PoisonedRequestFailsAlone) {
  EXPECT_EQ(status_of(server_.ask(post("/v1/completions", R"({"prompt": [1, 5]})"))), 500);
  const std::string stream =
      server_.ask(post("/v1/completions", R"({"prompt": [[5], [1, 5]], "stream": true})"));
  EXPECT_NE(stream.find("\"error\""), std::string::npos);
  EXPECT_EQ(stream.find("[DONE]"), std::string::npos);
}

TEST(HttpServer, FaultTurnsHealthTo503) {
  TestServer server;
  EXPECT_EQ(status_of(server.ask(get("/health"))), 200);
  const std::string answer = server.ask(post("/v1/completions", R"({"prompt": [2]})"));
  EXPECT_EQ(status_of(answer), 503);
  EXPECT_NE(answer.find("\"engine_fault\""), std::string::npos) << answer;
  EXPECT_EQ(answer.find("Retry-After"), std::string::npos) << "this program cannot help any more";
  const std::string health = server.ask(get("/health"));
  EXPECT_EQ(status_of(health), 503);
  EXPECT_NE(health.find("the test broke it"), std::string::npos);
}

TEST(HttpServer, LoadingAndDraining) {
  App app({});
  HttpServerOptions options;
  options.port = 0;
  options.access_log = false;
  HttpServer http(app, options);
  http.start();
  const auto ask = [&](const std::string& request) {
    RawClient client(http.port());
    client.send(request);
    return client.receive();
  };
  EXPECT_EQ(status_of(ask(get("/health"))), 503);
  EXPECT_NE(ask(get("/v1/models")).find("Retry-After: 1"), std::string::npos);
  EXPECT_EQ(status_of(ask(get("/"))), 200);
  EchoGenerator generator;
  app.set_model(byte_model(&generator));
  EXPECT_EQ(status_of(ask(get("/health"))), 200);
  app.set_draining();
  EXPECT_EQ(status_of(ask(get("/health"))), 503);
  EXPECT_EQ(status_of(ask(kGood)), 503);
  http.stop(1);
}

TEST(HttpServer, KeysOnEveryPath) {
  AppOptions options;
  options.api_keys = {"secret"};
  TestServer server(options);
  const auto good = [&] {
    const std::string answer =
        server.ask(post("/v1/completions", R"({"prompt": "hello", "temperature": 0})",
                        "Authorization: Bearer secret\r\n"));
    EXPECT_EQ(status_of(answer), 200) << answer;
    return without_ids(body_of(answer));
  };
  const std::string before = good();
  for (const char* path :
       {"/metrics", "/v1/models", "/tokenizer_info", "/nowhere", "//health", "/health/",
        "/v1/../health", "/%68ealth", "/HEALTH", "http://localhost/health"}) {
    EXPECT_EQ(status_of(server.ask(get(path))), 401) << path;
    EXPECT_EQ(status_of(server.ask(get(path, "Authorization: Bearer secre\r\n"))), 401) << path;
    EXPECT_EQ(status_of(server.ask(
                  get(path, "Authorization: Bearer " + std::string(10000, 's') + "\r\n"))),
              401);
    EXPECT_EQ(status_of(server.ask(
                  get(path, "Authorization: Bearer secret\r\nAuthorization: Bearer x\r\n"))),
              401);
    EXPECT_NE(status_of(server.ask(get(path, "Authorization: bearer secret\r\n"))), 401) << path;
    // So long a key is no header any more; the others have all been looked at.
    EXPECT_EQ(status_of(server.ask(
                  get(path, "Authorization: Bearer " + std::string(1 << 20, 's') + "\r\n"))),
              431);
    EXPECT_EQ(good(), before) << "after " << path;
  }
  for (const char* path : {"/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions"}) {
    EXPECT_EQ(status_of(server.ask(post(path, "{}"))), 401) << path;
    EXPECT_EQ(status_of(server.ask(post(path, "{}", "Authorization: Bearer secret\r\n"))), 400)
        << path;
    EXPECT_EQ(good(), before) << "after " << path;
  }
  EXPECT_EQ(status_of(server.ask(get("/health"))), 200);
}

TEST(HttpServer, HostsOfThisMachineAndAllowedOnes) {
  HttpServerOptions options;
  options.allowed_hosts = {"models.example", "other.example:81"};
  TestServer server({}, options);
  const std::string before = without_ids(body_of(server.ask(kGood)));
  const auto status = [&](const std::string& host) {
    return status_of(server.ask("GET /v1/models HTTP/1.1\r\nHost: " + host + "\r\n\r\n"));
  };
  for (const char* host : {"localhost", "LocalHost:8080", "127.0.0.1:80", "[::1]:80",
                           "models.example", "Models.Example:8080", "other.example:81"})
    EXPECT_EQ(status(host), 200) << host;
  for (const char* host :
       {"evil.example", "models.example.evil.example", "xmodels.example:8080", "other.example",
        "other.example:82", "localhost.evil.example", "[::1].evil.example", "[", "\\localhost"}) {
    EXPECT_EQ(status(host), 403) << host;
    EXPECT_EQ(without_ids(body_of(server.ask(kGood))), before) << "after " << host;
  }
}

// Cached prefixes are shared under equal salts, so the holders of two keys must never have one.
TEST(HttpServer, KeysDoNotShareCachedPrefixes) {
  AppOptions options;
  options.api_keys = {"one", "two"};
  TestServer server(options);
  const auto salt = [&](const std::string& key, const std::string& more) {
    const std::string body = R"({"prompt": "hello", "max_tokens": 1)" + more + "}";
    EXPECT_EQ(status_of(server.ask(
                  post("/v1/completions", body, "Authorization: Bearer " + key + "\r\n"))),
              200);
    return server.generator.last_salt();
  };
  const std::string mine = R"(, "cache_salt": "mine")", forged = R"(, "cache_salt": "0:")";
  EXPECT_EQ(salt("one", ""), salt("one", ""));
  EXPECT_EQ(salt("one", mine), salt("one", mine));
  EXPECT_NE(salt("one", ""), salt("two", ""));
  EXPECT_NE(salt("one", mine), salt("two", mine));
  EXPECT_NE(salt("one", ""), salt("one", mine));
  EXPECT_NE(salt("one", ""), salt("two", forged));
}

TEST(HttpServer, CorsOnlyWhenAsked) {
  AppOptions options;
  options.cors_origins = {"https://app.example"};
  TestServer server(options);
  const std::string before = without_ids(body_of(server.ask(kGood)));
  const std::string preflight = server.ask(
      "OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://app.example\r\n\r\n");
  EXPECT_EQ(status_of(preflight), 204);
  EXPECT_NE(preflight.find("Access-Control-Allow-Origin: https://app.example\r\n"),
            std::string::npos);
  // OpenAI's client names its own headers.
  const std::string wanted = server.ask(
      "OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://app.example\r\n"
      "Access-Control-Request-Headers: authorization,content-type,x-stainless-os\r\n\r\n");
  EXPECT_NE(wanted.find("Access-Control-Allow-Headers: authorization,content-type,x-stainless-os"),
            std::string::npos)
      << wanted;
  EXPECT_EQ(status_of(server.ask(get("/health", "Origin: https://other.example\r\n"))), 403);
  EXPECT_EQ(status_of(server.ask("OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                                 "Origin: https://other.example\r\n\r\n")),
            403);
  EXPECT_EQ(server.ask(get("/health")).find("Access-Control"), std::string::npos);
  EXPECT_EQ(without_ids(body_of(server.ask(kGood))), before);
}

TEST(HttpServer, Streams) {
  TestServer server;
  const std::string answer = server.ask(post(
      "/v1/chat/completions",
      R"({"messages": [{"role": "user", "content": "h\u00e9 STOP"}], "max_tokens": 12, "temperature": 0,
          "stop": "STOP", "stream": true, "stream_options": {"include_usage": true}})"));
  EXPECT_EQ(status_of(answer), 200);
  std::string text, reason;
  Json usage;
  std::string events = unchunked(body_of(answer));
  EXPECT_TRUE(events.ends_with("data: [DONE]\n\n"));
  for (size_t at = 0; (at = events.find("data: {", at)) != std::string::npos;) {
    const size_t end = events.find("\n\n", at);
    const Json event = parse_json(events.substr(at + 6, end - at - 6), "event");
    at = end;
    EXPECT_EQ(event["object"], "chat.completion.chunk");
    if (event.contains("usage")) usage = event["usage"];
    for (const Json& choice : event["choices"]) {
      if (choice["delta"].contains("content"))
        text += choice["delta"]["content"].get<std::string>();
      if (choice["finish_reason"].is_string()) reason = choice["finish_reason"].get<std::string>();
    }
  }
  EXPECT_EQ(text, "h\xC3\xA9 ");
  EXPECT_EQ(reason, "stop");
  EXPECT_EQ(usage["prompt_tokens"], 8);
  EXPECT_TRUE(server.generator.wait_until_idle());
}

// The contract of lm-evaluation-harness: prompt and one token, the first entry null.
TEST(HttpServer, EchoedLogprobs) {
  TestServer server;
  const std::string before = without_ids(body_of(server.ask(kGood)));
  for (const size_t length : {size_t{1}, size_t{7}, size_t{4095}}) {
    Json prompts = Json::array();
    for (size_t p = 0; p<64; p += length> 100 ? 32 : 1) {
      Json ids = Json::array();
      for (size_t i = 0; i < length; ++i) ids.push_back(65 + (i + p) % 26);
      prompts.push_back(ids);
    }
    const std::string answer = server.ask(post("/v1/completions", Json{{"prompt", prompts},
                                                                       {"temperature", 0},
                                                                       {"max_tokens", 1},
                                                                       {"logprobs", 1},
                                                                       {"seed", 1234},
                                                                       {"echo", true}}
                                                                      .dump()),
                                          60);
    ASSERT_EQ(status_of(answer), 200) << answer.substr(0, 1000);
    const Json body = parse_json(body_of(answer), "answer", 64);
    ASSERT_EQ(body["choices"].size(), prompts.size());
    for (size_t i = 0; i < prompts.size(); ++i) {
      const Json& choice = body["choices"][i];
      const Json& logprobs = choice["logprobs"];
      EXPECT_EQ(choice["index"], i);
      EXPECT_EQ(choice["text"].get<std::string>().size(), length + 1);
      for (const char* list : {"tokens", "token_logprobs", "top_logprobs", "text_offset"})
        ASSERT_EQ(logprobs[list].size(), length + 1) << list;
      EXPECT_TRUE(logprobs["token_logprobs"][0].is_null());
      for (size_t t = 1; t <= length; ++t) {
        const double own = logprobs["token_logprobs"][t].get<double>();
        const Json& top = logprobs["top_logprobs"][t];
        double best = -1e9;
        for (const auto& [name, value] : top.items()) best = std::max(best, value.get<double>());
        ASSERT_EQ(own, best);  // exactly: is_greedy is decided by it
        ASSERT_EQ(logprobs["text_offset"][t], t);
      }
    }
    EXPECT_EQ(without_ids(body_of(server.ask(kGood))), before) << "after " << length;
  }
}

TEST(HttpServer, TokenizesAndBack) {
  TestServer server;
  const Json tokens = parse_json(
      body_of(
          server.ask(post("/tokenize", R"({"prompt": "h\u00e9", "add_special_tokens": false})"))),
      "answer");
  EXPECT_EQ(tokens["tokens"], Json({104, 195, 169}));
  EXPECT_EQ(tokens["count"], 3);
  EXPECT_EQ(body_of(server.ask(post("/detokenize", R"({"tokens": [104, 195, 169]})"))),
            "{\"prompt\":\"h\xC3\xA9\"}");
  EXPECT_TRUE(
      parse_json(body_of(server.ask(get("/tokenizer_info"))), "answer").contains("eos_token"));
  const Json models = parse_json(body_of(server.ask(get("/v1/models"))), "answer");
  EXPECT_EQ(models["data"][0]["id"], "bytes");
}

// promtool knows names of its own taste: vLLM's have a colon, which is all that it may say.
TEST(HttpServer, MetricsPleasePromtool) {
  if (std::system("promtool --version > /dev/null 2>&1") != 0)
    GTEST_SKIP() << "promtool is not installed";
  TestServer server;
  server.ask(kGood);
  const std::string path = fmt::format("{}/metrics-{}.txt", ::testing::TempDir(), getpid());
  std::ofstream(path) << body_of(server.ask(get("/metrics")));
  FILE* pipe = popen(("promtool check metrics < " + path + " 2>&1").c_str(), "r");
  std::string out;
  char line[1024];
  while (std::fgets(line, sizeof line, pipe)) {
    if (!std::strstr(line, "metric names should not contain ':'")) out += line;
  }
  pclose(pipe);
  unlink(path.c_str());
  EXPECT_EQ(out, "");
}

}  // namespace
}  // namespace indexcache
