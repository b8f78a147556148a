// moe_gate_up and moe_down with narrow products: a block takes 16 columns of one expert and up to 8
// (or 64, where experts have more) of its rows.
#include <algorithm>

#include "ops/kit/expert_tiles.cuh"
#include "ops/kit/narrow_mma.cuh"
#include "ops/kit/silu.cuh"
#include "ops/moe_mlp/moe_mlp_impl.h"

namespace indexcache {

namespace {

struct Products {
  NarrowInput x;
  const int32_t* row_begin;
  int32_t num_experts;
  int64_t n, k;
  const Weight* matrices[2];  // of every expert
  uint16_t* y;
};

template <int kTiles, int kMatrices>
__global__ void __launch_bounds__(kNarrowThreads) moe_narrow_kernel(Products p) {
  wait_for_previous();
  const ExpertTile tile =
      find_expert_tile(p.row_begin, p.num_experts, kTiles * kNarrowTileRows, blockIdx.y);
  if (tile.expert < 0) return;
  const uint8_t* w[kMatrices];
  for (int i = 0; i < kMatrices; ++i) w[i] = p.matrices[i][tile.expert].data;
  narrow_products<kTiles>(
      p.x, tile.row, tile.end, w, static_cast<int64_t>(blockIdx.x) * kNarrowCols, p.n, p.k,
      [&](int64_t row, int64_t col, const float(&sums)[kMatrices]) {
        const float value = kMatrices == 2 ? silu(sums[0]) * sums[kMatrices - 1] : sums[0];
        p.y[row * p.n + col] = static_cast<uint16_t>(f32_to_bf16_bits(value));
      });
}

template <int kMatrices>
void run(CudaStream& stream, const Products& p, int64_t num_rows) {
  const auto grid = [&](int64_t tile_rows) {
    const int64_t tiles =
        std::min(num_rows, num_rows / tile_rows + static_cast<int64_t>(p.num_experts));
    return dim3(blocks_for(p.n, kNarrowCols).x, static_cast<unsigned>(tiles));
  };
  if (num_rows <= 8 * static_cast<int64_t>(p.num_experts)) {
    launch(moe_narrow_kernel<1, kMatrices>, grid(kNarrowTileRows), kNarrowThreads, 0, stream, p);
  } else {
    launch(moe_narrow_kernel<8, kMatrices>, grid(8 * kNarrowTileRows), kNarrowThreads, 0, stream,
           p);
  }
}

}  // namespace

void moe_gate_up_cuda(Exec& exec, const MoeGateUpArgs& args) {
  const Weight& w = args.gate.weights[0];
  run<2>(exec.cuda(),
         {{.bf16 = args.x, .ld = w.cols, .ids = args.tokens},
          args.rows.row_begin,
          static_cast<int32_t>(args.gate.weights.size()),
          w.rows,
          w.cols,
          {args.gate.device_weights, args.up.device_weights},
          args.y},
         args.rows.num_rows);
}

void moe_down_cuda(Exec& exec, const MoeDownArgs& args) {
  const Weight& w = args.down.weights[0];
  run<1>(exec.cuda(),
         {{.bf16 = args.x, .ld = w.cols},
          args.rows.row_begin,
          static_cast<int32_t>(args.down.weights.size()),
          w.rows,
          w.cols,
          {args.down.device_weights, nullptr},
          args.y},
         args.rows.num_rows);
}

}  // namespace indexcache
