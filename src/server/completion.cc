#include "server/completion.h"

#include <algorithm>
#include <random>

namespace indexcache {

namespace {

// The server's thread goes on to other connections after so many.
constexpr int kEventsAtOnce = 256;

double seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

ApiError refusal_error(const Refusal& refusal) {
  switch (refusal.kind) {
    case Refusal::Kind::kTooLong:
      return {400, refusal.message, "prompt", "context_length_exceeded"};
    case Refusal::Kind::kQueueFull: {
      ApiError error(429, refusal.message, {}, "queue_full");
      error.retry_after_seconds = std::max(refusal.retry_after_seconds, 0.001);
      return error;
    }
    case Refusal::Kind::kDraining: {
      ApiError error(503, refusal.message, {}, "shutting_down");
      error.retry_after_seconds = std::max(refusal.retry_after_seconds, 1.0);
      return error;
    }
    default:
      return {503, refusal.message, {}, "engine_fault"};
  }
}

void merge_logprobs(Json& into, Json more) {
  if (more.is_null()) return;
  if (into.is_null()) {
    into = std::move(more);
    return;
  }
  for (auto& [key, list] : more.items())
    if (list.is_array())
      for (Json& item : list) into[key].push_back(std::move(item));
}

}  // namespace

Completion::Completion(std::shared_ptr<const ServedModel> model, Metrics& metrics,
                       CompletionRequest request, std::string id, int64_t created, Wake wake)
    : model_(std::move(model)),
      metrics_(metrics),
      request_(std::move(request)),
      id_(std::move(id)),
      created_(created) {
  try {
    submit_all(std::move(wake));
  } catch (...) {
    abort();
    throw;
  }
  const auto longest = std::ranges::max(request_.prompts, {}, &std::vector<int32_t>::size).size();
  const int64_t max_tokens = request_.generation.max_tokens;
  metrics_.add_request(
      request_.n, max_tokens < 0 ? model_->context - static_cast<int64_t>(longest) : max_tokens);
}

Completion::~Completion() { abort(); }

void Completion::submit_all(Wake wake) {
  if (request_.own_seed) {
    std::random_device random;
    request_.generation.sampling.seed = (uint64_t{random()} << 32) | random();
  }
  const uint64_t first_seed = request_.generation.sampling.seed;
  for (const std::vector<int32_t>& prompt : request_.prompts) {
    for (int64_t i = 0; i < request_.n; ++i) {
      GenerationRequest generation = request_.generation;
      generation.prompt = prompt;
      generation.sampling.seed = first_seed + static_cast<uint64_t>(i);
      if (generation.max_tokens < 0)
        generation.max_tokens = model_->context - static_cast<int64_t>(prompt.size());
      const size_t index = running_.size();
      Running& running = running_.emplace_back(*model_, request_, prompt);
      running.measured.prompt_tokens = static_cast<int64_t>(prompt.size());
      Refusal refusal;
      const auto on_event = [inbox = inbox_, wake, index](GenerationEvent event) {
        {
          const std::lock_guard lock(inbox->mutex);
          try {
            inbox->events.push_back({index, Clock::now(), std::move(event)});
          } catch (const std::bad_alloc&) {  // of this request, not of the engine that tells it
            inbox->lost_one = true;
          }
        }
        wake();
      };
      try {
        running.id = model_->generator->submit(std::move(generation), on_event, &refusal);
      } catch (const Error& wrong) {
        throw ApiError(400, wrong.what());
      }
      if (running.id == 0) throw refusal_error(refusal);
    }
  }
}

void Completion::abort() {
  for (Running& running : running_) {
    if (running.id != 0 && !running.done) {
      model_->generator->cancel(running.id);
      running.done = true;
      running.measured.reason = "abort";
      running.measured.end = seconds(Clock::now() - started_);
      running.measured.generated_tokens = running.choice.num_tokens();
      metrics_.add_finished(running.measured);
      if (running.finish_reason.empty()) running.finish_reason = "abort";
    }
    running.id = 0;
  }
}

Exchange::Progress Completion::poll() {
  {
    const std::lock_guard lock(inbox_->mutex);
    for (Event& event : inbox_->events) untaken_.push_back(std::move(event));
    inbox_->events.clear();
    if (inbox_->lost_one) throw std::bad_alloc();
  }
  for (int i = 0; i < kEventsAtOnce && !untaken_.empty(); ++i) {
    Event event = std::move(untaken_.front());
    untaken_.pop_front();
    if (!error_ && !running_[event.choice].done) take(event);
  }
  Progress progress;
  progress.more = !untaken_.empty();
  progress.done = error_ || num_done_ == running_.size();
  progress.failed = error_.has_value();
  if (progress.done && request_.stream) {
    if (error_) {
      write_event(error_json(*error_));
    } else {
      if (request_.include_usage) {
        Json last = chunk(Json::array());
        last["usage"] = usage();
        write_event(last);
      }
      out_ += "data: [DONE]\n\n";
    }
  }
  progress.chunk = std::exchange(out_, {});
  return progress;
}

void Completion::take(Event& event) {
  Running& running = running_[event.choice];
  switch (event.event.kind) {
    case GenerationEvent::Kind::kPromptDone:
      running.cached_tokens = event.event.cached_prompt_tokens;
      running.measured.queued = event.event.queue_seconds;
      if (request_.stream && request_.chat) {
        write_event(chunk({{{"index", event.choice},
                            {"delta", {{"role", "assistant"}, {"content", ""}}},
                            {"logprobs", nullptr},
                            {"finish_reason", nullptr}}}));
      }
      deliver(event.choice, running.choice.prompt_done(event.event.prompt_logprobs));
      return;
    case GenerationEvent::Kind::kToken: {
      if (running.measured.first_token < 0) {
        running.measured.first_token = seconds(event.time - started_);
      } else {
        running.measured.token_gaps.push_back(seconds(event.time - running.last_token));
      }
      running.last_token = event.time;
      running.measured.last_token = seconds(event.time - started_);
      deliver(event.choice, running.choice.token(event.event.token, event.event.logprob));
      if (running.choice.stopped()) {
        model_->generator->cancel(running.id);
        finish(event.choice, "stop", event.time);
      }
      return;
    }
    case GenerationEvent::Kind::kFinished:
      break;
  }
  switch (event.event.reason) {
    case FinishReason::kLength:
    case FinishReason::kStop: {
      deliver(event.choice, running.choice.finish());
      const bool stop = event.event.reason == FinishReason::kStop || running.choice.stopped();
      return finish(event.choice, stop ? "stop" : "length", event.time);
    }
    case FinishReason::kNanLogits:
      running.measured.reason = "nan";
      fail_with(
          500,
          event.event.message.empty() ? "the model's logits were not finite" : event.event.message,
          "non_finite_logits");
      break;
    case FinishReason::kEngineFault:
      fail_with(503, event.event.message.empty() ? "the engine failed" : event.event.message,
                "engine_fault");
      break;
    case FinishReason::kDrained:
    case FinishReason::kCancelled:
      fail_with(503, "the server stopped before the answer was done", "shutting_down");
      break;
  }
  finish(event.choice, running.measured.reason.empty() ? "error" : running.measured.reason,
         event.time);
}

void Completion::fail_with(int status, const std::string& message, const std::string& code) {
  error_.emplace(status, message, std::string(), code);
}

void Completion::deliver(size_t index, Choice::Piece piece) {
  Running& running = running_[index];
  if (!request_.stream) {
    running.text += piece.text;
    merge_logprobs(running.logprobs, std::move(piece.logprobs));
    return;
  }
  if (piece.text.empty() && piece.logprobs.is_null()) return;
  Json choice = {{"index", index}};
  if (request_.chat) {
    choice["delta"] = {{"content", piece.text}};
  } else {
    choice["text"] = piece.text;
  }
  choice["logprobs"] = std::move(piece.logprobs);
  choice["finish_reason"] = nullptr;
  write_event(chunk(Json::array({std::move(choice)})));
}

void Completion::finish(size_t index, const std::string& reason, Clock::time_point time) {
  Running& running = running_[index];
  running.done = true;
  running.id = 0;
  running.finish_reason = reason;
  running.measured.reason = reason;
  running.measured.end = seconds(time - started_);
  running.measured.generated_tokens = running.choice.num_tokens();
  metrics_.add_finished(running.measured);
  ++num_done_;
  if (!request_.stream || error_) return;
  Json choice = {{"index", index}};
  if (request_.chat) {
    choice["delta"] = Json::object();
  } else {
    choice["text"] = "";
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = reason;
  write_event(chunk(Json::array({std::move(choice)})));
}

Json Completion::chunk(Json choices) const {
  Json out = {{"id", id_},
              {"object", request_.chat ? "chat.completion.chunk" : "text_completion"},
              {"created", created_},
              {"model", model_->name},
              {"choices", std::move(choices)}};
  if (request_.include_usage) out["usage"] = nullptr;  // until the last one
  return out;
}

void Completion::write_event(const Json& json) { out_ += "data: " + dump(json) + "\n\n"; }

Json Completion::usage() const {
  int64_t prompt = 0, generated = 0, cached = 0;
  for (const auto& ids : request_.prompts) prompt += static_cast<int64_t>(ids.size());
  for (size_t i = 0; i < running_.size(); ++i) {
    generated += running_[i].choice.num_tokens();
    // A prompt counts once, however many answers it gets.
    if (i % static_cast<size_t>(request_.n) == 0) cached += running_[i].cached_tokens;
  }
  return {{"prompt_tokens", prompt},
          {"completion_tokens", generated},
          {"total_tokens", prompt + generated},
          {"prompt_tokens_details", {{"cached_tokens", cached}}}};
}

HttpResponse Completion::response() {
  if (error_) return error_response(*error_);
  Json choices = Json::array();
  for (size_t i = 0; i < running_.size(); ++i) {
    Running& running = running_[i];
    Json choice = {{"index", i}};
    if (request_.chat) {
      choice["message"] = {{"role", "assistant"}, {"content", running.text}, {"refusal", nullptr}};
    } else {
      choice["text"] = running.text;
    }
    choice["logprobs"] = std::move(running.logprobs);
    choice["finish_reason"] = running.finish_reason;
    choices.push_back(std::move(choice));
  }
  Json body = chunk(std::move(choices));
  if (request_.chat) body["object"] = "chat.completion";
  body["usage"] = usage();
  HttpResponse response;
  response.body = dump(body);
  return response;
}

AnswerNote Completion::note() const {
  AnswerNote note;
  note.prompt_tokens = 0;
  note.generated_tokens = 0;
  for (const auto& ids : request_.prompts) note.prompt_tokens += static_cast<int64_t>(ids.size());
  for (const Running& running : running_) {
    note.generated_tokens += running.choice.num_tokens();
    if (note.finish.empty() || running.finish_reason != "stop") note.finish = running.finish_reason;
  }
  note.prompt = request_.log_text;
  return note;
}

}  // namespace indexcache
