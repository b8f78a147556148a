#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"
#include "ops/token_nll/token_nll.h"

namespace indexcache {

namespace {

void check_range(const char* name, double value, double min, double max) {
  if (!(value >= min && value <= max)) fail("{} is {}, expected {} to {}", name, value, min, max);
}

// The best first; equal logits by token id.
bool better(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

}  // namespace

void check_sampling_params(const SamplingParams& params) {
  check_range("temperature", params.temperature, 0, 100);
  check_range("top_k", static_cast<double>(params.top_k), 0, INT32_MAX);
  if (!(params.top_p > 0)) fail("top_p is {}, expected above 0 and at most 1", params.top_p);
  check_range("top_p", params.top_p, 0, 1);
  check_range("min_p", params.min_p, 0, 1);
}

int32_t Sampler::next(std::span<const float> logits) {
  CHECK(!logits.empty());
  int32_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) fail("the model gave NaN as the logit of token {}", i);
    const bool above =
        best < 0 ? logits[i] > -INFINITY : logits[i] > logits[static_cast<size_t>(best)];
    if (above) best = static_cast<int32_t>(i);
  }
  if (best < 0) fail("the model gave -infinity as the logit of every token");
  const float top = logits[static_cast<size_t>(best)];
  if (params_.temperature == 0 || params_.top_k == 1 || top == INFINITY) return best;

  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > -INFINITY) candidates_.emplace_back(logits[i], static_cast<int32_t>(i));
  }
  if (params_.top_k > 0 && params_.top_k < static_cast<int64_t>(candidates_.size())) {
    std::nth_element(candidates_.begin(), candidates_.begin() + params_.top_k - 1,
                     candidates_.end(), better);
    candidates_.resize(static_cast<size_t>(params_.top_k));
  }

  // Weights relative to the best. The order from the best down is made only as far as it is looked
  // at, which is short for all but flat distributions.
  const auto weight = [&](size_t i) {
    return std::exp((static_cast<double>(candidates_[i].first) - top) / params_.temperature);
  };
  double total = 0;
  for (size_t i = 0; i < candidates_.size(); ++i) total += weight(i);
  size_t num_sorted = 0;
  const auto sort_up_to = [&](size_t i) {
    while (num_sorted <= i) {
      const auto begin = candidates_.begin() + static_cast<std::ptrdiff_t>(num_sorted);
      num_sorted = std::min(candidates_.size(), std::max<size_t>(64, 4 * num_sorted));
      const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(num_sorted);
      std::partial_sort(begin, end, candidates_.end(), better);
    }
  };
  // The smallest set of best tokens with at least top_p of the mass, then those that min_p lets
  // through.
  size_t keep = candidates_.size();
  double mass = total;
  if (params_.top_p < 1 || params_.min_p > 0) {
    mass = 0;
    for (keep = 0; keep < candidates_.size(); ++keep) {
      sort_up_to(keep);
      const double next = weight(keep);
      if (keep > 0 && (mass >= params_.top_p * total || next < params_.min_p)) break;
      mass += next;
    }
  }
  double target = rng_.uniform() * mass;
  for (size_t i = 0; i < keep; ++i) {
    sort_up_to(i);
    target -= weight(i);
    if (target < 0) return candidates_[i].second;
  }
  return candidates_[keep - 1].second;  // rounding of the running difference
}

double negative_log_likelihood(std::span<const float> logits, int32_t target) {
  return log_sum_exp(logits) - static_cast<double>(logits[static_cast<size_t>(target)]);
}

TokenLogprob token_logprob(std::span<const float> logits, int32_t token, int64_t n) {
  const double total = log_sum_exp(logits);
  const auto logprob = [&](float logit) { return static_cast<double>(logit) - total; };
  const float own = logits[static_cast<size_t>(token)];
  TokenLogprob result{token, logprob(own), 0, {}};
  // The n best so far are a heap whose front is the worst of them.
  std::vector<std::pair<float, int32_t>> best;
  for (size_t i = 0; i < logits.size(); ++i) {
    const std::pair<float, int32_t> candidate{logits[i], static_cast<int32_t>(i)};
    result.rank += better(candidate, {own, token});
    if (n <= 0) continue;
    if (static_cast<int64_t>(best.size()) == n) {
      if (!better(candidate, best.front())) continue;
      std::pop_heap(best.begin(), best.end(), better);
      best.pop_back();
    }
    best.push_back(candidate);
    std::push_heap(best.begin(), best.end(), better);
  }
  std::sort_heap(best.begin(), best.end(), better);
  for (const auto& [logit, id] : best) result.top.emplace_back(id, logprob(logit));
  return result;
}

bool all_finite(std::span<const float> values) {
  // An infinity or NaN has all bits of the exponent; without an early exit this is a vector loop.
  uint32_t found = 0;
  for (const float value : values)
    found |= (std::bit_cast<uint32_t>(value) & 0x7F800000u) == 0x7F800000u;
  return found == 0;
}

}  // namespace indexcache
