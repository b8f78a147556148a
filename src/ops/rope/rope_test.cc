#include "ops/rope/rope.h"

#include <gtest/gtest.h>

#include "ops/kit/testing.h"
#include "ops/rope/rope_table.h"

namespace indexcache {

static RopeArgs to_device(DeviceOperands& device, RopeArgs args) {
  const auto extent = [&](int64_t ld, int64_t head_stride) {
    return args.num_rows == 0
               ? 0
               : (args.num_rows - 1) * ld + (args.num_heads - 1) * head_stride + args.rope_dim;
  };
  device.elements(args.x, extent(args.ldx, args.x_head_stride));
  device.elements(args.x16, extent(args.ldx, args.x_head_stride));
  device.elements(args.cos, args.num_rows * args.rope_dim / 2);
  device.elements(args.sin, args.num_rows * args.rope_dim / 2);
  device.elements(args.y, extent(args.ldy, args.y_head_stride));
  return args;
}

namespace {

constexpr int64_t kHeads = 3;

// Rows of kHeads heads of rope_dim + `rest` elements; rope leaves the rest alone.
struct Problem {
  GuardedRows x, y;
  std::vector<float> cos, sin;
  RopeArgs args;

  Problem(Rng& rng, int64_t num_rows, int64_t rope_dim, int64_t rest, bool interleaved)
      : x(num_rows * kHeads, rope_dim, rope_dim + rest),
        y(num_rows * kHeads, rope_dim, rope_dim + 2 * rest) {
    x.fill_random(rng);
    for (int64_t i = 0; i < num_rows * rope_dim / 2; ++i) {
      const double angle = 100 * rng.uniform();
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    args = {x.data(),
            kHeads * x.stride(),
            x.stride(),
            num_rows,
            kHeads,
            rope_dim,
            interleaved,
            cos.data(),
            sin.data(),
            y.data(),
            kHeads * y.stride(),
            y.stride()};
  }
  std::vector<float> run(const std::string& impl, int num_threads = 2) {
    run_forced(rope, "rope", impl, args, num_threads);
    return y.dense();
  }
  // 4 * 2^-24 (|a| + |b|) of the pair that element i belongs to.
  auto bound(const std::vector<float>& input) const {
    const size_t dim = static_cast<size_t>(args.rope_dim);
    return [&input, dim, interleaved = args.interleaved](size_t i) {
      const size_t head = i / dim * dim, e = i % dim;
      const size_t other = interleaved ? e ^ 1 : (e + dim / 2) % dim;
      return 4 * kHalfUlp * (std::abs(input[i]) + std::abs(input[head + other]));
    };
  }
};

TEST(Rope, Bf16InputOnAGpuIsTheSameNumbers) {
  if (!can_run(Device::kCuda)) GTEST_SKIP() << "needs a GPU";
  Rng rng(printed_seed());
  for (const bool interleaved : {false, true}) {
    Problem problem(rng, 17, 64, 5, interleaved);
    std::vector<uint16_t> x16(static_cast<size_t>(17 * problem.args.ldx));
    for (size_t i = 0; i < x16.size(); ++i) {
      x16[i] = f32_to_bf16(problem.x.data()[i]);
      problem.x.data()[i] = bf16_to_f32(x16[i]);
    }
    const auto want = problem.run("cuda");
    problem.args.x = nullptr;
    problem.args.x16 = x16.data();
    EXPECT_TRUE(same_bits(problem.run("cuda"), want));
  }
}

TEST(Rope, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const int64_t num_rows : kRowCounts) {
      for (const int64_t dim : {2, 6, 8, 14, 32, 64, 130}) {
        for (const bool interleaved : {false, true}) {
          SCOPED_TRACE(
              fmt::format("{} rows {} dim {} interleaved {}", impl, num_rows, dim, interleaved));
          Problem problem(rng, num_rows, dim, num_rows == 16 ? 0 : 5, interleaved);
          const auto input = problem.x.dense(), want = problem.run("ref");
          EXPECT_TRUE(all_close(problem.run(impl), want, problem.bound(input)));
          EXPECT_TRUE(problem.x.untouched());
          EXPECT_TRUE(problem.y.untouched());
          problem.args.y = problem.x.data();
          problem.args.ldy = problem.args.ldx;
          problem.args.y_head_stride = problem.args.x_head_stride;
          problem.run(impl);
          EXPECT_TRUE(all_close(problem.x.dense(), want, problem.bound(input))) << "in place";
          EXPECT_TRUE(problem.x.untouched());
        }
      }
    }
  }
}

TEST(Rope, IsTheRotation) {
  const float x[] = {1, 2, 3, 4}, cos[] = {0, 1}, sin[] = {1, 0};  // a quarter turn, none
  float y[4];
  Exec exec(1);
  rope(exec, {x, 4, 4, 1, 1, 4, true, cos, sin, y, 4, 4});
  EXPECT_EQ(std::vector<float>(y, y + 4), (std::vector<float>{-2, 1, 3, 4}));
  rope(exec, {x, 4, 4, 1, 1, 4, false, cos, sin, y, 4, 4});
  EXPECT_EQ(std::vector<float>(y, y + 4), (std::vector<float>{-3, 2, 1, 4}));
}

TEST(Rope, NanStaysInItsPair) {
  Rng rng(printed_seed());
  for (const std::string& impl : runnable_implementations()) {
    for (const bool interleaved : {false, true}) {
      Problem problem(rng, 3, 64, 0, interleaved);
      problem.x.row(4)[6] = kNan;
      const auto got = problem.run(impl);
      const size_t partner = interleaved ? 7 : 38;
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_EQ(std::isnan(got[i]), i == 4 * 64 + 6 || i == 4 * 64 + partner) << i;
      }
    }
  }
}

TEST(Rope, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  Problem problem(rng, 33, 64, 1, true);
  for (const std::string& impl : runnable_implementations()) {
    const auto one = problem.run(impl, 1);
    EXPECT_TRUE(same_bits(problem.run(impl, 2), one)) << impl;
    EXPECT_TRUE(same_bits(problem.run(impl, 3), one)) << impl;
  }
}

// The angle is a float32 product; its cosine and sine are exact to a rounding of each factor.
TEST(RopeTable, AgreesWithDouble) {
  const std::vector<int32_t> positions = {0, 1, 63, 64, 4095, 200000, 1048575};
  std::vector<float> inv_freq;
  for (int j = 0; j < 32; ++j) inv_freq.push_back(static_cast<float>(std::pow(1e6, -j / 32.0)));
  for (const float factor : {1.0f, 1.25f}) {
    RopeTable table;
    fill_rope_table(positions, inv_freq, factor, &table);
    ASSERT_EQ(table.cos.size(), positions.size() * inv_freq.size());
    ASSERT_EQ(table.sin.size(), table.cos.size());
    size_t i = 0;
    for (const int32_t position : positions) {
      for (const float frequency : inv_freq) {
        const double angle = static_cast<float>(static_cast<float>(position) * frequency);
        EXPECT_NEAR(table.cos[i], factor * std::cos(angle), 2 * kHalfUlp * factor) << i;
        EXPECT_NEAR(table.sin[i], factor * std::sin(angle), 2 * kHalfUlp * factor) << i;
        ++i;
      }
    }
    for (size_t j = 0; j < inv_freq.size(); ++j) {
      EXPECT_EQ(table.cos[j], factor);
      EXPECT_EQ(table.sin[j], 0);
    }
  }
}

TEST(RopeTable, RefillingShrinks) {
  RopeTable table;
  const std::vector<int32_t> many = {1, 2, 3}, one = {7};
  const std::vector<float> inv_freq = {1, 0.5f};
  fill_rope_table(many, inv_freq, 1, &table);
  fill_rope_table(one, inv_freq, 1, &table);
  ASSERT_EQ(table.cos.size(), 2u);
  EXPECT_FLOAT_EQ(table.cos[1], std::cos(3.5f));
  fill_rope_table({}, inv_freq, 1, &table);
  EXPECT_TRUE(table.cos.empty());
}

}  // namespace
}  // namespace indexcache
