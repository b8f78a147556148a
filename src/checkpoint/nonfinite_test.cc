#include "checkpoint/nonfinite.h"

#include <cmath>
#include <limits>

#include "base/rng.h"
#include "base/units.h"
#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

TEST(Nonfinite, KnowsEveryPatternOfTheSmallTypes) {
  for (int bits = 0; bits < 256; ++bits) {
    const uint8_t byte = static_cast<uint8_t>(bits);
    const auto count = [&](DType dtype) { return count_nonfinite({dtype, {1}, &byte}).count; };
    EXPECT_EQ(count(DType::kF8E4M3), std::isnan(f8e4m3_to_f32(byte)) ? 1 : 0) << bits;
    EXPECT_EQ(count(DType::kF8E5M2), (bits & 0x7C) == 0x7C ? 1 : 0) << bits;
    EXPECT_EQ(count(DType::kF8E8M0), bits == 255 ? 1 : 0) << bits;
    EXPECT_EQ(count(DType::kU8), 0);
  }
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t word = static_cast<uint16_t>(bits);
    const auto* data = reinterpret_cast<const uint8_t*>(&word);
    EXPECT_EQ(count_nonfinite({DType::kF16, {1}, data}).count,
              std::isfinite(f16_to_f32(word)) ? 0 : 1)
        << bits;
    EXPECT_EQ(count_nonfinite({DType::kBF16, {1}, data}).count,
              std::isfinite(bf16_to_f32(word)) ? 0 : 1)
        << bits;
  }
}

TEST(Nonfinite, FindsTheFirstAndCountsAllUnaligned) {
  constexpr uint64_t kSeed = 31;
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  Rng rng(kSeed);
  for (int round = 0; round < 40; ++round) {
    const int64_t size = static_cast<int64_t>(1 + rng.below(20'000));
    std::vector<float> values(static_cast<size_t>(size), 1.5f);
    const uint64_t num_bad = rng.below(4) == 0 ? values.size() : rng.below(5);
    int64_t first = -1, count = 0;
    for (uint64_t i = 0; i < num_bad; ++i) {
      values[num_bad == values.size() ? i : rng.below(values.size())] =
          rng.below(2) ? std::numeric_limits<float>::quiet_NaN()
                       : -std::numeric_limits<float>::infinity();
    }
    for (int64_t i = 0; i < size; ++i) {
      if (std::isfinite(values[static_cast<size_t>(i)])) continue;
      if (count++ == 0) first = i;
    }
    std::vector<uint8_t> bytes(values.size() * 4 + 1);
    std::memcpy(bytes.data() + 1, values.data(), values.size() * 4);
    const Nonfinite found = count_nonfinite({DType::kF32, {size}, bytes.data() + 1});
    EXPECT_EQ(found.count, count);
    EXPECT_EQ(found.first, first);
    std::vector<double> wide(values.begin(), values.end());
    EXPECT_EQ(
        count_nonfinite({DType::kF64, {size}, reinterpret_cast<const uint8_t*>(wide.data())}).first,
        first);
  }
}

TEST(Nonfinite, NamesTensorFileAndIndex) {
  Checkpoint checkpoint;
  checkpoint.path = "/models/m";
  checkpoint.add("fine", filled(DType::kF32, {0}, 0));
  Tensor bad(DType::kF32, {2, 3});
  bad.as<float>()[4] = std::numeric_limits<float>::quiet_NaN();
  checkpoint.add("bad", std::move(bad));
  expect_contains(error_of([&] { check_finite(checkpoint); }),
                  {"/models/m: ", "1 tensors", "\"bad\"", "1 of 6 values", "first at element 4"});
}

}  // namespace
}  // namespace indexcache
