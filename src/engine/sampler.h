// The next token from a row of logits: greedy, or temperature with top-k, top-p and min-p, in that
// order, as llama.cpp and vLLM apply them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/rng.h"

namespace indexcache {

struct SamplingParams {
  double temperature = 0;  // 0: greedy
  int64_t top_k = 0;       // 0: off
  double top_p = 1;        // 1: off
  double min_p = 0;        // 0: off; a token needs at least min_p times the probability of the best
  uint64_t seed = 0;
};

// Error naming the field, the value and the range.
void check_sampling_params(const SamplingParams& params);

class Sampler {
 public:
  explicit Sampler(const SamplingParams& params) : params_(params), rng_(params.seed) {}

  // Ties go to the lower token id. -infinity is never chosen. Logits with NaN, or all -infinity,
  // are an Error: there is no right token, and a random one would hide it.
  int32_t next(std::span<const float> logits);

 private:
  SamplingParams params_;
  Rng rng_;
  std::vector<std::pair<float, int32_t>> candidates_;
};

struct TokenLogprob {
  int32_t token = 0;
  double logprob = 0;  // natural logarithm, of the model's distribution before temperature
  int64_t rank = 0;    // 0: the most likely one
  std::vector<std::pair<int32_t, double>> top;  // the n best, best first
};

// log softmax(logits) of `token` and of the n best, in double; equal logits rank by token id. The
// same token has the same number in both places. Logits must be finite or -infinity.
TokenLogprob token_logprob(std::span<const float> logits, int32_t token, int64_t n);

// Neither NaN nor infinity among them.
bool all_finite(std::span<const float> values);

// -log softmax(logits)[target], in double. For a target with logit -infinity it is infinity.
double negative_log_likelihood(std::span<const float> logits, int32_t target);

}  // namespace indexcache
