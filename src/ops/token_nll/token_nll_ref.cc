#include <algorithm>
#include <cmath>

#include "ops/token_nll/token_nll.h"

namespace indexcache {

double log_sum_exp(std::span<const float> logits) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - top);
  return std::log(sum) + top;
}

void token_nll_ref(Exec& exec, const TokenNllArgs& args) {
  exec.pool.parallel_for(args.num_rows, [&](int64_t r, int) {
    const std::span row(args.logits + r * args.vocab_size, static_cast<size_t>(args.vocab_size));
    args.nll[r] = log_sum_exp(row) - static_cast<double>(row[static_cast<size_t>(args.targets[r])]);
  });
}

}  // namespace indexcache
