#include "ops/rms_norm/rms_norm.h"

#include <gtest/gtest.h>

#include "ops/kit/testing.h"

namespace indexcache {

static RmsNormArgs to_device(DeviceOperands& device, RmsNormArgs args) {
  device.rows(args.x, args.num_rows, args.row_elements, args.ldx);
  device.elements(args.weight, args.row_elements);
  device.rows(args.y, args.num_rows, args.row_elements, args.ldy);
  device.elements(args.y16, args.num_rows * args.row_elements);
  return args;
}

namespace {

struct Problem {
  GuardedRows x, y;
  std::vector<float> weight;
  RmsNormArgs args;

  Problem(Rng& rng, int64_t num_rows, int64_t n, int64_t gap)
      : x(num_rows, n, n + gap), y(num_rows, n, n + 2 * gap), weight(random_floats(rng, n)) {
    x.fill_random(rng);
    args = {x.data(), x.stride(), weight.data(), 1e-5f, num_rows, n, y.data(), y.stride()};
  }
  std::vector<float> run(const std::string& impl, int num_threads = 2) {
    run_forced(rms_norm, "rms_norm", impl, args, num_threads);
    return y.dense();
  }
  auto bound(const std::vector<float>& want) const {
    const double relative = static_cast<double>(args.row_elements + 8) * kHalfUlp;
    return [&want, relative](size_t i) { return relative * std::abs(want[i]); };
  }
};

TEST(RmsNorm, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const int64_t num_rows : kRowCounts) {
      for (const int64_t n : kRowElements) {
        for (const int64_t gap : {0, 3}) {
          SCOPED_TRACE(fmt::format("{} rows {} n {} gap {}", impl, num_rows, n, gap));
          Problem problem(rng, num_rows, n, gap);
          const auto want = problem.run("ref");
          EXPECT_TRUE(all_close(problem.run(impl), want, problem.bound(want)));
          EXPECT_TRUE(problem.x.untouched());
          EXPECT_TRUE(problem.y.untouched());
          problem.args.y = problem.x.data();
          problem.args.ldy = problem.x.stride();
          problem.run(impl);
          EXPECT_TRUE(all_close(problem.x.dense(), want, problem.bound(want))) << "in place";
        }
      }
    }
  }
}

TEST(RmsNorm, IsTheFormula) {
  const float x[] = {3, 4, 0, 0}, weight[] = {1, -2, 5, 1};
  float y[4];
  Exec exec(1);
  rms_norm(exec, {x, 4, weight, 0, 1, 4, y, 4});  // root mean square: 2.5
  EXPECT_FLOAT_EQ(y[0], 1.2f);
  EXPECT_FLOAT_EQ(y[1], -3.2f);
  EXPECT_EQ(y[2], 0);
  EXPECT_EQ(y[3], 0);
}

TEST(RmsNorm, NanAndInfinityStayInTheirRow) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      for (const int64_t column : {0, 5, 18}) {
        SCOPED_TRACE(fmt::format("{} {} in column {}", impl, bad, column));
        Problem problem(rng, 17, 19, 0);
        const auto clean = problem.run(impl);
        problem.x.row(3)[column] = bad;
        const auto want = problem.run("ref"), got = problem.run(impl);
        EXPECT_TRUE(all_close(got, want, problem.bound(want)));
        for (size_t i = 0; i < got.size(); ++i) {
          if (i / 19 != 3) {
            EXPECT_EQ(got[i], clean[i]) << i;
          }
        }
      }
    }
    Problem zeros(rng, 2, 19, 0);
    std::fill_n(zeros.x.row(1), 19, 0.0f);
    const auto got = zeros.run(impl);
    for (size_t i = 19; i < 38; ++i) EXPECT_EQ(got[i], 0);
  }
}

// Rows in bf16 are the rows rounded, beside them or alone.
TEST(RmsNorm, RoundedRowsOnAGpu) {
  if (!can_run(Device::kCuda)) GTEST_SKIP() << "needs a GPU";
  Rng rng(printed_seed());
  for (const int64_t n : {1, 7, 64, 130, 768, 2048, 4100}) {
    for (const int64_t gap : {0, 4, 3}) {
      Problem problem(rng, 3, n, gap);
      std::vector<uint16_t> rounded(static_cast<size_t>(3 * n)), alone = rounded;
      problem.args.y16 = rounded.data();
      const auto y = problem.run("cuda");
      for (size_t i = 0; i < y.size(); ++i)
        ASSERT_EQ(rounded[i], f32_to_bf16(y[i])) << "n " << n << " gap " << gap << " at " << i;
      EXPECT_TRUE(problem.y.untouched());
      problem.args.y16 = alone.data();
      problem.args.y = nullptr;
      run_forced(rms_norm, "rms_norm", "cuda", problem.args);
      EXPECT_EQ(alone, rounded);
    }
  }
}

TEST(RmsNorm, ThreadsChangeNoBit) {
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
