// What requests of one batch must not do to each other: change a bit, poison, see, or lose events.

#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "base/rng.h"
#include "engine/scheduler.h"
#include "tests/scheduler_test_kit.h"

namespace indexcache {
namespace {

// --- deterministic mode
// ---------------------------------------------------------------------------

GenerationRequest scored_request(uint64_t seed, int64_t num_prompt, int64_t max_tokens) {
  GenerationRequest request = request_of(small_tokens(seed, num_prompt), max_tokens);
  request.num_logprobs = 3;
  if (seed % 2 == 1) request.sampling = {.temperature = 1, .top_p = 0.95, .seed = seed};
  return request;
}

void expect_same_bits_everywhere(const ModelSource& source, ComputeChoice compute) {
  RunOptions options = scheduler_engine_options(compute);
  options.cache_tokens = 8192;
  const SchedulerOptions deterministic{.deterministic = true};
  std::vector<GenerationRequest> requests;
  for (uint64_t i = 0; i < 8; ++i)
    requests.push_back(scored_request(100 + i, 30 + static_cast<int64_t>(i * 61), 40));
  GenerationRequest prompt_scored = requests[3];
  prompt_scored.num_prompt_logprobs = 2;

  std::vector<ClientAnswer> alone;
  ClientAnswer prompt_alone;
  {
    Engine engine(source, options);
    SchedulerOptions no_cache = deterministic;
    no_cache.prefix_cache = false;
    Scheduler scheduler(engine, no_cache);
    for (const GenerationRequest& request : requests)
      alone.push_back(answer_of(scheduler, request));
    prompt_alone = answer_of(scheduler, prompt_scored);
    EXPECT_TRUE(same_bits(prompt_alone.logprobs, alone[3].logprobs));
  }
  for (const int64_t chunk_tokens : {512, 64, 5}) {
    for (const int num_threads : {1, 2}) {
      const std::string what = fmt::format("chunk {}, {} threads", chunk_tokens, num_threads);
      options.num_threads = num_threads;
      Engine engine(source, options);
      SchedulerOptions chunked = deterministic;
      chunked.chunk_tokens = chunk_tokens;
      chunked.max_running = 6;
      Scheduler scheduler(engine, chunked);
      for (const char* round : {"first", "from the prefix cache"}) {
        const std::vector<ClientAnswer> together = answers_of(scheduler, requests);
        for (size_t i = 0; i < requests.size(); ++i)
          expect_same_bits(together[i], alone[i], fmt::format("{} {} {}", i, what, round));
      }
      EXPECT_GT(scheduler.stats().prefix_hit_tokens, 0) << "a weak test";
      expect_same_bits(answer_of(scheduler, prompt_scored), prompt_alone, what);
    }
  }
  // So few pages that requests must give way.
  options.cache_tokens = 640;
  Engine engine(source, options);
  Scheduler scheduler(engine, deterministic);
  const std::vector<ClientAnswer> crowded = answers_of(scheduler, requests);
  for (size_t i = 0; i < requests.size(); ++i)
    expect_same_bits(crowded[i], alone[i], fmt::format("crowded {}", i));
}

TEST(Deterministic, F32BitsDoNotDependOnTheBatch) {
  expect_same_bits_everywhere(small_model("FFSFS"), ComputeChoice::kF32);
}

TEST(Deterministic, BF16BitsDoNotDependOnTheBatch) {
  expect_same_bits_everywhere(small_model("FFSFS"), ComputeChoice::kBF16);
}

// As many at once as a server takes, most of whose prompts begin as another's does, in batches and
// chunks of any size: each as if alone.
TEST(Deterministic, BatchesOf2To64WithSharedBeginnings) {
  constexpr uint64_t kSeed = 20261130;
  SCOPED_TRACE(fmt::format("seed {}", kSeed));
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options(ComputeChoice::kBF16);
  options.cache_tokens = 64 * 320;
  std::vector<GenerationRequest> requests;
  for (uint64_t i = 0; i < 64; ++i) {
    // A quarter begin with one text, a quarter with the next, and so on.
    GenerationRequest request = scored_request(600 + i, 1 + static_cast<int64_t>(i * 37 % 90), 12);
    const std::vector<int32_t> beginning = small_tokens(700 + i % 4, 64 * (i % 4));
    request.prompt.insert(request.prompt.begin(), beginning.begin(), beginning.end());
    if (i % 8 == 5) request.num_prompt_logprobs = 1;
    requests.push_back(std::move(request));
  }
  Engine engine(source, options);
  std::vector<ClientAnswer> alone;
  {
    Scheduler scheduler(engine, {.prefix_cache = false, .deterministic = true});
    for (const GenerationRequest& request : requests)
      alone.push_back(answer_of(scheduler, request));
  }
  Rng rng(kSeed);
  int64_t num_hits = 0;
  for (const int64_t batch : {2, 3, 5, 8, 16, 33, 64}) {
    for (int trial = 0; trial < 2; ++trial) {
      SchedulerOptions some{.max_running = batch, .deterministic = true};
      some.chunk_tokens = 1 + static_cast<int64_t>(rng.below(256));
      some.mixed_chunk_tokens = 1 + static_cast<int64_t>(rng.below(256));
      some.logit_bytes = static_cast<int64_t>(4 * kSmallVocab * (1 + rng.below(200)));
      const std::string what =
          fmt::format("batch {} chunk {} mixed {} logits {}", batch, some.chunk_tokens,
                      some.mixed_chunk_tokens, some.logit_bytes);
      std::vector<size_t> order(requests.size());
      std::iota(order.begin(), order.end(), size_t{0});
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
      std::vector<GenerationRequest> shuffled;
      for (const size_t i : order) shuffled.push_back(requests[i]);
      Scheduler scheduler(engine, some);
      const std::vector<ClientAnswer> together = answers_of(scheduler, shuffled);
      for (size_t i = 0; i < order.size(); ++i)
        expect_same_bits(together[i], alone[order[i]], fmt::format("{} {}", order[i], what));
      num_hits += scheduler.stats().prefix_hit_tokens;
    }
  }
  EXPECT_GT(num_hits, 7 * 2 * 64 * 10) << "a weak test";
}

// --- poison
// ---------------------------------------------------------------------------------------

constexpr int32_t kPoison = kSmallVocab - 1;

// The embedding of one token is NaN or infinity.
ModelSource poisoned_model(float value) {
  ModelSource source = small_model("FFSFS");
  const TensorView* embedding = source.checkpoint.find("model.embed_tokens.weight");
  const int64_t hidden = source.config.hidden_size;
  auto* row = const_cast<uint8_t*>(embedding->data) + kPoison * hidden * 4;
  std::memcpy(row + 4 * 5, &value, sizeof(value));
  return source;
}

// As small_tokens, without the poisoned one.
std::vector<int32_t> clean_tokens(uint64_t seed, int64_t count) {
  std::vector<int32_t> tokens = small_tokens(seed, count);
  for (int32_t& token : tokens) token %= kPoison;
  return tokens;
}

TEST(Poison, StaysInItsRequest) {
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const ComputeChoice compute : {ComputeChoice::kF32, ComputeChoice::kBF16}) {
      SCOPED_TRACE(fmt::format("{} {}", value, compute == ComputeChoice::kBF16));
      const ModelSource source = poisoned_model(value);
      RunOptions options = scheduler_engine_options(compute);
      options.cache_tokens = 4096;
      Engine engine(source, options);
      Scheduler scheduler(engine, {.chunk_tokens = 64, .deterministic = true});
      std::vector<GenerationRequest> healthy;
      for (uint64_t i = 0; i < 4; ++i) {
        healthy.push_back(request_of(clean_tokens(200 + i, 100), 30));
        healthy.back().stop_tokens = {kPoison};  // which the model may say by itself
        healthy.back().num_logprobs = 1;
      }
      std::vector<ClientAnswer> expected;
      for (const GenerationRequest& request : healthy)
        expected.push_back(answer_of(scheduler, request));

      // Poison in the first page, in a later one, and as the last token; beginnings are shared with
      // the healthy.
      for (const size_t place : {size_t{3}, size_t{80}, size_t{99}}) {
        std::vector<GenerationRequest> all = healthy;
        for (int twice = 0; twice < 2; ++twice) {
          all.insert(all.begin() + 2, healthy[0]);
          all[2].prompt[place] = kPoison;
        }
        const std::vector<ClientAnswer> answers = answers_of(scheduler, all);
        for (size_t i = 0; i < all.size(); ++i) {
          if (i == 2 || i == 3) {
            EXPECT_EQ(answers[i].reason, FinishReason::kNanLogits);
            EXPECT_TRUE(answers[i].tokens.empty());
            EXPECT_NE(answers[i].message.find("NaN"), std::string::npos) << answers[i].message;
          } else {
            expect_same_bits(answers[i], expected[i < 2 ? i : i - 2], fmt::format("request {}", i));
          }
        }
      }
      ASSERT_TRUE(scheduler.drain(60));
      const SchedulerStats stats = scheduler.stats();
      EXPECT_EQ(stats.free_pages, stats.pages);
    }
  }
}

TEST(Poison, ItsPagesAreDroppedFromTheCache) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Scheduler scheduler(engine, {});
  const GenerationRequest request = request_of(small_tokens(300, 200), 5);
  const ClientAnswer expected = answer_of(scheduler, request);
  EXPECT_EQ(answer_of(scheduler, request).cached_prompt_tokens, 192);
  // Break what the cache holds, as a bad memory cell would. The engine's thread is idle.
  ASSERT_TRUE(scheduler.stats().cached_pages > 0);
  const PagedRows latent = engine.cache.latent(0);
  for (int64_t i = 0; i < engine.cache.shape().num_pages * latent.page_bytes / 4; ++i) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(latent.base + 4 * i, &nan, sizeof(nan));
  }
  EXPECT_EQ(answer_of(scheduler, request).reason, FinishReason::kNanLogits);
  const ClientAnswer again = answer_of(scheduler, request);
  EXPECT_EQ(again.cached_prompt_tokens, 0) << "computed anew";
  EXPECT_EQ(again.tokens, expected.tokens);
}

// --- tenants
// --------------------------------------------------------------------------------------

TEST(Tenants, ShareNothingUnlessTheirSaltIsTheSame) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Scheduler scheduler(engine, {});
  GenerationRequest request = request_of(small_tokens(400, 200), 2);
  const auto cached = [&](const std::string& salt) {
    request.cache_salt = salt;
    return answer_of(scheduler, request).cached_prompt_tokens;
  };
  EXPECT_EQ(cached("a"), 0);
  EXPECT_EQ(cached("a"), 192);
  EXPECT_EQ(cached("b"), 0);
  EXPECT_EQ(cached(""), 0);
  EXPECT_EQ(cached("b"), 192);
}

// --- many threads
// ---------------------------------------------------------------------------------

// Every phase of a request meets a cancel, while others share its beginning. Meant to be run with
// -DINDEXCACHE_SANITIZE=thread too: no path of it reaches OpenMP, which TSan does not understand,
// unless the CPU has tiles.
TEST(Stress, SubmitAndCancelFromManyThreads) {
  constexpr uint64_t kSeed = 20261124;
  constexpr int kThreads = 4, kRequests = 40;
  SCOPED_TRACE(fmt::format("seed {}", kSeed));
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.context = 400;
  options.cache_tokens = 1024;  // 16 pages: preemptions happen
  Engine engine(source, options);
  std::vector<ClientAnswer> expected;
  std::vector<GenerationRequest> kinds;
  for (uint64_t i = 0; i < 6; ++i) {
    std::vector<int32_t> prompt = small_tokens(500 + i / 3, 130);
    const std::vector<int32_t> rest = small_tokens(510 + i, static_cast<int64_t>(i) * 17);
    prompt.insert(prompt.end(), rest.begin(), rest.end());
    kinds.push_back(request_of(prompt, 10 + static_cast<int64_t>(i) * 10));
  }
  Scheduler scheduler(
      engine, {.max_running = 6, .max_waiting = 4, .chunk_tokens = 96, .deterministic = true});
  for (const GenerationRequest& kind : kinds) expected.push_back(answer_of(scheduler, kind));
  const SchedulerStats before = scheduler.stats();

  std::atomic<int64_t> refused = 0, cancelled = 0, finished = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(kSeed + static_cast<uint64_t>(t));
      for (int i = 0; i < kRequests; ++i) {
        const size_t kind = rng.below(kinds.size());
        Client client;
        Refusal refusal;
        const auto id = scheduler.submit(kinds[kind], client.on_event(), &refusal);
        if (id == 0) {
          EXPECT_EQ(refusal.kind, Refusal::Kind::kQueueFull);
          refused += 1;
          std::this_thread::yield();
          continue;
        }
        if (rng.below(2) == 0) {
          client.wait_for_tokens(rng.below(12));
          if (rng.below(3) == 0)
            std::this_thread::sleep_for(std::chrono::microseconds(rng.below(3000)));
          scheduler.cancel(id);
          EXPECT_EQ(client.so_far().num_finished, 1) << "told before cancel() returns";
          scheduler.cancel(id);
        }
        const ClientAnswer answer = client.wait();
        EXPECT_TRUE(answer.in_order);
        EXPECT_EQ(answer.num_finished, 1);
        if (answer.reason == FinishReason::kCancelled) {
          cancelled += 1;
          ASSERT_LE(answer.tokens.size(), expected[kind].tokens.size());
          EXPECT_TRUE(std::equal(answer.tokens.begin(), answer.tokens.end(),
                                 expected[kind].tokens.begin()));
        } else {
          finished += 1;
          EXPECT_EQ(answer.tokens, expected[kind].tokens);
        }
        scheduler.stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(scheduler.drain(60));
  const SchedulerStats stats = scheduler.stats();
  EXPECT_EQ(refused + cancelled + finished, kThreads * kRequests);
  EXPECT_EQ(stats.refused - before.refused, refused);
  EXPECT_EQ(stats.cancelled - before.cancelled, cancelled);
  EXPECT_EQ(stats.finished - before.finished, finished);
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.free_pages, stats.pages);
}

}  // namespace
}  // namespace indexcache
