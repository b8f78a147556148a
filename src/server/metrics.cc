#include "server/metrics.h"

#include <algorithm>

namespace indexcache {

namespace {

std::string escaped(const std::string& label) {
  std::string out;
  for (const char c : label) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out;
}

void write_head(std::string& out, const std::string& name, const std::string& help,
                const char* type) {
  out += fmt::format("# HELP {0} {1}\n# TYPE {0} {2}\n", name, help, type);
}

void write_value(std::string& out, const std::string& name, const std::string& help,
                 const char* type, const std::string& labels, double value) {
  write_head(out, name, help, type);
  out += fmt::format("{}{{{}}} {}\n", name, labels, value);
}

}  // namespace

void Histogram::add(double value) {
  const auto it = std::ranges::lower_bound(bounds_, value);
  ++counts_[static_cast<size_t>(it - bounds_.begin())];
  sum_ += value;
}

void Histogram::write(std::string& out, const std::string& name, const std::string& help,
                      const std::string& labels) const {
  write_head(out, name, help, "histogram");
  uint64_t total = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    total += counts_[i];
    const std::string bound = i < bounds_.size() ? fmt::format("{}", bounds_[i]) : "+Inf";
    out += fmt::format("{}_bucket{{{},le=\"{}\"}} {}\n", name, labels, bound, total);
  }
  out += fmt::format("{0}_sum{{{1}}} {2}\n{0}_count{{{1}}} {3}\n", name, labels, sum_, total);
}

void Metrics::add_response(int status) {
  const std::lock_guard lock(mutex_);
  ++responses_[status];
}

void Metrics::add_request(int64_t n, int64_t max_tokens) {
  const std::lock_guard lock(mutex_);
  asked_n_.add(static_cast<double>(n));
  asked_tokens_.add(static_cast<double>(max_tokens));
}

void Metrics::add_finished(const Finished& finished) {
  const std::lock_guard lock(mutex_);
  ++finished_[finished.reason];
  if (finished.reason == "nan") ++corrupted_;
  if (finished.first_token >= 0) {
    first_token_.add(finished.first_token);
    queue_.add(finished.queued);
    prefill_.add(std::max(finished.first_token - finished.queued, 0.0));
    decode_.add(finished.last_token - finished.first_token);
    inference_.add(std::max(finished.last_token - finished.queued, 0.0));
  }
  for (const double gap : finished.token_gaps) between_tokens_.add(gap);
  whole_.add(finished.end);
  prompt_length_.add(static_cast<double>(finished.prompt_tokens));
  answer_length_.add(static_cast<double>(finished.generated_tokens));
}

std::string Metrics::text(const SchedulerStats& stats, const std::string& model_name,
                          const std::string& plan) const {
  const std::string labels = fmt::format("model_name=\"{}\"", escaped(model_name));
  std::string out;
  const auto gauge = [&](const char* name, const char* help, double value) {
    write_value(out, name, help, "gauge", labels, value);
  };
  const auto counter = [&](const char* name, const char* help, double value) {
    write_value(out, name, help, "counter", labels, value);
  };
  const auto count = [](int64_t n) { return static_cast<double>(n); };
  gauge("vllm:num_requests_running", "Requests in the batch.", count(stats.running));
  gauge("vllm:num_requests_waiting", "Requests in the queue.", count(stats.waiting));
  gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.",
        stats.pages > 0 ? 1 - count(stats.free_pages) / count(stats.pages) : 0);
  counter("vllm:prompt_tokens_total", "Prompt tokens computed.", count(stats.prompt_tokens));
  counter("vllm:generation_tokens_total", "Tokens generated.", count(stats.generated_tokens));
  counter("vllm:num_preemptions_total", "Requests that gave their pages back to be computed again.",
          count(stats.preemptions));
  counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
          count(stats.prefix_queried_tokens));
  counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
          count(stats.prefix_hit_tokens));
  counter("indexcache_requests_accepted_total", "Requests taken by the scheduler.",
          count(stats.accepted));
  counter("indexcache_requests_refused_total", "Requests refused by the scheduler.",
          count(stats.refused));
  counter("indexcache_requests_cancelled_total", "Requests whose client left.",
          count(stats.cancelled));
  counter("indexcache_steps_total", "Forward passes.", count(stats.steps));
  gauge("indexcache_cache_pages", "Pages of the cache.", count(stats.pages));
  gauge("indexcache_cache_free_pages", "Free pages of the cache.", count(stats.free_pages));
  gauge("indexcache_cache_prefix_pages", "Free pages that still hold a prefix.",
        count(stats.cached_pages));
  gauge("indexcache_num_layers", "Decoder layers.", count(static_cast<int64_t>(plan.size())));
  gauge("indexcache_num_full_layers", "Layers that run their indexer.",
        count(std::ranges::count(plan, 'F')));
  write_head(out, "vllm:cache_config_info", "How the cache is divided.", "gauge");
  out += fmt::format("vllm:cache_config_info{{{},block_size=\"{}\",num_gpu_blocks=\"{}\"}} 1\n",
                     labels, kPageTokens, stats.pages);
  write_head(out, "indexcache_plan_info", "The index plan in force.", "gauge");
  out += fmt::format("indexcache_plan_info{{{},plan=\"{}\"}} 1\n", labels, escaped(plan));
  counter("indexcache_indexer_seconds_total", "Time in indexers.", stats.times.indexer);
  counter("indexcache_attention_seconds_total", "Time in attention.", stats.times.attention);
  counter("indexcache_ffn_seconds_total", "Time in feed-forward layers.", stats.times.ffn);
  counter("indexcache_head_seconds_total", "Time in the output head.", stats.times.head);
  gauge("indexcache_engine_healthy", "1 while the engine works, 0 after a fault.",
        stats.fault.empty() ? 1 : 0);

  const std::lock_guard lock(mutex_);
  counter("vllm:corrupted_requests_total", "Requests ended by logits that were not finite.",
          static_cast<double>(corrupted_));
  write_head(out, "vllm:request_success_total", "Finished answers by reason.", "counter");
  for (const char* reason : {"stop", "length", "abort"}) {
    out += fmt::format("vllm:request_success_total{{{},finished_reason=\"{}\"}} {}\n", labels,
                       reason, finished_.at(reason));
  }
  write_head(out, "indexcache_http_responses_total", "HTTP answers by status.", "counter");
  for (const auto& [status, responses] : responses_) {
    out += fmt::format("indexcache_http_responses_total{{{},code=\"{}\"}} {}\n", labels, status,
                       responses);
  }
  first_token_.write(out, "vllm:time_to_first_token_seconds",
                     "From the request to its first token.", labels);
  between_tokens_.write(out, "vllm:inter_token_latency_seconds", "Between two tokens.", labels);
  queue_.write(out, "vllm:request_queue_time_seconds", "Until a request was admitted.", labels);
  prefill_.write(out, "vllm:request_prefill_time_seconds", "From there to its first token.",
                 labels);
  decode_.write(out, "vllm:request_decode_time_seconds", "From its first to its last token.",
                labels);
  inference_.write(out, "vllm:request_inference_time_seconds",
                   "From its admission to its last token.", labels);
  whole_.write(out, "vllm:e2e_request_latency_seconds", "From the request to its last token.",
               labels);
  asked_n_.write(out, "vllm:request_params_n", "Answers that a request asked for.", labels);
  asked_tokens_.write(out, "vllm:request_params_max_tokens",
                      "Tokens that a request asked for at most, per answer.", labels);
  prompt_length_.write(out, "vllm:request_prompt_tokens", "Prompt tokens of a request.", labels);
  answer_length_.write(out, "vllm:request_generation_tokens", "Tokens generated for a request.",
                       labels);
  return out;
}

}  // namespace indexcache
