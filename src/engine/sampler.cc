#include "engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

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
  std::sort(candidates_.begin(), candidates_.end(), better);

  std::vector<double> weights;
  double total = 0;
  for (const auto& [logit, id] : candidates_) {
    weights.push_back(std::exp((static_cast<double>(logit) - top) / params_.temperature));
    total += weights.back();
  }
  // The smallest set of best tokens with at least top_p of the mass, then those that min_p lets
  // through.
  double mass = 0;
  size_t keep = 0;
  while (keep < weights.size() && (keep == 0 || mass < params_.top_p * total))
    mass += weights[keep++];
  while (keep > 1 && weights[keep - 1] < params_.min_p * weights[0]) mass -= weights[--keep];

  double target = rng_.uniform() * mass;
  for (size_t i = 0; i < keep; ++i) {
    target -= weights[i];
    if (target < 0) return candidates_[i].second;
  }
  return candidates_[keep - 1].second;  // rounding of the running difference
}

double negative_log_likelihood(std::span<const float> logits, int32_t target) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - top);
  return std::log(sum) + top - static_cast<double>(logits[static_cast<size_t>(target)]);
}

}  // namespace indexcache
