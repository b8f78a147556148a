// Splits a call of matmul into items for the threads and runs the vector kernels on them.
//
// A group with few rows of x is bound by reading w: each item streams some rows of w once, against
// all rows of x. A group with many is bound by arithmetic: x is packed once into panels, and an
// item multiplies a block of rows of w by the panels of a block of tokens. Items depend on shapes
// only, never on the number of threads. The two add in different orders; with `batch_invariant` a
// few rows go through a third kernel, which adds like the panels.
#include <algorithm>
#include <vector>

#include "base/checked.h"
#include "ops/matmul/matmul_impl.h"
#include "ops/matmul/matmul_kernels.h"

namespace indexcache {

namespace {

constexpr int64_t kSmallItemBytes = 128 << 10;  // of w
constexpr int64_t kReadBoundM = 4;              // with more rows of x, time grows with them
constexpr int64_t kPanelItemFlops = 16 << 20;   // about 70 us of one core
constexpr int64_t kItemTokens = 256;
constexpr int64_t kMaxItemTiles = 4;
// Below this, packing costs less than waking the threads.
constexpr int64_t kSerialPackElements = 16384;

// One x that is packed, for one or several groups in a row.
struct PackedX {
  const MatmulGroup* group = nullptr;
  bool small = false;      // rows, not panels
  int64_t num_blocks = 0;  // that can be packed at the same time: panels, or rows of x
  int64_t block_words = 0;
  int64_t offset = 0;       // of the first block, in words
  int64_t first_block = 0;  // counted over all
};

struct Item {
  const MatmulGroup* group = nullptr;
  size_t packed = 0;
  int64_t row_begin = 0, row_end = 0;  // of w
  int64_t m_begin = 0, m_end = 0;
};

struct Plan {
  std::vector<PackedX> packed;
  std::vector<Item> items;
  int64_t num_blocks = 0;
  int64_t num_words = 0;
  int64_t num_elements = 0;
  int64_t scratch_bytes = 0;
};

WeightType weight_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return WeightType::kF32;
    case DType::kF16:
      return WeightType::kF16;
    case DType::kBF16:
      return WeightType::kBF16;
    default:
      return WeightType::kF8E4M3;
  }
}

void plan_packing(const MatmulKernels& kernels, const MatmulGroup& group, const MatmulArgs& args,
                  Plan& plan) {
  if (!plan.packed.empty()) {
    const MatmulGroup& last = *plan.packed.back().group;
    if (last.x == group.x && last.ldx == group.ldx && last.m == group.m &&
        last.w.cols == group.w.cols)
      return;
  }
  const bool pairs = args.compute == Compute::kBF16 && kernels.has_dot;
  const int64_t k_words = pairs ? ceil_div(group.w.cols, 2) : group.w.cols;
  const int64_t max_small_m = args.batch_invariant ? kernels.max_ordered_m : kernels.max_small_m;
  PackedX packed;
  packed.group = &group;
  packed.small = group.m <= max_small_m || group.w.cols == 0;
  packed.num_blocks = packed.small ? group.m : ceil_div(group.m, kernels.lanes);
  packed.block_words = packed.small ? round_up(k_words, kernels.lanes) : k_words * kernels.lanes;
  packed.offset = plan.num_words;
  packed.first_block = plan.num_blocks;
  plan.packed.push_back(packed);
  plan.num_blocks += packed.num_blocks;
  plan.num_words += packed.num_blocks * packed.block_words;
  plan.num_elements += group.m * group.w.cols;
}

void plan_items(const MatmulKernels& kernels, const MatmulGroup& group, const MatmulArgs& args,
                Plan& plan) {
  const bool small = plan.packed.back().small;
  int64_t item_rows;
  int64_t item_tokens = group.m;
  if (small) {
    const int64_t row_bytes = std::max<int64_t>(1, group.w.cols * dtype_bytes(group.w.dtype));
    const int64_t row_cost = row_bytes * std::max<int64_t>(1, group.m / kReadBoundM);
    item_rows = round_up(std::max<int64_t>(1, kSmallItemBytes / row_cost),
                         args.batch_invariant ? kernels.lanes : kernels.small_tile_rows);
    const auto scratch_bytes =
        args.batch_invariant ? kernels.ordered_scratch_bytes : kernels.small_scratch_bytes;
    plan.scratch_bytes = std::max(plan.scratch_bytes, scratch_bytes(group.w.cols));
  } else {
    item_tokens = std::min(group.m, kItemTokens);
    const int64_t tile_flops = 2 * kernels.tile_rows * item_tokens * group.w.cols;
    item_rows =
        kernels.tile_rows * std::clamp<int64_t>(kPanelItemFlops / tile_flops, 1, kMaxItemTiles);
    plan.scratch_bytes =
        std::max(plan.scratch_bytes, kernels.panel_scratch_bytes(item_rows, item_tokens));
  }
  for (int64_t row = 0; row < group.w.rows; row += item_rows) {
    for (int64_t m = 0; m < group.m; m += item_tokens) {
      plan.items.push_back({&group, plan.packed.size() - 1, row,
                            std::min(row + item_rows, group.w.rows), m,
                            std::min(m + item_tokens, group.m)});
    }
  }
}

void pack_block(const MatmulKernels& kernels, const PackedX& packed, int64_t block, bool bf16,
                float* words) {
  const MatmulGroup& group = *packed.group;
  const int64_t rows = packed.small ? 1 : kernels.lanes;
  MatmulPackArgs args;
  args.x = group.x + block * rows * group.ldx;
  args.ldx = group.ldx;
  args.num_rows = std::min(rows, group.m - block * rows);
  args.k = group.w.cols;
  args.bf16 = bf16;
  args.out = words + packed.offset + block * packed.block_words;
  (packed.small ? kernels.pack_rows : kernels.pack_panel)(args);
}

void pack(const MatmulKernels& kernels, Exec& exec, const Plan& plan, bool bf16, float* words) {
  if (plan.num_elements <= kSerialPackElements) {
    for (const PackedX& packed : plan.packed) {
      for (int64_t block = 0; block < packed.num_blocks; ++block)
        pack_block(kernels, packed, block, bf16, words);
    }
    return;
  }
  exec.pool.parallel_for(plan.num_blocks, [&](int64_t index, int) {
    const auto packed = std::prev(std::upper_bound(
        plan.packed.begin(), plan.packed.end(), index,
        [](int64_t value, const PackedX& candidate) { return value < candidate.first_block; }));
    pack_block(kernels, *packed, index - packed->first_block, bf16, words);
  });
}

void run_item(const MatmulKernels& kernels, const PackedX& packed, const Item& item,
              const MatmulArgs& args, const float* words, uint8_t* scratch) {
  const MatmulGroup& group = *item.group;
  MatmulRowsArgs rows;
  rows.type = weight_type(group.w.dtype);
  rows.w = group.w.data;
  rows.scale_inv = group.w.scale_inv;
  rows.row_begin = item.row_begin;
  rows.row_end = item.row_end;
  rows.k = group.w.cols;
  rows.bf16 = args.compute == Compute::kBF16;
  rows.x = words + packed.offset + item.m_begin / kernels.lanes * packed.block_words;
  rows.m = item.m_end - item.m_begin;
  rows.y = group.y + item.m_begin * group.ldy;
  rows.ldy = group.ldy;
  rows.accumulate = args.accumulate;
  rows.scratch = scratch;
  const auto small_rows = args.batch_invariant ? kernels.ordered_rows : kernels.small_rows;
  (packed.small ? small_rows : kernels.panel_rows)(rows);
}

}  // namespace

void matmul_vector(const MatmulKernels& kernels, Exec& exec, const MatmulArgs& args) {
  const bool bf16 = args.compute == Compute::kBF16;
  Plan plan;
  for (const MatmulGroup& group : args.groups) {
    if (group.m == 0 || group.w.rows == 0) continue;
    plan_packing(kernels, group, args, plan);
    plan_items(kernels, group, args, plan);
  }
  auto* const words = reinterpret_cast<float*>(
      exec.shared_scratch(static_cast<size_t>(plan.num_words) * sizeof(float)));
  pack(kernels, exec, plan, bf16, words);
  exec.pool.parallel_for(static_cast<int64_t>(plan.items.size()), [&](int64_t index, int thread) {
    const Item& item = plan.items[static_cast<size_t>(index)];
    uint8_t* scratch = exec.scratch(thread, static_cast<size_t>(plan.scratch_bytes));
    run_item(kernels, plan.packed[item.packed], item, args, words, scratch);
  });
}

}  // namespace indexcache
