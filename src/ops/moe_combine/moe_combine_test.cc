#include "ops/moe_combine/moe_combine.h"

#include <gtest/gtest.h>

#include <numeric>

#include "ops/kit/testing.h"

namespace indexcache {

static MoeCombineArgs to_device(DeviceOperands& device, MoeCombineArgs args) {
  device.elements(args.rows, args.num_rows * args.num_slots * args.row_elements);
  device.elements(args.rows16, args.num_rows * args.num_slots * args.row_elements);
  device.elements(args.slots, args.num_rows * args.num_slots);
  device.elements(args.weights, args.num_rows * args.num_slots);
  device.elements(args.y, args.num_rows * args.row_elements);
  return args;
}

namespace {

struct Problem {
  GuardedRows y;
  std::vector<float> rows, weights, start;
  std::vector<int32_t> slots;
  MoeCombineArgs args;

  Problem(Rng& rng, int64_t num_rows, int64_t num_slots, int64_t n)
      : y(num_rows, n, n),
        rows(random_floats(rng, num_rows * num_slots * n)),
        weights(random_floats(rng, num_rows * num_slots)),
        slots(static_cast<size_t>(num_rows * num_slots)) {
    std::iota(slots.begin(), slots.end(), 0);
    for (size_t i = slots.size(); i > 1; --i) std::swap(slots[i - 1], slots[rng.below(i)]);
    y.fill_random(rng);
    start = y.dense();
    args = {rows.data(), slots.data(), weights.data(), num_slots, num_rows, n, y.data()};
  }
  std::vector<float> run(const std::string& impl, int num_threads = 2) {
    std::copy(start.begin(), start.end(), y.data());
    run_forced(moe_combine, "moe_combine", impl, args, num_threads);
    return y.dense();
  }
  // (num_slots + 2) 2^-24 (|y| + sum_j |w rows|)
  auto bound() const {
    return [this](size_t i) {
      const size_t n = static_cast<size_t>(args.row_elements), r = i / n;
      const size_t num_slots = static_cast<size_t>(args.num_slots);
      double size = std::abs(start[i]);
      for (size_t j = 0; j < num_slots; ++j) {
        const size_t slot = static_cast<size_t>(slots[r * num_slots + j]);
        size += std::abs(static_cast<double>(weights[r * num_slots + j]) * rows[slot * n + i % n]);
      }
      return static_cast<double>(num_slots + 2) * kHalfUlp * size;
    };
  }
};

TEST(MoeCombine, Bf16RowsOnAGpuAreTheSameNumbers) {
  if (!can_run(Device::kCuda)) GTEST_SKIP() << "needs a GPU";
  Rng rng(printed_seed());
  for (const int64_t n : {8, 136, 2048}) {
    Problem problem(rng, 9, 5, n);
    std::vector<uint16_t> rows16;
    for (float& value : problem.rows) {
      rows16.push_back(f32_to_bf16(value));
      value = bf16_to_f32(rows16.back());
    }
    // GuardedRows begin 64 floats into their memory.
    std::vector<float> aligned(problem.start.size() + 4);
    float* y = aligned.data();
    while (reinterpret_cast<uintptr_t>(y) % 16 != 0) ++y;
    const auto want = problem.run("ref");
    std::copy(problem.start.begin(), problem.start.end(), y);
    problem.args.rows = nullptr;
    problem.args.rows16 = rows16.data();
    problem.args.y = y;
    run_forced(moe_combine, "moe_combine", "cuda", problem.args);
    EXPECT_TRUE(all_close(std::span<const float>(y, want.size()), want, problem.bound()));
  }
}

TEST(MoeCombine, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const int64_t num_rows : kRowCounts) {
      for (const int64_t n : kRowElements) {
        for (const int64_t num_slots : {0, 1, 2, 8}) {
          SCOPED_TRACE(fmt::format("{} rows {} n {} slots {}", impl, num_rows, n, num_slots));
          Problem problem(rng, num_rows, num_slots, n);
          const auto want = problem.run("ref");
          EXPECT_TRUE(all_close(problem.run(impl), want, problem.bound()));
          EXPECT_TRUE(problem.y.untouched());
        }
      }
    }
  }
}

TEST(MoeCombine, IsTheFormula) {
  const float rows[] = {1, 2, 10, 20, 100, 200}, weights[] = {0.5f, 2};
  const int32_t slots[] = {2, 0};
  float y[] = {1000, 2000};
  Exec exec(1);
  moe_combine(exec, {rows, slots, weights, 2, 1, 2, y});
  EXPECT_EQ(y[0], 1052);
  EXPECT_EQ(y[1], 2104);
}

TEST(MoeCombine, NanStaysInItsRow) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    Problem problem(rng, 17, 2, 19);
    problem.weights[2 * 5 + 1] = kNan;
    const auto got = problem.run(impl);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_EQ(std::isnan(got[i]), i / 19 == 5) << impl << " " << i;
  }
}

TEST(MoeCombine, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  Problem problem(rng, 33, 8, 130);
  for (const std::string& impl : runnable_implementations()) {
    const auto one = problem.run(impl, 1);
    EXPECT_TRUE(same_bits(problem.run(impl, 2), one)) << impl;
    EXPECT_TRUE(same_bits(problem.run(impl, 3), one)) << impl;
  }
}

}  // namespace
}  // namespace indexcache
