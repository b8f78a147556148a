#include "engine/scheduler.h"

#include <cmath>

#include "engine/request_batch.h"
#include "tests/scheduler_test_kit.h"

namespace indexcache {
namespace {

constexpr double kLong = 60;  // seconds; nothing waits that long unless it is broken

TEST(Scheduler, OneRequestIsGenerate) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  const std::vector<int32_t> prompt = small_tokens(1, 150);
  SequenceCache sequence;
  const GenerateResult expected = generate(engine, sequence, prompt, {.max_tokens = 40});
  engine.cache.release(sequence);

  Scheduler scheduler(engine, {});
  const ClientAnswer answer = answer_of(scheduler, request_of(prompt, 40));
  EXPECT_EQ(answer.tokens, expected.tokens);
  EXPECT_TRUE(answer.in_order);
  EXPECT_EQ(answer.num_prompt_done, 1);
  EXPECT_EQ(answer.num_finished, 1);
  EXPECT_EQ(answer.reason, FinishReason::kLength);
  const SchedulerStats stats = scheduler.stats();
  EXPECT_EQ(stats.free_pages, stats.pages);
  EXPECT_EQ(stats.prompt_tokens, 150);
  EXPECT_EQ(stats.generated_tokens, 40);
  EXPECT_EQ(stats.steps, 40);
  EXPECT_GT(stats.times.total(), 0);
}

TEST(Scheduler, ManyAtOnceAreEachTheSameAsAlone) {
  const ModelSource source = small_model("FSFFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 8192;
  Engine engine(source, options);
  std::vector<GenerationRequest> requests;
  for (uint64_t i = 0; i < 12; ++i) {
    requests.push_back(request_of(small_tokens(i, 1 + static_cast<int64_t>(i * 53 % 300)), 20));
    if (i % 3 == 1) requests.back().sampling = {.temperature = 0.8, .seed = i};
  }
  std::vector<ClientAnswer> alone;
  {
    Scheduler scheduler(engine, {.prefix_cache = false});
    for (const GenerationRequest& request : requests)
      alone.push_back(answer_of(scheduler, request));
  }
  Scheduler scheduler(engine, {.max_running = 8, .chunk_tokens = 96});
  const std::vector<ClientAnswer> together = answers_of(scheduler, requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(together[i].tokens, alone[i].tokens) << i;
    EXPECT_TRUE(together[i].in_order) << i;
  }
}

// Against the logits of one pass over the prompt.
TEST(Scheduler, PromptLogprobsAreThoseOfThePrompt) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  const std::vector<int32_t> prompt = small_tokens(2, 200);
  std::vector<float> rows;
  SequenceCache sequence;
  PrefillHooks hooks;
  hooks.chunk_logits = [&](int64_t, std::span<const float> chunk) {
    rows.insert(rows.end(), chunk.begin(), chunk.end());
  };
  prefill(engine, sequence, prompt, nullptr, hooks);
  engine.cache.release(sequence);

  for (const int64_t chunk_tokens : {512, 64, 7}) {
    SCOPED_TRACE(chunk_tokens);
    Scheduler scheduler(engine, {.chunk_tokens = chunk_tokens});
    answer_of(scheduler, request_of(prompt, 1));
    GenerationRequest request = request_of(prompt, 1);
    request.num_logprobs = 2;
    request.num_prompt_logprobs = 3;
    const ClientAnswer answer = answer_of(scheduler, request);
    EXPECT_EQ(answer.cached_prompt_tokens, 0) << "cached positions have no logits";
    ASSERT_EQ(answer.prompt_logprobs.size(), prompt.size() - 1);
    for (size_t i = 0; i + 1 < prompt.size(); ++i) {
      const std::span<const float> row = std::span(rows).subspan(i * kSmallVocab, kSmallVocab);
      const TokenLogprob& found = answer.prompt_logprobs[i];
      EXPECT_EQ(found.token, prompt[i + 1]);
      EXPECT_NEAR(found.logprob, -negative_log_likelihood(row, found.token), 2e-5) << i;
      ASSERT_EQ(found.top.size(), 3u);
      EXPECT_GE(found.top[0].second, found.top[1].second);
      EXPECT_EQ(found.rank == 0, found.top[0].first == found.token);
      EXPECT_EQ(found.rank == 0, found.logprob == found.top[0].second) << "the same number";
    }
    ASSERT_EQ(answer.logprobs.size(), 1u);
    EXPECT_EQ(answer.logprobs[0].rank, 0) << "greedy";
    EXPECT_EQ(answer.logprobs[0].top.size(), 2u);

    // Scoring alone: no token is generated.
    request.max_tokens = 0;
    const ClientAnswer scored = answer_of(scheduler, request);
    EXPECT_TRUE(scored.tokens.empty());
    EXPECT_EQ(scored.prompt_logprobs.size(), prompt.size() - 1);
    EXPECT_EQ(scored.reason, FinishReason::kLength);
  }
}

TEST(Scheduler, StopTokensEndBeforeTheyAreGivenOut) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Scheduler scheduler(engine, {});
  GenerationRequest request = request_of(small_tokens(3, 90), 30);
  const std::vector<int32_t> free = answer_of(scheduler, request).tokens;
  ASSERT_EQ(free.size(), 30u);
  const int32_t stop = free[5];
  const size_t first =
      static_cast<size_t>(std::find(free.begin(), free.end(), stop) - free.begin());
  request.stop_tokens = {stop};
  const ClientAnswer stopped = answer_of(scheduler, request);
  EXPECT_EQ(stopped.reason, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens, std::vector<int32_t>(free.begin(), free.begin() + first));

  request.min_tokens = static_cast<int64_t>(first) + 3;
  const ClientAnswer longer = answer_of(scheduler, request);
  EXPECT_GE(longer.tokens.size(), first + 3);
  for (size_t i = 0; i < first + 3; ++i) EXPECT_NE(longer.tokens[i], stop);
}

TEST(Scheduler, TheContextEndsARequest) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.context = 100;
  Engine engine(source, options);
  const std::vector<int32_t> prompt = small_tokens(4, 90);
  SequenceCache sequence;
  const GenerateResult expected = generate(engine, sequence, prompt, {.max_tokens = 50});
  EXPECT_EQ(expected.finish, GenerateResult::Finish::kContextFull);
  engine.cache.release(sequence);
  Scheduler scheduler(engine, {});
  const ClientAnswer answer = answer_of(scheduler, request_of(prompt, 50));
  EXPECT_EQ(answer.tokens, expected.tokens);
  EXPECT_EQ(answer.reason, FinishReason::kLength);
  EXPECT_EQ(answer_of(scheduler, request_of(small_tokens(4, 100), 5)).tokens.size(), 1u);
}

TEST(Scheduler, RefusesAndSaysWhy) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Scheduler scheduler(engine, {.max_running = 1, .max_waiting = 1});
  Client client;
  Refusal refusal;
  EXPECT_EQ(scheduler.submit(request_of(small_tokens(5, 1025), 1), client.on_event(), &refusal),
            0u);
  EXPECT_EQ(refusal.kind, Refusal::Kind::kTooLong);
  EXPECT_NE(refusal.message.find("1025"), std::string::npos) << refusal.message;
  EXPECT_NE(refusal.message.find("1024"), std::string::npos) << refusal.message;

  Client running, waiting;
  const auto first = scheduler.submit(request_of({1}, 900), running.on_event(), nullptr);
  const auto second = scheduler.submit(request_of({2}, 900), waiting.on_event(), nullptr);
  EXPECT_NE(first, 0u);
  EXPECT_NE(second, 0u);
  EXPECT_EQ(scheduler.submit(request_of({3}, 1), client.on_event(), &refusal), 0u);
  EXPECT_EQ(refusal.kind, Refusal::Kind::kQueueFull);
  EXPECT_GT(refusal.retry_after_seconds, 0);
  scheduler.cancel(second);
  EXPECT_EQ(waiting.so_far().reason, FinishReason::kCancelled);
  EXPECT_NE(scheduler.submit(request_of({3}, 1), client.on_event(), &refusal), 0u)
      << "a cancelled request makes room at once";
  scheduler.cancel(first);
  EXPECT_EQ(client.wait().reason, FinishReason::kLength);

  const auto throws = [&](const std::function<void(GenerationRequest&)>& spoil) {
    GenerationRequest request = request_of({1, 2, 3}, 4);
    spoil(request);
    EXPECT_THROW(scheduler.submit(request, client.on_event(), &refusal), Error);
  };
  throws([](GenerationRequest& r) { r.prompt.clear(); });
  throws([](GenerationRequest& r) { r.prompt[1] = kSmallVocab; });
  throws([](GenerationRequest& r) { r.prompt[1] = -1; });
  throws([](GenerationRequest& r) { r.stop_tokens = {kSmallVocab}; });
  throws([](GenerationRequest& r) { r.max_tokens = 0; });
  throws([](GenerationRequest& r) { r.max_tokens = -1; });
  throws([](GenerationRequest& r) { r.min_tokens = 5; });
  throws([](GenerationRequest& r) { r.sampling.top_p = 0; });
  throws([](GenerationRequest& r) { r.num_logprobs = kSmallVocab + 1; });
  const SchedulerStats stats = scheduler.stats();
  EXPECT_EQ(stats.accepted, 3);
  EXPECT_EQ(stats.refused, 2);
  EXPECT_EQ(stats.cancelled, 2);
  EXPECT_EQ(stats.finished, 1);
}

TEST(Scheduler, CancelFreesPagesAndSharedBeginningsStay) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 4096;
  Engine engine(source, options);
  Scheduler scheduler(engine, {.chunk_tokens = 64});
  const std::vector<int32_t> prompt = small_tokens(6, 300);
  const ClientAnswer expected = answer_of(scheduler, request_of(prompt, 30));
  Client cancelled, other;
  const auto id = scheduler.submit(request_of(prompt, 700), cancelled.on_event(), nullptr);
  scheduler.submit(request_of(prompt, 30), other.on_event(), nullptr);
  cancelled.wait_for_tokens(3);
  scheduler.cancel(id);
  const ClientAnswer answer = cancelled.so_far();
  EXPECT_EQ(answer.num_finished, 1);
  EXPECT_EQ(answer.reason, FinishReason::kCancelled);
  scheduler.cancel(id);
  scheduler.cancel(12345);
  EXPECT_EQ(other.wait().tokens, expected.tokens);
  EXPECT_EQ(other.so_far().cached_prompt_tokens, 256);
  EXPECT_TRUE(scheduler.drain(kLong));
  EXPECT_EQ(cancelled.so_far().num_finished, 1);
  EXPECT_EQ(cancelled.so_far().tokens.size(), answer.tokens.size()) << "an event after the end";
  const SchedulerStats stats = scheduler.stats();
  EXPECT_EQ(stats.free_pages, stats.pages);
  EXPECT_EQ(stats.running + stats.waiting, 0);
}

TEST(Scheduler, DrainWaitsAndTheEndIsTold) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Client quick, slow, refused;
  {
    Scheduler scheduler(engine, {});
    scheduler.submit(request_of({1, 2}, 3), quick.on_event(), nullptr);
    scheduler.submit(request_of({1, 2}, 1000), slow.on_event(), nullptr);
    EXPECT_FALSE(scheduler.drain(0));
    Refusal refusal;
    EXPECT_EQ(scheduler.submit(request_of({1}, 1), refused.on_event(), &refusal), 0u);
    EXPECT_EQ(refusal.kind, Refusal::Kind::kDraining);
    EXPECT_EQ(quick.wait().reason, FinishReason::kLength);
    scheduler.stop();
    EXPECT_EQ(slow.so_far().num_finished, 1) << "told before stop() returns";
    EXPECT_EQ(scheduler.submit(request_of({1}, 1), refused.on_event(), &refusal), 0u);
    EXPECT_EQ(scheduler.stats().running, 0);
    scheduler.stop();
  }
  EXPECT_EQ(slow.so_far().num_finished, 1);
  EXPECT_EQ(slow.so_far().reason, FinishReason::kDrained);
  EXPECT_EQ(refused.so_far().num_finished, 0);
  EXPECT_EQ(engine.cache.num_free_pages(), engine.cache.shape().num_pages);
}

TEST(Scheduler, CountsARequestFromTheMomentItComes) {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, scheduler_engine_options());
  Scheduler scheduler(engine, {});
  Client client;
  scheduler.submit(request_of(small_tokens(3, 400), 5), client.on_event(), nullptr);
  int64_t num_looks = 0;
  for (;; ++num_looks) {
    const SchedulerStats stats = scheduler.stats();
    if (client.so_far().num_prompt_done > 0) break;
    ASSERT_EQ(stats.running + stats.waiting, 1) << "look " << num_looks;
  }
  EXPECT_GT(num_looks, 0);
  client.wait();
}

TEST(Scheduler, AnEngineThatFailsServesNobody) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.forced_ops["matmul"] = "broken";  // every pass is an Error
  Engine engine(source, options);
  Scheduler scheduler(engine, {});
  Client first, second;
  Refusal refusal;
  scheduler.submit(request_of({1, 2}, 5), first.on_event(), nullptr);
  const ClientAnswer answer = first.wait();
  EXPECT_EQ(answer.reason, FinishReason::kEngineFault);
  EXPECT_NE(answer.message.find("broken"), std::string::npos) << answer.message;
  EXPECT_EQ(scheduler.submit(request_of({1}, 5), second.on_event(), &refusal), 0u);
  EXPECT_EQ(refusal.kind, Refusal::Kind::kFaulted);
  const SchedulerStats stats = scheduler.stats();
  EXPECT_NE(stats.fault.find("broken"), std::string::npos);
  EXPECT_EQ(stats.free_pages, stats.pages);
  EXPECT_TRUE(scheduler.drain(kLong));
}

// --- what a step does, without the thread -------------------------------------------------------

struct Steps {
  explicit Steps(Engine& engine, const SchedulerOptions& options) : batch(engine, options) {}

  std::shared_ptr<RequestState> add(GenerationRequest request) {
    auto state = std::make_shared<RequestState>(++last_id, std::move(request), nullptr);
    batch.add(state);
    return state;
  }
  SchedulerStats stats() {
    SchedulerStats result;
    batch.describe(result);
    return result;
  }
  static int64_t count(const std::vector<PendingEvent>& events, const RequestState& request,
                       GenerationEvent::Kind kind) {
    return std::count_if(events.begin(), events.end(), [&](const PendingEvent& pending) {
      return pending.request.get() == &request && pending.event.kind == kind;
    });
  }

  RequestBatch batch;
  Scheduler::RequestId last_id = 0;
};

using Kind = GenerationEvent::Kind;

TEST(RequestBatch, ALongPromptHoldsUpNobody) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 4096;
  Engine engine(source, options);
  Steps steps(engine, {.chunk_tokens = 64});
  const auto decoding = steps.add(request_of(small_tokens(7, 10), 100));
  steps.batch.step();
  const auto long_prompt = steps.add(request_of(small_tokens(8, 1000), 1));
  const auto other_long = steps.add(request_of(small_tokens(9, 900), 1));
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(Steps::count(steps.batch.step(), *decoding, Kind::kToken), 1);
  const auto short_prompt = steps.add(request_of(small_tokens(10, 20), 5));
  const std::vector<PendingEvent> events = steps.batch.step();
  EXPECT_EQ(Steps::count(events, *decoding, Kind::kToken), 1);
  EXPECT_EQ(Steps::count(events, *short_prompt, Kind::kToken), 1) << "in the step it came";
  int64_t num_steps = 4;
  while (long_prompt->num_generated() == 0) {
    steps.batch.step();
    ++num_steps;
  }
  EXPECT_LE(num_steps, 1000 / 30 + 2) << "half of the rows are its own";
  EXPECT_EQ(decoding->num_generated(), 1 + num_steps);
}

// Chunks whose prompts' logprobs are wanted are cut where their logits would take too much memory.
TEST(RequestBatch, LogitsAreBoundedAndPromptLogprobsTheSame) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 4096;
  Engine engine(source, options);
  engine.exec.batch_invariant = true;
  const auto run = [&](int64_t logit_bytes, int64_t* num_steps) {
    Steps steps(engine, {.logit_bytes = logit_bytes});
    std::vector<std::vector<TokenLogprob>> logprobs(2);
    for (const uint64_t seed : {30, 31}) {
      GenerationRequest request = request_of(small_tokens(seed, 150), 1);
      request.num_prompt_logprobs = 2;
      steps.add(request);
    }
    steps.add(request_of(small_tokens(32, 300), 30));  // has logits of one row a step
    for (*num_steps = 0; !steps.batch.idle(); ++*num_steps) {
      for (PendingEvent& pending : steps.batch.step()) {
        if (pending.event.kind == Kind::kPromptDone && pending.request->id <= 2)
          logprobs[pending.request->id - 1] = pending.event.prompt_logprobs;
      }
    }
    return logprobs;
  };
  int64_t uncut_steps = 0, cut_steps = 0;
  const auto uncut = run(SchedulerOptions().logit_bytes, &uncut_steps);
  constexpr int64_t kRows = 6;  // 3 for each of the two
  const auto cut = run(kRows * 4 * kSmallVocab, &cut_steps);
  EXPECT_LE(uncut_steps, 31);
  EXPECT_GE(cut_steps, 150 / 3);
  for (size_t i = 0; i < 2; ++i) {
    ASSERT_EQ(uncut[i].size(), 149u);
    EXPECT_TRUE(same_bits(cut[i], uncut[i])) << i;
  }
  // Not even one row fits: it goes on by one.
  const auto least = run(1, &cut_steps);
  EXPECT_GE(cut_steps, 150);
  EXPECT_TRUE(same_bits(least[1], uncut[1]));
}

TEST(RequestBatch, WhoIsCancelledHasNoPagesAfterTheNextStep) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 4096;
  Engine engine(source, options);
  for (const bool prefix_cache : {true, false}) {
    Steps steps(engine, {.chunk_tokens = 64, .prefix_cache = prefix_cache});
    const auto stays = steps.add(request_of(small_tokens(40, 100), 200));
    const auto decodes = steps.add(request_of(small_tokens(41, 100), 200));
    while (decodes->num_generated() == 0) steps.batch.step();
    const auto in_prompt = steps.add(request_of(small_tokens(42, 900), 1));
    steps.batch.step();
    const auto waits = steps.add(request_of(small_tokens(43, 10), 1));
    ASSERT_GT(in_prompt->cache.num_tokens, 0);
    ASSERT_LT(in_prompt->cache.num_tokens, 900);
    const int64_t pages = steps.stats().pages, stays_with = 2;
    ASSERT_LT(steps.stats().free_pages, pages - 2 * stays_with);
    decodes->ended = in_prompt->ended = waits->ended = true;
    const std::vector<PendingEvent> events = steps.batch.step();
    EXPECT_EQ(steps.stats().free_pages, pages - stays_with) << prefix_cache;
    EXPECT_EQ(steps.stats().running + steps.stats().waiting, 1);
    for (const PendingEvent& pending : events) EXPECT_EQ(pending.request, stays);
    stays->ended = true;
    EXPECT_TRUE(steps.batch.step().empty());
    EXPECT_EQ(steps.stats().free_pages, pages);
    EXPECT_TRUE(steps.batch.idle());
  }
}

TEST(RequestBatch, EqualPromptsAtOnceAreComputedOnce) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.cache_tokens = 8192;
  Engine engine(source, options);
  Steps steps(engine, {.chunk_tokens = 100});
  std::vector<std::shared_ptr<RequestState>> requests;
  for (int i = 0; i < 5; ++i) requests.push_back(steps.add(request_of(small_tokens(11, 300), 1)));
  int64_t num_steps = 0;
  while (!steps.batch.idle()) {
    steps.batch.step();
    ++num_steps;
  }
  EXPECT_LE(num_steps, 6) << "300 tokens and four rests of 44, 100 rows a step";
  EXPECT_EQ(steps.stats().prefix_hit_tokens, 4 * 256);
  for (const auto& request : requests) EXPECT_EQ(request->tokens, requests[0]->tokens);
  EXPECT_EQ(requests[4]->cached_prompt_tokens, 256);
}

TEST(RequestBatch, TheYoungestGivesWayAndLosesNothing) {
  const ModelSource source = small_model("FFSFS");
  RunOptions options = scheduler_engine_options();
  options.context = 320;
  options.cache_tokens = 320;  // 5 pages
  Engine engine(source, options);
  engine.exec.batch_invariant = true;
  std::vector<GenerationRequest> requests;
  for (uint64_t i = 0; i < 3; ++i) {
    requests.push_back(request_of(small_tokens(20 + i, 50), 110));
    requests.back().num_logprobs = 2;
    requests.back().num_prompt_logprobs = 1;
    requests.back().sampling = {.temperature = 1, .seed = i};
  }
  const auto run = [&](std::span<const GenerationRequest> some, int64_t* preemptions) {
    Steps steps(engine, {});
    std::vector<std::shared_ptr<RequestState>> states;
    for (const GenerationRequest& request : some) states.push_back(steps.add(request));
    std::vector<ClientAnswer> answers(some.size());
    while (!steps.batch.idle()) {
      for (PendingEvent& pending : steps.batch.step()) {
        ClientAnswer& answer = answers[pending.request->id - 1];
        if (pending.event.kind == Kind::kPromptDone) {
          answer.num_prompt_done += 1;
          answer.prompt_logprobs = pending.event.prompt_logprobs;
        }
        if (pending.event.kind == Kind::kToken) {
          answer.tokens.push_back(pending.event.token);
          answer.logprobs.push_back(*pending.event.logprob);
        }
        if (pending.event.kind == Kind::kFinished) answer.reason = pending.event.reason;
      }
      EXPECT_LE(steps.stats().running, 3);
    }
    EXPECT_EQ(steps.stats().free_pages, 5);
    if (preemptions != nullptr) *preemptions = steps.stats().preemptions;
    return answers;
  };
  std::vector<ClientAnswer> alone;
  for (size_t i = 0; i < requests.size(); ++i) {
    alone.push_back(run(std::span(requests).subspan(i, 1), nullptr).front());
  }
  int64_t preemptions = 0;
  const std::vector<ClientAnswer> together = run(requests, &preemptions);
  EXPECT_GT(preemptions, 0) << "a weak test";
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(together[i].num_prompt_done, 1);
    EXPECT_EQ(together[i].tokens.size(), 110u);
    expect_same_bits(together[i], alone[i], "request " + std::to_string(i));
  }
}

}  // namespace
}  // namespace indexcache
