#include "engine/scheduler.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <string_view>
#include <thread>
#include <unordered_map>

#include "engine/request_batch.h"

namespace indexcache {

namespace {

void check_options(const SchedulerOptions& options) {
  const auto check = [](const char* name, int64_t value, int64_t least) {
    if (value < least) fail("{} is {}, expected at least {}", name, value, least);
  };
  check("max_running", options.max_running, 1);
  check("max_waiting", options.max_waiting, 0);
  check("chunk_tokens", options.chunk_tokens, 1);
  check("mixed_chunk_tokens", options.mixed_chunk_tokens, 1);
  check("logit_bytes", options.logit_bytes, 1);
}

void check_tokens(const char* what, const std::vector<int32_t>& tokens, int64_t vocab) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocab) continue;
    fail("{} {} is {}, expected 0 to {} (vocab_size {})", what, i, tokens[i], vocab - 1, vocab);
  }
}

void check_request(const GenerationRequest& request, int64_t vocab) {
  const auto check = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
      fail("{} is {}, expected {} to {}", name, value, least, most);
  };
  if (request.prompt.empty()) fail("the prompt has no tokens, expected at least 1");
  check_tokens("prompt token", request.prompt, vocab);
  check_tokens("stop token", request.stop_tokens, vocab);
  check_sampling_params(request.sampling);
  check("max_tokens", request.max_tokens, request.num_prompt_logprobs >= 0 ? 0 : 1, INT64_MAX);
  check("min_tokens", request.min_tokens, 0, request.max_tokens);
  check("num_logprobs", request.num_logprobs, -1, vocab);
  check("num_prompt_logprobs", request.num_prompt_logprobs, -1, vocab);
  if (request.min_tokens > 0 && static_cast<int64_t>(request.stop_tokens.size()) >= vocab)
    fail("min_tokens is {} and all tokens may be stop tokens, expected fewer than {} of them",
         request.min_tokens, vocab);
}

}  // namespace

int64_t max_request_tokens(const Engine& engine) {
  return std::min(engine.memory.context, engine.cache.shape().num_pages * kPageTokens);
}

struct Scheduler::State {
  State(Engine& engine_in, const SchedulerOptions& options_in)
      : engine(engine_in), options(options_in), batch(engine, options) {
    batch.describe(stats);
  }

  void run();
  bool wait_for_work();
  void set_fault(const std::exception& error);
  void end_all(FinishReason reason, std::string_view message);
  void publish(const std::vector<PendingEvent>& events);
  void deliver(PendingEvent pending);
  double retry_after_seconds() const;

  Engine& engine;
  const SchedulerOptions options;
  RequestBatch batch;  // the thread's

  mutable std::mutex mutex;
  std::condition_variable work;     // for the thread
  std::condition_variable changed;  // for who waits for requests to end
  std::vector<std::shared_ptr<RequestState>> incoming;
  // From submit() until their kFinished is delivered.
  std::unordered_map<RequestId, std::shared_ptr<RequestState>> requests;
  RequestId last_id = 0;
  int64_t num_alive = 0;  // not ended
  bool something_ended = false;
  bool draining = false, stopping = false, thread_idle = true;
  double seconds_between_ends = 1, last_end = 0;
  SchedulerStats stats;
  std::thread thread;
};

// False: it is time to stop.
bool Scheduler::State::wait_for_work() {
  std::unique_lock lock(mutex);
  const auto has_work = [&] {
    return stopping || !incoming.empty() || something_ended || !batch.idle();
  };
  if (!has_work()) {
    thread_idle = true;
    changed.notify_all();
    work.wait(lock, has_work);
  }
  thread_idle = false;
  if (stopping) return false;
  for (const auto& request : incoming) batch.add(request);
  incoming.clear();
  batch.describe(stats);  // who came is not lost from the books while the first step runs
  something_ended = false;
  return true;
}

void Scheduler::State::run() {
  for (;;) {
    try {
      if (!wait_for_work()) break;
      std::vector<PendingEvent> events = batch.step();
      publish(events);
      for (PendingEvent& pending : events) deliver(std::move(pending));
    } catch (const std::exception& error) {
      set_fault(error);
      end_all(FinishReason::kEngineFault, stats.fault);
      if (options.on_fault) options.on_fault();
    }
  }
  end_all(FinishReason::kDrained, "the server stops");
}

// Requests are refused from now on.
void Scheduler::State::set_fault(const std::exception& error) {
  const std::lock_guard lock(mutex);
  const bool no_memory = dynamic_cast<const std::bad_alloc*>(&error) != nullptr;
  try {
    stats.fault = no_memory ? "out of memory" : error.what();
  } catch (const std::bad_alloc&) {
    stats.fault = "out of memory";  // short enough to need none
  }
}

// Whoever has been accepted and not heard of an end hears of it, be there memory or not.
void Scheduler::State::end_all(FinishReason reason, std::string_view message) {
  batch.release_all();
  {
    const std::lock_guard lock(mutex);
    incoming.clear();
    batch.describe(stats);
  }
  for (;;) {
    std::shared_ptr<RequestState> request;
    {
      const std::lock_guard lock(mutex);
      if (requests.empty()) return;
      request = requests.begin()->second;
      if (!request->ended.exchange(true)) {
        stats.finished += 1;
        num_alive -= 1;
      }
    }
    GenerationEvent event;
    event.kind = GenerationEvent::Kind::kFinished;
    event.reason = reason;
    try {
      event.message = message;
    } catch (const std::bad_alloc&) {  // the reason has to do
    }
    deliver({request, std::move(event)});
  }
}

// Closes the books before anybody hears of it: who gets a kFinished finds its pages free.
void Scheduler::State::publish(const std::vector<PendingEvent>& events) {
  const std::lock_guard lock(mutex);
  batch.describe(stats);
  for (const PendingEvent& pending : events) {
    if (pending.event.kind != GenerationEvent::Kind::kFinished) continue;
    if (pending.request->ended.exchange(true)) continue;  // cancelled during the step
    stats.finished += 1;
    num_alive -= 1;
    const double now = monotonic_seconds();
    if (last_end > 0) seconds_between_ends += 0.1 * (now - last_end - seconds_between_ends);
    last_end = now;
  }
}

void Scheduler::State::deliver(PendingEvent pending) {
  RequestState& request = *pending.request;
  const bool last = pending.event.kind == GenerationEvent::Kind::kFinished;
  {
    const std::lock_guard lock(request.delivery);
    if (!request.closed) {
      request.closed = last;
      request.on_event(std::move(pending.event));
      if (last) request.on_event = nullptr;
    }
  }
  if (!last) return;
  const std::lock_guard lock(mutex);
  requests.erase(request.id);
  changed.notify_all();
}

// About when a place becomes free, from how often requests ended lately.
double Scheduler::State::retry_after_seconds() const {
  return std::clamp(seconds_between_ends, 1.0, 60.0);
}

Scheduler::Scheduler(Engine& engine, const SchedulerOptions& options) {
  check_options(options);
  engine.exec.batch_invariant = false;  // as the scheduler before may have left it
  if (options.deterministic) make_batch_invariant(engine);
  state_ = std::make_unique<State>(engine, options);
  state_->thread = std::thread([state = state_.get()] { state->run(); });
}

Scheduler::~Scheduler() { stop(); }

void Scheduler::stop() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->draining = state_->stopping = true;
    state_->work.notify_all();
  }
  if (state_->thread.joinable()) state_->thread.join();
}

Scheduler::RequestId Scheduler::submit(GenerationRequest request, OnEvent on_event,
                                       Refusal* refusal) {
  check_request(request, state_->engine.model.config.vocab_size);
  const int64_t length = static_cast<int64_t>(request.prompt.size()),
                most = max_request_tokens(state_->engine);
  const std::lock_guard lock(state_->mutex);
  const auto refuse = [&](Refusal::Kind kind, std::string message, double retry_after) {
    state_->stats.refused += 1;
    if (refusal != nullptr) *refusal = {kind, std::move(message), retry_after};
    return RequestId{0};
  };
  if (!state_->stats.fault.empty()) {
    return refuse(Refusal::Kind::kFaulted, "the engine failed: " + state_->stats.fault, 0);
  }
  if (state_->draining) return refuse(Refusal::Kind::kDraining, "the server is stopping", 0);
  if (length > most) {
    return refuse(Refusal::Kind::kTooLong,
                  fmt::format("the prompt has {} tokens, the context holds {}", length, most), 0);
  }
  const int64_t places = state_->options.max_running + state_->options.max_waiting;
  if (state_->num_alive >= places) {
    return refuse(Refusal::Kind::kQueueFull,
                  fmt::format("{} requests are running or waiting, which is all that are taken",
                              state_->num_alive),
                  state_->retry_after_seconds());
  }
  const RequestId id = ++state_->last_id;
  auto added = std::make_shared<RequestState>(id, std::move(request), std::move(on_event));
  state_->incoming.push_back(added);
  try {
    state_->requests.emplace(id, std::move(added));
  } catch (...) {  // both know of it, or neither
    state_->incoming.pop_back();
    throw;
  }
  state_->num_alive += 1;
  state_->stats.accepted += 1;
  state_->work.notify_one();
  return id;
}

void Scheduler::cancel(RequestId id) {
  std::shared_ptr<RequestState> request;
  {
    std::unique_lock lock(state_->mutex);
    const auto found = state_->requests.find(id);
    if (found == state_->requests.end()) return;
    request = found->second;
    if (request->ended.exchange(true)) {
      // It has just ended by itself: no event comes any more once the last one is delivered.
      state_->changed.wait(lock, [&] { return !state_->requests.contains(id); });
      return;
    }
    state_->requests.erase(found);
    state_->num_alive -= 1;
    state_->stats.cancelled += 1;
    state_->something_ended = true;
    state_->work.notify_one();
  }
  const std::lock_guard lock(request->delivery);
  request->closed = true;
  GenerationEvent event;
  event.kind = GenerationEvent::Kind::kFinished;
  event.reason = FinishReason::kCancelled;
  request->on_event(std::move(event));
  request->on_event = nullptr;
}

bool Scheduler::drain(double timeout_seconds) {
  std::unique_lock lock(state_->mutex);
  state_->draining = true;
  const auto timeout = std::chrono::duration<double>(std::clamp(timeout_seconds, 0.0, 1e6));
  return state_->changed.wait_for(lock, timeout, [&] {
    return state_->num_alive == 0 && state_->requests.empty() && state_->thread_idle &&
           !state_->something_ended;
  });
}

SchedulerStats Scheduler::stats() const {
  const std::lock_guard lock(state_->mutex);
  SchedulerStats stats = state_->stats;
  stats.waiting += static_cast<int64_t>(state_->incoming.size());
  return stats;
}

}  // namespace indexcache
