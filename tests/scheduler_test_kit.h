// A client of the scheduler for tests: collects the events of one request.
#pragma once

#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>

#include "engine/scheduler.h"
#include "tests/small_model.h"

namespace indexcache {

struct ClientAnswer {
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs, prompt_logprobs;
  int64_t cached_prompt_tokens = 0;
  int num_prompt_done = 0, num_finished = 0;
  FinishReason reason = FinishReason::kLength;
  std::string message;
  bool in_order = true;  // prompt, tokens, end
};

class Client {
 public:
  Scheduler::OnEvent on_event() {
    return [state = state_](GenerationEvent event) { state->take(std::move(event)); };
  }

  ClientAnswer wait() {
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] { return state_->answer.num_finished > 0; });
    return state_->answer;
  }

  void wait_for_tokens(size_t count) {
    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [&] {
      return state_->answer.tokens.size() >= count || state_->answer.num_finished > 0;
    });
  }

  ClientAnswer so_far() {
    const std::lock_guard lock(state_->mutex);
    return state_->answer;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    ClientAnswer answer;

    void take(GenerationEvent event) {
      const std::lock_guard lock(mutex);
      answer.in_order = answer.in_order && answer.num_finished == 0;
      switch (event.kind) {
        case GenerationEvent::Kind::kPromptDone:
          answer.in_order = answer.in_order && answer.tokens.empty();
          answer.num_prompt_done += 1;
          answer.prompt_logprobs = std::move(event.prompt_logprobs);
          answer.cached_prompt_tokens = event.cached_prompt_tokens;
          break;
        case GenerationEvent::Kind::kToken:
          answer.in_order = answer.in_order && answer.num_prompt_done == 1;
          answer.tokens.push_back(event.token);
          if (event.logprob) answer.logprobs.push_back(std::move(*event.logprob));
          break;
        case GenerationEvent::Kind::kFinished:
          answer.num_finished += 1;
          answer.reason = event.reason;
          answer.message = std::move(event.message);
          break;
      }
      changed.notify_all();
    }
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

inline GenerationRequest request_of(std::vector<int32_t> prompt, int64_t max_tokens) {
  GenerationRequest request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  return request;
}

// Submits all at once and waits for all.
inline std::vector<ClientAnswer> answers_of(Scheduler& scheduler,
                                            const std::vector<GenerationRequest>& requests) {
  std::vector<Client> clients(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    Refusal refusal;
    EXPECT_NE(scheduler.submit(requests[i], clients[i].on_event(), &refusal), 0u)
        << refusal.message;
  }
  std::vector<ClientAnswer> answers;
  for (Client& client : clients) answers.push_back(client.wait());
  return answers;
}

inline ClientAnswer answer_of(Scheduler& scheduler, const GenerationRequest& request) {
  return answers_of(scheduler, {request}).front();
}

inline RunOptions scheduler_engine_options(ComputeChoice compute = ComputeChoice::kF32) {
  return {.num_threads = 2, .context = 1024, .compute = compute};
}

// Logprobs bit for bit, of the prompt and of the answer.
inline bool same_bits(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].token != b[i].token || a[i].logprob != b[i].logprob || a[i].rank != b[i].rank ||
        a[i].top != b[i].top)
      return false;
  }
  return true;
}

inline void expect_same_bits(const ClientAnswer& a, const ClientAnswer& b,
                             const std::string& what) {
  EXPECT_EQ(a.tokens, b.tokens) << what;
  EXPECT_TRUE(same_bits(a.logprobs, b.logprobs)) << what;
  EXPECT_TRUE(same_bits(a.prompt_logprobs, b.prompt_logprobs)) << what;
  EXPECT_EQ(a.reason, b.reason) << what;
}

}  // namespace indexcache
