#include "ops/index_select/index_select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/checked.h"
#include "base/rng.h"
#include "ops/kit/fp8_rows.h"
#include "ops/kit/int8_rows.h"
#include "ops/kit/test_device.h"

namespace indexcache {

static IndexSelectArgs to_device(DeviceOperands& device, IndexSelectArgs args) {
  int64_t tokens = 0;
  int32_t last_page = 0;
  for (const SeqSpan& seq : args.seqs) {
    tokens += seq.num_tokens;
    for (int64_t p = 0; p < ceil_div(seq.first_position + seq.num_tokens, kPageTokens); ++p)
      last_page = std::max(last_page, seq.pages[p]);
  }
  device.elements(args.q, tokens * args.num_heads * args.head_dim);
  device.elements(args.weights, tokens * args.num_heads);
  device.pool(args.keys, (last_page + 1) * args.keys.page_bytes);
  args.keys.num_pages = last_page + 1;
  device.elements(args.positions, tokens * args.k);
  device.elements(args.counts, tokens);
  args.device_seqs = device.seqs(args.seqs);
  return args;
}

namespace {

constexpr int32_t kPoison = 0x7B7B7B7B;
constexpr int64_t kGuard = 64;
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();

// Of int8 keys the integers are exact too: an element of each row is 127 or -127, so scales are 1.
// Of e4m3 keys small ones are: an element is 7 or -7, so scales are 1/64. Sums then need less than
// the 13 bits that Hopper's tensor cores keep.
enum class Values { kNormal, kSmallIntegers, kInt8, kZeros };

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
      if (values == Values::kInt8) return static_cast<float>(rng.below(255)) - 127;
      return rng.normal();
    };
    const bool unit_scales =
        values == Values::kInt8 || (values == Values::kSmallIntegers && s.dtype == DType::kI8);
    const auto fill_row = [&](float* row) {
      for (int64_t d = 0; d < s.dim; ++d) row[d] = value();
      if (values == Values::kSmallIntegers && s.dtype == DType::kF8E4M3)
        row[rng.below(static_cast<uint64_t>(s.dim))] = rng.below(2) ? 7 : -7;
      if (unit_scales) row[rng.below(static_cast<uint64_t>(s.dim))] = rng.below(2) ? 127 : -127;
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
    for (int64_t row = 0; row < tokens * s.heads; ++row) fill_row(q.data() + row * s.dim);
    for (float& x : weights) {
      x = values == Values::kInt8 ? static_cast<float>(rng.below(3)) - 1 : value();
    }

    args.q = q.data();
    args.weights = weights.data();
    args.num_heads = s.heads;
    args.head_dim = s.dim;
    args.keys.dtype = s.dtype;
    args.keys.row_elements = s.dim;
    args.keys.page_bytes = kPageTokens * paged_row_bytes(s.dtype, s.dim) + 64;  // may be apart
    pool.resize(order.size() * static_cast<size_t>(args.keys.page_bytes));
    args.keys.base = pool.data();
    args.keys.num_pages = std::ssize(order);
    args.seqs = seqs;
    args.k = s.k;
    for (size_t i = 0; i < pool.size(); i += s.dtype == DType::kBF16 ? 2 : 4) {
      const float nan = kNan;
      const uint16_t half = f32_to_bf16(kNan);
      s.dtype == DType::kBF16 ? memcpy(&pool[i], &half, 2) : memcpy(&pool[i], &nan, 4);
    }
    std::vector<float> row(static_cast<size_t>(s.dim));
    for (const SeqSpan& seq : seqs) {
      for (int64_t p = 0; p < seq.first_position + seq.num_tokens; ++p) {
        fill_row(row.data());
        set_key(seq, p, row);
      }
    }
  }
  Problem(const Problem&) = delete;

  void set_key(const SeqSpan& seq, int64_t position, const std::vector<float>& values) {
    uint8_t* row = args.keys.row(seq.pages, position);
    if (sizes.dtype == DType::kI8) {
      *args.keys.scale(seq.pages, position) =
          quantise_row(values.data(), sizes.dim, reinterpret_cast<int8_t*>(row));
    } else if (sizes.dtype == DType::kF8E4M3) {
      *args.keys.scale(seq.pages, position) = quantise_fp8_row(values.data(), sizes.dim, row);
    } else if (sizes.dtype == DType::kBF16) {
      std::transform(values.begin(), values.end(), reinterpret_cast<uint16_t*>(row), f32_to_bf16);
    } else {
      std::copy(values.begin(), values.end(), reinterpret_cast<float*>(row));
    }
  }
  std::vector<float> key(const SeqSpan& seq, int64_t position) const {
    const uint8_t* row = args.keys.row(seq.pages, position);
    std::vector<float> values(static_cast<size_t>(sizes.dim));
    for (size_t d = 0; d < values.size(); ++d) {
      values[d] = sizes.dtype == DType::kF32 ? reinterpret_cast<const float*>(row)[d]
                  : sizes.dtype == DType::kBF16
                      ? bf16_to_f32(reinterpret_cast<const uint16_t*>(row)[d])
                  : sizes.dtype == DType::kF8E4M3 ? f8e4m3_to_f32(row[d])
                                                  : reinterpret_cast<const int8_t*>(row)[d];
    }
    return values;
  }
  // What the sum over heads is multiplied with.
  double key_scale(const SeqSpan& seq, int64_t position) const {
    return rows_have_scales(sizes.dtype) ? *args.keys.scale(seq.pages, position) : 1;
  }
  // The rows of q and the weights of one token, in the precision that goes with the keys.
  std::pair<std::vector<float>, std::vector<float>> query(int64_t token) const {
    const auto from = q.begin() + token * sizes.heads * sizes.dim;
    const auto first_weight = weights.begin() + token * sizes.heads;
    std::vector<float> rows(from, from + sizes.heads * sizes.dim);
    std::vector<float> factors(first_weight, first_weight + sizes.heads);
    if (sizes.dtype == DType::kBF16) {
      for (float& x : rows) x = bf16_to_f32(f32_to_bf16(x));
    } else if (sizes.dtype == DType::kI8) {
      std::vector<int8_t> integers(rows.size());
      for (int64_t h = 0; h < sizes.heads; ++h) {
        factors[h] *= quantise_row(&rows[h * sizes.dim], sizes.dim, &integers[h * sizes.dim]);
      }
      std::copy(integers.begin(), integers.end(), rows.begin());
    } else if (sizes.dtype == DType::kF8E4M3) {
      std::vector<uint8_t> bits(static_cast<size_t>(sizes.dim));
      for (int64_t h = 0; h < sizes.heads; ++h) {
        float* row = rows.data() + h * sizes.dim;
        factors[h] *= quantise_fp8_row(row, sizes.dim, bits.data());
        std::transform(bits.begin(), bits.end(), row, f8e4m3_to_f32);
      }
    }
    return {rows, factors};
  }
};

const OpImpl<IndexSelectArgs>& find(const std::string& name) {
  for (const OpImpl<IndexSelectArgs>& impl : index_select_impls()) {
    if (impl.name == name) return impl;
  }
  return index_select_impls().back();
}

Device device_of(const std::string& name) { return find(name).device; }

bool takes(const std::string& impl, const Problem& problem) {
  return find(impl).supported(problem.args);
}

Selection run(const Problem& problem, const std::string& impl, int threads,
              int64_t max_context = 0) {
  IndexSelectArgs args = problem.args;
  args.max_context = max_context;
  const int64_t tokens = std::ssize(problem.weights) / args.num_heads;
  Selection out{std::vector<int32_t>(static_cast<size_t>(tokens * args.k + kGuard), kPoison),
                std::vector<int32_t>(static_cast<size_t>(tokens + kGuard), kPoison)};
  args.positions = out.positions.data();
  args.counts = out.counts.data();
  run_on(device_of(impl), index_select, "index_select", impl, args, threads);
  for (std::vector<int32_t>* v : {&out.positions, &out.counts}) {
    const auto guard = v->end() - kGuard;
    EXPECT_EQ(std::count(guard, v->end(), kPoison), kGuard) << "wrote past the end";
    v->erase(guard, v->end());
  }
  return out;
}

// Everything the contract says about one selection, from scores in double.
void expect_valid(const Problem& problem, const Selection& got, const std::string& impl) {
  const std::string what = impl + " " + describe(problem.sizes);
  const double cut_off =
      impl == "sm90_fp8" ? static_cast<double>(problem.sizes.dim) / 32 * 33 * 0x1p-13 : 0;
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
      const auto [q, weights] = problem.query(token);
      for (int64_t p = 0; p < visible; ++p) {
        const std::vector<float> key = problem.key(seq, p);
        double size = 0, cut = 0;
        for (int64_t h = 0; h < args.num_heads; ++h) {
          double dot = 0, dot_size = 0, largest = 0;
          for (int64_t d = 0; d < args.head_dim; ++d) {
            const double product = static_cast<double>(q[h * args.head_dim + d]) * key[d];
            dot += product;
            dot_size += std::abs(product);
            largest = std::max({largest, std::abs(product), std::abs(dot)});
          }
          cut += std::abs(weights[h]) * largest * cut_off;
          scores[p] += weights[h] * std::max(dot, 0.0);
          size += std::abs(weights[h]) * dot_size;
        }
        scores[p] *= problem.key_scale(seq, p);
        const double rounded =
            2.0 * static_cast<double>(args.head_dim + args.num_heads) * 0x1p-24 * size;
        tolerance = std::max(tolerance, (rounded + cut) * problem.key_scale(seq, p));
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
      {kI8, 1, 2, 1, {{0, 5}, {0, 0}, {9, 1}}},
      {kI8, 3, 6, 7, {{0, 40}, {6, 1}, {7, 2}, {5, 3}}},
      {kI8, 8, 64, 7, {{63, 1}, {64, 17}, {127, 33}}},
      {kI8, 32, 128, 256, {{255, 1}, {256, 1}, {254, 5}, {700, 3}, {300, 20}}},
      {kI8, 17, 130, 256, {{500, 2}, {1000, 1}, {250, 16}}},
      {kI8, 3, 64, 2048, {{2040, 20}, {2047, 1}, {2048, 1}, {5000, 2}}},
      {kI8, 33, 66, 1, {{3000, 1}, {100, 18}}},
      {kI8, 16, 32, 64, {{1500, 1}, {0, 100}}},
      {kF8E4M3, 1, 2, 1, {{0, 5}, {0, 0}, {9, 1}}},
      {kF8E4M3, 3, 6, 7, {{0, 40}, {6, 1}, {7, 2}, {5, 3}}},
      {kF8E4M3, 17, 130, 256, {{500, 2}, {1000, 1}, {250, 16}}},
      // Of 128 elements, which Hopper's kernels take: few tokens a sequence, and many.
      {kF8E4M3, 32, 128, 256, {{255, 1}, {256, 1}, {700, 3}, {0, 0}, {300, 2}}},
      {kF8E4M3, 32, 128, 256, {{255, 1}, {254, 5}, {700, 3}, {300, 20}}},
      {kF8E4M3, 1, 128, 7, {{63, 1}, {64, 17}, {127, 33}}},
      {kF8E4M3, 20, 128, 2048, {{2040, 20}, {2047, 1}, {5000, 2}}},
      {kF8E4M3, 40, 128, 100, {{500, 1}, {1000, 2}}},
      {kF8E4M3, 40, 128, 100, {{500, 7}}},
      {kF8E4M3, 128, 128, 64, {{300, 1}, {64, 1}}},
      {kF8E4M3, 128, 128, 64, {{300, 5}}},
  };
  return sizes;
}

class IndexSelect : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    const OpImpl<IndexSelectArgs>& entry = index_select_impls()[static_cast<size_t>(GetParam())];
    impl_ = entry.name;
    IndexSelectArgs fp8;
    fp8.num_heads = 32;
    fp8.head_dim = 128;
    fp8.k = 64;
    fp8.keys = {.dtype = DType::kF8E4M3, .row_elements = 128, .num_pages = 1};
    if (!can_run(entry.device) || (!entry.supported({}) && !entry.supported(fp8)))
      GTEST_SKIP() << "this machine cannot run " << impl_;
    printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  }

  static constexpr uint64_t kSeed = 20260711;
  Rng rng_{kSeed};
  std::string impl_;
};

TEST_P(IndexSelect, RandomScoresWithinTheGap) {
  for (const Sizes& sizes : all_sizes()) {
    const Problem problem(sizes, Values::kNormal, rng_);
    if (takes(impl_, problem)) expect_valid(problem, run(problem, impl_, 2), impl_);
  }
}

TEST_P(IndexSelect, RandomSizes) {
  for (int round = 0; round < 90; ++round) {
    const DType dtypes[] = {DType::kF32, DType::kBF16, DType::kI8, DType::kF8E4M3};
    const int64_t heads[] = {1, 2, 3, 8, 15, 16, 20}, dims[] = {2, 6, 30, 32, 34, 64};
    Sizes sizes{dtypes[rng_.below(4)],
                heads[rng_.below(7)],
                dims[rng_.below(6)],
                1 + static_cast<int64_t>(rng_.below(80)),
                {}};
    for (uint64_t i = rng_.below(4) + 1; i > 0; --i) {
      sizes.spans.push_back({rng_.below(300), rng_.below(40)});
    }
    if (impl_ == "sm90_fp8") {
      sizes.dtype = DType::kF8E4M3;
      sizes.dim = 128;
      sizes.heads = 1 + static_cast<int64_t>(rng_.below(128));
    }
    const Problem problem(sizes, Values::kNormal, rng_);
    if (!takes(impl_, problem)) continue;
    expect_valid(problem, run(problem, impl_, 1 + static_cast<int>(rng_.below(4))), impl_);
  }
}

// Sums of small integers are exact in every implementation, so ties are too.
TEST_P(IndexSelect, TiesGoToTheLowerPosition) {
  for (const Sizes& sizes : all_sizes()) {
    for (const Values values : {Values::kSmallIntegers, Values::kZeros}) {
      const Problem problem(sizes, values, rng_);
      if (!takes(impl_, problem)) continue;
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

// Every product of two bytes occurs, in sums that f32 still holds exactly.
TEST_P(IndexSelect, Int8ProductsAreExact) {
  const std::vector<Sizes> sizes = {
      {DType::kI8, 1, 2, 5, {{200, 3}}},      {DType::kI8, 1, 64, 20, {{300, 40}}},
      {DType::kI8, 3, 130, 33, {{300, 40}}},  {DType::kI8, 3, 130, 33, {{300, 1}, {100, 2}}},
      {DType::kI8, 1, 1038, 9, {{150, 20}}},  {DType::kI8, 1, 1038, 9, {{150, 1}}},
      {DType::kI8, 18, 30, 40, {{100, 100}}}, {DType::kI8, 18, 30, 40, {{250, 1}}}};
  for (const Sizes& size : sizes) {
    const Problem problem(size, Values::kInt8, rng_);
    if (!takes(impl_, problem)) GTEST_SKIP() << impl_ << " takes no int8 keys";
    EXPECT_EQ(run(problem, impl_, 2), run(problem, "ref", 2)) << describe(size);
  }
  // The largest sums there can be, of either sign.
  Problem largest({DType::kI8, 1, 1038, 7, {{100, 17}}}, Values::kInt8, rng_);
  for (float& x : largest.q) x = x < 0 ? -127.0f : 127.0f;
  const std::vector<float> first(largest.q.begin(), largest.q.begin() + 1038);
  for (int64_t p = 0; p < 100; p += 3) {
    std::vector<float> row = first;
    for (int64_t d = 0; d < p % 5; ++d) row[d] = -row[d];
    if (p % 2 == 1) {
      for (float& x : row) x = -x;
    }
    largest.set_key(largest.seqs[0], p, row);
  }
  EXPECT_EQ(run(largest, impl_, 2), run(largest, "ref", 2));
}

// int8 keys against f32 ones: a product moves by at most half a step of each of its factors, so
// only positions that close to the k-th best may change places.
TEST_P(IndexSelect, Int8SelectionsAreWithinTheGapOfF32) {
  const int64_t heads = 8, dim = 64, k = 50;
  const Sizes sizes = {DType::kF32, heads, dim, k, {{500, 20}}};
  const Problem exact(sizes, Values::kNormal, rng_);
  Problem rounded({DType::kI8, heads, dim, k, {{500, 20}}}, Values::kZeros, rng_);
  rounded.q = exact.q;
  rounded.weights = exact.weights;
  rounded.args.q = rounded.q.data();
  rounded.args.weights = rounded.weights.data();
  for (int64_t p = 0; p < 520; ++p) {
    rounded.set_key(rounded.seqs[0], p, exact.key(exact.seqs[0], p));
  }
  if (!takes(impl_, rounded)) GTEST_SKIP() << impl_ << " takes no int8 keys";
  const Selection got = run(rounded, impl_, 2);
  const auto largest = [&](const float* row) {
    float most = 0;
    for (int64_t d = 0; d < dim; ++d) most = std::max(most, std::abs(row[d]));
    return static_cast<double>(most);
  };
  int64_t both = 0;
  for (int64_t t = 0; t < 20; ++t) {
    std::vector<std::pair<double, double>> scores;  // and how far int8 may move them
    for (int64_t p = 0; p <= 500 + t; ++p) {
      const std::vector<float> key = exact.key(exact.seqs[0], p);
      const double key_step = largest(key.data()) / 127;
      double score = 0, moved = 0;
      for (int64_t h = 0; h < heads; ++h) {
        const float* q = exact.q.data() + (t * heads + h) * dim;
        const double q_step = largest(q) / 127, weight = exact.weights[t * heads + h];
        double dot = 0, dot_moved = 0;
        for (int64_t d = 0; d < dim; ++d) {
          dot += static_cast<double>(q[d]) * key[d];
          dot_moved +=
              std::abs(q[d]) * key_step / 2 + std::abs(key[d]) * q_step / 2 + q_step * key_step / 4;
        }
        score += weight * std::max(dot, 0.0);
        moved += std::abs(weight) * dot_moved;
      }
      scores.push_back({score, moved * 1.0001});  // f32 rounding of scales and sums
    }
    std::vector<double> sorted;
    for (const auto& [score, moved] : scores) sorted.push_back(score);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
    double moved = 0;
    for (const auto& score : scores) moved = std::max(moved, score.second);
    std::vector<bool> selected(scores.size());
    for (int64_t j = 0; j < k; ++j) selected[got.positions[t * k + j]] = true;
    for (size_t p = 0; p < scores.size(); ++p) {
      const double above = scores[p].first - sorted[k - 1];
      if (selected[p]) {
        EXPECT_GE(above, -2 * moved) << "token " << t << " position " << p;
      } else {
        EXPECT_LE(above, 2 * moved) << "token " << t << " position " << p;
      }
      both += selected[p] && above >= 0;
    }
  }
  printf("overlap with f32 keys %.3f\n", static_cast<double>(both) / (20 * k));
}

TEST_P(IndexSelect, NanAndInfinityRank) {
  for (const Sizes& sizes : all_sizes()) {
    Problem problem(sizes, Values::kSmallIntegers, rng_);
    if (!takes(impl_, problem)) continue;
    for (const SeqSpan& seq : problem.seqs) {
      for (int64_t p = 0; p < seq.first_position + seq.num_tokens; ++p) {
        const float specials[] = {kNan, -kNan, kInfinity, -kInfinity};
        if (rng_.below(3) == 0) {
          std::vector<float> row = problem.key(seq, p);
          row[rng_.below(static_cast<uint64_t>(sizes.dim))] = specials[rng_.below(4)];
          problem.set_key(seq, p, row);
        }
      }
    }
    EXPECT_EQ(run(problem, impl_, 2), run(problem, "ref", 2)) << describe(sizes);
  }
}

TEST_P(IndexSelect, OnlyNanIsStillSelected) {
  for (const DType dtype : {DType::kBF16, DType::kI8, DType::kF8E4M3}) {
    const int64_t dim = dtype == DType::kF8E4M3 ? 128 : 4;
    Problem problem({dtype, 2, dim, 70, {{199, 1}, {90, 20}}}, Values::kNormal, rng_);
    if (!takes(impl_, problem)) continue;
    for (float& x : problem.q) x = kNan;
    const Selection got = run(problem, impl_, 2);
    for (int32_t i = 0; i < 70; ++i) EXPECT_EQ(got.positions[static_cast<size_t>(i)], i);
    EXPECT_EQ(got, run(problem, "ref", 1));
  }
}

TEST_P(IndexSelect, IndependentOfThreadsAndOfTheBatch) {
  for (const Sizes& sizes : all_sizes()) {
    const Problem problem(sizes, Values::kNormal, rng_);
    if (!takes(impl_, problem)) continue;
    const Selection whole = run(problem, impl_, 1);
    for (const int threads : {2, 3, 7}) {
      EXPECT_EQ(whole, run(problem, impl_, threads)) << describe(sizes) << " threads " << threads;
    }
    EXPECT_EQ(whole, run(problem, impl_, 2, 20000)) << describe(sizes) << " in a long context";
    Exec exec(2, device_of(impl_));
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
          run_on(exec, index_select, args);
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
  const DType dtype = impl_ == "sm90_fp8" ? DType::kF8E4M3 : DType::kF32;
  const Problem problem({dtype, 2, 128, 3, {{0, 0}, {7, 0}}}, Values::kNormal, rng_);
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

// Where products are summed in f32, rows too long for exact sums are left to others.
TEST(IndexSelectContract, Int8SumsThatF32DoesNotHoldAreRefused) {
  IndexSelectArgs args;
  args.keys.dtype = DType::kI8;
  for (const auto& impl : index_select_impls()) {
    args.head_dim = 1038;
    if (!impl.supported(args)) continue;
    args.head_dim = 1040;
    const std::string name = impl.name;
    EXPECT_EQ(impl.supported(args),
              name == "ref" || name == "avx512bf16" || impl.device == Device::kCuda)
        << name;
  }
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
