// Products of the experts on Hopper: one persistent block an SM walks over tiles of 128 rows of an
// expert by two panels of 128 columns: the same columns of gate and up, or 256 columns of down. One
// thread keeps a ring of stages filled by the copy engine, two warpgroups multiply, 64 rows each.
//
// Tiles go expert after expert, rows fastest, so that blocks that run together share panels of
// weights, and an expert's rows stay in L2 for all its columns. Beyond an expert's rows a tile
// multiplies what comes next in x and drops it; a warpgroup without rows multiplies nothing.
#include <algorithm>

#include "device/previous_kernel.cuh"
#include "ops/kit/expert_tiles.cuh"
#include "ops/kit/silu.cuh"
#include "ops/kit/sm90_tma.cuh"
#include "ops/kit/sm90_wgmma.cuh"
#include "ops/moe_mlp/moe_mlp_sm90.cuh"

namespace indexcache::sm90 {

namespace {

constexpr int kTileRows = 128, kPanelCols = 128;
constexpr int kDepthBytes = 128;  // of k in a stage: 64 bf16
constexpr int kStages = 4;
constexpr int kGroupThreads = 128, kGroups = 2;  // warpgroups that multiply
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kGroupRows = kTileRows / kGroups;

struct Stage {
  uint8_t x[kTileRows * kDepthBytes];
  uint8_t w[2][kPanelCols * kDepthBytes];
};

struct Shared {
  Stage stages[kStages];
  uint64_t full[kStages], empty[kStages];
  int32_t tiles_before[kMaxMoeExperts + 1];  // tiles of rows, of the experts before
};

struct Params {
  const int32_t* row_begin;
  int num_experts;
  int col_tiles, depth_steps;
  int64_t n;
  uint16_t* y;
};

struct Tile {
  int expert, row, end, col_tile;
};

// The tiles of a block, in order.
struct TileWalk {
  const Params& params;
  const Shared& shared;
  int next, expert = 0;

  __device__ __forceinline__ TileWalk(const Params& params_in, const Shared& shared_in)
      : params(params_in), shared(shared_in), next(static_cast<int>(blockIdx.x)) {}

  __device__ __forceinline__ bool take(Tile& tile) {
    while (expert < params.num_experts &&
           next >= shared.tiles_before[expert + 1] * params.col_tiles)
      ++expert;
    if (expert == params.num_experts) return false;
    const int row_tiles = shared.tiles_before[expert + 1] - shared.tiles_before[expert];
    const int within = next - shared.tiles_before[expert] * params.col_tiles;
    tile.expert = expert;
    tile.row = params.row_begin[expert] + within % row_tiles * kTileRows;
    tile.end = params.row_begin[expert + 1];
    tile.col_tile = within / row_tiles;
    next += static_cast<int>(gridDim.x);
    return true;
  }
};

// Adds a stage to the sums.
__device__ __forceinline__ void multiply(const Stage& stage, int group, float (&left)[64],
                                         float (&right)[64], bool first) {
  const uint64_t x = panel_k_major(stage.x + group * kGroupRows * kDepthBytes),
                 w0 = panel_k_major(stage.w[0]), w1 = panel_k_major(stage.w[1]);
  mma_begin();
#pragma unroll
  for (uint32_t step = 0; step < 4; ++step) {
    const int add = first && step == 0 ? 0 : 1;
    mma_bf16<0, 0>(left, x + step * kNextUnits, w0 + step * kNextUnits, add);
    mma_bf16<0, 0>(right, x + step * kNextUnits, w1 + step * kNextUnits, add);
  }
  mma_commit();
}

// Writes 64 rows of a panel of 128 columns. A lane has two columns of each 8; two lanes exchange,
// so that each has four, and the four lanes of a row write 32 bytes together.
template <class Value>
__device__ __forceinline__ void store_panel(uint16_t* y, int64_t n, int64_t first_row, int64_t end,
                                            int64_t first_col, const Value& value) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads, c = thread % 4;
  const bool odd = c % 2 == 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
#pragma unroll
    for (int j = 0; j < kPanelCols / 8; j += 2) {
      const uint32_t low = bf16_pair(value(4 * j + 2 * half), value(4 * j + 2 * half + 1)),
                     high = bf16_pair(value(4 * j + 4 + 2 * half), value(4 * j + 5 + 2 * half));
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
      const int64_t col = first_col + 8 * j + (odd ? 6 + 2 * c : 2 * c);
      if (row < end && col < n)
        *reinterpret_cast<uint2*>(y + row * n + col) =
            odd ? make_uint2(other, high) : make_uint2(low, other);
    }
  }
}

template <bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    moe_products_kernel(const __grid_constant__ Params params,
                        const __grid_constant__ CUtensorMap x_map,
                        const __grid_constant__ CUtensorMap w_map,
                        const __grid_constant__ CUtensorMap up_map) {
  wait_for_previous();
  extern __shared__ __align__(1024) unsigned char moe_shared[];
  Shared& shared =
      *reinterpret_cast<Shared*>(moe_shared + (1024 - shared_address(moe_shared) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kGroups * kGroupThreads / kWarpLanes);
    }
    fence_barrier_init();
    shared.tiles_before[0] = 0;
  }
  uint32_t before = 0;
  for (int first = 0; first < params.num_experts; first += kThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    const int rows = e < params.num_experts ? params.row_begin[e + 1] - params.row_begin[e] : 0;
    const uint32_t tiles = static_cast<uint32_t>(ceil_div_cuda(rows, kTileRows));
    const BlockScan scan = block_scan(tiles);
    if (e < params.num_experts)
      shared.tiles_before[e + 1] = static_cast<int32_t>(before + scan.before + tiles);
    before += scan.total;
  }
  __syncthreads();

  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  RingPosition<kStages> at;
  TileWalk walk(params, shared);
  Tile tile;
  if (group == kGroups) {
    give_registers<40>();
    if (threadIdx.x % kGroupThreads != 0) return;
    while (walk.take(tile)) {
      const int col0 = tile.col_tile * kPanelCols * (kGated ? 1 : 2),
                col1 = kGated ? col0 : col0 + kPanelCols;
      for (int step = 0; step < params.depth_steps; ++step) {
        Stage& stage = shared.stages[at.stage];
        uint64_t* full = &shared.full[at.stage];
        barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
        barrier_arrive_expect(full, sizeof(Stage));
        copy_box_at(stage.x, &x_map, step * kDepthBytes, tile.row, 0, full);
        copy_box_at(stage.w[0], &w_map, step * kDepthBytes, col0, tile.expert, full);
        copy_box_at(stage.w[1], kGated ? &up_map : &w_map, step * kDepthBytes, col1, tile.expert,
                    full);
        at.advance();
      }
    }
    return;
  }

  take_registers<232>();
  const auto release = [&](uint32_t stage) {
    if (threadIdx.x % kWarpLanes == 0) barrier_arrive(&shared.empty[stage]);
  };
  while (walk.take(tile)) {
    const int first_row = tile.row + group * kGroupRows;
    if (first_row >= tile.end) {
      for (int step = 0; step < params.depth_steps; ++step) {
        barrier_wait(&shared.full[at.stage], at.parity);
        release(at.stage);
        at.advance();
      }
      continue;
    }
    float left[64], right[64];
    uint32_t before_stage = 0;
    for (int step = 0; step < params.depth_steps; ++step) {
      barrier_wait(&shared.full[at.stage], at.parity);
      multiply(shared.stages[at.stage], group, left, right, step == 0);
      if (step > 0) {
        mma_wait<1>();
        release(before_stage);
      }
      before_stage = at.stage;
      at.advance();
    }
    mma_wait<0>();
    mma_landed(left);
    mma_landed(right);
    release(before_stage);
    if constexpr (kGated) {
      store_panel(params.y, params.n, first_row, tile.end, tile.col_tile * kPanelCols,
                  [&](int i) { return silu(left[i]) * right[i]; });
    } else {
      const int col = tile.col_tile * 2 * kPanelCols;
      store_panel(params.y, params.n, first_row, tile.end, col, [&](int i) { return left[i]; });
      store_panel(params.y, params.n, first_row, tile.end, col + kPanelCols,
                  [&](int i) { return right[i]; });
    }
  }
}

constexpr unsigned kGatherThreads = 128;

__global__ void __launch_bounds__(kGatherThreads)
    gather_bf16_rows_kernel(const uint16_t* x, const int32_t* ids, int64_t k, uint16_t* y) {
  wait_for_previous();
  const uint4* from = reinterpret_cast<const uint4*>(x + ids[blockIdx.x] * k);
  uint4* to = reinterpret_cast<uint4*>(y + blockIdx.x * k);
  for (int64_t i = threadIdx.x; i < k / 8; i += kGatherThreads) to[i] = from[i];
}

}  // namespace

cudaError_t moe_products_sm90(const MoeProductsSm90& args, int num_multiprocessors,
                              cudaStream_t stream) {
  const bool gated = args.up.first != nullptr;
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_experts < 1 || args.num_experts > kMaxMoeExperts || args.k % 8 != 0 ||
      args.n % 8 != 0)
    return cudaErrorInvalidValue;
  const int64_t row_bytes = 2 * args.k;
  CUtensorMap x_map, w_map, up_map;
  const auto map_experts = [&](CUtensorMap* map, const MoeMatricesSm90& matrices) {
    return map_matrices(map, matrices.first, row_bytes, row_bytes, args.n, args.num_experts,
                        matrices.stride_bytes, kPanelCols);
  };
  cudaError_t status =
      map_matrices(&x_map, args.x, row_bytes, row_bytes, args.num_rows, 1, 16, kTileRows);
  if (status == cudaSuccess) status = map_experts(&w_map, args.w);
  if (status == cudaSuccess) status = map_experts(&up_map, gated ? args.up : args.w);
  if (status != cudaSuccess) return status;

  const int64_t tile_cols = gated ? kPanelCols : 2 * kPanelCols;
  Params params;
  params.row_begin = args.row_begin;
  params.num_experts = args.num_experts;
  params.col_tiles = static_cast<int>(ceil_div_cuda(args.n, tile_cols));
  params.depth_steps = static_cast<int>(ceil_div_cuda<int64_t>(row_bytes, kDepthBytes));
  params.n = args.n;
  params.y = args.y;
  const auto kernel = gated ? moe_products_kernel<true> : moe_products_kernel<false>;
  const int shared_bytes = static_cast<int>(sizeof(Shared)) + 1024;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  const int64_t most_tiles =
      std::min(args.num_rows, args.num_rows / kTileRows + args.num_experts) * params.col_tiles;
  const int grid = static_cast<int>(std::min<int64_t>(most_tiles, num_multiprocessors));
  return start_kernel(kernel, dim3(static_cast<unsigned>(grid)), dim3(kThreads),
                      static_cast<size_t>(shared_bytes), stream, true, params, x_map, w_map,
                      up_map);
}

cudaError_t gather_bf16_rows(const uint16_t* x, const int32_t* ids, int64_t num_rows, int64_t k,
                             uint16_t* y, cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  return start_kernel(gather_bf16_rows_kernel, dim3(static_cast<unsigned>(num_rows)),
                      dim3(kGatherThreads), 0, stream, true, x, ids, k, y);
}

}  // namespace indexcache::sm90
