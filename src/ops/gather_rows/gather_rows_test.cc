#include "ops/gather_rows/gather_rows.h"

#include <gtest/gtest.h>

#include <cstring>

#include "ops/kit/testing.h"

namespace indexcache {

static GatherRowsArgs to_device(DeviceOperands& device, GatherRowsArgs args) {
  device.elements(args.table, args.table_rows * args.row_elements * dtype_bytes(args.dtype));
  device.elements(args.ids, args.num_rows);
  device.elements(args.y, args.num_rows * args.row_elements);
  return args;
}

namespace {

constexpr int64_t kTableRows = 37;
constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3};

// A table of random bits (NaN and infinity among them), `shift` bytes off any alignment.
struct Problem {
  std::vector<uint8_t> table;
  std::vector<int32_t> ids;
  GuardedRows y;
  GatherRowsArgs args;

  Problem(Rng& rng, DType dtype, int64_t num_rows, int64_t n, size_t shift)
      : table(static_cast<size_t>(kTableRows * n * dtype_bytes(dtype)) + shift), y(num_rows, n, n) {
    for (uint8_t& byte : table) byte = static_cast<uint8_t>(rng.next() >> 56);
    for (int64_t r = 0; r < num_rows; ++r)
      ids.push_back(static_cast<int32_t>(rng.below(kTableRows)));
    if (num_rows > 0) ids[0] = kTableRows - 1;
    args = {dtype, table.data() + shift, kTableRows, n, ids.data(), num_rows, y.data()};
  }
  std::vector<float> run(const std::string& impl, int num_threads = 2) {
    run_forced(gather_rows, "gather_rows", impl, args, num_threads);
    return y.dense();
  }
};

TEST(GatherRows, EveryImplementationGivesTheExactValues) {
  Rng rng(printed_seed());
  std::vector<std::string> impls = runnable_implementations();
  impls.push_back("ref");
  for (const std::string& impl : impls) {
    for (const DType dtype : kTypes) {
      for (const int64_t num_rows : kRowCounts) {
        for (const int64_t n : kRowElements) {
          SCOPED_TRACE(fmt::format("{} {} rows {} n {}", impl, dtype_name(dtype), num_rows, n));
          Problem problem(rng, dtype, num_rows, n, n % 2 == 0 ? 1 : 0);
          const TensorView table{dtype, {kTableRows, n}, problem.args.table};
          std::vector<float> want;
          for (const int32_t id : problem.ids) {
            for (int64_t i = 0; i < n; ++i) want.push_back(element_as_f32(table, id * n + i));
          }
          EXPECT_TRUE(same_bits(problem.run(impl), want));
          EXPECT_TRUE(problem.y.untouched());
        }
      }
    }
  }
}

TEST(GatherRows, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  Problem problem(rng, DType::kBF16, 33, 130, 0);
  for (const std::string& impl : runnable_implementations()) {
    const auto one = problem.run(impl, 1);
    EXPECT_TRUE(same_bits(problem.run(impl, 2), one)) << impl;
    EXPECT_TRUE(same_bits(problem.run(impl, 3), one)) << impl;
  }
}

TEST(GatherRowsDeathTest, ANumberOutsideTheTableIsABug) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Rng rng(1);
  Problem problem(rng, DType::kF32, 3, 8, 0);
  for (const int32_t id : {-1, static_cast<int32_t>(kTableRows)}) {
    problem.ids[1] = id;
    EXPECT_DEATH(problem.run("ref", 1), "CHECK failed: args.ids");
  }
}

}  // namespace
}  // namespace indexcache
