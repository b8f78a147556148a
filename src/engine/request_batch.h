// The requests that one engine works on, and the step that takes all of them on by a forward pass.
// Owned by the scheduler's thread; scheduler.h says what happens to a request, this is how.
//
//   waiting   by age. Admitted in this order, when pages for all of a request's tokens are there.
//   running   by age. Tokens that are not in the cache yet are its pending rows: a chunk of the
//             prompt, or the one token sampled last.
//
// Preempted requests go back to waiting with prompt and answer so far as their tokens; sampler and
// delivered events stay, so they go on as if nothing had been.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cache/prefix_cache.h"
#include "engine/scheduler.h"

namespace indexcache {

struct RequestState {
  RequestState(Scheduler::RequestId id_in, GenerationRequest request_in, Scheduler::OnEvent event)
      : id(id_in),
        request(std::move(request_in)),
        sampler(request.sampling),
        tokens(request.prompt),
        on_event(std::move(event)) {}

  int64_t num_prompt() const { return static_cast<int64_t>(request.prompt.size()); }
  int64_t num_generated() const { return static_cast<int64_t>(tokens.size()) - num_prompt(); }
  int64_t num_pending() const { return static_cast<int64_t>(tokens.size()) - cache.num_tokens; }
  bool wants_prompt_logprobs() const { return request.num_prompt_logprobs >= 0 && !prompt_done; }
  // The first position whose logits are still to be looked at; no cached page may stand for it.
  int64_t first_wanted_logits() const {
    const int64_t last = static_cast<int64_t>(tokens.size()) - 1;
    return wants_prompt_logprobs() ? static_cast<int64_t>(prompt_logprobs.size()) : last;
  }

  const Scheduler::RequestId id;
  const GenerationRequest request;
  const double submitted = monotonic_seconds();

  // The engine's thread only.
  Sampler sampler;
  std::vector<int32_t> tokens;  // the prompt, then the answer
  SequenceCache cache;
  PrefixPosition position;
  bool done = false;             // has its kFinished
  bool admitted_before = false;  // preempted requests do not count twice
  bool prompt_done = false;
  int64_t cached_prompt_tokens = 0;
  double queue_seconds = 0;
  std::vector<TokenLogprob> prompt_logprobs;  // so far

  // No more is computed for this request. Set once, under the scheduler's lock, by who ends it.
  std::atomic<bool> ended = false;

  std::mutex delivery;  // held while on_event runs
  Scheduler::OnEvent on_event;
  bool closed = false;  // nothing is delivered any more
};

struct PendingEvent {
  std::shared_ptr<RequestState> request;
  GenerationEvent event;
};

class RequestBatch {
 public:
  RequestBatch(Engine& engine, const SchedulerOptions& options);

  void add(std::shared_ptr<RequestState> request) { waiting_.push_back(std::move(request)); }
  bool idle() const { return running_.empty() && waiting_.empty(); }

  // One forward pass, if there is anything to do. Requests that ended elsewhere give their pages
  // back first. The events are in each request's order; its pages are free when it has a kFinished.
  std::vector<PendingEvent> step();

  // All requests give their pages back and are forgotten, without an event. Needs no memory.
  void release_all();

  // What this knows of the statistics.
  void describe(SchedulerStats& stats) const;

 private:
  struct Row {  // of logits
    RequestState* request = nullptr;
    int64_t position = 0;  // of the token that it follows
    bool is_next = false;  // else it is the logprob of a prompt token
    bool finite = false;
    int32_t token = 0;     // sampled, or of the prompt
    TokenLogprob logprob;  // of `token`, if wanted
  };
  using Requests = std::vector<std::shared_ptr<RequestState>>;

  void remove_ended();
  void admit();
  void reserve_rows();
  void preempt_youngest();
  void plan_rows();
  void run_batch();
  bool another_computes_its_page(RequestState& request, std::vector<PrefixCache::Key>& under_way);
  void look_at_results();
  void look_at_row(Row& row, std::span<const float> logits) const;
  void take_result(const std::shared_ptr<RequestState>& request, std::span<Row> rows, bool finite);
  void take_next(const std::shared_ptr<RequestState>& request, Row& row);
  void emit(const std::shared_ptr<RequestState>& request, GenerationEvent event);
  void finish(const std::shared_ptr<RequestState>& request, FinishReason reason,
              std::string message = {});

  Engine& engine_;
  const SchedulerOptions options_;
  const int64_t max_tokens_;  // of one request
  PrefixCache prefix_;
  std::deque<std::shared_ptr<RequestState>> waiting_;
  Requests running_;
  SchedulerStats totals_;  // the counters of this class

  // Of the step under way.
  Requests in_batch_;
  std::vector<BatchSequence> batch_;
  std::vector<float> logits_;
  std::vector<Row> rows_;
  std::vector<PendingEvent> events_;
};

}  // namespace indexcache
