#include "ops/store_latent/store_latent.h"

#include <gtest/gtest.h>

#include "ops/kit/test_cache.h"

namespace indexcache {

static StoreLatentArgs to_device(DeviceOperands& device, StoreLatentArgs args) {
  const int64_t half = (args.rows.row_elements - args.latent_dim) / 2;
  device.rows(args.x, args.num_rows, args.rows.row_elements, args.ldx);
  device.elements(args.weight, args.latent_dim);
  device.elements(args.cos, args.num_rows * half);
  device.elements(args.sin, args.num_rows * half);
  cache_to_device(device, args);
  return args;
}

namespace {

using Span = ScatteredCache::Span;

struct Problem {
  ScatteredCache cache;
  GuardedRows x;
  std::vector<float> weight, cos, sin;
  StoreLatentArgs args;

  Problem(Rng& rng, DType dtype, const std::vector<Span>& spans, int64_t latent, int64_t rope,
          int64_t gap)
      : cache(rng, spans,
              {.dtype = dtype,
               .row_elements = latent + rope,
               .fp8_elements = dtype == DType::kF8E4M3 ? latent : 0}),
        x(cache.num_tokens, latent + rope, latent + rope + gap),
        weight(random_floats(rng, latent)) {
    x.fill_random(rng);
    for (int64_t i = 0; i < cache.num_tokens * rope / 2; ++i) {
      const double angle = 100 * rng.uniform();
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    args = {.x = x.data(),
            .ldx = x.stride(),
            .num_rows = cache.num_tokens,
            .latent_dim = latent,
            .weight = weight.data(),
            .eps = 1e-6f,
            .cos = cos.data(),
            .sin = sin.data(),
            .seqs = cache.seqs,
            .rows = cache.rows};
  }

  const std::vector<uint8_t>& run(const std::string& impl, int num_threads = 2) {
    cache.poison();
    run_forced(store_latent, "store_latent", impl, args, num_threads);
    return cache.pool;
  }

  // The contract's tolerance of element i of row `token`.
  double bound(int64_t token, int64_t i, float want) {
    const int64_t n = args.latent_dim;
    if (i < n) return static_cast<double>(n + 8) * kHalfUlp * std::abs(want);
    const float* pair = x.row(token) + n + (i - n) / 2 * 2;
    return 4 * kHalfUlp * (std::abs(pair[0]) + std::abs(pair[1]));
  }
};

struct Sizes {
  int64_t latent, rope;
};
const std::vector<Sizes> kSizes = {{1, 2},    {7, 0},   {36, 8},    {128, 32}, {130, 14},
                                   {512, 64}, {516, 6}, {1000, 66}, {128, 6},  {640, 2}};

std::vector<std::string> all_implementations() {
  std::vector<std::string> impls = runnable_implementations();
  impls.push_back("ref");
  return impls;
}

TEST(StoreLatent, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  std::vector<std::vector<Span>> batches = kCacheBatches;
  batches.push_back(many_decoding());
  for (const std::string& impl : runnable_implementations()) {
    for (size_t b = 0; b < batches.size(); ++b) {
      for (const auto& [latent, rope] : kSizes) {
        SCOPED_TRACE(fmt::format("{} batch {} {}+{}", impl, b, latent, rope));
        Problem problem(rng, DType::kF32, batches[b], latent, rope, b % 2 == 0 ? 0 : 3);
        problem.run("ref");
        const auto want = problem.cache.f32_rows();
        problem.run(impl);
        const auto got = problem.cache.f32_rows();
        for (int64_t token = 0; token < problem.cache.num_tokens; ++token) {
          const auto& row = want[static_cast<size_t>(token)];
          EXPECT_TRUE(all_close(
              got[static_cast<size_t>(token)], row,
              [&](size_t i) { return problem.bound(token, static_cast<int64_t>(i), row[i]); }))
              << "token " << token;
        }
        EXPECT_TRUE(problem.cache.holds(got)) << "wrote beside its rows";
        EXPECT_TRUE(problem.x.untouched());
      }
    }
  }
}

// A cache of another type holds the f32 rows rounded once, and nothing beside them is written.
TEST(StoreLatent, RowsAreRoundedOnce) {
  Rng rng(printed_seed());
  for (const std::string& impl : all_implementations()) {
    for (size_t b = 0; b < kCacheBatches.size(); ++b) {
      for (const auto& [latent, rope] : kSizes) {
        SCOPED_TRACE(fmt::format("{} batch {} {}+{}", impl, b, latent, rope));
        Problem f32(rng, DType::kF32, kCacheBatches[b], latent, rope, b % 2 == 0 ? 0 : 3);
        f32.run(impl);
        for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
          if (dtype == DType::kF8E4M3 && latent % kFp8Block != 0) continue;
          Problem rounded(rng, dtype, kCacheBatches[b], latent, rope, 0);
          rounded.args.x = f32.args.x;
          rounded.args.ldx = f32.args.ldx;
          rounded.args.weight = f32.args.weight;
          rounded.args.cos = f32.args.cos;
          rounded.args.sin = f32.args.sin;
          rounded.run(impl);
          EXPECT_TRUE(rounded.cache.holds(f32.cache.f32_rows())) << dtype_name(dtype);
        }
      }
    }
  }
}

TEST(StoreLatent, IsTheFormula) {
  Rng rng(1);
  Problem problem(rng, DType::kF32, {{70, 1}}, 4, 4, 0);
  const float x[] = {3, 4, 0, 0, 1, 2, 3, 4}, weight[] = {1, -2, 5, 1}, cos[] = {0, 1},
              sin[] = {1, 0};  // root mean square: 2.5; a quarter turn, none
  problem.args.x = x;
  problem.args.weight = weight;
  problem.args.eps = 0;
  problem.args.cos = cos;
  problem.args.sin = sin;
  for (const std::string& impl : all_implementations()) {
    problem.run(impl);
    const std::vector<float> row = problem.cache.f32_rows()[0],
                             want = {1.2f, -3.2f, 0, 0, -2, 1, 3, 4};
    for (size_t i = 0; i < row.size(); ++i) EXPECT_FLOAT_EQ(row[i], want[i]) << impl << " " << i;
  }
}

// x of +-1 makes the norm 1, so that what is rounded is the weight.
TEST(StoreLatent, RoundsAsTheScalarConversionDoes) {
  const float special[] = {kNan,
                           -kNan,
                           kInfinity,
                           -kInfinity,
                           1e-40f,
                           -1e-45f,
                           3.4e38f,
                           -3.4e38f,
                           1.00390625f,
                           1.01171875f,
                           std::bit_cast<float>(0x7F800001u),
                           std::bit_cast<float>(0x3F808001u),
                           std::bit_cast<float>(0x3F807FFFu)};
  Rng rng(printed_seed());
  for (const std::string& impl : all_implementations()) {
    for (const int64_t latent : {19, 128}) {
      Problem problem(rng, DType::kBF16, {{60, 8}}, latent, 4, 0);
      problem.args.eps = 0;
      std::vector<std::vector<float>> want;
      for (size_t i = 0; i < problem.weight.size(); ++i) {
        problem.weight[i] = i < std::size(special)
                                ? special[i]
                                : std::bit_cast<float>(static_cast<uint32_t>(rng.next() >> 32));
      }
      std::fill(problem.cos.begin(), problem.cos.end(), 1.0f);
      std::fill(problem.sin.begin(), problem.sin.end(), 0.0f);
      for (int64_t r = 0; r < 8; ++r) {
        std::fill_n(problem.x.row(r), latent, 1.0f);
        want.push_back(problem.weight);
        want.back().insert(want.back().end(), problem.x.row(r) + latent,
                           problem.x.row(r) + latent + 4);
      }
      problem.run(impl);
      EXPECT_TRUE(problem.cache.holds(want)) << impl;
    }
  }
}

// Each block of 128 has a scale of its own: of ordinary numbers, of none, of one that is not
// finite.
TEST(StoreLatent, Fp8BlocksOfEveryKind) {
  Rng rng(printed_seed());
  for (const std::string& impl : all_implementations()) {
    Problem problem(rng, DType::kF8E4M3, {{60, 8}}, 512, 4, 1);
    problem.args.eps = 0;
    std::fill_n(problem.weight.data() + 128, 128, 0.0f);
    problem.weight[300] = kNan;
    std::fill_n(problem.weight.data() + 384, 128, 3.4e38f);
    std::fill(problem.cos.begin(), problem.cos.end(), 1.0f);
    std::fill(problem.sin.begin(), problem.sin.end(), 0.0f);
    std::vector<std::vector<float>> want;
    for (int64_t r = 0; r < 8; ++r) {
      std::fill_n(problem.x.row(r), 512, 1.0f);
      want.push_back(problem.weight);
      want.back().insert(want.back().end(), problem.x.row(r) + 512, problem.x.row(r) + 516);
    }
    problem.run(impl);
    EXPECT_TRUE(problem.cache.holds(want)) << impl;
    const uint8_t* row = problem.cache.rows.row(problem.cache.seqs[0].pages, 63);
    const float* scales = reinterpret_cast<const float*>(row + 512);
    EXPECT_GT(scales[0], 0) << impl;
    EXPECT_EQ(scales[1], 0) << impl;
    EXPECT_TRUE(std::isnan(scales[2])) << impl;
    EXPECT_EQ(scales[3], 3.4e38f / 448) << impl;
  }
}

TEST(StoreLatent, NanAndInfinityStayWhereTheyReach) {
  Rng rng(printed_seed());
  const int64_t latent = 130, rope = 8;
  for (const std::string& impl : all_implementations()) {
    Problem problem(rng, DType::kF32, {{0, 17}}, latent, rope, 1);
    problem.run(impl);
    const auto clean = problem.cache.f32_rows();
    problem.x.row(3)[129] = kNan;
    problem.x.row(5)[latent + 3] = kInfinity;
    std::fill_n(problem.x.row(7), latent, 0.0f);
    problem.run(impl);
    const auto got = problem.cache.f32_rows();
    for (size_t r = 0; r < got.size(); ++r) {
      for (size_t i = 0; i < got[r].size(); ++i) {
        const bool norm = i < static_cast<size_t>(latent);
        const bool pair = i / 2 == static_cast<size_t>(latent) / 2 + 1;
        if (r == 3 && norm) {
          EXPECT_TRUE(std::isnan(got[r][i])) << impl << " " << i;
        } else if (r == 5 && pair) {
          EXPECT_FALSE(std::isfinite(got[r][i])) << impl << " " << i;
        } else if (r == 7 && norm) {
          EXPECT_EQ(got[r][i], 0) << impl << " " << i;
        } else {
          EXPECT_EQ(got[r][i], clean[r][i]) << impl << " row " << r << " at " << i;
        }
      }
    }
  }
}

TEST(StoreLatent, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    Problem problem(rng, dtype, kCacheBatches.back(), dtype == DType::kBF16 ? 130 : 128, 14, 1);
    for (const std::string& impl : runnable_implementations()) {
      const std::vector<uint8_t> one = problem.run(impl, 1);
      EXPECT_TRUE(problem.run(impl, 2) == one) << impl;
      EXPECT_TRUE(problem.run(impl, 3) == one) << impl;
    }
  }
}

}  // namespace
}  // namespace indexcache
