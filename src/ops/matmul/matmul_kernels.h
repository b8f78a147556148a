// What matmul.cc asks of the vector kernels, which are compiled once per instruction set. Plain
// data only (ops/kit/isa.h says why).
//
// Both operands are brought to 32-bit words along k: one float32, or, where the dot instruction
// serves Compute::kBF16, a pair of bf16. A word of x and a word of w are multiplied and added to a
// float32 sum in one instruction.
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
  uint8_t* scratch = nullptr;  // as many bytes as the kernel asks for
};

struct MatmulKernels {
  int64_t lanes;            // rows of x in a panel
  bool has_dot;             // with bf16 a word is a pair
  int64_t tile_rows;        // items of panel_rows are best multiples of this many rows of w
  int64_t small_tile_rows;  // items of small_rows must begin at multiples; divides the 128 rows of
                            // a block of scales
  int64_t max_small_m;      // up to here small_rows is the faster one

  // At most `lanes` rows to one panel [words of k][lanes]; missing rows are zero.
  void (*pack_panel)(const MatmulPackArgs& args);
  // To [num_rows][words of k, a multiple of lanes], the end filled with zeros.
  void (*pack_rows)(const MatmulPackArgs& args);
  // x is ceil(m / lanes) panels.
  void (*panel_rows)(const MatmulRowsArgs& args);
  int64_t (*panel_scratch_bytes)(int64_t num_rows, int64_t m);
  // x is packed rows. w is read once, where it lies.
  void (*small_rows)(const MatmulRowsArgs& args);
  int64_t (*small_scratch_bytes)(int64_t k);
  // The bits of panel_rows from packed rows: each sum is made word after word, whereas small_rows
  // makes one sum a lane. Items must begin at multiples of `lanes`.
  void (*ordered_rows)(const MatmulRowsArgs& args);
  int64_t (*ordered_scratch_bytes)(int64_t k);
  int64_t max_ordered_m;  // up to here ordered_rows is faster than panel_rows
};

#define INDEXCACHE_DECLARE(isa, feature)     \
  namespace isa {                            \
  extern const MatmulKernels kMatmulKernels; \
  }
INDEXCACHE_FOR_EACH_ISA(INDEXCACHE_DECLARE)
#undef INDEXCACHE_DECLARE

}  // namespace indexcache
