// What the tests of ops share: which implementations this machine can run, random inputs from a
// printed seed, buffers that notice writes outside their rows, and the comparison against ref.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "base/rng.h"
#include "device/cpu_features.h"
#include "device/gpus.h"
#include "ops/kit/exec.h"
#include "ops/kit/test_device.h"

namespace indexcache {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr double kHalfUlp = 0x1p-24;  // the rounding of one f32 operation, relative

inline const std::vector<int64_t> kRowCounts = {0, 1, 15, 16, 17, 33};
inline const std::vector<int64_t> kRowElements = {1, 2, 7, 8, 16, 130, 1000};

// Fresh in every run, printed so that a failure can be repeated with INDEXCACHE_TEST_SEED=<seed>.
inline uint64_t printed_seed() {
  const char* given = std::getenv("INDEXCACHE_TEST_SEED");
  const uint64_t seed = given ? std::strtoull(given, nullptr, 10) : std::random_device()();
  std::printf("INDEXCACHE_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// The lines of INDEXCACHE_ROWS_TABLE except ref that this machine can run; says which it cannot.
inline std::vector<std::string> runnable_implementations() {
  std::vector<std::string> names;
  const auto add = [&](const char* name, bool runs) {
    if (runs) {
      names.emplace_back(name);
    } else {
      std::printf("skipped: this machine cannot run %s\n", name);
    }
  };
  add("avx512", cpu_features().avx512);
  add("avx2", cpu_features().avx2);
  add("cuda", can_run(Device::kCuda));
  return names;
}

// Runs one implementation of an op by name.
template <class Args>
void run_forced(void (*op)(Exec&, const Args&), const char* op_name, const std::string& impl,
                const Args& args, int num_threads = 2) {
  run_on(impl == "cuda" ? Device::kCuda : Device::kCpu, op, op_name, impl, args, num_threads);
}

inline std::vector<float> random_floats(Rng& rng, int64_t count, float scale = 1) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = scale * rng.normal();
  return values;
}

// Rows with a stride. Everything that is not an element of a row, guards at both ends included,
// holds a bit pattern that untouched() looks for.
class GuardedRows {
 public:
  GuardedRows(int64_t num_rows, int64_t row_elements, int64_t stride)
      : num_rows_(num_rows),
        row_elements_(row_elements),
        stride_(stride),
        floats_(static_cast<size_t>(num_rows * stride + 2 * kGuard), kPoison) {}

  float* data() { return floats_.data() + kGuard; }
  float* row(int64_t r) { return data() + r * stride_; }
  int64_t stride() const { return stride_; }

  void fill_random(Rng& rng, float scale = 1) {
    for (int64_t r = 0; r < num_rows_; ++r) {
      for (int64_t i = 0; i < row_elements_; ++i) row(r)[i] = scale * rng.normal();
    }
  }

  std::vector<float> dense() {
    std::vector<float> values;
    for (int64_t r = 0; r < num_rows_; ++r)
      values.insert(values.end(), row(r), row(r) + row_elements_);
    return values;
  }

  // Whether all that lies outside the rows is as it was.
  bool untouched() const {
    for (size_t i = 0; i < floats_.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) - kGuard;
      const bool inside = at >= 0 && at < num_rows_ * stride_ && at % stride_ < row_elements_;
      if (!inside && std::bit_cast<uint32_t>(floats_[i]) != std::bit_cast<uint32_t>(kPoison))
        return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64;
  static constexpr float kPoison = -6.25e29f;
  int64_t num_rows_, row_elements_, stride_;
  std::vector<float> floats_;
};

// NaN and infinity must be in the same places; elsewhere |got - want| <= bound(i). Names the
// coordinate that is furthest outside its bound.
template <class Bound>
testing::AssertionResult all_close(std::span<const float> got, std::span<const float> want,
                                   const Bound& bound) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  for (size_t i = 0; i < got.size(); ++i) {
    const bool same = std::isnan(got[i]) == std::isnan(want[i]) &&
                      (std::isinf(want[i]) || std::isinf(got[i]) ? got[i] == want[i] : true);
    if (!same)
      return testing::AssertionFailure()
             << "at " << i << ": got " << got[i] << ", expected " << want[i];
  }
  size_t worst = 0;
  double worst_excess = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(want[i])) continue;
    const double error = std::abs(static_cast<double>(got[i]) - want[i]);
    const double limit = bound(i);
    const double excess = error <= limit ? 0 : limit > 0 ? error / limit : HUGE_VAL;
    if (excess > worst_excess) {
      worst = i;
      worst_excess = excess;
    }
  }
  if (worst_excess == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << fmt::format("worst at {}: got {}, expected {}, {} times the bound {}", worst,
                        got[worst], want[worst], worst_excess, bound(worst));
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<uint32_t>(x) == std::bit_cast<uint32_t>(y);
  });
}

}  // namespace indexcache
