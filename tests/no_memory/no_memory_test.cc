// Memory that runs out at every place of reading what comes from outside: an error each time, no
// crash, nothing lost; and a server that goes on.
#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <mutex>

#include "base/rng.h"
#include "checkpoint/test_files.h"
#include "engine/engine.h"
#include "plan/plan_file.h"
#include "server/server_test_kit.h"
#include "tests/no_memory/failing_new.h"
#include "tests/scheduler_test_kit.h"
#include "tests/server_process.h"

// The JSON library's constructor from a list loses the members that it has made when it finds no
// memory for the next. Answers are written so; what is loaded is not, and is counted below.
extern "C" const char* __lsan_default_suppressions() { return "leak:nlohmann::"; }

namespace indexcache {
namespace {

constexpr uint64_t kSeed = 20261130;

// All places to begin with, then a random one of each few: quadratic time is kept in bounds.
int64_t next_place(int64_t n, Rng& rng, int64_t all = 300) {
  return n + 1 + (n < all ? 0 : static_cast<int64_t>(rng.below(static_cast<uint64_t>(n / 6))));
}

// `body` makes the same text of what it has read every time.
void expect_bad_alloc_at_every_place(const std::function<std::string()>& body, int64_t all = 300) {
  const std::string expected = body();
  for (const auto failure : {NoMemoryAfter::Failure::kOnce, NoMemoryAfter::Failure::kForGood}) {
    Rng rng(kSeed);
    bool has_failed = true;
    int64_t num_errors = 0;
    for (int64_t n = 0; has_failed; n = next_place(n, rng, all)) {
      const int64_t before = num_allocations_alive();
      try {
        std::string found;
        {
          const NoMemoryAfter limit(n, failure);
          found = body();
        }
        EXPECT_EQ(found, expected) << "after " << n;
      } catch (const std::bad_alloc&) {
        ++num_errors;
      }
      has_failed = NoMemoryAfter::has_failed();
      ASSERT_EQ(num_allocations_alive(), before) << "after " << n;
    }
    EXPECT_GT(num_errors, 0) << "a weak test";
  }
}

// With a part of each kind, and a body's greatest depth.
std::string document() {
  std::string deep = "1";
  for (int i = 0; i < 31; ++i)
    deep = R"({"a": [)" + deep + R"(, "a text that is not short", null]})";
  return R"({"messages": [{"role": "user", "content": "a text that is not short"}, [], {}], "deep": )" +
         deep + "}";
}

TEST(NoMemory, Json) {
  const std::string text = document();
  expect_bad_alloc_at_every_place([&] { return parse_json(text, "x.json").dump(); });
  // What is refused half-way goes as well.
  const std::string refused = text.substr(0, text.size() - 40) + "]";
  expect_bad_alloc_at_every_place(
      [&] { return error_of([&] { parse_json(refused, "x.json"); }).substr(0, 20); });
}

TEST(NoMemory, Config) {
  const std::string path = model_folder() + "/config.json";
  expect_bad_alloc_at_every_place([&] { return config_json(load_config(path)).dump(); });
}

TEST(NoMemory, Checkpoint) {
  expect_bad_alloc_at_every_place([&] {
    std::string names;
    for (const std::string& name : Checkpoint::open(model_folder()).names()) names += name + "\n";
    return names;
  });
}

TEST(NoMemory, Model) {
  expect_bad_alloc_at_every_place([&] { return open_model(model_folder()).config.fingerprint; });
}

TEST(NoMemory, Plan) {
  const TempFolder folder;
  const std::string fingerprint(64, 'a'), path = folder / "plan.json";
  save_plan_file({"FFSS", fingerprint, {{3, 1.5, "FFFS"}, {2, 1.625, "FFSS"}}}, path);
  expect_bad_alloc_at_every_place([&] {
    const PlanFile file = load_plan_file(path);
    return fmt::format("{} {} {}", file.plan, file.steps.size(), file.steps.back().loss);
  });
  for (const std::string& plan : {path, std::string("1/4"), std::string("freq=4,offset=3")})
    expect_bad_alloc_at_every_place([&] { return to_string(resolve_plan(plan, 4, fingerprint)); });
}

TEST(NoMemory, TokenizerAndTemplate) {
  const std::string folder = INDEXCACHE_SOURCE_DIR "/models/demo";
  const std::string bytes = byte_level_tokenizer_json(260),
                    merges = read_file(folder + "/tokenizer.json");
  const auto tokenize = [](const std::string& json) {
    const Tokenizer tokenizer = Tokenizer::parse(json, "tokenizer.json");
    const std::vector<int32_t> ids = tokenizer.encode("The indexer h\xC3\xA9 1234", true, true);
    return fmt::format("{} {}", tokenizer.decode(ids, false), tokenizer.vocab_size());
  };
  expect_bad_alloc_at_every_place([&] { return tokenize(bytes); });
  // 8192 tokens, and a tenth of a second each time under the sanitizers.
  expect_bad_alloc_at_every_place([&] { return tokenize(merges); }, 40);
  expect_bad_alloc_at_every_place([&] {
    const TextConfig text = load_text_config(folder);
    ChatInput input;
    input.messages = Json::array({{{"role", "user"}, {"content", "hello"}}});
    return text.chat_template->render(input).text;
  });
}

const std::string kBody =
    R"({"prompt": "hello", "temperature": 0, "max_tokens": 4, "logprobs": 2})";
const std::string kMessages =
    R"({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0)";

TEST(NoMemory, BodiesOfRequests) {
  EchoGenerator generator;
  const auto model = byte_model(&generator);
  const ServerLimits limits;
  expect_bad_alloc_at_every_place([&] {
    const Json body = parse_body(kBody, limits);
    return fmt::format("{}", fmt::join(parse_completion(body, *model, limits).prompts[0], " "));
  });
  expect_bad_alloc_at_every_place([&] {
    const Json body = parse_body(kMessages + "}", limits);
    return fmt::format("{}", fmt::join(parse_chat(body, *model, limits, 0).prompts[0], " "));
  });
}

// At each place of serving a request. Where the answer is under way, or nothing can be said for
// want of memory, the connection ends.
TEST(NoMemory, ServerGoesOn) {
  TestServer server;
  const std::string good = post("/v1/completions", kBody);
  const std::string before = without_ids(body_of(server.ask(good)));
  const std::pair<const char*, std::string> requests[] = {
      {"completion", good},
      {"chat", post("/v1/chat/completions", kMessages + "}")},
      {"stream", post("/v1/chat/completions", kMessages + R"(, "stream": true})")},
      {"tokenize", post("/tokenize", R"({"prompt": "hello"})")},
      {"metrics", get("/metrics")},
      {"wrong", post("/v1/completions", R"({"prompt": "hello", "n": 0})")},
  };
  for (const auto& [name, request] : requests) {
    SCOPED_TRACE(name);
    // How much of a stream comes in one chunk is a matter of time.
    const auto content = [](const std::string& answer) {
      const std::string body = body_of(answer);
      return without_ids(answer.find("chunked\r\n") == answer.npos ? body : unchunked(body));
    };
    const std::string usual = content(server.ask(request));
    Rng rng(kSeed);
    int num_refused = 0;
    bool has_failed = true;
    for (int64_t n = 0; has_failed; n = next_place(n, rng)) {
      std::string answer;
      {
        RawClient client(server.http.port());
        const NoMemoryAfter limit(n, NoMemoryAfter::Failure::kOnce,
                                  NoMemoryAfter::Threads::kOthers);
        client.send(request);
        answer = client.receive();
      }
      has_failed = NoMemoryAfter::has_failed();
      if (status_of(answer) == 503) {
        ++num_refused;
        const Json error = parse_json(body_of(answer), "answer").at("error");
        EXPECT_EQ(error.at("code"), "out_of_memory") << answer;
        EXPECT_EQ(error.at("type"), "unavailable_error");
      } else if (std::string(name) != "metrics" && content(answer) != usual) {
        EXPECT_TRUE(answer.empty() || std::string(name) == "stream") << n << answer;
        EXPECT_EQ(answer.find("[DONE]"), std::string::npos) << answer;
      }
      ASSERT_TRUE(server.generator.wait_until_idle()) << "after " << n;
      ASSERT_EQ(without_ids(body_of(server.ask(good))), before) << "after " << n;
    }
    EXPECT_GT(num_refused, 0) << "a weak test";
  }
}

// Hears of a request without taking memory.
struct QuietClient {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<int32_t> tokens;
  int num_finished = 0;
  FinishReason reason = FinishReason::kLength;
  std::string message;

  Scheduler::OnEvent on_event() {
    tokens.reserve(64);
    return [this](GenerationEvent event) {
      const std::lock_guard lock(mutex);
      if (event.kind == GenerationEvent::Kind::kToken) tokens.push_back(event.token);
      if (event.kind != GenerationEvent::Kind::kFinished) return;
      num_finished += 1;
      reason = event.reason;
      message = std::move(event.message);
      changed.notify_all();
    };
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return num_finished > 0; });
  }
};

// At each place of the engine's threads: every request ends once, with its answer or by the fault,
// which the next one is told; nothing stays behind in the cache.
TEST(NoMemory, Engine) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 1024;  // the last request waits for pages or takes those of another
  std::vector<GenerationRequest> requests;
  for (uint64_t i = 0; i < 4; ++i) {
    GenerationRequest& request =
        requests.emplace_back(request_of(small_tokens(i / 2, i == 3 ? 600 : 150), 6));
    request.cache_salt = "a salt that is not short";
    request.num_logprobs = 2;
    if (i == 1) request.num_prompt_logprobs = 1;
  }
  std::vector<ClientAnswer> expected;
  {
    Engine engine(source, options);
    Scheduler scheduler(engine, {});
    expected = answers_of(scheduler, requests);
  }
  for (const auto failure : {NoMemoryAfter::Failure::kOnce, NoMemoryAfter::Failure::kForGood}) {
    Rng rng(kSeed);
    int num_faults = 0;
    bool has_failed = true;
    for (int64_t n = 0; has_failed; n = next_place(n, rng, 100)) {
      SCOPED_TRACE(n);
      Engine engine(source, options);
      Scheduler scheduler(engine, {.max_running = 3});
      std::vector<QuietClient> clients(requests.size());
      std::vector<Scheduler::OnEvent> listeners;
      for (QuietClient& client : clients) listeners.push_back(client.on_event());
      {
        const NoMemoryAfter limit(n, failure, NoMemoryAfter::Threads::kOthers);
        for (size_t i = 0; i < requests.size(); ++i) {
          Refusal refusal;
          if (scheduler.submit(requests[i], listeners[i], &refusal) != 0) continue;
          EXPECT_EQ(refusal.kind, Refusal::Kind::kFaulted);
          clients[i].num_finished = 1;
          clients[i].reason = FinishReason::kEngineFault;
        }
        for (QuietClient& client : clients) client.wait();
      }
      has_failed = NoMemoryAfter::has_failed();
      const SchedulerStats stats = scheduler.stats();
      for (size_t i = 0; i < clients.size(); ++i) {
        EXPECT_EQ(clients[i].num_finished, 1);
        if (clients[i].reason != FinishReason::kEngineFault) {
          EXPECT_EQ(clients[i].tokens, expected[i].tokens);
        } else {
          EXPECT_FALSE(stats.fault.empty());
        }
      }
      EXPECT_EQ(stats.free_pages, stats.pages);
      EXPECT_EQ(stats.accepted, stats.finished);
      if (stats.fault.empty()) continue;
      ++num_faults;
      EXPECT_EQ(stats.fault, "out of memory");
      Refusal refusal;
      Client late;
      EXPECT_EQ(scheduler.submit(requests[0], late.on_event(), &refusal), 0u);
      EXPECT_EQ(refusal.kind, Refusal::Kind::kFaulted);
    }
    EXPECT_GT(num_faults, 10) << "a weak test";
  }
}

TEST(NoMemory, EngineStops) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Scheduler scheduler(engine, {});
  std::vector<QuietClient> clients(3);
  for (QuietClient& client : clients) {
    client.tokens.reserve(1024);
    EXPECT_NE(scheduler.submit(request_of({1, 2}, 1000), client.on_event(), nullptr), 0u);
  }
  {
    const NoMemoryAfter limit(0, NoMemoryAfter::Failure::kForGood, NoMemoryAfter::Threads::kOthers);
    scheduler.stop();
  }
  for (const QuietClient& client : clients) {
    EXPECT_EQ(client.num_finished, 1);
    EXPECT_TRUE(client.reason == FinishReason::kDrained ||
                client.reason == FinishReason::kEngineFault);
  }
  EXPECT_EQ(scheduler.stats().free_pages, scheduler.stats().pages);
}

// The program itself, whose libraries get their memory from malloc.
TEST(NoMemory, Commands) {
  if (!kLimitAddressSpace) GTEST_SKIP() << "sanitizers have a malloc of their own";
  const TempFolder folder;
  const std::string tokens = folder.write("ids.json", "[1, 2, 3]");
  const std::vector<std::string> commands[] = {
      {"inspect", "-m", model_folder(), "--json"},
      {"logits", "-m", model_folder(), "--tokens", tokens, "-o", folder / "out.safetensors", "-t",
       "2"},
      {"run", "-m", model_folder(), "-p", "hello", "-n", "2", "--temp", "0"},
  };
  ProgramOptions options;
  const std::string seen = folder / "seen";
  options.environment = {{"LD_PRELOAD", INDEXCACHE_FAILING_MALLOC}, {"NO_MEMORY_SEEN", seen}};
  for (const std::vector<std::string>& command : commands) {
    for (const bool for_good : {false, true}) {
      SCOPED_TRACE(command[0] + (for_good ? ", for good" : ", once"));
      Rng rng(kSeed);
      int num_errors = 0;
      bool has_failed = true;
      for (int64_t n = 0; has_failed; n = next_place(n, rng, 40)) {
        options.environment.resize(2);
        options.environment.emplace_back("NO_MEMORY_AFTER", std::to_string(n));
        if (for_good) options.environment.emplace_back("NO_MEMORY_FOR_GOOD", "1");
        std::filesystem::remove(folder / "out.safetensors");
        const ProgramResult result = run_program(command, options);
        has_failed = std::filesystem::remove(seen);
        ASSERT_FALSE(result.timed_out) << n;
        ASSERT_EQ(result.signal, 0) << "after " << n << ": " << result.err;
        if (result.exit_code == 0) continue;  // something could do without
        ++num_errors;
        ASSERT_EQ(result.exit_code, 1) << "after " << n << ": " << result.err;
        ASSERT_EQ(error_lines(result.err).size(), 1u) << "after " << n << ": " << result.err;
        EXPECT_FALSE(std::filesystem::exists(folder / "out.safetensors")) << "after " << n;
      }
      EXPECT_GT(num_errors, 0) << "a weak test";
    }
  }
}

}  // namespace
}  // namespace indexcache
