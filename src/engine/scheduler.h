// Many requests over one engine: continuous batching with chunked prefill over a paged cache that
// requests with equal beginnings share.
//
// One thread owns the engine. Each of its steps is one forward pass of at most
// `batch_tokens` rows: first one token of every decoding request, then chunks of prompts with the
// rows that are left, so that a long prompt never holds up the decoding of others for longer than
// one step. When pages run out, the youngest running request gives its pages back and is computed
// again later (preemption); its client sees only a pause.
//
// How the rows for prompts are shared is share_rows() (batch_builder.h): half for the oldest, half
// for the others, the shortest first. Requests are admitted in order of arrival.
//
// Every accepted request ends in exactly one kFinished event. Callbacks run on the engine's thread,
// must not throw, and must return at once (post the event to your own thread); after cancel()
// returned, or after kFinished, none comes any more. The kCancelled event comes on the thread that
// called cancel(), so hold no lock there that the callback takes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"

namespace indexcache {

struct GenerationRequest {
  std::vector<int32_t> prompt;  // at least 1 token
  int64_t max_tokens = 16;      // 0 is allowed when prompt_logprobs are wanted
  SamplingParams sampling;
  std::vector<int32_t> stop_tokens;  // generation ends before one of these is given out
  int64_t min_tokens = 0;            // stop_tokens are not sampled before so many tokens
  int num_logprobs = -1;             // -1: none; n: the chosen token's and the n best, per token
  int num_prompt_logprobs = -1;      // the same for prompt tokens 1.. (token 0 has none)
  std::string cache_salt;            // only requests with an equal salt share cached pages
};

enum class FinishReason {
  kLength,  // max_tokens, or the context is full
  kStop,    // a stop token
  kCancelled,
  kDrained,      // the server stopped before this request was done
  kNanLogits,    // this request's logits were not finite; its cached pages were dropped
  kEngineFault,  // the engine itself failed; no request will be served any more
};

struct GenerationEvent {
  enum class Kind { kPromptDone, kToken, kFinished } kind = Kind::kToken;
  int32_t token = 0;                            // kToken
  std::optional<TokenLogprob> logprob;          // kToken, if asked for
  std::vector<TokenLogprob> prompt_logprobs;    // kPromptDone, if asked for: prompt.size() - 1
  int64_t cached_prompt_tokens = 0;             // kPromptDone: found in the prefix cache
  double queue_seconds = 0;                     // kPromptDone: until it was first admitted
  FinishReason reason = FinishReason::kLength;  // kFinished
  std::string message;                          // kFinished by a fault: why
};

struct SchedulerOptions {
  int64_t max_running = 64;          // requests in the batch
  int64_t max_waiting = 256;         // requests in the queue; more are refused
  int64_t chunk_tokens = 512;        // rows of one step, at most the engine's batch_tokens
  int64_t mixed_chunk_tokens = 256;  // rows that prompts have in a step in which others decode
  // Logits of one step: with prompt logprobs every row has some, so their chunks are cut to fit.
  int64_t logit_bytes = 64 << 20;
  bool prefix_cache = true;
  // A request's bits do not depend on what else is in the batch, on chunks, on cached beginnings or
  // on preemption (Exec::batch_invariant). They are those of this machine's implementations.
  bool deterministic = false;
  // Called on the engine's thread once a fault has ended all requests; must not throw.
  std::function<void()> on_fault;
};

// Why a request was not taken. kTooLong never fits; the others may be tried again after
// `retry_after_seconds`.
struct Refusal {
  enum class Kind { kTooLong, kQueueFull, kDraining, kFaulted } kind = Kind::kQueueFull;
  std::string message;
  double retry_after_seconds = 0;
};

// Counters since the start and gauges of now, for /metrics and the page.
struct SchedulerStats {
  int64_t running = 0, waiting = 0;
  // Of the free pages `cached_pages` still hold a prefix.
  int64_t pages = 0, free_pages = 0, cached_pages = 0;
  int64_t accepted = 0, refused = 0, finished = 0, cancelled = 0, preemptions = 0;
  int64_t prompt_tokens = 0, generated_tokens = 0;
  int64_t prefix_queried_tokens = 0, prefix_hit_tokens = 0;
  int64_t steps = 0;
  ForwardTimes times;  // summed
  std::string fault;   // empty: healthy
};

// Tokens of one request, prompt and answer: what the context allows and the whole cache holds.
int64_t max_request_tokens(const Engine& engine);

class Scheduler {
 public:
  // Starts the thread. `engine` outlives the scheduler and is used by nobody else meanwhile.
  Scheduler(Engine& engine, const SchedulerOptions& options);
  ~Scheduler();  // stop()
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  using OnEvent = std::function<void(GenerationEvent event)>;
  using RequestId = uint64_t;  // never 0

  // Returns 0 and fills `refusal` when the request is not taken. Error for a request that is wrong
  // in itself (a token id out of range, a bad sampling parameter). Safe from any thread.
  RequestId submit(GenerationRequest request, OnEvent on_event, Refusal* refusal);

  // The request ends with kCancelled (delivered before this returns, unless it had finished) and
  // its pages are free at the next step. Not to be called from a callback. Unknown ids are ignored.
  void cancel(RequestId id);

  // No request is admitted from now on. True when all are done before `timeout_seconds` are over.
  bool drain(double timeout_seconds);

  // Ends what runs with kDrained after the step that is under way, and the thread with it. Whoever
  // is to hear of it has heard when this returns.
  void stop();

  SchedulerStats stats() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace indexcache
