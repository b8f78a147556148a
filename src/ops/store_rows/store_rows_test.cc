#include "ops/store_rows/store_rows.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "base/checked.h"
#include "ops/kit/testing.h"

namespace indexcache {

static StoreRowsArgs to_device(DeviceOperands& device, StoreRowsArgs args) {
  device.rows(args.x, args.num_rows, args.rows.row_elements, args.ldx);
  int32_t last_page = 0;
  for (const SeqSpan& seq : args.seqs) {
    const int64_t end = seq.first_position + seq.num_tokens;
    for (int64_t p = 0; p < (end + kPageTokens - 1) / kPageTokens; ++p)
      last_page = std::max(last_page, seq.pages[p]);
  }
  device.pool(args.rows, (last_page + 1) * args.rows.page_bytes);
  args.device_seqs = device.seqs(args.seqs);
  return args;
}

namespace {

constexpr uint8_t kPoison = 0xA5;

struct Span {
  int64_t first_position, num_tokens;
};

const std::vector<std::vector<Span>> kBatches = {
    {},        {{0, 1}},  {{0, 0}, {63, 2}, {0, 0}},
    {{5, 15}}, {{0, 64}}, {{127, 1}, {64, 130}, {0, 1}, {3, 17}, {200, 33}},
};

// The integer next to x / scale, found by trying them all; between two the even one.
float int8_row(const float* x, int64_t n, uint8_t* to) {
  float scale = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) scale = kNan;
    if (!(std::abs(x[i]) / 127 <= scale)) scale = std::isnan(scale) ? scale : std::abs(x[i]) / 127;
  }
  for (int64_t i = 0; i < n; ++i) {
    int best = 0;
    for (int y = -127; scale > 0 && y <= 127; ++y) {
      const float far = std::abs(x[i] / scale - static_cast<float>(y)),
                  so_far = std::abs(x[i] / scale - static_cast<float>(best));
      if (far < so_far || (far == so_far && y % 2 == 0)) best = y;
    }
    to[i] = static_cast<uint8_t>(best);
  }
  return scale;
}

// The e4m3 number next to x / scale, in the same way; between two the one with an even last bit.
float fp8_row(const float* x, int64_t n, uint8_t* to) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite = finite && std::isfinite(x[i]);
    largest = std::max(largest, std::abs(x[i]));
  }
  const float scale = finite ? largest / 448 : kNan;
  for (int64_t i = 0; i < n; ++i) {
    const float wanted = scale > 0 ? std::abs(x[i] / scale) : 0;
    int best = 0;
    for (int bits = 0; bits < 0x7F; ++bits) {
      const float far = std::abs(wanted - f8e4m3_to_f32(static_cast<uint8_t>(bits))),
                  so_far = std::abs(wanted - f8e4m3_to_f32(static_cast<uint8_t>(best)));
      if (far < so_far || (far == so_far && bits % 2 == 0)) best = bits;
    }
    to[i] = static_cast<uint8_t>(best | (scale > 0 && std::signbit(x[i]) ? 0x80 : 0));
  }
  return scale;
}

// Sequences whose pages are scattered over one poisoned pool.
struct Problem {
  GuardedRows x;
  std::vector<uint8_t> pool;
  std::vector<std::vector<int32_t>> pages;
  std::vector<SeqSpan> seqs;
  StoreRowsArgs args;

  static int64_t tokens_of(const std::vector<Span>& spans) {
    int64_t count = 0;
    for (const Span& span : spans) count += span.num_tokens;
    return count;
  }

  Problem(Rng& rng, DType dtype, const std::vector<Span>& spans, int64_t n, int64_t gap)
      : x(tokens_of(spans), n, n + gap) {
    x.fill_random(rng);
    std::vector<int32_t> free_pages;
    int32_t num_pages = 1;  // one page belongs to nobody
    for (const Span& span : spans)
      num_pages +=
          static_cast<int32_t>(ceil_div(span.first_position + span.num_tokens, kPageTokens));
    for (int32_t p = 0; p < num_pages; ++p) free_pages.push_back(p);
    for (size_t i = free_pages.size(); i > 1; --i)
      std::swap(free_pages[i - 1], free_pages[rng.below(i)]);
    int64_t token = 0;
    for (const Span& span : spans) {
      const auto count =
          static_cast<size_t>(ceil_div(span.first_position + span.num_tokens, kPageTokens));
      pages.emplace_back(free_pages.end() - static_cast<int64_t>(count), free_pages.end());
      free_pages.resize(free_pages.size() - count);
      seqs.push_back({token, span.num_tokens, span.first_position, nullptr});
      token += span.num_tokens;
    }
    for (size_t s = 0; s < seqs.size(); ++s) seqs[s].pages = pages[s].data();
    const int64_t page_bytes = kPageTokens * paged_row_bytes(dtype, n) + 24;
    pool.resize(static_cast<size_t>(num_pages * page_bytes));
    args = {x.data(), x.stride(), token, seqs, {dtype, n, page_bytes, pool.data()}};
  }

  std::vector<uint8_t> run(const std::string& impl, int num_threads = 2) {
    std::fill(pool.begin(), pool.end(), kPoison);
    run_forced(store_rows, "store_rows", impl, args, num_threads);
    return pool;
  }

  // The pool by the contract: only the rows of the spans change.
  std::vector<uint8_t> expected() {
    std::vector<uint8_t> want(pool.size(), kPoison);
    const PagedRows& rows = args.rows;
    for (const SeqSpan& seq : seqs) {
      for (int64_t i = 0; i < seq.num_tokens; ++i) {
        const int64_t position = seq.first_position + i;
        uint8_t* to = want.data() + seq.pages[position / 64] * rows.page_bytes +
                      position % 64 * rows.row_elements * dtype_bytes(rows.dtype);
        if (rows_have_scales(rows.dtype)) {
          const auto quantise = rows.dtype == DType::kI8 ? int8_row : fp8_row;
          const float scale = quantise(x.row(seq.token_begin + i), rows.row_elements, to);
          const int64_t page = seq.pages[position / 64];
          std::memcpy(
              want.data() + page * rows.page_bytes + 64 * rows.row_elements + position % 64 * 4,
              &scale, 4);
          continue;
        }
        for (int64_t e = 0; e < rows.row_elements; ++e) {
          const float value = x.row(seq.token_begin + i)[e];
          const uint16_t bits = f32_to_bf16(value);
          if (rows.dtype == DType::kF32) {
            std::memcpy(to + 4 * e, &value, 4);
          } else {
            std::memcpy(to + 2 * e, &bits, 2);
          }
        }
      }
    }
    return want;
  }
};

TEST(StoreRows, EveryImplementationWritesExactlyItsRows) {
  Rng rng(printed_seed());
  std::vector<std::string> impls = runnable_implementations();
  impls.push_back("ref");
  for (const std::string& impl : impls) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8, DType::kF8E4M3}) {
      for (size_t b = 0; b < kBatches.size(); ++b) {
        for (const int64_t n : {1, 2, 7, 8, 16, 130}) {
          SCOPED_TRACE(fmt::format("{} {} batch {} n {}", impl, dtype_name(dtype), b, n));
          Problem problem(rng, dtype, kBatches[b], n, b % 2 == 0 ? 0 : 3);
          EXPECT_TRUE(problem.run(impl) == problem.expected());
          EXPECT_TRUE(problem.x.untouched());
        }
      }
    }
  }
}

TEST(StoreRows, RoundsAsTheScalarConversionDoes) {
  const float special[] = {kNan,
                           -kNan,
                           kInfinity,
                           -kInfinity,
                           0,
                           -0.0f,
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
  for (const std::string& impl : runnable_implementations()) {
    Problem problem(rng, DType::kBF16, {{60, 8}}, 19, 0);
    for (int64_t r = 0; r < 8; ++r)
      std::copy(std::begin(special), std::end(special), problem.x.row(r) + r % 4);
    for (int64_t r = 4; r < 8; ++r) {
      for (int64_t e = 0; e < 19; ++e)
        problem.x.row(r)[e] = std::bit_cast<float>(static_cast<uint32_t>(rng.next() >> 32));
    }
    EXPECT_TRUE(problem.run(impl) == problem.expected()) << impl;
  }
}

TEST(StoreRows, Int8RowsOfEveryKind) {
  const int64_t n = 130;
  Rng rng(printed_seed());
  std::vector<std::string> impls = runnable_implementations();
  impls.push_back("ref");
  for (const std::string& impl : impls) {
    Problem problem(rng, DType::kI8, {{60, 12}}, n, 1);
    const float specials[] = {kNan, -kNan, kInfinity, -kInfinity};
    for (int64_t r = 0; r < 4; ++r) problem.x.row(r)[r * 43] = specials[r];
    std::fill_n(problem.x.row(4), n, 0.0f);
    std::fill_n(problem.x.row(5), n, -0.0f);
    std::fill_n(problem.x.row(6), n, 1e-45f);   // the scale is 0
    std::fill_n(problem.x.row(7), n, -2e-43f);  // the scale is rounded by half: -127 at the least
    std::fill_n(problem.x.row(8), n, 3.4e38f);
    for (int64_t e = 0; e < n; ++e) {
      problem.x.row(9)[e] = e == 77 ? -127.0f : static_cast<float>(e) - 64.5f;  // ties
    }
    EXPECT_TRUE(problem.run(impl) == problem.expected()) << impl;
    const PagedRows& rows = problem.args.rows;
    const SeqSpan& seq = problem.seqs[0];
    const auto scale = [&](int64_t r) { return *rows.scale(seq.pages, 60 + r); };
    const auto row = [&](int64_t r) {
      return reinterpret_cast<const int8_t*>(rows.row(seq.pages, 60 + r));
    };
    for (int64_t r = 0; r < 4; ++r) EXPECT_TRUE(std::isnan(scale(r))) << impl;
    for (int64_t r = 4; r < 7; ++r) EXPECT_EQ(scale(r), 0) << impl;
    for (int64_t r = 0; r < 7; ++r) EXPECT_EQ(row(r)[5], 0) << impl;
    EXPECT_EQ(row(7)[5], -127) << impl;
    EXPECT_EQ(row(8)[5], 127) << impl;
    EXPECT_EQ(scale(9), 1) << impl;
    EXPECT_EQ(row(9)[0], -64) << impl;
    EXPECT_EQ(row(9)[1], -64) << impl;
    EXPECT_EQ(row(9)[77], -127) << impl;
  }
}

TEST(StoreRows, Fp8RowsOfEveryKind) {
  const int64_t n = 130;
  Rng rng(printed_seed());
  std::vector<std::string> impls = runnable_implementations();
  impls.push_back("ref");
  for (const std::string& impl : impls) {
    Problem problem(rng, DType::kF8E4M3, {{60, 12}}, n, 1);
    const float specials[] = {kNan, -kNan, kInfinity, -kInfinity};
    for (int64_t r = 0; r < 4; ++r) problem.x.row(r)[r * 43] = specials[r];
    std::fill_n(problem.x.row(4), n, 0.0f);
    std::fill_n(problem.x.row(5), n, -0.0f);
    std::fill_n(problem.x.row(6), n, 1e-45f);   // the scale is 0
    std::fill_n(problem.x.row(7), n, -7e-43f);  // the scale is rounded: kept to -448
    std::fill_n(problem.x.row(8), n, 3.4e38f);
    // The scale is 1: ties between neighbours, subnormal and normal, and what they round to.
    for (int64_t e = 0; e < n; ++e) {
      const float low = f8e4m3_to_f32(static_cast<uint8_t>(e % 0x7E)),
                  high = f8e4m3_to_f32(static_cast<uint8_t>(e % 0x7E + 1));
      problem.x.row(9)[e] = (e % 2 == 0 ? 0.5f : -0.5f) * (low + high);
      problem.x.row(10)[e] = std::nextafter(problem.x.row(9)[e], e % 3 == 0 ? 1e3f : 0.0f);
    }
    problem.x.row(9)[129] = problem.x.row(10)[129] = -448;
    EXPECT_TRUE(problem.run(impl) == problem.expected()) << impl;
    const PagedRows& rows = problem.args.rows;
    const SeqSpan& seq = problem.seqs[0];
    const auto scale = [&](int64_t r) { return *rows.scale(seq.pages, 60 + r); };
    for (int64_t r = 0; r < 4; ++r) EXPECT_TRUE(std::isnan(scale(r))) << impl;
    for (int64_t r = 4; r < 7; ++r) EXPECT_EQ(scale(r), 0) << impl;
    for (int64_t r = 0; r < 7; ++r) EXPECT_EQ(rows.row(seq.pages, 60 + r)[5], 0) << impl;
    EXPECT_EQ(rows.row(seq.pages, 67)[5], 0xFE) << impl;
    EXPECT_EQ(scale(9), 1) << impl;
  }
}

TEST(StoreRows, ThreadsChangeNoBit) {
  Rng rng(printed_seed());
  Problem problem(rng, DType::kBF16, kBatches.back(), 130, 1);
  for (const std::string& impl : runnable_implementations()) {
    const auto one = problem.run(impl, 1);
    EXPECT_TRUE(problem.run(impl, 2) == one) << impl;
    EXPECT_TRUE(problem.run(impl, 3) == one) << impl;
  }
}

}  // namespace
}  // namespace indexcache
