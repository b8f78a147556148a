// What index plans cost on text, all of them on the same tokens in one run: perplexity, and how far
// the next-token distributions move from the reference plan's.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace indexcache {

// One way to run a model: an engine whose weights cover the plan, shared by variants that differ in
// the plan alone.
struct Variant {
  std::string name;
  IndexPlan plan;
  Engine* engine = nullptr;
};

// A mean over tokens with the standard error of that mean. One sequence is one observation, because
// its tokens are alike; 0 with one sequence.
struct Estimate {
  double mean = 0, error = 0;
};

struct TextScore {
  Estimate nll;             // nats a token
  Estimate nll_increase;    // over the reference on the same tokens: most of the noise is gone
  Estimate kl;              // KL(reference || this), nats a token
  Estimate top1_agreement;  // share of tokens whose likeliest next token is the reference's
  double bits_per_byte = 0;
  double perplexity() const;
};

// The first variant is the reference. Every sequence has the same length, at least 2.
// `num_target_bytes`: the bytes of text that the tokens with a loss stand for, all together.
std::vector<TextScore> score_text(const std::vector<Variant>& variants,
                                  const std::vector<std::vector<int32_t>>& sequences,
                                  int64_t num_target_bytes,
                                  const std::function<void(int64_t tokens_done)>& progress = {});

}  // namespace indexcache
