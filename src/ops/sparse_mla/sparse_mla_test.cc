#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "base/checked.h"
#include "base/rng.h"
#include "device/cpu_features.h"
#include "ops/kit/fp8_rows.h"
#include "ops/kit/store_row.h"
#include "ops/kit/test_device.h"
#include "ops/sparse_mla/sparse_mla_cpu.h"
#include "ops/sparse_mla/sparse_mla_impl.h"

namespace indexcache {

static SparseMlaArgs to_device(DeviceOperands& device, SparseMlaArgs args) {
  int64_t tokens = 0;
  int32_t last_page = -1;
  for (const SeqSpan& seq : args.seqs) {
    tokens += seq.num_tokens;
    for (int64_t p = 0; p < ceil_div(seq.first_position + seq.num_tokens, kPageTokens); ++p)
      last_page = std::max(last_page, seq.pages[p]);
  }
  device.elements(args.q, tokens * args.num_heads * args.rows.row_elements);
  // The last page ends with its last row.
  device.pool(args.rows, last_page * args.rows.page_bytes + kPageTokens * args.rows.row_bytes());
  device.elements(args.positions, tokens * args.k);
  device.elements(args.counts, tokens);
  device.elements(args.out, tokens * args.num_heads * args.value_dim);
  args.device_seqs = device.seqs(args.seqs);
  return args;
}

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A batch of runs of sequences over one pool of shuffled pages. The pool ends with its last page,
// rows that no token selects are NaN, and so is what lies between pages.
struct Problem {
  struct Run {
    int64_t first_position, num_tokens;
  };

  int64_t num_heads, value_dim, row_elements, k;
  DType dtype;
  float scale;
  bool f32_products = false;
  std::vector<std::vector<int32_t>> pages;
  std::vector<uint8_t> pool;
  std::vector<SeqSpan> seqs;
  std::vector<float> q;
  std::vector<int32_t> positions, counts;
  int64_t num_tokens = 0, page_bytes = 0;

  Problem(uint64_t seed, int64_t heads, int64_t value, int64_t rope, int64_t top_k, DType type,
          const std::vector<Run>& runs, const std::vector<int64_t>& wanted_counts)
      : num_heads(heads), value_dim(value), row_elements(value + rope), k(top_k), dtype(type) {
    Rng rng(seed);
    scale = 1 / std::sqrt(static_cast<float>(row_elements));
    std::vector<int32_t> all_pages;
    int32_t num_pages = 0;
    for (const Run& run : runs) {
      num_pages += static_cast<int32_t>(ceil_div(run.first_position + run.num_tokens, kPageTokens));
    }
    for (int32_t i = 0; i < num_pages; ++i) all_pages.push_back(i);
    for (size_t i = all_pages.size(); i > 1; --i)
      std::swap(all_pages[i - 1], all_pages[rng.below(i)]);
    page_bytes = kPageTokens * rows().row_bytes() + 32;
    // 0xFF, 0xFFFF and 0xFFFFFFFF are NaN.
    pool.assign(static_cast<size_t>(num_pages * page_bytes - 32), 0xFF);
    for (const Run& run : runs) {
      const size_t n =
          static_cast<size_t>(ceil_div(run.first_position + run.num_tokens, kPageTokens));
      pages.emplace_back(all_pages.end() - n, all_pages.end());
      all_pages.resize(all_pages.size() - n);
      seqs.push_back({num_tokens, run.num_tokens, run.first_position, nullptr});
      num_tokens += run.num_tokens;
    }
    for (size_t i = 0; i < seqs.size(); ++i) seqs[i].pages = pages[i].data();
    positions.assign(static_cast<size_t>(num_tokens * k), std::numeric_limits<int32_t>::max());
    for (const SeqSpan& seq : seqs) {
      for (int64_t i = 0; i < seq.num_tokens; ++i) {
        const int64_t token = seq.token_begin + i, visible = seq.first_position + i + 1;
        const int64_t count = std::min({wanted_counts[token % wanted_counts.size()], k, visible});
        counts.push_back(static_cast<int32_t>(count));
        int32_t* to = positions.data() + token * k;
        for (int64_t p = 0, need = count; need > 0; ++p) {
          if (static_cast<int64_t>(rng.below(static_cast<uint64_t>(visible - p))) >= need) continue;
          *to++ = static_cast<int32_t>(p);
          --need;
          std::vector<float> row(static_cast<size_t>(row_elements));
          for (float& x : row) x = rng.normal();
          store_row(rows(), seq.pages, p, row.data());
        }
      }
    }
    q.resize(static_cast<size_t>(num_tokens * num_heads * row_elements));
    for (float& x : q) x = rng.normal();
  }

  PagedRows rows() const {
    return {dtype,
            row_elements,
            page_bytes,
            const_cast<uint8_t*>(pool.data()),
            static_cast<int64_t>(pool.size()) / std::max<int64_t>(page_bytes, 1) + 1,
            dtype == DType::kF8E4M3 ? value_dim : 0};
  }
  void set(const SeqSpan& seq, int64_t position, int64_t element, float value) {
    std::vector<float> row;
    for (int64_t e = 0; e < row_elements; ++e)
      row.push_back(static_cast<float>(get(seq, position, e)));
    row[static_cast<size_t>(element)] = value;
    store_row(rows(), seq.pages, position, row.data());
  }
  double get(const SeqSpan& seq, int64_t position, int64_t element) const {
    const uint8_t* row = rows().row(seq.pages, position);
    if (dtype == DType::kF8E4M3) return fp8_latent_element(rows(), row, element);
    return dtype == DType::kBF16 ? bf16_to_f32(reinterpret_cast<const uint16_t*>(row)[element])
                                 : reinterpret_cast<const float*>(row)[element];
  }

  SparseMlaArgs arguments() const {
    SparseMlaArgs args;
    args.q = q.data();
    args.num_heads = num_heads;
    args.value_dim = value_dim;
    args.scale = scale;
    args.rows = rows();
    args.seqs = seqs;
    args.positions = positions.data();
    args.counts = counts.data();
    args.k = k;
    args.f32_products = f32_products;
    return args;
  }

  std::vector<float> run(const std::string& impl, int num_threads) const {
    // Poison, and a guard behind the end.
    std::vector<float> out(static_cast<size_t>(num_tokens * num_heads * value_dim + 64), kNaN);
    for (int i = 0; i < 64; ++i) out[out.size() - 64 + i] = 7;
    SparseMlaArgs args = arguments();
    args.out = out.data();
    Device device = Device::kCpu;
    for (const OpImpl<SparseMlaArgs>& entry : sparse_mla_impls()) {
      if (entry.name == impl) device = entry.device;
    }
    run_on(device, sparse_mla, "sparse_mla", impl, args, num_threads);
    for (int i = 0; i < 64; ++i) EXPECT_EQ(out[out.size() - 64 + i], 7) << "wrote past the end";
    out.resize(out.size() - 64);
    return out;
  }

  // Asserts `times` the bound of sparse_mla.h.
  void expect_close(const std::vector<float>& out, const std::vector<float>& ref,
                    const std::string& what, double times = 1) const {
    const double u = 0x1p-24, rounding = dtype == DType::kBF16                      ? 0x1p-9
                                         : dtype == DType::kF8E4M3 && !f32_products ? 0x1p-8
                                                                                    : 0;
    double worst = 0;
    std::string where;
    for (const SeqSpan& seq : seqs) {
      for (int64_t token = seq.token_begin; token < seq.token_begin + seq.num_tokens; ++token) {
        std::vector<double> row(static_cast<size_t>(row_elements));
        std::vector<double> largest_score(static_cast<size_t>(num_heads));
        std::vector<double> largest_value(static_cast<size_t>(value_dim));
        for (int64_t s = 0; s < counts[token]; ++s) {
          for (int64_t e = 0; e < row_elements; ++e) {
            row[e] = std::fabs(get(seq, positions[token * k + s], e));
          }
          for (int64_t d = 0; d < value_dim; ++d) {
            largest_value[d] = std::max(largest_value[d], row[d]);
          }
          for (int64_t h = 0; h < num_heads; ++h) {
            const float* qh = q.data() + (token * num_heads + h) * row_elements;
            double score = 0;
            for (int64_t e = 0; e < row_elements; ++e) score += std::fabs(scale * qh[e]) * row[e];
            largest_score[h] = std::max(largest_score[h], score);
          }
        }
        for (int64_t i = 0; i < num_heads * value_dim; ++i) {
          const int64_t h = i / value_dim, d = i % value_dim;
          const float got = out[token * num_heads * value_dim + i];
          const float want = ref[token * num_heads * value_dim + i];
          ASSERT_EQ(std::isnan(got), std::isnan(want))
              << what << " token " << token << " head " << h << " dim " << d;
          if (std::isnan(want)) continue;
          const double score_error =
              (rounding + static_cast<double>(row_elements + 4) * u) * largest_score[h];
          const double bound = largest_value[d] * (std::min(score_error, 2.0) + rounding +
                                                   static_cast<double>(3 * counts[token] + 32) * u);
          const double error = std::fabs(static_cast<double>(got) - want);
          const double ratio = error == 0 ? 0 : error / bound;
          if (ratio <= worst) continue;
          worst = ratio;
          where = fmt::format("token {} head {} dim {}: {} vs {}, bound {}", token, h, d, got, want,
                              bound);
        }
      }
    }
    EXPECT_LE(worst, times) << what << " " << where;
  }
};

const std::vector<int64_t> kCounts = {0, 1, 2, 3, 127, 128, 129, 255, 257, 1000};

std::vector<std::string> fast_impls(const Problem& problem) {
  std::vector<std::string> names;
  for (const OpImpl<SparseMlaArgs>& impl : sparse_mla_impls()) {
    if (impl.name == std::string("ref")) continue;
    if (can_run(impl.device) && impl.supported(problem.arguments())) {
      names.push_back(impl.name);
    } else {
      std::printf("skipped: this machine cannot run %s with these sizes\n", impl.name);
    }
  }
  return names;
}

constexpr DType kDTypes[] = {DType::kF32, DType::kBF16};
constexpr DType kAllDTypes[] = {DType::kF32, DType::kBF16, DType::kF8E4M3};

void expect_all_close(const Problem& problem, const std::string& what) {
  const std::vector<float> ref = problem.run("ref", 2);
  for (const std::string& impl : fast_impls(problem)) {
    problem.expect_close(problem.run(impl, 2), ref,
                         fmt::format("{} {} heads {} dims {}+{}", impl, what, problem.num_heads,
                                     problem.value_dim, problem.row_elements - problem.value_dim));
  }
}

TEST(SparseMla, OddSizesMatchRef) {
  uint64_t seed = 1;
  for (const int64_t heads : {1, 3, 8, 16, 20, 33}) {
    for (const int64_t value_dim : {2, 48, 130, 512}) {
      for (const int64_t rope : {2, 16, 64}) {
        const DType dtype = kDTypes[seed % 2];
        // 12 tokens: spans of 128 positions and merging.
        const Problem problem(seed, heads, value_dim, rope, 300, dtype,
                              {{0, 2}, {400, 1}, {150, 9}}, kCounts);
        expect_all_close(problem, fmt::format("{} seed {}", dtype_name(dtype), seed));
        ++seed;
      }
    }
  }
}

TEST(SparseMla, Fp8RowsMatchRef) {
  uint64_t seed = 100;
  for (const int64_t heads : {1, 12, 20, 30, 70}) {
    for (const auto& [value_dim, rope] :
         {std::array<int64_t, 2>{128, 32}, {128, 6}, {256, 0}, {512, 64}}) {
      for (const bool f32_products : {false, true}) {
        Problem problem(seed, heads, value_dim, rope, 300, DType::kF8E4M3,
                        {{0, 2}, {400, 1}, {150, 9}}, kCounts);
        problem.f32_products = f32_products;
        expect_all_close(problem, fmt::format("fp8 seed {} f32 products {}", seed, f32_products));
        ++seed;
      }
    }
  }
  // Unsplit.
  expect_all_close(Problem(seed, 20, 128, 32, 280, DType::kF8E4M3, {{300, 40}, {0, 30}}, kCounts),
                   "fp8 unsplit");
}

TEST(SparseMla, UnsplitSelectionsMatchRef) {
  for (const DType dtype : kDTypes) {
    for (const auto& [heads, value_dim, rope] : {std::array<int64_t, 3>{6, 48, 16},
                                                 {8, 128, 32},
                                                 {17, 34, 0},
                                                 {40, 64, 6},
                                                 {128, 32, 16}}) {
      const Problem problem(7, heads, value_dim, rope, 280, dtype, {{300, 40}, {0, 30}}, kCounts);
      expect_all_close(problem, dtype_name(dtype));
    }
  }
}

TEST(SparseMla, LongSelectionOfOneToken) {
  for (const DType dtype : kAllDTypes) {
    const Problem problem(3, 16, 512, 64, 2048, dtype, {{3000, 1}}, {2048});
    expect_all_close(problem, dtype_name(dtype));
  }
}

// The largest score changes from block to block, and one position takes all the weight.
TEST(SparseMla, HugeLogitsAreOneHot) {
  for (const DType dtype : kDTypes) {
    for (const int64_t num_tokens : {1, 70}) {
      Problem problem(5, 5, 34, 16, 600, dtype, {{900, num_tokens}}, {600});
      problem.scale = 1e4f;
      const std::vector<float> ref = problem.run("ref", 2);
      for (const std::string& impl : fast_impls(problem)) {
        const std::vector<float> out = problem.run(impl, 2);
        problem.expect_close(out, ref, impl);
        for (int64_t token = 0; token < num_tokens; ++token) {
          // Exactly one row, if the lead of the best score is beyond what rounding can change.
          bool found = false;
          for (int64_t s = 0; s < 600 && !found; ++s) {
            found = true;
            for (int64_t d = 0; d < problem.value_dim; ++d) {
              found &= out[token * 5 * problem.value_dim + d] ==
                       problem.get(problem.seqs[0], problem.positions[token * 600 + s], d);
            }
          }
          EXPECT_TRUE(found) << impl << " token " << token;
        }
      }
    }
  }
}

TEST(SparseMla, EqualLogitsGiveTheMean) {
  for (const DType dtype : kDTypes) {
    Problem problem(6, 3, 40, 8, 500, dtype, {{700, 2}, {700, 80}}, {0, 1, 130, 500});
    std::fill(problem.q.begin(), problem.q.end(), 0.0f);
    expect_all_close(problem, dtype_name(dtype));
  }
}

TEST(SparseMla, NaNStaysWithinItsTokenAndHead) {
  for (const DType dtype : kAllDTypes) {
    const int64_t dim = dtype == DType::kF8E4M3 ? 128 : 66;
    Problem problem(8, 20, dim, 16, 300, dtype, {{500, 70}, {500, 3}}, kCounts);
    // A row: every head of the tokens that select it. An element of q: one head of one token.
    const int32_t poisoned = problem.positions[69 * 300];
    problem.set(problem.seqs[0], poisoned, 65, kNaN);
    problem.q[(71 * problem.num_heads + 4) * problem.row_elements + 3] = kNaN;
    const std::vector<float> ref = problem.run("ref", 2);
    EXPECT_TRUE(std::isnan(ref[(69 * 20 + 2) * dim]));
    EXPECT_EQ(std::isnan(ref[(71 * 20 + 4) * dim]), problem.counts[71] > 0);
    EXPECT_FALSE(std::isnan(ref[(71 * 20 + 5) * dim]));
    for (const std::string& impl : fast_impls(problem))
      problem.expect_close(problem.run(impl, 2), ref, impl);
  }
}

TEST(SparseMla, SameBitsForAnyNumberOfThreads) {
  for (const int64_t num_tokens : {1, 5, 80}) {
    for (const DType dtype : kAllDTypes) {
      const int64_t dim = dtype == DType::kF8E4M3 ? 128 : 130;
      const Problem problem(9, 20, dim, 16, 700, dtype, {{900, num_tokens}}, {700, 3, 260});
      for (const std::string& impl : fast_impls(problem)) {
        const std::vector<float> one = problem.run(impl, 1);
        for (const int threads : {2, 3}) {
          const std::vector<float> many = problem.run(impl, threads);
          EXPECT_EQ(std::memcmp(one.data(), many.data(), one.size() * sizeof(float)), 0)
              << impl << " " << threads << " threads";
        }
      }
    }
  }
}

TEST(SparseMla, BatchEqualsTokensOneByOne) {
  for (const DType dtype : kAllDTypes) {
    const Problem batch(10, 8, 128, 32, 256, dtype, {{300, 33}, {600, 33}}, {256, 17, 200});
    for (const std::string& impl : fast_impls(batch)) {
      std::vector<float> singles;
      for (const SeqSpan& seq : batch.seqs) {
        for (int64_t i = 0; i < seq.num_tokens; ++i) {
          const int64_t token = seq.token_begin + i;
          Problem one = batch;
          one.num_tokens = 1;
          one.seqs = {{0, 1, seq.first_position + i, seq.pages}};
          one.q.assign(batch.q.begin() + token * 8 * 160, batch.q.begin() + (token + 1) * 8 * 160);
          one.positions.assign(batch.positions.begin() + token * 256,
                               batch.positions.begin() + (token + 1) * 256);
          one.counts = {batch.counts[token]};
          const std::vector<float> out = one.run(impl, 2);
          singles.insert(singles.end(), out.begin(), out.end());
        }
      }
      batch.expect_close(batch.run(impl, 2), singles, impl, 2);
    }
  }
}

TEST(SparseMla, NoTokensAndNoSequences) {
  const Problem problem(11, 4, 32, 16, 8, DType::kF32, {{70, 0}, {70, 1}, {70, 0}}, {8});
  expect_all_close(problem, "empty runs");
  Exec exec(1);
  SparseMlaArgs args;
  args.num_heads = 1;
  args.value_dim = 2;
  args.rows.row_elements = 4;
  args.k = 1;
  sparse_mla(exec, args);
}

TEST(SparseMlaDeathTest, RejectsBrokenSelections) {
  Problem problem(12, 4, 32, 16, 8, DType::kF32, {{70, 1}}, {8});
  std::swap(problem.positions[0], problem.positions[1]);
  EXPECT_DEATH(problem.run("ref", 1), "previous < positions");
  std::sort(problem.positions.begin(), problem.positions.end());
  problem.positions[7] = 71;
  EXPECT_DEATH(problem.run("ref", 1), "previous <= seq.first_position");
}

// The merge of a span of weight exp(x) with one of weight 1 whose output is 0 gives exp(x) itself.
using Merge = void (*)(const SparseMlaMerge&);

float exp_of(Merge merge, float x) {
  const float part[] = {0, 1}, max[] = {0, x}, sum[] = {1, 0};
  float out = kNaN;
  merge({.part = part,
         .part_stride = 1,
         .max = max,
         .sum = sum,
         .max_stride = 1,
         .num_parts = 2,
         .value_dim = 1,
         .out = &out});
  return out;
}

TEST(SparseMla, ExpIsAccurate) {
  std::vector<std::pair<const char*, Merge>> merges;
  if (cpu_features().avx2) merges.emplace_back("avx2", avx2::sparse_mla_merge);
  if (cpu_features().avx512) merges.emplace_back("avx512", avx512::sparse_mla_merge);
  for (const auto& [name, merge] : merges) {
    EXPECT_EQ(exp_of(merge, 0), 1) << name;
    EXPECT_EQ(exp_of(merge, -std::numeric_limits<float>::infinity()), 0) << name;
    EXPECT_EQ(exp_of(merge, std::numeric_limits<float>::lowest()), 0) << name;
    EXPECT_EQ(exp_of(merge, std::nextafter(-87.3f, -88.0f)), 0) << name;
    EXPECT_TRUE(std::isnan(exp_of(merge, kNaN))) << name;
    double worst = 0;
    float where = 0;
    const auto check = [&](float x) {
      const double want = std::exp(static_cast<double>(x));
      const double error = std::fabs(exp_of(merge, x) - want) / want;
      if (error > worst) worst = error, where = x;
    };
    for (int i = 0; i <= 1000000; ++i) check(-87.3f * static_cast<float>(i) * 1e-6f);
    // Small arguments of every magnitude, and both sides of every boundary between powers of two.
    for (float x = -1; x < -1e-30f; x *= 0.9f) check(x);
    for (int n = 0; n < 125; ++n) {
      const float x = -(static_cast<float>(n) + 0.5f) * 0.693147181f;
      check(x);
      check(std::nextafter(x, 0.0f));
      check(std::nextafter(x, -100.0f));
    }
    check(-87.3f);
    EXPECT_LT(worst, 0x1p-22) << name << " at " << where;
    std::printf("%s: largest relative error of exp 2^%.2f at %g\n", name, std::log2(worst), where);
  }
}

}  // namespace
}  // namespace indexcache
