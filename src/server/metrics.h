// Counts and times for /metrics, under vLLM's names, and what only this engine has (the index plan,
// the indexer's time) under its own.
#pragma once

#include <array>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "server/generator.h"

namespace indexcache {

class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds)
      : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}
  void add(double value);
  void write(std::string& out, const std::string& name, const std::string& help,
             const std::string& labels) const;

 private:
  std::vector<double> bounds_;
  std::vector<uint64_t> counts_;  // the last one: above all bounds
  double sum_ = 0;
};

// Safe from any thread.
class Metrics {
 public:
  void add_response(int status);
  // One accepted request, and what it asked for.
  void add_request(int64_t n, int64_t max_tokens);
  // One finished choice. Times in seconds since the request came; first_token < 0: there was none.
  // `queued` is how long it waited to be admitted.
  struct Finished {
    std::string reason;
    double first_token = -1, end = 0;
    int64_t prompt_tokens = 0, generated_tokens = 0;
    std::vector<double> token_gaps;
    double queued = 0, last_token = -1;
  };
  void add_finished(const Finished& finished);

  // Prometheus's text format.
  std::string text(const SchedulerStats& stats, const std::string& model_name,
                   const std::string& plan) const;

 private:
  mutable std::mutex mutex_;
  std::map<int, uint64_t> responses_;
  std::map<std::string, uint64_t> finished_{{"stop", 0}, {"length", 0}, {"abort", 0}};
  uint64_t corrupted_ = 0;
  Histogram first_token_{{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                          1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560}};
  Histogram between_tokens_{{0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
                             5, 7.5, 10, 20, 40, 80}};
  static std::vector<double> request_seconds() {
    return {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
            30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
  }
  Histogram queue_{request_seconds()}, prefill_{request_seconds()}, decode_{request_seconds()},
      inference_{request_seconds()}, whole_{request_seconds()};
  Histogram asked_n_{{1, 2, 5, 10, 20}};
  Histogram asked_tokens_{
      {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000}};
  Histogram prompt_length_{
      {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000}};
  Histogram answer_length_{{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000}};
};

}  // namespace indexcache
