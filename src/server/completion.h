// A request that is being answered: its choices run in the scheduler, and their events become one
// JSON answer or a stream of server-sent events.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "server/choice.h"
#include "server/metrics.h"

namespace indexcache {

class Completion : public Exchange {
 public:
  // Hands all choices to the scheduler, or throws ApiError and leaves none behind.
  Completion(std::shared_ptr<const ServedModel> model, Metrics& metrics, CompletionRequest request,
             std::string id, int64_t created, Wake wake);
  ~Completion() override;

  Progress poll() override;
  bool streams() const override { return request_.stream; }
  HttpResponse response() override;
  AnswerNote note() const override;
  void abort() override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Event {
    size_t choice;
    Clock::time_point time;
    GenerationEvent event;
  };
  // Outlives this object in callbacks that are still on their way.
  struct Inbox {
    std::mutex mutex;
    std::vector<Event> events;
    bool lost_one = false;  // for want of memory
  };
  struct Running {
    Running(const ServedModel& model, const CompletionRequest& request,
            const std::vector<int32_t>& prompt)
        : choice(model, request, prompt) {}
    Choice choice;
    uint64_t id = 0;  // 0: not running any more
    bool done = false;
    std::string finish_reason;
    std::string text;  // collected when not streamed
    Json logprobs;
    int64_t cached_tokens = 0;
    Clock::time_point last_token;
    Metrics::Finished measured;
  };

  void submit_all(Wake wake);
  void take(Event& event);
  void deliver(size_t index, Choice::Piece piece);
  void finish(size_t index, const std::string& reason, Clock::time_point time);
  void fail_with(int status, const std::string& message, const std::string& code);
  Json chunk(Json choices) const;
  Json usage() const;
  void write_event(const Json& json);

  std::shared_ptr<const ServedModel> model_;
  Metrics& metrics_;
  CompletionRequest request_;
  std::string id_;
  int64_t created_;
  Clock::time_point started_ = Clock::now();
  std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();
  std::deque<Running> running_;
  std::deque<Event> untaken_;
  std::string out_;  // streamed, not yet taken
  std::optional<ApiError> error_;
  size_t num_done_ = 0;
};

}  // namespace indexcache
