#include "ops/store_index_key/store_index_key.h"

#include <gtest/gtest.h>

#include "ops/kit/test_cache.h"

namespace indexcache {

static StoreIndexKeyArgs to_device(DeviceOperands& device, StoreIndexKeyArgs args) {
  device.rows(args.x, args.num_rows, args.rows.row_elements, args.ldx);
  device.elements(args.weight, args.rows.row_elements);
  device.elements(args.bias, args.rows.row_elements);
  device.elements(args.cos, args.num_rows * args.rope_dim / 2);
  device.elements(args.sin, args.num_rows * args.rope_dim / 2);
  cache_to_device(device, args);
  return args;
}

namespace {

using Span = ScatteredCache::Span;

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kI8, DType::kF8E4M3};

struct Sizes {
  int64_t dim, rope;
};
const std::vector<Sizes> kSizes = {{1, 0},    {2, 2},    {7, 6},     {24, 8},
                                   {128, 64}, {130, 66}, {132, 132}, {1000, 64}};

struct Problem {
  ScatteredCache cache;
  GuardedRows x;
  std::vector<float> weight, bias, cos, sin;
  StoreIndexKeyArgs args;

  Problem(Rng& rng, DType dtype, const std::vector<Span>& spans, Sizes sizes, int64_t gap,
          bool interleaved, float offset = 0)
      : cache(rng, spans, {.dtype = dtype, .row_elements = sizes.dim}),
        x(cache.num_tokens, sizes.dim, sizes.dim + gap),
        weight(random_floats(rng, sizes.dim)),
        bias(random_floats(rng, sizes.dim)) {
    x.fill_random(rng);
    for (int64_t r = 0; r < cache.num_tokens; ++r) {
      for (int64_t i = 0; i < sizes.dim; ++i) x.row(r)[i] += offset;
    }
    for (int64_t i = 0; i < cache.num_tokens * sizes.rope / 2; ++i) {
      const double angle = 100 * rng.uniform();
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    args = {.x = x.data(),
            .ldx = x.stride(),
            .num_rows = cache.num_tokens,
            .weight = weight.data(),
            .bias = bias.data(),
            .eps = 1e-6f,
            .rope_dim = sizes.rope,
            .interleaved = interleaved,
            .cos = cos.data(),
            .sin = sin.data(),
            .seqs = cache.seqs,
            .rows = cache.rows};
  }

  const std::vector<uint8_t>& run(const std::string& impl, int num_threads = 2) {
    cache.poison();
    run_forced(store_index_key, "store_index_key", impl, args, num_threads);
    return cache.pool;
  }

  // The contract's tolerance of each element of row `token`.
  std::vector<double> bounds(int64_t token) {
    const int64_t n = args.rows.row_elements, half = args.rope_dim / 2;
    const float* row = x.row(token);
    double sum = 0, squares = 0, largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += row[i];
      largest = std::max<double>(largest, std::abs(row[i]));
    }
    const double mean = sum / static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) squares += std::pow(row[i] - mean, 2);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + args.eps);
    std::vector<double> of_norm, normed;
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      of_norm.push_back(static_cast<double>(n + 8) * kHalfUlp *
                        (largest * scale * std::abs(weight[i]) + std::abs(bias[i])));
      normed.push_back((row[i] - mean) * scale * weight[i] + bias[i]);
    }
    std::vector<double> all = of_norm;
    for (int64_t j = 0; j < half; ++j) {
      const auto a = static_cast<size_t>(args.interleaved ? 2 * j : j),
                 b = static_cast<size_t>(args.interleaved ? 2 * j + 1 : j + half);
      const double c = std::abs(args.cos[token * half + j]),
                   s = std::abs(args.sin[token * half + j]),
                   rounding = 4 * kHalfUlp * (std::abs(normed[a]) + std::abs(normed[b]));
      all[a] = c * of_norm[a] + s * of_norm[b] + rounding;
      all[b] = s * of_norm[a] + c * of_norm[b] + rounding;
    }
    return all;
  }

  // Makes row r of what is normed and rotated `bias_row`, whatever x is: one token, no rotation.
  void stores(const std::vector<float>& bias_row) {
    bias = bias_row;
    args.bias = bias.data();
    std::fill(weight.begin(), weight.end(), 0.0f);
    args.rope_dim = 0;
  }
};

std::vector<std::string> all_implementations() {
  std::vector<std::string> impls = runnable_implementations();
  impls.push_back("ref");
  return impls;
}

TEST(StoreIndexKey, EveryImplementationAgreesWithRef) {
  Rng rng(printed_seed());
  std::vector<std::vector<Span>> batches = kCacheBatches;
  batches.push_back(many_decoding());
  for (const std::string& impl : runnable_implementations()) {
    for (size_t b = 0; b < batches.size(); ++b) {
      for (const Sizes& sizes : kSizes) {
        for (const bool interleaved : {false, true}) {
          SCOPED_TRACE(fmt::format("{} batch {} {} rope {} interleaved {}", impl, b, sizes.dim,
                                   sizes.rope, interleaved));
          Problem problem(rng, DType::kF32, batches[b], sizes, b % 2 == 0 ? 0 : 3, interleaved,
                          b == 3 ? 100.0f : 0.0f);
          problem.run("ref");
          const auto want = problem.cache.f32_rows();
          problem.run(impl);
          const auto got = problem.cache.f32_rows();
          for (int64_t token = 0; token < problem.cache.num_tokens; ++token) {
            const std::vector<double> bounds = problem.bounds(token);
            EXPECT_TRUE(all_close(got[static_cast<size_t>(token)], want[static_cast<size_t>(token)],
                                  [&](size_t i) { return bounds[i]; }))
                << "token " << token;
          }
          EXPECT_TRUE(problem.cache.holds(got)) << "wrote beside its rows";
          EXPECT_TRUE(problem.x.untouched());
        }
      }
    }
  }
}

// A cache of another type holds the f32 rows rounded once, and nothing beside them is written.
TEST(StoreIndexKey, RowsAreRoundedOnce) {
  Rng rng(printed_seed());
  for (const std::string& impl : all_implementations()) {
    for (size_t b = 0; b < kCacheBatches.size(); ++b) {
      for (const Sizes& sizes : kSizes) {
        Problem f32(rng, DType::kF32, kCacheBatches[b], sizes, b % 2 == 0 ? 0 : 3, b % 2 == 0);
        f32.run(impl);
        for (const DType dtype : {DType::kBF16, DType::kI8, DType::kF8E4M3}) {
          SCOPED_TRACE(fmt::format("{} {} batch {} {} rope {}", impl, dtype_name(dtype), b,
                                   sizes.dim, sizes.rope));
          Problem rounded(rng, dtype, kCacheBatches[b], sizes, 0, b % 2 == 0);
          const PagedRows rows = rounded.args.rows;
          const auto seqs = rounded.args.seqs;
          rounded.args = f32.args;
          rounded.args.rows = rows;
          rounded.args.seqs = seqs;
          rounded.run(impl);
          EXPECT_TRUE(rounded.cache.holds(f32.cache.f32_rows()));
        }
      }
    }
  }
}

TEST(StoreIndexKey, IsTheFormula) {
  Rng rng(1);
  const float x[] = {1, 3, 1, 3, 1, 3}, weight[] = {1, 1, 2, 2, 1, 1}, bias[] = {0, 1, 3, 2, 0, 9},
              cos[] = {0, 1}, sin[] = {1, 0};  // mean 2, variance 1; a quarter turn, none
  for (const bool interleaved : {true, false}) {
    Problem problem(rng, DType::kF32, {{70, 1}}, {6, 4}, 0, interleaved);
    problem.args.x = x;
    problem.args.weight = weight;
    problem.args.bias = bias;
    problem.args.eps = 0;
    problem.args.cos = cos;
    problem.args.sin = sin;
    // The norm: -1, 2, 1, 4, -1, 10.
    const std::vector<float> want = interleaved ? std::vector<float>{-2, -1, 1, 4, -1, 10}
                                                : std::vector<float>{-1, 2, -1, 4, -1, 10};
    for (const std::string& impl : all_implementations()) {
      problem.run(impl);
      EXPECT_EQ(problem.cache.f32_rows()[0], want) << impl << " " << interleaved;
    }
  }
}

TEST(StoreIndexKey, NanAndInfinityStayInTheirRow) {
  Rng rng(printed_seed());
  for (const std::string& impl : all_implementations()) {
    for (const DType dtype : kTypes) {
      for (const float bad : {kNan, kInfinity, -kInfinity}) {
        SCOPED_TRACE(fmt::format("{} {} {}", impl, dtype_name(dtype), bad));
        Problem problem(rng, dtype, {{50, 17}}, {19, 8}, 0, true);
        problem.run(impl);
        std::vector<std::vector<uint8_t>> clean;
        const auto row = [&](int64_t r) {
          const uint8_t* at = problem.cache.rows.row(problem.cache.seqs[0].pages, 50 + r);
          return std::vector<uint8_t>(at, at + 19 * dtype_bytes(dtype));
        };
        for (int64_t r = 0; r < 17; ++r) clean.push_back(row(r));
        problem.x.row(3)[18] = bad;
        problem.run(impl);
        for (int64_t r = 0; r < 17; ++r) {
          if (r != 3) {
            EXPECT_EQ(row(r), clean[static_cast<size_t>(r)]) << r;
          }
        }
        const PagedRows& rows = problem.cache.rows;
        const int32_t* pages = problem.cache.seqs[0].pages;
        if (rows_have_scales(dtype)) {
          EXPECT_TRUE(std::isnan(*rows.scale(pages, 53)));
        } else {
          for (int64_t i = 0; i < 19; ++i) {
            const uint8_t* at = rows.row(pages, 53);
            const float value = dtype == DType::kF32
                                    ? reinterpret_cast<const float*>(at)[i]
                                    : bf16_to_f32(reinterpret_cast<const uint16_t*>(at)[i]);
            EXPECT_TRUE(std::isnan(value)) << i;
          }
        }
      }
    }
  }
}

TEST(StoreIndexKey, AConstantRowGivesTheBias) {
  Rng rng(printed_seed());
  for (const std::string& impl : all_implementations()) {
    Problem problem(rng, DType::kF32, {{0, 2}}, {16, 0}, 0, true);
    std::fill_n(problem.x.row(1), 16, 0.25f);
    problem.run(impl);
    EXPECT_EQ(problem.cache.f32_rows()[1], problem.bias) << impl;
  }
}

// Rows with all that rounding knows: NaN and infinity, zeros, scales of 0 and of rounded numbers,
// ties.
TEST(StoreIndexKey, RoundedRowsOfEveryKind) {
  constexpr size_t n = 132;
  std::vector<std::vector<float>> kinds;
  for (const float special : {kNan, -kNan, kInfinity, -kInfinity}) {
    kinds.emplace_back(n, 1.5f);
    kinds.back()[43 * kinds.size() % n] = special;
  }
  for (const float all : {0.0f, 1e-45f, -2e-43f, -7e-43f, 3.4e38f}) kinds.emplace_back(n, all);
  std::vector<float> ties(n), near(n);
  for (size_t e = 0; e < n; ++e) {
    const float low = f8e4m3_to_f32(static_cast<uint8_t>(e % 0x7E)),
                high = f8e4m3_to_f32(static_cast<uint8_t>(e % 0x7E + 1));
    ties[e] = (e % 2 == 0 ? 0.5f : -0.5f) * (low + high);
    near[e] = std::nextafter(ties[e], e % 3 == 0 ? 1e3f : 0.0f);
  }
  ties[129] = near[129] = -448;  // the scale of e4m3 is 1
  kinds.push_back(ties);
  kinds.push_back(near);
  for (size_t e = 0; e < n; ++e) ties[e] = static_cast<float>(e) - 64.5f;
  ties[77] = -127;  // that of int8
  kinds.push_back(ties);
  Rng rng(printed_seed());
  std::vector<float> any(n);
  for (float& x : any) x = std::bit_cast<float>(static_cast<uint32_t>(rng.next() >> 32));
  kinds.push_back(any);

  for (const std::string& impl : all_implementations()) {
    for (const DType dtype : kTypes) {
      for (size_t kind = 0; kind < kinds.size(); ++kind) {
        Problem problem(rng, dtype, {{60, 1}}, {n, 0}, 1, true);
        problem.stores(kinds[kind]);
        problem.run(impl);
        EXPECT_TRUE(problem.cache.holds({kinds[kind]}))
            << impl << " " << dtype_name(dtype) << " " << kind;
      }
    }
  }
}

TEST(StoreIndexKey, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  for (const DType dtype : kTypes) {
    Problem problem(rng, dtype, kCacheBatches.back(), {130, 64}, 1, false);
    for (const std::string& impl : runnable_implementations()) {
      const std::vector<uint8_t> one = problem.run(impl, 1);
      EXPECT_TRUE(problem.run(impl, 2) == one) << impl;
      EXPECT_TRUE(problem.run(impl, 3) == one) << impl;
    }
  }
}

}  // namespace
}  // namespace indexcache
