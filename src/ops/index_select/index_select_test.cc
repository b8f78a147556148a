#include "ops/index_select/index_select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/checked.h"
#include "base/rng.h"

namespace indexcache {
namespace {

constexpr int32_t kPoison = 0x7B7B7B7B;
constexpr int64_t kGuard = 64;
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();

enum class Values { kNormal, kSmallIntegers, kZeros };

struct Sizes {
  DType dtype;
  int64_t heads, dim, k;
  std::vector<std::pair<int64_t, int64_t>> spans;  // first position, tokens
};

std::string describe(const Sizes& sizes) {
  std::string text = fmt::format("{} heads {} dim {} k {} spans", dtype_name(sizes.dtype),
                                 sizes.heads, sizes.dim, sizes.k);
  for (const auto& [first, tokens] : sizes.spans) text += fmt::format(" {}+{}", first, tokens);
  return text;
}

struct Selection {
  std::vector<int32_t> positions, counts;
  bool operator==(const Selection&) const = default;
};

// A batch of sequences whose pages are scattered over a pool; rows that no query may see are NaN.
struct Problem {
  Sizes sizes;
  std::vector<float> q, weights;
  std::vector<uint8_t> pool;
  std::vector<std::vector<int32_t>> pages;
  std::vector<SeqSpan> seqs;
  IndexSelectArgs args;

  Problem(const Sizes& s, Values values, Rng& rng) : sizes(s) {
    const auto value = [&]() -> float {
      if (values == Values::kZeros) return 0;
      if (values == Values::kSmallIntegers) return static_cast<float>(rng.below(5)) - 2;
      return rng.normal();
    };
    int64_t tokens = 0, num_pages = 0;
    for (const auto& [first, count] : s.spans) {
      pages.emplace_back(static_cast<size_t>(ceil_div(first + count, kPageTokens)));
      seqs.push_back({tokens, count, first, nullptr});
      tokens += count;
      num_pages += static_cast<int64_t>(pages.back().size());
    }
    std::vector<int32_t> order(static_cast<size_t>(num_pages) + 1);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
    for (size_t i = 0, at = 0; i < pages.size(); ++i) {
      for (int32_t& page : pages[i]) page = order[at++];
      seqs[i].pages = pages[i].data();
    }
    q.resize(static_cast<size_t>(tokens * s.heads * s.dim));
    weights.resize(static_cast<size_t>(tokens * s.heads));
    for (float& x : q) x = value();
    for (float& x : weights) x = value();

    args.q = q.data();
    args.weights = weights.data();
    args.num_heads = s.heads;
    args.head_dim = s.dim;
    args.keys.dtype = s.dtype;
    args.keys.row_elements = s.dim;
    args.keys.page_bytes = kPageTokens * s.dim * dtype_bytes(s.dtype) + 64;  // pages may be apart
    pool.resize(order.size() * static_cast<size_t>(args.keys.page_bytes));
    args.keys.base = pool.data();
    args.seqs = seqs;
    args.k = s.k;
    for (size_t i = 0; i < pool.size(); i += dtype_bytes(s.dtype)) {
      const float nan = kNan;
      const uint16_t half = f32_to_bf16(kNan);
      s.dtype == DType::kF32 ? memcpy(&pool[i], &nan, 4) : memcpy(&pool[i], &half, 2);
    }
    for (const SeqSpan& seq : seqs) {
      for (int64_t p = 0; p < seq.first_position + seq.num_tokens; ++p) {
        for (int64_t d = 0; d < s.dim; ++d) set_key(seq, p, d, value());
      }
    }
  }
  Problem(const Problem&) = delete;

  void set_key(const SeqSpan& seq, int64_t position, int64_t d, float value) {
    uint8_t* row = args.keys.row(seq.pages, position);
    const uint16_t half = f32_to_bf16(value);
    sizes.dtype == DType::kF32 ? memcpy(row + 4 * d, &value, 4) : memcpy(row + 2 * d, &half, 2);
  }
  float key(const SeqSpan& seq, int64_t position, int64_t d) const {
    const uint8_t* row = args.keys.row(seq.pages, position);
    return sizes.dtype == DType::kF32 ? reinterpret_cast<const float*>(row)[d]
                                      : bf16_to_f32(reinterpret_cast<const uint16_t*>(row)[d]);
  }
};

Selection run(const Problem& problem, const std::string& impl, int threads) {
  Exec exec(threads);
  exec.forced["index_select"] = impl;
  IndexSelectArgs args = problem.args;
  const int64_t tokens = std::ssize(problem.weights) / args.num_heads;
  Selection out{std::vector<int32_t>(static_cast<size_t>(tokens * args.k + kGuard), kPoison),
                std::vector<int32_t>(static_cast<size_t>(tokens + kGuard), kPoison)};
  args.positions = out.positions.data();
  args.counts = out.counts.data();
  index_select(exec, args);
  for (std::vector<int32_t>* v : {&out.positions, &out.counts}) {
    const auto guard = v->end() - kGuard;
    EXPECT_EQ(std::count(guard, v->end(), kPoison), kGuard) << "wrote past the end";
    v->erase(guard, v->end());
  }
  return out;
}

// Everything the contract says about one selection, from scores in double.
void expect_valid(const Problem& problem, const Selection& got, const std::string& what) {
  const IndexSelectArgs& args = problem.args;
  for (const SeqSpan& seq : problem.seqs) {
    for (int64_t i = 0; i < seq.num_tokens; ++i) {
      const int64_t token = seq.token_begin + i, visible = seq.first_position + i + 1;
      const int64_t count = std::min(args.k, visible);
      const int32_t* row = got.positions.data() + token * args.k;
      ASSERT_EQ(got.counts[token], count) << what << " token " << token;
      for (int64_t j = 0; j < args.k; ++j) {
        if (j >= count) {
          ASSERT_EQ(row[j], -1) << what << " token " << token << " entry " << j;
        } else {
          ASSERT_GT(row[j], j == 0 ? -1 : row[j - 1]) << what << " token " << token;
          ASSERT_LT(row[j], visible) << what << " token " << token;
        }
      }
      if (count == visible) continue;
      std::vector<double> scores(visible);
      double tolerance = 0;
      for (int64_t p = 0; p < visible; ++p) {
        double size = 0;
        for (int64_t h = 0; h < args.num_heads; ++h) {
          double dot = 0, dot_size = 0;
          for (int64_t d = 0; d < args.head_dim; ++d) {
            float a = args.q[(token * args.num_heads + h) * args.head_dim + d];
            if (args.keys.dtype == DType::kBF16) a = bf16_to_f32(f32_to_bf16(a));
            const double product = static_cast<double>(a) * problem.key(seq, p, d);
            dot += product;
            dot_size += std::abs(product);
          }
          const double weight = args.weights[token * args.num_heads + h];
          scores[p] += weight * std::max(dot, 0.0);
          size += std::abs(weight) * dot_size;
        }
        tolerance = std::max(
            tolerance, 2.0 * static_cast<double>(args.head_dim + args.num_heads) * 0x1p-24 * size);
      }
      std::vector<double> sorted = scores;
      std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(),
                       std::greater<>());
      const double kth = sorted[count - 1];
      std::vector<bool> selected(visible);
      for (int64_t j = 0; j < count; ++j) selected[row[j]] = true;
      for (int64_t p = 0; p < visible; ++p) {
        const double above = scores[p] - kth;
        if (selected[p]) {
          ASSERT_GE(above, -2 * tolerance) << what << " token " << token << " position " << p;
        } else {
          ASSERT_LE(above, 2 * tolerance) << what << " token " << token << " position " << p;
        }
      }
    }
  }
}

const std::vector<Sizes>& all_sizes() {
  using enum DType;
  static const std::vector<Sizes> sizes = {
      {kF32, 1, 2, 1, {{0, 1}}},
      {kBF16, 1, 2, 1, {{0, 5}, {0, 0}, {9, 1}}},
      {kBF16, 3, 6, 7, {{0, 40}, {6, 1}, {7, 2}, {5, 3}}},
      {kF32, 3, 6, 7, {{0, 40}, {6, 1}, {7, 2}, {5, 3}}},
      {kBF16, 8, 64, 7, {{63, 1}, {64, 17}, {127, 33}}},
      {kF32, 8, 64, 7, {{63, 1}, {64, 17}, {127, 33}}},
      {kBF16, 32, 128, 256, {{255, 1}, {256, 1}, {254, 5}, {700, 3}, {300, 20}}},
      {kF32, 32, 128, 256, {{255, 1}, {256, 1}, {254, 5}, {700, 3}}},
      {kBF16, 17, 130, 256, {{500, 2}, {1000, 1}, {250, 16}}},
      {kF32, 17, 130, 256, {{500, 2}, {1000, 1}, {250, 16}}},
      {kBF16, 3, 64, 2048, {{2040, 20}, {2047, 1}, {2048, 1}, {9000, 2}}},
      {kF32, 3, 64, 2048, {{2040, 20}, {2047, 1}, {2048, 1}, {5000, 2}}},
      {kBF16, 33, 66, 1, {{3000, 1}, {100, 18}}},
      {kF32, 16, 32, 64, {{1500, 1}, {0, 100}}},
      {kBF16, 16, 32, 5000, {{0, 3}, {4000, 2}}},  // k beyond every length
  };
  return sizes;
}

class IndexSelect : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    const OpImpl<IndexSelectArgs>& entry = index_select_impls()[static_cast<size_t>(GetParam())];
    impl_ = entry.name;
    if (!entry.supported({})) GTEST_SKIP() << "this CPU cannot run " << impl_;
    printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  }

  static constexpr uint64_t kSeed = 20260711;
  Rng rng_{kSeed};
  std::string impl_;
};

TEST_P(IndexSelect, RandomScoresWithinTheGap) {
  for (const Sizes& sizes : all_sizes()) {
    const Problem problem(sizes, Values::kNormal, rng_);
    expect_valid(problem, run(problem, impl_, 2), describe(sizes));
  }
}

TEST_P(IndexSelect, RandomSizes) {
  for (int round = 0; round < 60; ++round) {
    const int64_t heads[] = {1, 2, 3, 8, 15, 16, 20}, dims[] = {2, 6, 30, 32, 34, 64};
    Sizes sizes{rng_.below(2) ? DType::kF32 : DType::kBF16,
                heads[rng_.below(7)],
                dims[rng_.below(6)],
                1 + static_cast<int64_t>(rng_.below(80)),
                {}};
    for (uint64_t i = rng_.below(4) + 1; i > 0; --i) {
      sizes.spans.push_back({rng_.below(300), rng_.below(40)});
    }
    const Problem problem(sizes, Values::kNormal, rng_);
    expect_valid(problem, run(problem, impl_, 1 + static_cast<int>(rng_.below(4))),
                 describe(sizes));
  }
}

// Sums of small integers are exact in every implementation, so ties are too.
TEST_P(IndexSelect, TiesGoToTheLowerPosition) {
  for (const Sizes& sizes : all_sizes()) {
    for (const Values values : {Values::kSmallIntegers, Values::kZeros}) {
      const Problem problem(sizes, values, rng_);
      const Selection got = run(problem, impl_, 2);
      EXPECT_EQ(got, run(problem, "ref", 2)) << describe(sizes);
      if (values == Values::kZeros) {
        for (size_t i = 0; i < got.positions.size(); ++i) {
          const int32_t entry = static_cast<int32_t>(i % static_cast<size_t>(sizes.k));
          const int32_t count = got.counts[i / static_cast<size_t>(sizes.k)];
          ASSERT_EQ(got.positions[i], entry < count ? entry : -1) << describe(sizes);
        }
      }
    }
  }
}

TEST_P(IndexSelect, NanAndInfinityRank) {
  for (const Sizes& sizes : all_sizes()) {
    Problem problem(sizes, Values::kSmallIntegers, rng_);
    for (const SeqSpan& seq : problem.seqs) {
      for (int64_t p = 0; p < seq.first_position + seq.num_tokens; ++p) {
        const float specials[] = {kNan, -kNan, kInfinity, -kInfinity};
        if (rng_.below(3) == 0) {
          problem.set_key(seq, p, static_cast<int64_t>(rng_.below(sizes.dim)),
                          specials[rng_.below(4)]);
        }
      }
    }
    EXPECT_EQ(run(problem, impl_, 2), run(problem, "ref", 2)) << describe(sizes);
  }
}

TEST_P(IndexSelect, OnlyNanIsStillSelected) {
  Problem problem({DType::kBF16, 2, 4, 70, {{199, 1}, {90, 20}}}, Values::kNormal, rng_);
  for (float& x : problem.q) x = kNan;
  const Selection got = run(problem, impl_, 2);
  for (int32_t i = 0; i < 70; ++i) EXPECT_EQ(got.positions[static_cast<size_t>(i)], i);
  EXPECT_EQ(got, run(problem, "ref", 1));
}

TEST_P(IndexSelect, IndependentOfThreadsAndOfTheBatch) {
  for (const Sizes& sizes : all_sizes()) {
    const Problem problem(sizes, Values::kNormal, rng_);
    const Selection whole = run(problem, impl_, 1);
    for (const int threads : {2, 3, 7}) {
      EXPECT_EQ(whole, run(problem, impl_, threads)) << describe(sizes) << " threads " << threads;
    }
    Exec exec(2);
    exec.forced["index_select"] = impl_;
    Selection single = whole;
    std::fill(single.positions.begin(), single.positions.end(), kPoison);
    for (const SeqSpan& seq : problem.seqs) {
      // One by one, then in chunks of a few.
      for (const int64_t chunk : {1, 5, 13}) {
        for (int64_t i = 0; i < seq.num_tokens; i += chunk) {
          const int64_t token = seq.token_begin + i;
          const SeqSpan part = {0, std::min(chunk, seq.num_tokens - i), seq.first_position + i,
                                seq.pages};
          IndexSelectArgs args = problem.args;
          args.q += token * args.num_heads * args.head_dim;
          args.weights += token * args.num_heads;
          args.seqs = {&part, 1};
          args.positions = single.positions.data() + token * args.k;
          args.counts = single.counts.data() + token;
          index_select(exec, args);
        }
        const auto range = [&](const Selection& s) {
          return std::vector<int32_t>(
              s.positions.begin() + seq.token_begin * sizes.k,
              s.positions.begin() + (seq.token_begin + seq.num_tokens) * sizes.k);
        };
        EXPECT_EQ(range(single), range(whole)) << describe(sizes) << " chunk " << chunk;
      }
    }
  }
}

TEST_P(IndexSelect, NothingToDo) {
  const Problem problem({DType::kF32, 2, 4, 3, {{0, 0}, {7, 0}}}, Values::kNormal, rng_);
  EXPECT_TRUE(run(problem, impl_, 2).counts.empty());
}

INSTANTIATE_TEST_SUITE_P(Impls, IndexSelect,
                         testing::Range(0, static_cast<int>(index_select_impls().size())),
                         [](const auto& entry) {
                           return std::string(
                               index_select_impls()[static_cast<size_t>(entry.param)].name);
                         });

TEST(IndexSelectContract, CostCountsScoredPairsOnly) {
  Rng rng(1);
  const Problem problem({DType::kBF16, 2, 4, 3, {{0, 5}, {0, 2}}}, Values::kNormal, rng);
  // Of the first sequence the queries at 3 and 4 see 4 and 5 tokens; the second scores nothing.
  EXPECT_EQ(index_select_cost(problem.args).flops, 2.0 * 2 * 4 * 9);
}

TEST(IndexSelectContractDeathTest, BrokenArgumentsAbort) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Rng rng(1);
  const Problem problem({DType::kF32, 2, 4, 3, {{0, 5}}}, Values::kNormal, rng);
  IndexSelectArgs args = problem.args;
  args.head_dim = 3;
  Exec exec(1);
  EXPECT_DEATH(index_select(exec, args), "head_dim % 2");
  args = problem.args;
  args.k = 0;
  EXPECT_DEATH(index_select(exec, args), "args.k");
}

}  // namespace
}  // namespace indexcache
