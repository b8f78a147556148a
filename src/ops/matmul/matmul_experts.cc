// Checks the contract of matmul_experts. On the CPU the rows are known, so that it is a matmul.
#include <algorithm>
#include <vector>

#include "ops/matmul/matmul_impl.h"

namespace indexcache {

namespace {

void as_groups(Exec& exec, const MatmulExpertsArgs& args) {
  std::vector<MatmulGroup> groups;
  for (const ExpertProduct& product : args.products) {
    for (size_t e = 0; e < product.weights.size(); ++e) {
      const int64_t begin = args.row_begin[e], rows = args.row_begin[e + 1] - begin;
      CHECK_GE(rows, 0);
      if (rows == 0) continue;
      groups.push_back({product.x + begin * product.ldx, product.ldx, rows, product.weights[e],
                        product.y + begin * product.ldy, product.ldy});
    }
  }
  // Straight to the implementation: its time counts as this op's.
  const MatmulArgs products{groups, args.compute, false, exec.batch_invariant};
  choose<MatmulArgs>(exec, "matmul", matmul_impls(), products).run(exec, products);
}

[[maybe_unused]] bool have_one_type(const MatmulExpertsArgs& args) {
  for (const ExpertProduct& product : args.products) {
    for (const Weight& w : product.weights) {
      if (w.dtype != product.weights[0].dtype) return false;
    }
  }
  return true;
}

constexpr OpImpl<MatmulExpertsArgs> kImpls[] = {
#ifdef INDEXCACHE_CUDA
    {"cuda", have_one_type, matmul_experts_cuda, Device::kCuda},
#endif
    {"matmul", [](const MatmulExpertsArgs&) { return true; }, as_groups},
};

Cost matmul_experts_cost(const MatmulExpertsArgs& args) {
  Cost cost;
  for (const ExpertProduct& product : args.products) {
    const auto rows = static_cast<double>(args.num_rows),
               n = static_cast<double>(product.weights[0].rows),
               k = static_cast<double>(product.weights[0].cols);
    const double experts = std::min(rows, static_cast<double>(product.weights.size()));
    cost.flops += 2 * rows * n * k;
    cost.bytes += 4 * rows * (k + n) + experts * n * k * dtype_bytes(product.weights[0].dtype);
  }
  return cost;
}

}  // namespace

std::span<const OpImpl<MatmulExpertsArgs>> matmul_experts_impls() { return kImpls; }

void matmul_experts(Exec& exec, const MatmulExpertsArgs& args) {
  CHECK_GE(args.num_rows, 0);
  CHECK(args.row_begin != nullptr);
  for (const ExpertProduct& product : args.products) {
    CHECK(!product.weights.empty());
    CHECK_EQ(product.weights.size(), args.products[0].weights.size());
    CHECK(exec.device == Device::kCpu || product.device_weights != nullptr);
    for (const Weight& w : product.weights) {
      CHECK_EQ(w.rows, product.weights[0].rows);
      CHECK_EQ(w.cols, product.weights[0].cols);
    }
  }
  run_op<MatmulExpertsArgs>(exec, "matmul_experts", kImpls, args, matmul_experts_cost(args));
}

}  // namespace indexcache
