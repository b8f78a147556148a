// What the tests of the ops that fill caches share: sequences whose pages are scattered over one
// poisoned pool, and rows rounded to the cache's types by trying every number.
#pragma once

#include <cstring>
#include <vector>

#include "base/checked.h"
#include "ops/kit/testing.h"

namespace indexcache {

// The integer next to x / scale; between two the even one.
inline float nearest_int8_row(const float* x, int64_t n, uint8_t* to) {
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

// The e4m3 number next to x / scale; between two the one with an even last bit.
inline float nearest_fp8_row(const float* x, int64_t n, uint8_t* to) {
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

struct ScatteredCache {
  struct Span {
    int64_t first_position, num_tokens;
  };
  static constexpr uint8_t kPoison = 0xA5;

  std::vector<uint8_t> pool;
  std::vector<std::vector<int32_t>> pages;
  std::vector<SeqSpan> seqs;
  PagedRows rows;
  int64_t num_tokens = 0;

  // `rows_in` has the type and the elements. One page belongs to nobody.
  ScatteredCache(Rng& rng, const std::vector<Span>& spans, PagedRows rows_in) : rows(rows_in) {
    std::vector<int32_t> free_pages = {0};
    for (const Span& span : spans) {
      const int64_t count = ceil_div(span.first_position + span.num_tokens, kPageTokens);
      for (int64_t i = 0; i < count; ++i)
        free_pages.push_back(static_cast<int32_t>(free_pages.size()));
    }
    const int64_t num_pages = std::ssize(free_pages);
    for (size_t i = free_pages.size(); i > 1; --i)
      std::swap(free_pages[i - 1], free_pages[rng.below(i)]);
    for (const Span& span : spans) {
      const int64_t count = ceil_div(span.first_position + span.num_tokens, kPageTokens);
      pages.emplace_back(free_pages.end() - count, free_pages.end());
      free_pages.resize(free_pages.size() - static_cast<size_t>(count));
      seqs.push_back({num_tokens, span.num_tokens, span.first_position, nullptr});
      num_tokens += span.num_tokens;
    }
    for (size_t s = 0; s < seqs.size(); ++s) seqs[s].pages = pages[s].data();
    const bool scales_behind = rows_have_scales(rows.dtype) && rows.fp8_elements == 0;
    rows.page_bytes = kPageTokens * (rows.row_bytes() + (scales_behind ? 4 : 0)) + 32;
    pool.assign(static_cast<size_t>(num_pages * rows.page_bytes), kPoison);
    rows.base = pool.data();
    rows.num_pages = num_pages;
  }
  ScatteredCache(const ScatteredCache&) = delete;

  void poison() { std::fill(pool.begin(), pool.end(), kPoison); }

  // The pool when row `token` is `y[token]` rounded, and nothing else was written.
  std::vector<uint8_t> with(const std::vector<std::vector<float>>& y) const {
    std::vector<uint8_t> want(pool.size(), kPoison);
    PagedRows to = rows;
    to.base = want.data();
    for (const SeqSpan& seq : seqs) {
      for (int64_t i = 0; i < seq.num_tokens; ++i) {
        const int64_t position = seq.first_position + i, n = rows.row_elements;
        const float* x = y[static_cast<size_t>(seq.token_begin + i)].data();
        uint8_t* row = to.row(seq.pages, position);
        if (rows.fp8_elements > 0) {
          const int64_t fp8 = rows.fp8_elements;
          float* scales = reinterpret_cast<float*>(row + fp8);
          for (int64_t e = 0; e < fp8; e += kFp8Block)
            scales[e / kFp8Block] = nearest_fp8_row(x + e, kFp8Block, row + e);
          uint16_t* rest = reinterpret_cast<uint16_t*>(scales + fp8 / kFp8Block);
          for (int64_t e = fp8; e < n; ++e) rest[e - fp8] = f32_to_bf16(x[e]);
          continue;
        }
        if (rows_have_scales(rows.dtype)) {
          *to.scale(seq.pages, position) =
              rows.dtype == DType::kI8 ? nearest_int8_row(x, n, row) : nearest_fp8_row(x, n, row);
          continue;
        }
        for (int64_t e = 0; e < n; ++e) {
          const uint16_t bits = f32_to_bf16(x[e]);
          rows.dtype == DType::kF32 ? std::memcpy(row + 4 * e, x + e, 4)
                                    : std::memcpy(row + 2 * e, &bits, 2);
        }
      }
    }
    return want;
  }

  // Whether the pool is that. Any NaN is as good as another: what arithmetic makes differs.
  bool holds(const std::vector<std::vector<float>>& y) const {
    std::vector<uint8_t> got = pool, want = with(y);
    for (std::vector<uint8_t>* bytes : {&got, &want}) {
      PagedRows to = rows;
      to.base = bytes->data();
      for (const SeqSpan& seq : seqs) {
        for (int64_t i = 0; i < seq.num_tokens; ++i) {
          uint8_t* row = to.row(seq.pages, seq.first_position + i);
          for (int64_t e = 0; e < rows.row_elements; ++e) {
            float* f32 = reinterpret_cast<float*>(row) + e;
            uint16_t* bf16 = reinterpret_cast<uint16_t*>(row) + e;
            if (rows.dtype == DType::kF32 && std::isnan(*f32)) *f32 = kNan;
            if (rows.dtype == DType::kBF16 && std::isnan(bf16_to_f32(*bf16))) *bf16 = 0x7FC0;
          }
        }
      }
    }
    return got == want;
  }

  // The rows of an f32 cache.
  std::vector<std::vector<float>> f32_rows() const {
    std::vector<std::vector<float>> all;
    for (const SeqSpan& seq : seqs) {
      for (int64_t i = 0; i < seq.num_tokens; ++i) {
        const float* row =
            reinterpret_cast<const float*>(rows.row(seq.pages, seq.first_position + i));
        all.emplace_back(row, row + rows.row_elements);
      }
    }
    return all;
  }
};

// Runs of new tokens: none, across pages, decoding beside prefill.
inline const std::vector<std::vector<ScatteredCache::Span>> kCacheBatches = {
    {},        {{0, 1}},  {{0, 0}, {63, 2}, {0, 0}},
    {{5, 15}}, {{0, 64}}, {{127, 1}, {64, 130}, {0, 1}, {3, 17}, {200, 33}},
};

// More runs than a warp has lanes, of one token each.
inline std::vector<ScatteredCache::Span> many_decoding() {
  std::vector<ScatteredCache::Span> spans;
  for (int64_t i = 0; i < 37; ++i) spans.push_back({i * 3, 1});
  return spans;
}

// Makes the pool and the runs those of a GPU.
template <class Args>
void cache_to_device(DeviceOperands& device, Args& args) {
  device.pool(args.rows, args.rows.num_pages * args.rows.page_bytes);
  args.device_seqs = device.seqs(args.seqs);
}

}  // namespace indexcache
