// Checks the contract of token_nll and chooses an implementation.
#include "ops/token_nll/token_nll.h"

namespace indexcache {

namespace {

constexpr OpImpl<TokenNllArgs> kImpls[] = {
#ifdef INDEXCACHE_CUDA
    {"cuda", [](const TokenNllArgs&) { return true; }, token_nll_cuda, Device::kCuda},
#endif
    {"ref", [](const TokenNllArgs&) { return true; }, token_nll_ref},
};

}  // namespace

void token_nll(Exec& exec, const TokenNllArgs& args) {
  CHECK_GE(args.vocab_size, 1);
  if (exec.device == Device::kCpu) {  // targets in GPU memory were checked where they were made
    for (int64_t r = 0; r < args.num_rows; ++r) {
      CHECK_GE(args.targets[r], 0);
      CHECK_LT(args.targets[r], args.vocab_size);
    }
  }
  const double n = static_cast<double>(args.num_rows * args.vocab_size);
  run_op(exec, "token_nll", kImpls, args, {2 * n, 4 * n});
}

}  // namespace indexcache
