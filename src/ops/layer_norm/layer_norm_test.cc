#include "ops/layer_norm/layer_norm.h"

#include <gtest/gtest.h>

#include "ops/kit/testing.h"

namespace indexcache {

static LayerNormArgs to_device(DeviceOperands& device, LayerNormArgs args) {
  device.rows(args.x, args.num_rows, args.row_elements, args.ldx);
  device.elements(args.weight, args.row_elements);
  device.elements(args.bias, args.row_elements);
  device.rows(args.y, args.num_rows, args.row_elements, args.ldy);
  return args;
}

namespace {

constexpr float kEps = 1e-6f;

struct Problem {
  GuardedRows x, y;
  std::vector<float> weight, bias, bounds;
  LayerNormArgs args;

  Problem(Rng& rng, int64_t num_rows, int64_t n, int64_t gap, float offset = 0)
      : x(num_rows, n, n + gap),
        y(num_rows, n, n + 2 * gap),
        weight(random_floats(rng, n)),
        bias(random_floats(rng, n)) {
    x.fill_random(rng);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t i = 0; i < n; ++i) x.row(r)[i] += offset;
    }
    args = {x.data(), x.stride(), weight.data(), bias.data(), kEps,
            num_rows, n,          y.data(),      y.stride()};
    // The contract: (n + 8) 2^-24 (max |x| / sqrt(variance + eps) |weight| + |bias|).
    for (int64_t r = 0; r < num_rows; ++r) {
      double sum = 0, squares = 0, largest = 0;
      for (int64_t i = 0; i < n; ++i) {
        sum += x.row(r)[i];
        largest = std::max<double>(largest, std::abs(x.row(r)[i]));
      }
      const double mean = sum / static_cast<double>(n);
      for (int64_t i = 0; i < n; ++i) squares += std::pow(x.row(r)[i] - mean, 2);
      const double scale = largest / std::sqrt(squares / static_cast<double>(n) + kEps);
      for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        bounds.push_back(static_cast<float>(static_cast<double>(n + 8) * kHalfUlp *
                                            (scale * std::abs(weight[i]) + std::abs(bias[i]))));
      }
    }
  }
  std::vector<float> run(const std::string& impl, int num_threads = 2) {
    run_forced(layer_norm, "layer_norm", impl, args, num_threads);
    return y.dense();
  }
  auto bound() const {
    return [this](size_t i) { return static_cast<double>(bounds[i]); };
  }
};

TEST(LayerNorm, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const int64_t num_rows : kRowCounts) {
      for (const int64_t n : kRowElements) {
        for (const float offset : {0.0f, 100.0f}) {
          SCOPED_TRACE(fmt::format("{} rows {} n {} offset {}", impl, num_rows, n, offset));
          Problem problem(rng, num_rows, n, offset > 0 ? 3 : 0, offset);
          const auto want = problem.run("ref");
          EXPECT_TRUE(all_close(problem.run(impl), want, problem.bound()));
          EXPECT_TRUE(problem.x.untouched());
          EXPECT_TRUE(problem.y.untouched());
          problem.args.y = problem.x.data();
          problem.args.ldy = problem.x.stride();
          problem.run(impl);
          EXPECT_TRUE(all_close(problem.x.dense(), want, problem.bound())) << "in place";
        }
      }
    }
  }
}

TEST(LayerNorm, IsTheFormula) {
  const float x[] = {1, 3, 1, 3}, weight[] = {1, 1, 2, 2}, bias[] = {0, 0.5f, 0, 10};
  float y[4];
  Exec exec(1);
  layer_norm(exec, {x, 4, weight, bias, 0, 1, 4, y, 4});  // mean 2, variance 1
  EXPECT_FLOAT_EQ(y[0], -1);
  EXPECT_FLOAT_EQ(y[1], 1.5f);
  EXPECT_FLOAT_EQ(y[2], -2);
  EXPECT_FLOAT_EQ(y[3], 12);
}

TEST(LayerNorm, NanAndInfinityStayInTheirRow) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      SCOPED_TRACE(fmt::format("{} {}", impl, bad));
      Problem problem(rng, 17, 19, 0);
      const auto clean = problem.run(impl);
      problem.x.row(3)[18] = bad;
      const auto got = problem.run(impl);
      EXPECT_TRUE(all_close(got, problem.run("ref"), problem.bound()));
      for (size_t i = 0; i < got.size(); ++i) {
        if (i / 19 == 3) {
          EXPECT_TRUE(std::isnan(got[i])) << i;
        } else {
          EXPECT_EQ(got[i], clean[i]) << i;
        }
      }
    }
  }
}

TEST(LayerNorm, AConstantRowGivesTheBias) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    Problem problem(rng, 2, 16, 0);
    std::fill_n(problem.x.row(1), 16, 0.25f);
    const auto got = problem.run(impl);
    for (size_t i = 0; i < 16; ++i) EXPECT_EQ(got[16 + i], problem.bias[i]);
  }
}

TEST(LayerNorm, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  Problem problem(rng, 33, 130, 1);
  for (const std::string& impl : runnable_implementations()) {
    const auto one = problem.run(impl, 1);
    EXPECT_TRUE(same_bits(problem.run(impl, 2), one)) << impl;
    EXPECT_TRUE(same_bits(problem.run(impl, 3), one)) << impl;
  }
}

}  // namespace
}  // namespace indexcache
