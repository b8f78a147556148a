// What happens to a real server, on a real engine: too many requests, too little room, poison,
// clients that leave at any moment. After each fault a good request gets the same bytes as before
// it.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <atomic>
#include <filesystem>
#include <fstream>

#include "base/rng.h"
#include "checkpoint/test_files.h"
#include "tests/server_requests.h"

namespace indexcache {
namespace {

TEST(ServeFaults, TooManyAreRefusedAndTheRestAreAnsweredAsIfAlone) {
  Server server(with({"--deterministic", "--max-running", "2", "--max-waiting", "2"}));
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  // More answers than there is room for are never begun.
  const std::string crowd =
      server.ask(post("/v1/completions", R"({"prompt": [5, 6], "n": 128, "max_tokens": 4000})"));
  EXPECT_EQ(status_of(crowd), 400) << crowd;
  const std::string request = request_of(tokens_of(2, 60), 200);
  const std::string alone = choices(server.ask(request));
  constexpr int kSent = 24;
  std::atomic<int> answered = 0, refused = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < kSent; ++i) {
    threads.emplace_back([&] {
      const std::string answer = server.ask(request);
      if (status_of(answer) == 200) {
        ++answered;
        EXPECT_EQ(choices(answer), alone);
      } else {
        ++refused;
        EXPECT_EQ(status_of(answer), 429) << answer;
        EXPECT_NE(answer.find("\r\nRetry-After: "), std::string::npos) << answer;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(answered + refused, kSent);
  EXPECT_GE(answered, 4);
  EXPECT_EQ(metric(server, "indexcache_requests_refused_total"), refused);
  EXPECT_EQ(metric(server, "indexcache_requests_accepted_total"), answered + 2);
  expect_recovered(server, before);
}

TEST(ServeFaults, ACacheForOneServesEight) {
  Server server(with({"--deterministic", "-c", "512", "--cache-tokens", "512"}));
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  std::vector<std::string> requests, alone;
  for (uint64_t i = 0; i < 8; ++i) {
    requests.push_back(request_of(tokens_of(10 + i, 100 + 20 * static_cast<int64_t>(i)), 120));
    alone.push_back(choices(server.ask(requests.back())));
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < requests.size(); ++i) {
    threads.emplace_back([&, i] { EXPECT_EQ(choices(server.ask(requests[i])), alone[i]) << i; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(metric(server, "vllm:num_preemptions_total"), 0) << "a weak test";
  const std::string too_long = server.ask(request_of(tokens_of(3, 500), 100));
  EXPECT_EQ(status_of(too_long), 400);
  for (const char* part : {"context_length_exceeded", "512", "600"})
    EXPECT_NE(too_long.find(part), std::string::npos) << too_long;
  expect_recovered(server, before);
}

TEST(ServeFaults, ClientsThatLeaveAtAnyMoment) {
  constexpr uint64_t kSeed = 20261124;
  SCOPED_TRACE(fmt::format("seed {}", kSeed));
  Server server(with({"--deterministic", "--max-running", "3", "--chunk", "64"}));
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(kSeed + t);
      for (int i = 0; i < 12; ++i) {
        RawClient client(server.port());
        // Half of them share their beginning.
        client.send(request_of(tokens_of(20 + rng.below(2) * (1 + t), 300), 200, rng.below(2)));
        std::this_thread::sleep_for(std::chrono::microseconds(rng.below(30000)));
      }
    });
  }
  for (int i = 0; i < 10; ++i) EXPECT_EQ(good(server), before) << "meanwhile";
  for (std::thread& thread : threads) thread.join();
  expect_recovered(server, before);
}

// Whoever takes nothing of what is sent is given up, and computed for no longer.
TEST(ServeFaults, ClientsThatDoNotReadTheirStream) {
  Server server(with({"--deterministic", "--write-timeout", "0.5"}));
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  constexpr int kClients = 2, kChoices = 32;
  const std::string endless =
      post("/v1/completions", fmt::format(R"({{"prompt": [5, 6, 7], "max_tokens": 4000, "n": {},
                                          "ignore_eos": true, "logprobs": 20, "stream": true}})",
                                          kChoices));
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < kClients; ++i) {
    clients.push_back(std::make_unique<RawClient>(server.port()));
    const int few = 4096;
    setsockopt(clients.back()->fd(), SOL_SOCKET, SO_RCVBUF, &few, sizeof few);
    clients.back()->send(endless);
  }
  constexpr int kCancelled = kClients * kChoices;
  for (int i = 0; i < 12000 && metric(server, "indexcache_requests_cancelled_total") < kCancelled;
       ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(metric(server, "indexcache_requests_cancelled_total"), kCancelled);
  expect_recovered(server, before);
}

// The weights have NaN in the embedding of one token: who uses it gets an error, nobody else does.
TEST(ServeFaults, APoisonedRequestFailsAlone) {
  constexpr int kPoisoned = 7;
  const std::string folder = model_folder() + "-poisoned";
  std::filesystem::copy(model_folder(), folder, std::filesystem::copy_options::recursive);
  const std::string path = folder + "/model.safetensors";
  std::string bytes = read_file(path);
  uint64_t size;
  std::memcpy(&size, bytes.data(), 8);
  const Json header = parse_json(std::string_view(bytes).substr(8, size), "header");
  const Json& embedding = header["model.embed_tokens.weight"];
  const size_t row_bytes = embedding["shape"][1].get<size_t>() * 2;
  ASSERT_EQ(embedding["dtype"], "BF16");
  bytes.replace(8 + size + embedding["data_offsets"][0].get<size_t>() + kPoisoned * row_bytes,
                row_bytes, std::string(row_bytes, '\xff'));
  std::ofstream(path, std::ios::binary) << bytes;

  Server server({"-m", folder, "-t", "1", "--port", "0", "--deterministic"});
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  std::vector<int32_t> poisoned = tokens_of(1, 300);
  poisoned[200] = kPoisoned;
  const std::string other = request_of(tokens_of(4, 100), 100);
  const std::string alone = choices(server.ask(other));
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      const std::string answer = server.ask(request_of(poisoned, 5));
      EXPECT_EQ(status_of(answer), 500);
      EXPECT_NE(answer.find("non_finite_logits"), std::string::npos) << answer;
    });
    threads.emplace_back([&] { EXPECT_EQ(choices(server.ask(other)), alone); });
  }
  for (std::thread& thread : threads) thread.join();
  const std::string stream = server.ask(request_of(poisoned, 5, true));
  EXPECT_NE(stream.find("\"error\""), std::string::npos) << stream;
  EXPECT_EQ(stream.find("[DONE]"), std::string::npos);
  EXPECT_EQ(metric(server, "vllm:corrupted_requests_total"), 4);
  // What is left of it in the cache harms nobody who begins in the same way.
  std::vector<int32_t> same_beginning = poisoned;
  same_beginning[200] = 11;
  EXPECT_EQ(status_of(server.ask(request_of(same_beginning, 5))), 200);
  expect_recovered(server, before);
  std::filesystem::remove_all(folder);
}

// An engine that fails serves nobody any more: it says so and why, and whoever supervises it hears
// of it when it is stopped.
TEST(ServeFaults, TheEngineFails) {
  Server server(with({"--force", "matmul=broken"}));
  ASSERT_TRUE(server.ready()) << server.log();
  EXPECT_EQ(status_of(server.ask(get("/health"))), 200);
  const std::string stream = server.ask(request_of(tokens_of(1, 40), 5, true));
  EXPECT_NE(stream.find("engine_fault"), std::string::npos) << stream;
  EXPECT_EQ(stream.find("[DONE]"), std::string::npos) << stream;
  for (int i = 0; i < 2; ++i) {
    const std::string answer = server.ask(kGood);
    EXPECT_EQ(status_of(answer), 503) << answer;
    EXPECT_NE(answer.find("engine_fault"), std::string::npos) << answer;
    const std::string health = server.ask(get("/health"));
    EXPECT_EQ(status_of(health), 503) << health;
    EXPECT_NE(health.find("broken"), std::string::npos) << health;
  }
  EXPECT_TRUE(server.wait_for_log("the engine failed: ")) << server.log();
  EXPECT_EQ(metric(server, "indexcache_engine_healthy"), 0);
  EXPECT_EQ(metric(server, "indexcache_cache_free_pages"),
            metric(server, "indexcache_cache_pages"));
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 1);
}

// Who waits for an answer hears of the fault; who only stays connected holds up nothing.
TEST(ServeFaults, TheEngineFailsAndTheServerEnds) {
  Server server(with({"--force", "matmul=broken", "--exit-on-fault"}));
  ASSERT_TRUE(server.ready()) << server.log();
  RawClient idle(server.port());
  EXPECT_TRUE(idle.connected());
  const std::string stream =
      server.ask(post("/v1/completions", R"({"prompt": [5, 6, 7], "n": 3, "stream": true})"));
  EXPECT_NE(stream.find("engine_fault"), std::string::npos) << stream;
  EXPECT_EQ(server.exit_code(), 1) << server.log();
  EXPECT_NE(server.log().find("the engine failed: "), std::string::npos) << server.log();
}

// Half of the descriptors are for connections; those that have been idle the longest make room.
TEST(ServeFaults, FewDescriptors) {
  Server server(with({"--deterministic"}), {}, [] {
    const rlimit few = {64, 64};
    setrlimit(RLIMIT_NOFILE, &few);
  });
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  {
    std::vector<std::unique_ptr<RawClient>> clients;
    for (int i = 0; i < 200; ++i) clients.push_back(std::make_unique<RawClient>(server.port()));
    clients.back()->send(kGood);
    EXPECT_EQ(choices(clients.back()->receive(30)), before);
    EXPECT_LT(server.num_descriptors(), 64);
    EXPECT_GT(server.num_descriptors(), 32) << "a weak test";
    const double used = server.cpu_seconds();
    std::this_thread::sleep_for(std::chrono::seconds(1));
    EXPECT_LT(server.cpu_seconds() - used, 0.3) << "it does not spin";
  }
  expect_recovered(server, before);
}

// The whole machine is out of descriptors or buffers, or a client left before it was greeted: the
// connection waits, and is served when it can be.
TEST(ServeFaults, ConnectionsThatCannotBeAccepted) {
  if (!kLimitAddressSpace) GTEST_SKIP() << "sanitizers want to be loaded first";
  const int errors[] = {ENFILE, ENOBUFS, ENOMEM, EMFILE, ECONNABORTED,
                        EPROTO, EINTR,   EPERM,  ENFILE};
  Server server(with({"--deterministic"}),
                {{"LD_PRELOAD", INDEXCACHE_FAILING_ACCEPT},
                 {"ACCEPT_ERRORS", fmt::format("{}", fmt::join(errors, ","))}});
  ASSERT_TRUE(server.ready()) << server.log();
  const double begin = monotonic_seconds();
  const std::string before = good(server);  // through all of them
  EXPECT_GT(monotonic_seconds() - begin, 0.1) << "a weak test: it pauses after each";
  expect_recovered(server, before);
}

// Deadlines and durations come from a clock that nobody sets.
TEST(ServeFaults, TheClockJumps) {
  std::string library;
  for (const char* path : {"/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
                           "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"})
    if (std::filesystem::exists(path)) library = path;
  if (library.empty() || !kLimitAddressSpace) GTEST_SKIP() << "needs libfaketime, no sanitizers";
  const std::string offset = model_folder() + "-clock";
  const auto jump = [&](const std::string& to) {
    std::ofstream(offset + ".new") << to << "\n";
    std::filesystem::rename(offset + ".new", offset);
  };
  jump("+0");
  Server server(with({"--deterministic"}), {{"LD_PRELOAD", library},
                                            {"FAKETIME_TIMESTAMP_FILE", offset},
                                            {"FAKETIME_NO_CACHE", "1"},
                                            {"FAKETIME_DONT_FAKE_MONOTONIC", "1"}});
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  for (const char* to : {"+10d", "-10d", "+3000d"}) {
    RawClient idle(server.port()), slow(server.port()), streaming(server.port());
    streaming.send(request_of(tokens_of(5, 40), 300, true));
    slow.send(kGood.substr(0, 100));
    jump(to);
    EXPECT_EQ(good(server), before) << to;
    const std::string stream = streaming.receive(30);
    EXPECT_EQ(status_of(stream), 200);
    EXPECT_NE(stream.find("[DONE]"), std::string::npos) << to << stream;
    slow.send(kGood.substr(100));
    EXPECT_EQ(choices(slow.receive(30)), before) << to;
    idle.send(kGood);
    EXPECT_EQ(choices(idle.receive(30)), before) << to;
  }
  const std::string metrics = server.ask(get("/metrics"));
  for (size_t at = 0; (at = metrics.find("} -", at)) != std::string::npos; ++at)
    ADD_FAILURE() << metrics.substr(metrics.rfind('\n', at), 200);
  EXPECT_LT(metric(server, "vllm:e2e_request_latency_seconds_sum"), 3600);
  expect_recovered(server, before);
}

// Loading hangs where it reads config.json, as on a file system whose server is gone.
TEST(ServeFaults, SignalWhileLoading) {
  const auto size = std::filesystem::file_size(model_folder() + "/config.json");
  for (const int number : {SIGTERM, SIGINT}) {
    Server server(with({}), {}, [&] { hang_reads(static_cast<uint32_t>(size)); });
    ASSERT_TRUE(server.listening()) << server.log();
    const std::string health = server.ask(get("/health"));
    EXPECT_EQ(status_of(health), 503);
    EXPECT_NE(health.find("being loaded"), std::string::npos) << health;
    server.signal(number);
    EXPECT_EQ(server.exit_code(), 128 + number) << server.log();
  }
}

TEST(ServeFaults, TooLittleMemoryIsSaidBeforeItIsTaken) {
  const ProgramResult cache = run_program({"serve", "-m", model_folder(), "--port", "0",
                                           "--cache-tokens", std::to_string(int64_t{1} << 34)});
  expect_failure(cache, 1);
  EXPECT_NE(cache.err.find("needs "), std::string::npos) << cache.err;
  EXPECT_NE(cache.err.find("available"), std::string::npos) << cache.err;
}

TEST(ServeFaults, AddressOfAnotherMachine) {
  const ProgramResult elsewhere =
      run_program({"serve", "-m", model_folder(), "--port", "0", "--host", "192.0.2.1"});
  expect_failure(elsewhere, 1);
  EXPECT_NE(elsewhere.err.find("cannot listen on 192.0.2.1"), std::string::npos) << elsewhere.err;
}

// No request can make it call out: the program does not even import what opens connections.
TEST(ServeFaults, CannotOpenConnections) {
  if (!kLimitAddressSpace) GTEST_SKIP() << "sanitizers import everything";
  const std::string program = read_file(INDEXCACHE_BINARY);
  for (const char* name : {"connect", "getaddrinfo", "sendto"}) {
    const std::string symbol = std::string(1, '\0') + name + std::string(1, '\0');
    EXPECT_EQ(program.find(symbol), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace indexcache
