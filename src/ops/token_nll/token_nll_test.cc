#include "ops/token_nll/token_nll.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "ops/kit/testing.h"

namespace indexcache {

static TokenNllArgs to_device(DeviceOperands& device, TokenNllArgs args) {
  device.elements(args.logits, args.num_rows * args.vocab_size);
  device.elements(args.targets, args.num_rows);
  device.elements(args.nll, args.num_rows);
  return args;
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<double> nll_of(Device device, const char* impl, const std::vector<float>& logits,
                           const std::vector<int32_t>& targets, int num_threads = 2) {
  std::vector<double> out(targets.size(), -7);
  const int64_t rows = static_cast<int64_t>(targets.size());
  run_on<TokenNllArgs>(
      device, token_nll, "token_nll", impl,
      {logits.data(), rows, rows == 0 ? 1 : static_cast<int64_t>(logits.size()) / rows,
       targets.data(), out.data()},
      num_threads);
  return out;
}

constexpr std::pair<Device, const char*> kImplementations[] = {{Device::kCpu, "ref"},
                                                               {Device::kCuda, "cuda"}};

TEST(TokenNll, KnownRows) {
  for (const auto& [device, impl] : kImplementations) {
    if (!can_run(device)) continue;
    const std::vector<double> got =
        nll_of(device, impl, {0, 0, 0, 0, 100, 0, -100, 3, 5, -kInfinity, 5, 5}, {2, 1, 1});
    EXPECT_DOUBLE_EQ(got[0], std::log(4)) << impl;
    EXPECT_DOUBLE_EQ(got[1], 100) << impl;
    EXPECT_EQ(got[2], std::numeric_limits<double>::infinity()) << impl;
    EXPECT_TRUE(nll_of(device, impl, {}, {}).empty()) << impl;
  }
}

TEST(TokenNll, ANanOrNothingButMinusInfinityGivesNan) {
  for (const auto& [device, impl] : kImplementations) {
    if (!can_run(device)) continue;
    const std::vector<double> got = nll_of(
        device, impl,
        {1, std::nanf(""), 2, std::nanf(""), 3, 1, -kInfinity, -kInfinity, -kInfinity}, {0, 2, 1});
    for (const double nll : got) EXPECT_TRUE(std::isnan(nll)) << impl;
  }
}

TEST(TokenNll, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  for (const int64_t vocab : {1, 2, 31, 257, 8192, 50001}) {
    for (const int64_t rows : {1, 3, 17}) {
      std::vector<float> logits(static_cast<size_t>(rows * vocab));
      for (float& logit : logits) logit = 12 * rng.normal();
      std::vector<int32_t> targets;
      for (int64_t r = 0; r < rows; ++r)
        targets.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(vocab))));
      const std::vector<double> want = nll_of(Device::kCpu, "ref", logits, targets);
      EXPECT_EQ(nll_of(Device::kCpu, "ref", logits, targets, 3), want);
      if (!can_run(Device::kCuda)) continue;
      const std::vector<double> got = nll_of(Device::kCuda, "cuda", logits, targets);
      for (size_t r = 0; r < got.size(); ++r)
        EXPECT_NEAR(got[r], want[r], 1e-12 * (std::abs(want[r]) + 100)) << vocab << " row " << r;
    }
  }
}

}  // namespace

}  // namespace indexcache
