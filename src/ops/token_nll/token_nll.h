// Negative log likelihood of a token under each row of logits.
//
//   nll[r] = log(sum_v exp(logits[r, v])) - logits[r, targets[r]]
//
// f32 in, double inside and out: losses of plans are compared to 1e-6 of their size. A target with
// logit -infinity gives infinity; a row with a NaN, or of -infinity alone, gives NaN. Tolerance
// against ref: 1e-12 of the sum's logarithm, from the order of the sum and the library's exp. Cost:
// vocab_size exponentials and 4 vocab_size bytes a row.
#pragma once

#include <span>

#include "ops/kit/exec.h"

namespace indexcache {

struct TokenNllArgs {
  const float* logits = nullptr;  // [num_rows, vocab_size]
  int64_t num_rows = 0;
  int64_t vocab_size = 0;
  const int32_t* targets = nullptr;  // [num_rows], in [0, vocab_size)
  double* nll = nullptr;             // [num_rows]
};

void token_nll(Exec& exec, const TokenNllArgs& args);

double log_sum_exp(std::span<const float> logits);

void token_nll_ref(Exec& exec, const TokenNllArgs& args);
void token_nll_cuda(Exec& exec, const TokenNllArgs& args);

}  // namespace indexcache
