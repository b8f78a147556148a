#include "ops/silu_mul/silu_mul.h"

#include <gtest/gtest.h>

#include "ops/kit/testing.h"

namespace indexcache {

static SiluMulArgs to_device(DeviceOperands& device, SiluMulArgs args) {
  device.elements(args.gate, args.num_rows * args.row_elements);
  device.elements(args.up, args.num_rows * args.row_elements);
  device.elements(args.y, args.num_rows * args.row_elements);
  return args;
}

namespace {

struct Problem {
  GuardedRows gate, up, y;
  SiluMulArgs args;

  Problem(Rng& rng, int64_t num_rows, int64_t n, float scale)
      : gate(num_rows, n, n), up(num_rows, n, n), y(num_rows, n, n) {
    gate.fill_random(rng, scale);
    up.fill_random(rng);
    args = {gate.data(), up.data(), num_rows, n, y.data()};
  }
  std::vector<float> run(const std::string& impl, int num_threads = 2) {
    run_forced(silu_mul, "silu_mul", impl, args, num_threads);
    return y.dense();
  }
};

auto contract_bound(const std::vector<float>& want, const std::vector<float>& up) {
  return [&](size_t i) {
    return 8 * kHalfUlp * std::abs(want[i]) + 0x1p-119 * std::abs(up[i]) + 0x1p-149;
  };
}

TEST(SiluMul, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const int64_t num_rows : kRowCounts) {
      for (const int64_t n : kRowElements) {
        for (const float scale : {1e-3f, 1.0f, 60.0f}) {
          SCOPED_TRACE(fmt::format("{} rows {} n {} scale {}", impl, num_rows, n, scale));
          Problem problem(rng, num_rows, n, scale);
          const auto up = problem.up.dense(), want = problem.run("ref");
          EXPECT_TRUE(all_close(problem.run(impl), want, contract_bound(want, up)));
          EXPECT_TRUE(problem.y.untouched());
          Problem over_up = problem;
          problem.args.y = problem.gate.data();
          problem.run(impl);
          EXPECT_TRUE(all_close(problem.gate.dense(), want, contract_bound(want, up)));
          EXPECT_TRUE(problem.gate.untouched());
          over_up.args = {over_up.gate.data(), over_up.up.data(), num_rows, n, over_up.up.data()};
          over_up.run(impl);
          EXPECT_TRUE(all_close(over_up.up.dense(), want, contract_bound(want, up)));
        }
      }
    }
  }
}

// Every gate from where exp underflows to where the sigmoid is 1, and the special values.
TEST(SiluMul, TheWholeRangeOfGates) {
  std::vector<float> gate = {0,       -0.0f,    kInfinity, -kInfinity, kNan,
                             3.3e38f, -3.3e38f, 1e-40f,    -1e-40f,    -87.3f,
                             -87.4f,  -103.9f,  -104.5f,   -699,       -701};
  for (int i = -12000; i < 12000; ++i) gate.push_back(static_cast<float>(i) / 100);
  const std::vector<float> up(gate.size(), 1);
  const int64_t n = static_cast<int64_t>(gate.size());
  std::vector<float> want(gate.size()), got(gate.size());
  run_forced(silu_mul, "silu_mul", "ref", {gate.data(), up.data(), 1, n, want.data()});
  EXPECT_EQ(want[0], 0);
  EXPECT_EQ(want[2], kInfinity);
  EXPECT_EQ(want[3], 0);
  EXPECT_TRUE(std::isnan(want[4]));
  for (const std::string& impl : runnable_implementations()) {
    run_forced(silu_mul, "silu_mul", impl, {gate.data(), up.data(), 1, n, got.data()});
    EXPECT_TRUE(all_close(got, want, contract_bound(want, up))) << impl;
  }
}

TEST(SiluMul, NanStaysInItsElement) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    Problem problem(rng, 5, 19, 1);
    problem.gate.row(2)[7] = kNan;
    problem.up.row(4)[18] = kNan;
    const auto got = problem.run(impl);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_EQ(std::isnan(got[i]), i == 2 * 19 + 7 || i == 4 * 19 + 18) << impl << " " << i;
  }
}

TEST(SiluMul, ThreadsChangeNoBit) {
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
