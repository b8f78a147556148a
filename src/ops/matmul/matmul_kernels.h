// What matmul.cc asks of the vector kernels, which are compiled once per instruction set. Plain data only (ops/kit/isa.h
// says why).
//
// Both operands are brought to 32-bit words along k: one float32, or, where the dot instruction serves Compute::kBF16, a
// pair of bf16. A word of x and a word of w are multiplied and added to a float32 sum in one instruction.
#pragma once

#include <stdint.h>

#include "ops/kit/isa.h"

namespace indexcache {

enum class WeightType : int32_t { kF32, kF16, kBF16, kF8E4M3 };

struct MatmulPackArgs {
  const float* x = nullptr;  // [num_rows, k], row stride ldx
  int64_t ldx = 0;
  int64_t num_rows = 0;
  int64_t k = 0;
  bool bf16 = false;     // round to bf16
  float* out = nullptr;  // words, see `pack_panel` and `pack_rows`
};

// Rows [row_begin, row_end) of w against all m rows of x.
struct MatmulRowsArgs {
  WeightType type = WeightType::kF32;
  const uint8_t* w = nullptr;        // row 0 of [n, k]
  const float* scale_inv = nullptr;  // fp8: block row 0
  int64_t row_begin = 0, row_end = 0;
  int64_t k = 0;
  bool bf16 = false;
  const float* x = nullptr;  // packed
  int64_t m = 0;
  float* y = nullptr;  // [m, n], row stride ldy
  int64_t ldy = 0;
  bool accumulate = false;
  uint8_t* scratch = nullptr;  // panels: `panel_scratch_bytes`
};

struct MatmulKernels {
  int64_t lanes;      // rows of x in a panel
  int64_t tile_rows;  // rows of w that panel_rows takes together; item boundaries are best multiples
  int64_t small_tile_rows;  // the same of small_rows; divides the 128 rows of a block of scales, boundaries are multiples
  bool has_dot;       // with bf16 a word is a pair

  // At most `lanes` rows to one panel [words of k][lanes]; missing rows are zero.
  void (*pack_panel)(const MatmulPackArgs& args);
  // To [num_rows][words of k, a multiple of lanes], the end filled with zeros.
  void (*pack_rows)(const MatmulPackArgs& args);
  // Lanes are rows of x; x is ceil(m / lanes) panels. For m of some lanes and more.
  void (*panel_rows)(const MatmulRowsArgs& args);
  int64_t (*panel_scratch_bytes)(int64_t num_rows, int64_t m);
  // Lanes are along k; x is packed rows. For few rows of x: w is read once, where it lies.
  void (*small_rows)(const MatmulRowsArgs& args);
};

#define INDEXCACHE_DECLARE(isa, feature) \
  namespace isa {                        \
  extern const MatmulKernels kMatmulKernels; \
  }
INDEXCACHE_FOR_EACH_ISA(INDEXCACHE_DECLARE)
#undef INDEXCACHE_DECLARE

}  // namespace indexcache
