// The vector kernels of matmul. Many rows of x: 12 rows of w by 2 panels of x, lanes are rows of x.
// Few: 4 rows of w by up to 4 rows of x, lanes along k. (With AVX2: 6 by 2 panels, 2 by 4.)
// Few, with the bits of many: up to 8 (4) rows of x, lanes are rows of w.
#include "ops/kit/vec.h"
#include "ops/matmul/matmul_kernels.h"

namespace indexcache {
namespace INDEXCACHE_ISA {
namespace {

constexpr int64_t kScaleBlock = 128;
constexpr int kTileRows =
    kLanes == 16 ? 12 : 6;  // with 2 panels: 24 of 32 or 12 of 16 registers hold sums
constexpr int kTilePanels = 2;
constexpr int64_t kBlockWords = 256;  // of k: a tile of w stays in L1 while panels pass
constexpr int64_t kTileStride =
    kBlockWords + 16;  // not a power of two: rows must not share L1 sets
constexpr int kSmallRows = kLanes == 16 ? 4 : 2;
constexpr int kSmallM = 4;

enum class Words { kF32, kF32RoundedToBF16, kBF16Pair };

constexpr int kWeightBytes[] = {4, 2, 2, 1};  // by WeightType

template <Words kWords>
constexpr int kElements =
    kWords == Words::kBF16Pair ? 2 * kLanes : kLanes;  // of one vector of words

template <Words kWords>
INDEXCACHE_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (kWords == Words::kBF16Pair) {
    return vec_dot_bf16(sum, _mm512_castps_si512(a), _mm512_castps_si512(b));
  }
#endif
  return vec_fma(a, b, sum);
}

#if defined(__AVX512F__)
INDEXCACHE_INLINE Vec round_to_bf16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7FC00000));
  return _mm512_castsi512_ps(
      _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}

// e4m3 to float32: the bits in place give the value times 2^-120, subnormals too.
INDEXCACHE_INLINE Vec load_f8(const uint8_t* p, Vec scale) {
  const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7F));
  const __m512i sign = _mm512_slli_epi32(_mm512_xor_si512(bits, magnitude), 24);
  const Vec small = _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(magnitude, 20), sign));
  const Vec value = vec_mul(vec_mul(small, vec_set(0x1.0p120f)), scale);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
  return _mm512_mask_mov_ps(value, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
}

INDEXCACHE_INLINE Vec load_first(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
INDEXCACHE_INLINE void store_first(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}

INDEXCACHE_INLINE void transpose(Vec (&v)[16]) {
  Vec t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]);
      const __m512d b = _mm512_castps_pd(t[i + j + 2]);
      v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
  }
}
#else
INDEXCACHE_INLINE Vec round_to_bf16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const Vec kept =
      _mm256_and_ps(_mm256_castsi256_ps(rounded),
                    _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  const Vec nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  return _mm256_blendv_ps(kept, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

INDEXCACHE_INLINE Vec load_f8(const uint8_t* p, Vec scale) {
  const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F));
  const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(bits, magnitude), 24);
  const Vec small = _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(magnitude, 20), sign));
  const Vec value = vec_mul(vec_mul(small, vec_set(0x1.0p120f)), scale);
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
  return _mm256_blendv_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)),
                          _mm256_castsi256_ps(nan));
}

INDEXCACHE_INLINE __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
INDEXCACHE_INLINE Vec load_first(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
INDEXCACHE_INLINE void store_first(float* p, Vec v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}

INDEXCACHE_INLINE void transpose(Vec (&v)[8]) {
  Vec t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      v[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}
#endif

template <WeightType kType>
INDEXCACHE_INLINE Vec load_f32(const uint8_t* p, Vec scale) {
  if constexpr (kType == WeightType::kF32) return vec_load(reinterpret_cast<const float*>(p));
  if constexpr (kType == WeightType::kF16)
    return vec_load_f16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (kType == WeightType::kBF16)
    return vec_load_bf16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (kType == WeightType::kF8E4M3) return load_f8(p, scale);
}

// kElements elements at p as one vector of words.
template <WeightType kType, Words kWords>
INDEXCACHE_INLINE Vec load_words(const uint8_t* p, Vec scale) {
  if constexpr (kWords == Words::kF32 ||
                (kWords == Words::kF32RoundedToBF16 && kType == WeightType::kBF16)) {
    return load_f32<kType>(p, scale);
  } else if constexpr (kWords == Words::kF32RoundedToBF16) {
    return round_to_bf16(load_f32<kType>(p, scale));
  } else if constexpr (kType == WeightType::kBF16) {
    return vec_load(reinterpret_cast<const float*>(p));
  } else {
#if defined(__AVX512BF16__)
    const Vec low = load_f32<kType>(p, scale);
    const Vec high = load_f32<kType>(p + kLanes * kWeightBytes[static_cast<int>(kType)], scale);
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    __builtin_unreachable();
#endif
  }
}

// `count` < kElements elements at p, the rest zero; reads nothing beyond them.
template <WeightType kType, Words kWords>
INDEXCACHE_INLINE Vec load_last_words(const uint8_t* p, int64_t count, Vec scale) {
  constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
  alignas(64) uint8_t buffer[static_cast<size_t>(kElements<kWords>) * kBytes] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(count * kBytes));
  return load_words<kType, kWords>(buffer, scale);
}

// Elements of one row as words, the last vector filled with zeros. `scale` are those of the
// elements' blocks of 128.
template <WeightType kType, Words kWords>
INDEXCACHE_INLINE void row_to_words(const uint8_t* p, int64_t count, const float* scale,
                                    float* out) {
  constexpr int64_t kStep = kElements<kWords>;
  constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
  const auto scale_at = [scale](int64_t i) {
    return kType == WeightType::kF8E4M3 ? vec_set(scale[i / kScaleBlock]) : vec_zero();
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep, out += kLanes) {
    vec_store(out, load_words<kType, kWords>(p + i * kBytes, scale_at(i)));
  }
  if (i < count)
    vec_store(out, load_last_words<kType, kWords>(p + i * kBytes, count - i, scale_at(i)));
}

// Calls f.template operator()<kType, kWords>().
template <class F>
INDEXCACHE_INLINE void with_words(WeightType type, bool bf16, const F& f) {
  const auto with_type = [&]<Words kWords>() {
    switch (type) {
      case WeightType::kF32:
        return f.template operator()<WeightType::kF32, kWords>();
      case WeightType::kF16:
        return f.template operator()<WeightType::kF16, kWords>();
      case WeightType::kBF16:
        return f.template operator()<WeightType::kBF16, kWords>();
      case WeightType::kF8E4M3:
        return f.template operator()<WeightType::kF8E4M3, kWords>();
    }
  };
  if (!bf16) return with_type.template operator()<Words::kF32>();
  if constexpr (kHasDot) return with_type.template operator()<Words::kBF16Pair>();
  return with_type.template operator()<Words::kF32RoundedToBF16>();
}

INDEXCACHE_INLINE int64_t words_of(int64_t num_elements, bool bf16) {
  return bf16 && kHasDot ? (num_elements + 1) / 2 : num_elements;
}

INDEXCACHE_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

void pack_rows(const MatmulPackArgs& args) {
  const int64_t stride = round_up(words_of(args.k, args.bf16), kLanes);
  with_words(WeightType::kF32, args.bf16, [&]<WeightType kType, Words kWords>() {
    for (int64_t row = 0; row < args.num_rows; ++row) {
      row_to_words<WeightType::kF32, kWords>(
          reinterpret_cast<const uint8_t*>(args.x + row * args.ldx), args.k, nullptr,
          args.out + row * stride);
    }
  });
}

void pack_panel(const MatmulPackArgs& args) {
  with_words(WeightType::kF32, args.bf16, [&]<WeightType kType, Words kWords>() {
    constexpr int64_t kStep = kElements<kWords>;
    const int64_t num_words = words_of(args.k, args.bf16);
    for (int64_t i = 0, word = 0; i < args.k; i += kStep, word += kLanes) {
      Vec v[kLanes];
      for (int64_t row = 0; row < kLanes; ++row) {
        const auto* p = reinterpret_cast<const uint8_t*>(args.x + row * args.ldx + i);
        if (row >= args.num_rows) {
          v[row] = vec_zero();
        } else if (i + kStep <= args.k) {
          v[row] = load_words<WeightType::kF32, kWords>(p, vec_zero());
        } else {
          v[row] = load_last_words<WeightType::kF32, kWords>(p, args.k - i, vec_zero());
        }
      }
      transpose(v);
      const int64_t count = num_words - word < kLanes ? num_words - word : kLanes;
      for (int64_t j = 0; j < count; ++j) vec_store(args.out + (word + j) * kLanes, v[j]);
    }
  });
}

// sums[r][16 p + lane] (+)= over words: w[r][word] x[p][word][lane]
template <Words kWords, int kRows, int kPanels>
void tile(const float* w, const float* x, int64_t panel_stride, int64_t num_words, bool first,
          float* sums, int64_t sums_stride) {
  Vec sum[kRows][kPanels];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      sum[r][p] = first ? vec_zero() : vec_load(sums + r * sums_stride + p * kLanes);
    }
  }
  for (int64_t i = 0; i < num_words; ++i) {
    Vec panel[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) panel[p] = vec_load(x + p * panel_stride + i * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vec word = vec_set(w[r * kTileStride + i]);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) sum[r][p] = multiply_add<kWords>(word, panel[p], sum[r][p]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) vec_store(sums + r * sums_stride + p * kLanes, sum[r][p]);
  }
}

// Heights of a tile are thirds of the full one; rows above `num_rows` of the scratch are computed
// and not stored.
template <Words kWords, int kPanels>
INDEXCACHE_INLINE void tile_of_rows(int64_t num_rows, const float* w, const float* x,
                                    int64_t panel_stride, int64_t num_words, bool first,
                                    float* sums, int64_t sums_stride) {
  constexpr int kThird = kTileRows / 3;
  if (num_rows > 2 * kThird) {
    tile<kWords, 3 * kThird, kPanels>(w, x, panel_stride, num_words, first, sums, sums_stride);
  } else if (num_rows > kThird) {
    tile<kWords, 2 * kThird, kPanels>(w, x, panel_stride, num_words, first, sums, sums_stride);
  } else {
    tile<kWords, kThird, kPanels>(w, x, panel_stride, num_words, first, sums, sums_stride);
  }
}

// sums [rows][lanes] to num_m rows of y.
INDEXCACHE_INLINE void store_transposed(const MatmulRowsArgs& args, const float* sums,
                                        int64_t sums_stride, int64_t m) {
  const int64_t num_rows = args.row_end - args.row_begin;
  const int64_t num_m = args.m - m < kLanes ? args.m - m : kLanes;
  for (int64_t row = 0; row < num_rows; row += kLanes) {
    const int64_t count = num_rows - row < kLanes ? num_rows - row : kLanes;
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kLanes; ++r)
      v[r] = vec_load(sums + (r < count ? row + r : row) * sums_stride);
    transpose(v);
    float* y = args.y + m * args.ldy + args.row_begin + row;
    for (int64_t i = 0; i < num_m; ++i, y += args.ldy) {
      if (count == kLanes) {
        vec_store(y, args.accumulate ? vec_add(vec_load(y), v[i]) : v[i]);
      } else {
        store_first(y, args.accumulate ? vec_add(load_first(y, count), v[i]) : v[i], count);
      }
    }
  }
}

// Rows of sums must not share L1 sets either.
INDEXCACHE_INLINE int64_t sums_stride_of(int64_t m) { return round_up(m, kLanes) + 16; }

int64_t panel_scratch_bytes(int64_t num_rows, int64_t m) {
  const int64_t rows = round_up(num_rows, kTileRows);
  return rows * (kTileStride + sums_stride_of(m)) * static_cast<int64_t>(sizeof(float));
}

void panel_rows(const MatmulRowsArgs& args) {
  const int64_t num_rows = args.row_end - args.row_begin;
  const int64_t num_words = words_of(args.k, args.bf16);
  const int64_t panel_stride = num_words * kLanes;
  const int64_t sums_stride = sums_stride_of(args.m);
  const int64_t num_panels = (args.m + kLanes - 1) / kLanes;
  const int64_t scale_stride = (args.k + kScaleBlock - 1) / kScaleBlock;
  auto* const block = reinterpret_cast<float*>(args.scratch);
  float* const sums = block + round_up(num_rows, kTileRows) * kTileStride;

  with_words(args.type, args.bf16, [&]<WeightType kType, Words kWords>() {
    constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
    constexpr int64_t kWordElements = kWords == Words::kBF16Pair ? 2 : 1;
    for (int64_t word = 0; word < num_words; word += kBlockWords) {
      const int64_t count = num_words - word < kBlockWords ? num_words - word : kBlockWords;
      const int64_t element = word * kWordElements;
      const int64_t num_elements =
          args.k - element < count * kWordElements ? args.k - element : count * kWordElements;
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t row = args.row_begin + r;
        const float* scale = nullptr;
        if constexpr (kType == WeightType::kF8E4M3) {
          scale = args.scale_inv + row / kScaleBlock * scale_stride + element / kScaleBlock;
        }
        row_to_words<kType, kWords>(args.w + (row * args.k + element) * kBytes, num_elements, scale,
                                    block + r * kTileStride);
      }
      const bool last = word + count == num_words;
      for (int64_t panel = 0; panel < num_panels; panel += kTilePanels) {
        const float* x = args.x + panel * panel_stride + word * kLanes;
        for (int64_t r = 0; r < num_rows; r += kTileRows) {
          float* tile_sums = sums + r * sums_stride + panel * kLanes;
          if (panel + kTilePanels <= num_panels) {
            tile_of_rows<kWords, kTilePanels>(num_rows - r, block + r * kTileStride, x,
                                              panel_stride, count, word == 0, tile_sums,
                                              sums_stride);
          } else {
            tile_of_rows<kWords, 1>(num_rows - r, block + r * kTileStride, x, panel_stride, count,
                                    word == 0, tile_sums, sums_stride);
          }
        }
        for (int64_t p = panel; last && p < num_panels && p < panel + kTilePanels; ++p) {
          store_transposed(args, sums + p * kLanes, sums_stride, p * kLanes);
        }
      }
    }
  });
}

// Some rows of w, and where their products with packed rows of x go.
struct SmallTile {
  const uint8_t* w;
  int64_t row_bytes;
  int64_t k;
  const float* scale_inv;  // fp8: of the rows' first block
  const float* x;
  int64_t x_stride;
  float* y;  // column of the first row
  int64_t ldy;
  bool accumulate;
};

// kRows rows of w by rows [m, m + kM) of x.
template <WeightType kType, Words kWords, int kRows, int kM>
INDEXCACHE_INLINE void multiply_small(const SmallTile& tile, int64_t m) {
  constexpr int64_t kStep = kElements<kWords>;
  constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
  const float* x = tile.x + m * tile.x_stride;
  Vec sum[kRows][kM];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kM; ++j) sum[r][j] = vec_zero();
  }
  const auto add_words = [&](const Vec(&words)[kRows]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kM; ++j) {
      const Vec v = vec_load(x + j * tile.x_stride);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][j] = multiply_add<kWords>(words[r], v, sum[r][j]);
    }
  };
  const auto scale_at = [&](int64_t i) __attribute__((always_inline)) {
    return kType == WeightType::kF8E4M3 ? vec_set(tile.scale_inv[i / kScaleBlock]) : vec_zero();
  };
  int64_t i = 0;
  for (; i + kStep <= tile.k; i += kStep, x += kLanes) {
    const Vec scale = scale_at(i);
    Vec words[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = tile.w + r * tile.row_bytes + i * kBytes;
      words[r] = load_words<kType, kWords>(p, scale);
      // The next tile's row: hardware prefetching starts anew with each short row.
      __builtin_prefetch(p + kRows * tile.row_bytes, 0, 2);
    }
    add_words(words);
  }
  if (i < tile.k) {
    const Vec scale = scale_at(i);
    Vec words[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      words[r] = load_last_words<kType, kWords>(tile.w + r * tile.row_bytes + i * kBytes,
                                                tile.k - i, scale);
    }
    add_words(words);
  }
  const auto store = [&](const auto& sum_of) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < kM; ++j) {
      float* y = tile.y + (m + j) * tile.ldy;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) y[r] = sum_of(r, j) + (tile.accumulate ? y[r] : 0.0f);
    }
  };
  if constexpr (kRows * kM > kSmallRows) {
    // With k of a few hundred, adding up the lanes one by one takes as long as the products.
    Vec all[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane)
      all[lane] = lane < kRows * kM ? sum[lane % kRows][lane / kRows] : vec_zero();
    alignas(64) float sums[kLanes];
    vec_store(sums, vec_sums(all));
    store([&](int r, int j) __attribute__((always_inline)) { return sums[j * kRows + r]; });
  } else {  // through memory one row of x was 8% slower in decoding
    store([&](int r, int j) __attribute__((always_inline)) { return vec_sum(sum[r][j]); });
  }
}

template <WeightType kType, Words kWords, int kRows>
INDEXCACHE_INLINE void multiply_small_all(const SmallTile& tile, int64_t num_m) {
  int64_t m = 0;
  for (; m + kSmallM <= num_m; m += kSmallM) multiply_small<kType, kWords, kRows, 4>(tile, m);
  switch (num_m - m) {
    case 1:
      return multiply_small<kType, kWords, kRows, 1>(tile, m);
    case 2:
      return multiply_small<kType, kWords, kRows, 2>(tile, m);
    case 3:
      return multiply_small<kType, kWords, kRows, 3>(tile, m);
  }
}

template <WeightType kType, Words kWords, int kRows>
INDEXCACHE_INLINE void small_rows_at(const MatmulRowsArgs& args, int64_t row) {
  constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
  // The type whose bytes are words already.
  constexpr WeightType kWordType =
      kWords == Words::kBF16Pair ? WeightType::kBF16 : WeightType::kF32;
  const int64_t x_stride = round_up(words_of(args.k, args.bf16), kLanes);
  SmallTile tile = {args.w + row * args.k * kBytes,
                    args.k * kBytes,
                    args.k,
                    nullptr,
                    args.x,
                    x_stride,
                    args.y + row,
                    args.ldy,
                    args.accumulate};
  // All rows of a tile lie in one row of blocks: tiles start at multiples of kSmallRows, which
  // divides 128.
  if constexpr (kType == WeightType::kF8E4M3) {
    tile.scale_inv =
        args.scale_inv + row / kScaleBlock * ((args.k + kScaleBlock - 1) / kScaleBlock);
  }
  if constexpr (kType != kWordType) {
    if (args.m > kSmallM) {  // several passes: convert once
      auto* const words = reinterpret_cast<float*>(args.scratch);
      for (int r = 0; r < kRows; ++r) {
        row_to_words<kType, kWords>(tile.w + r * tile.row_bytes, args.k, tile.scale_inv,
                                    words + r * x_stride);
      }
      tile.w = args.scratch;
      tile.row_bytes = x_stride * static_cast<int64_t>(sizeof(float));
      tile.k = x_stride * (kWords == Words::kBF16Pair ? 2 : 1);
      constexpr Words kReady = kWords == Words::kBF16Pair ? kWords : Words::kF32;
      return multiply_small_all<kWordType, kReady, kRows>(tile, args.m);
    }
  }
  multiply_small_all<kType, kWords, kRows>(tile, args.m);
}

int64_t small_scratch_bytes(int64_t k) {
  return kSmallRows * round_up(k, kLanes) * static_cast<int64_t>(sizeof(float));
}

void small_rows(const MatmulRowsArgs& args) {
  with_words(args.type, args.bf16, [&]<WeightType kType, Words kWords>() {
    int64_t row = args.row_begin;
    for (; row + kSmallRows <= args.row_end; row += kSmallRows)
      small_rows_at<kType, kWords, kSmallRows>(args, row);
    for (; row < args.row_end; ++row) small_rows_at<kType, kWords, 1>(args, row);
  });
}

constexpr int kOrderedM = kLanes == 16 ? 8 : 4;

// Rows of w in words, and where their products with packed rows of x go.
struct OrderedTile {
  const uint8_t* w;
  int64_t row_bytes;
  int64_t num_rows;  // at most kLanes
  int64_t k;         // elements of `type`
  int64_t num_words;
  const float* x;
  int64_t x_stride;
  float* y;  // column of the first row
  int64_t ldy;
  bool accumulate;
};

// The rows of w by rows [m, m + kM) of x. The lanes are the rows of w, transposed in registers.
template <WeightType kType, Words kWords, int kM>
void multiply_ordered(const OrderedTile& tile, int64_t m) {
  constexpr int64_t kStep = kElements<kWords>;
  constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
  const float* x = tile.x + m * tile.x_stride;
  Vec sum[kM];
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) sum[j] = vec_zero();
  for (int64_t i = 0, word = 0; i < tile.k; i += kStep, word += kLanes, x += kLanes) {
    Vec words[kLanes];
    if (tile.num_rows == kLanes && i + kStep <= tile.k) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const uint8_t* p = tile.w + r * tile.row_bytes + i * kBytes;
        words[r] = load_words<kType, kWords>(p, vec_zero());
        __builtin_prefetch(p + kLanes * tile.row_bytes, 0, 2);  // the next tile's row
      }
    } else {
      const int64_t count = tile.k - i < kStep ? tile.k - i : kStep;
      for (int r = 0; r < kLanes; ++r) {
        const uint8_t* p = tile.w + r * tile.row_bytes + i * kBytes;
        words[r] =
            r < tile.num_rows ? load_last_words<kType, kWords>(p, count, vec_zero()) : vec_zero();
      }
    }
    transpose(words);
    const auto add_word = [&](int u) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int j = 0; j < kM; ++j)
        sum[j] = multiply_add<kWords>(words[u], vec_set(x[j * tile.x_stride + u]), sum[j]);
    };
    // No word more than panel_rows adds: +0 would turn a sum of -0.
    if (tile.num_words - word >= kLanes) {
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u) add_word(u);
    } else {
      for (int u = 0; u < tile.num_words - word; ++u) add_word(u);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kM; ++j) {
    float* y = tile.y + (m + j) * tile.ldy;
    const int64_t n = tile.num_rows;
    if (n == kLanes) {
      vec_store(y, tile.accumulate ? vec_add(vec_load(y), sum[j]) : sum[j]);
    } else {
      store_first(y, tile.accumulate ? vec_add(load_first(y, n), sum[j]) : sum[j], n);
    }
  }
}

template <WeightType kType, Words kWords>
INDEXCACHE_INLINE void multiply_ordered_all(const OrderedTile& tile, int64_t num_m) {
  int64_t m = 0;
  for (; m + kOrderedM <= num_m; m += kOrderedM)
    multiply_ordered<kType, kWords, kOrderedM>(tile, m);
  for (; m + 2 <= num_m; m += 2) multiply_ordered<kType, kWords, 2>(tile, m);
  if (m < num_m) multiply_ordered<kType, kWords, 1>(tile, m);
}

int64_t ordered_scratch_bytes(int64_t k) {
  return kLanes * round_up(k, kLanes) * static_cast<int64_t>(sizeof(float));
}

void ordered_rows(const MatmulRowsArgs& args) {
  with_words(args.type, args.bf16, [&]<WeightType kType, Words kWords>() {
    constexpr int64_t kBytes = kWeightBytes[static_cast<int>(kType)];
    constexpr WeightType kWordType =
        kWords == Words::kBF16Pair ? WeightType::kBF16 : WeightType::kF32;
    constexpr Words kReady = kWords == Words::kBF16Pair ? kWords : Words::kF32;
    const int64_t num_words = words_of(args.k, args.bf16);
    OrderedTile tile;
    tile.num_words = num_words;
    tile.x = args.x;
    tile.x_stride = round_up(num_words, kLanes);
    tile.ldy = args.ldy;
    tile.accumulate = args.accumulate;
    for (int64_t row = args.row_begin; row < args.row_end; row += kLanes) {
      const uint8_t* w = args.w + row * args.k * kBytes;
      tile.num_rows = args.row_end - row < kLanes ? args.row_end - row : kLanes;
      tile.y = args.y + row;
      if constexpr (kType == kWordType && kWords == kReady) {
        tile.w = w;
        tile.row_bytes = args.k * kBytes;
        tile.k = args.k;
      } else {
        auto* const words = reinterpret_cast<float*>(args.scratch);
        const float* scale = nullptr;
        if constexpr (kType == WeightType::kF8E4M3) {
          scale = args.scale_inv + row / kScaleBlock * ((args.k + kScaleBlock - 1) / kScaleBlock);
        }
        for (int64_t r = 0; r < tile.num_rows; ++r) {
          row_to_words<kType, kWords>(w + r * args.k * kBytes, args.k, scale,
                                      words + r * tile.x_stride);
        }
        tile.w = args.scratch;
        tile.row_bytes = tile.x_stride * static_cast<int64_t>(sizeof(float));
        tile.k = tile.x_stride * (kWords == Words::kBF16Pair ? 2 : 1);
      }
      multiply_ordered_all<kWordType, kReady>(tile, args.m);
    }
  });
}

}  // namespace

extern const MatmulKernels kMatmulKernels = {
    .lanes = kLanes,
    .has_dot = kHasDot,
    .tile_rows = kTileRows,
    .small_tile_rows = kSmallRows,
    .max_small_m = kLanes == 16 ? 64 : 12,
    .pack_panel = pack_panel,
    .pack_rows = pack_rows,
    .panel_rows = panel_rows,
    .panel_scratch_bytes = panel_scratch_bytes,
    .small_rows = small_rows,
    .small_scratch_bytes = small_scratch_bytes,
    .ordered_rows = ordered_rows,
    .ordered_scratch_bytes = ordered_scratch_bytes,
    .max_ordered_m = kOrderedM,
};

}  // namespace INDEXCACHE_ISA
}  // namespace indexcache
