#include "engine/request_batch.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "base/checked.h"
#include "engine/batch_builder.h"

namespace indexcache {

namespace {

uint64_t secret_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

bool contains(const std::vector<int32_t>& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

}  // namespace

RequestBatch::RequestBatch(Engine& engine, const SchedulerOptions& options)
    : engine_(engine),
      options_(options),
      max_tokens_(max_request_tokens(engine)),
      prefix_(engine.cache, options.prefix_cache, secret_seed()) {}

std::vector<PendingEvent> RequestBatch::step() {
  remove_ended();
  admit();
  reserve_rows();
  plan_rows();
  if (!batch_.empty()) {
    logits_.resize(rows_.size() * static_cast<size_t>(engine_.model.config.vocab_size));
    run_batch();
    totals_.steps += 1;
    look_at_results();
    std::erase_if(running_, [](const auto& request) { return request->done; });
  }
  return std::exchange(events_, {});
}

void RequestBatch::run_batch() {
  const bool decodes = std::all_of(batch_.begin(), batch_.end(), [](const BatchSequence& sequence) {
    return sequence.tokens.size() == 1;
  });
  const bool sampled = decodes && engine_.exec.device == Device::kCuda;
  const bool timed = !sampled || is_timed_step(engine_, totals_.steps);
  ForwardTimes times;
  forward(engine_.exec, engine_.model, engine_.cache, engine_.activations, batch_, logits_.data(),
          nullptr, timed ? &times : nullptr);
  const double stands_for = sampled ? static_cast<double>(kTimedSteps) : 1;
  totals_.times.indexer += stands_for * times.indexer;
  totals_.times.attention += stands_for * times.attention;
  totals_.times.ffn += stands_for * times.ffn;
  totals_.times.head += stands_for * times.head;
}

void RequestBatch::release_all() {
  for (const auto& request : running_) prefix_.release(request->cache);
  // One has pages where a step failed while it was being admitted.
  for (const auto& request : waiting_) prefix_.release(request->cache);
  running_.clear();
  waiting_.clear();
  in_batch_.clear();
  batch_.clear();
  rows_.clear();
  events_.clear();
}

void RequestBatch::describe(SchedulerStats& stats) const {
  stats.running = static_cast<int64_t>(running_.size());
  stats.waiting = static_cast<int64_t>(waiting_.size());
  stats.pages = engine_.cache.shape().num_pages;
  stats.free_pages = prefix_.num_available();
  stats.cached_pages = prefix_.num_idle();
  stats.preemptions = totals_.preemptions;
  stats.prompt_tokens = totals_.prompt_tokens;
  stats.generated_tokens = totals_.generated_tokens;
  stats.prefix_queried_tokens = totals_.prefix_queried_tokens;
  stats.prefix_hit_tokens = totals_.prefix_hit_tokens;
  stats.steps = totals_.steps;
  stats.times = totals_.times;
}

void RequestBatch::remove_ended() {
  std::erase_if(running_, [&](const std::shared_ptr<RequestState>& request) {
    if (!request->ended) return false;
    prefix_.release(request->cache);
    return true;
  });
  std::erase_if(waiting_, [](const auto& request) { return request->ended.load(); });
}

// A request starts when all its tokens have a page and each running one could take one more, so
// that a newcomer does not cause the next preemption. Nobody overtakes: a request too large for now
// would wait for ever behind small ones.
void RequestBatch::admit() {
  while (!waiting_.empty() && static_cast<int64_t>(running_.size()) < options_.max_running) {
    RequestState& request = *waiting_.front();
    const int64_t num_tokens = static_cast<int64_t>(request.tokens.size());
    const int64_t found = prefix_.extend(request.cache, request.position, request.tokens,
                                         request.request.cache_salt, request.first_wanted_logits());
    const int64_t missing =
        ceil_div(num_tokens, kPageTokens) - static_cast<int64_t>(request.cache.pages.size());
    if (missing + static_cast<int64_t>(running_.size()) > prefix_.num_available()) {
      prefix_.release(request.cache);
      request.position = {};
      return;
    }
    CHECK(prefix_.reserve(request.cache, num_tokens));
    if (!request.admitted_before) {
      request.admitted_before = true;
      request.cached_prompt_tokens = found;
      request.queue_seconds = monotonic_seconds() - request.submitted;
      totals_.prefix_hit_tokens += found;
      if (prefix_.enabled()) totals_.prefix_queried_tokens += num_tokens;
    }
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

// Prompts have their pages since they were admitted; a token that was sampled may need one more.
void RequestBatch::reserve_rows() {
  for (size_t i = 0; i < running_.size(); ++i) {
    const auto has_room = [&] {
      RequestState& request = *running_[i];
      return prefix_.reserve(request.cache, static_cast<int64_t>(request.tokens.size()));
    };
    while (i < running_.size() && !has_room()) preempt_youngest();
  }
}

void RequestBatch::preempt_youngest() {
  std::shared_ptr<RequestState> request = std::move(running_.back());
  running_.pop_back();
  prefix_.release(request->cache);
  request->position = {};
  totals_.preemptions += 1;
  waiting_.push_front(std::move(request));
}

// Of several requests that go on with the same page the oldest computes it; the others leave it
// their rows and find the page later.
bool RequestBatch::another_computes_its_page(RequestState& request,
                                             std::vector<PrefixCache::Key>& under_way) {
  const PrefixPosition& position = request.position;
  const int64_t end = position.num_tokens + kPageTokens;
  if (!prefix_.enabled() || position.detached || end > static_cast<int64_t>(request.tokens.size()))
    return false;
  PrefixCache::Key key = PrefixCache::key_of(position, request.tokens, request.request.cache_salt);
  const bool could_take_it =
      position.num_tokens == request.cache.num_tokens && end <= request.first_wanted_logits();
  if (could_take_it && std::find(under_way.begin(), under_way.end(), key) != under_way.end())
    return true;
  under_way.push_back(std::move(key));
  return false;
}

void RequestBatch::plan_rows() {
  const int64_t vocab = engine_.model.config.vocab_size;
  int64_t num_decoding = 0, num_with_prompt_logprobs = 0;
  for (const auto& request : running_) {
    num_decoding += request->num_pending() == 1;
    num_with_prompt_logprobs += request->wants_prompt_logprobs();
  }
  int64_t step_rows = std::min(options_.chunk_tokens, engine_.activations.max_tokens);
  if (num_decoding > 0) step_rows = std::min(step_rows, num_decoding + options_.mixed_chunk_tokens);
  const int64_t logit_rows = std::max<int64_t>(
      1, options_.logit_bytes / 4 / vocab / std::max<int64_t>(num_with_prompt_logprobs, 1));

  std::vector<PrefixCache::Key> under_way;
  std::vector<RowDemand> demands;
  for (const auto& request : running_) {
    RowDemand& demand = demands.emplace_back();
    if (request->num_pending() > 1) {
      const int64_t found =
          prefix_.extend(request->cache, request->position, request->tokens,
                         request->request.cache_salt, request->first_wanted_logits());
      if (!request->prompt_done) {
        request->cached_prompt_tokens += found;
        totals_.prefix_hit_tokens += found;
      }
    }
    demand.pending = request->num_pending();
    demand.most = request->wants_prompt_logprobs() ? logit_rows : step_rows;
    if (demand.pending > 1 && another_computes_its_page(*request, under_way)) demand.most = 0;
  }
  const std::vector<int64_t> shares = share_rows(demands, step_rows);

  in_batch_.clear();
  batch_.clear();
  rows_.clear();
  for (size_t i = 0; i < running_.size(); ++i) {
    if (shares[i] == 0) continue;
    RequestState& request = *running_[i];
    const int64_t first = request.cache.num_tokens, end = first + shares[i];
    const int64_t wanted = std::clamp(request.first_wanted_logits(), first, end);
    in_batch_.push_back(running_[i]);
    batch_.push_back({&request.cache,
                      std::span(request.tokens)
                          .subspan(static_cast<size_t>(first), static_cast<size_t>(shares[i])),
                      end - wanted});
    for (int64_t p = wanted; p < end; ++p) {
      rows_.push_back({&request, p, p + 1 == static_cast<int64_t>(request.tokens.size())});
    }
  }
}

void RequestBatch::look_at_results() {
  const size_t vocab = static_cast<size_t>(engine_.model.config.vocab_size),
               hidden = static_cast<size_t>(engine_.model.config.hidden_size);
  engine_.exec.pool.parallel_for(static_cast<int64_t>(rows_.size()), [&](int64_t i, int) {
    const size_t row = static_cast<size_t>(i);
    look_at_row(rows_[row], std::span(logits_).subspan(row * vocab, vocab));
  });
  // The residual stream of every token of the step is still there. What is not finite in it may be
  // in the pages too, which must not reach others.
  const float* x = read_residual(engine_.exec, engine_.model, engine_.activations).data();
  std::span<Row> rows = rows_;
  for (size_t i = 0; i < batch_.size(); ++i) {
    const size_t num_values = batch_[i].tokens.size() * hidden,
                 num_rows = static_cast<size_t>(batch_[i].num_logits);
    bool finite = all_finite({x, num_values});
    for (const Row& row : rows.first(num_rows)) finite = finite && row.finite;
    take_result(in_batch_[i], rows.first(num_rows), finite);
    x += num_values;
    rows = rows.subspan(num_rows);
  }
}

// Runs on any thread of the pool; rows of one request are never sampled twice.
void RequestBatch::look_at_row(Row& row, std::span<const float> logits) const {
  row.finite = all_finite(logits);
  if (!row.finite) return;
  RequestState& request = *row.request;
  const int num_logprobs =
      row.is_next ? request.request.num_logprobs : request.request.num_prompt_logprobs;
  if (!row.is_next) {
    row.token = request.tokens[static_cast<size_t>(row.position + 1)];
    row.logprob = token_logprob(logits, row.token, num_logprobs);
    return;
  }
  if (request.request.max_tokens == 0) return;
  if (request.num_generated() >= request.request.min_tokens) {
    row.token = request.sampler.next(logits);
  } else {
    std::vector<float> allowed(logits.begin(), logits.end());
    for (const int32_t token : request.request.stop_tokens)
      allowed[static_cast<size_t>(token)] = -INFINITY;
    row.token = request.sampler.next(allowed);
  }
  if (num_logprobs >= 0) row.logprob = token_logprob(logits, row.token, num_logprobs);
}

void RequestBatch::take_result(const std::shared_ptr<RequestState>& request, std::span<Row> rows,
                               bool finite) {
  if (!finite) {
    prefix_.drop(request->cache);
    finish(request, FinishReason::kNanLogits,
           fmt::format("the model gave NaN or infinity within the first {} tokens of this request",
                       request->cache.num_tokens));
    return;
  }
  prefix_.insert(request->cache, request->position, request->tokens, request->request.cache_salt);
  for (Row& row : rows) {
    if (!row.is_next) request->prompt_logprobs.push_back(std::move(row.logprob));
  }
  if (rows.empty() || !rows.back().is_next) return;

  if (!request->prompt_done) {
    request->prompt_done = true;
    totals_.prompt_tokens += request->num_prompt();
    GenerationEvent event;
    event.kind = GenerationEvent::Kind::kPromptDone;
    event.prompt_logprobs = std::exchange(request->prompt_logprobs, {});
    event.cached_prompt_tokens = request->cached_prompt_tokens;
    event.queue_seconds = request->queue_seconds;
    emit(request, std::move(event));
  }
  if (request->request.max_tokens == 0) return finish(request, FinishReason::kLength);
  take_next(request, rows.back());
}

void RequestBatch::take_next(const std::shared_ptr<RequestState>& request, Row& row) {
  if (contains(request->request.stop_tokens, row.token))
    return finish(request, FinishReason::kStop);
  GenerationEvent event;
  event.token = row.token;
  if (request->request.num_logprobs >= 0) event.logprob = std::move(row.logprob);
  emit(request, std::move(event));
  request->tokens.push_back(row.token);
  totals_.generated_tokens += 1;
  if (request->num_generated() == request->request.max_tokens ||
      static_cast<int64_t>(request->tokens.size()) > max_tokens_)
    finish(request, FinishReason::kLength);
}

void RequestBatch::emit(const std::shared_ptr<RequestState>& request, GenerationEvent event) {
  events_.push_back({request, std::move(event)});
}

void RequestBatch::finish(const std::shared_ptr<RequestState>& request, FinishReason reason,
                          std::string message) {
  prefix_.release(request->cache);
  request->done = true;
  GenerationEvent event;
  event.kind = GenerationEvent::Kind::kFinished;
  event.reason = reason;
  event.message = std::move(message);
  emit(request, std::move(event));
}

}  // namespace indexcache
