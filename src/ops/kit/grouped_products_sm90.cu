// One persistent block an SM walks over tiles of 128 rows of a group by two panels of 128 columns:
// the same columns of w and up, or 256 columns of w. One thread keeps a ring of stages filled by
// the copy engine, two warpgroups multiply, 64 rows each.
//
// Tiles go group after group, rows fastest, so that blocks that run together share panels of
// weights, and a group's rows stay in L2 for all its columns. Beyond a group's rows a tile
// multiplies what comes next in x and drops it; a warpgroup without rows multiplies nothing.
//
// With e4m3 a stage is one block of scales along k. Its products become a sum of their own, which
// is scaled and added to the f32 sums while the other warpgroup has the tensor cores.
#include <algorithm>

#include "device/previous_kernel.cuh"
#include "ops/kit/expert_tiles.cuh"
#include "ops/kit/grouped_products_sm90.cuh"
#include "ops/kit/silu.cuh"
#include "ops/kit/sm90_tma.cuh"
#include "ops/kit/sm90_wgmma.cuh"

namespace indexcache::sm90 {

namespace {

constexpr int kTileRows = 128, kPanelCols = 128;
constexpr int kDepthBytes = 128;  // of k in a stage: 64 bf16 or 128 e4m3
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
  int32_t tiles_before[kMaxGroups + 1];  // tiles of rows, of the groups before
};

struct Params {
  GroupedProducts args;
  int col_tiles, depth_steps;

  __device__ __forceinline__ int row_begin(int group) const {
    if (args.row_begin == nullptr) return group == 0 ? 0 : static_cast<int>(args.num_rows);
    return args.row_begin[group];
  }
};

struct Tile {
  int group, row, end, col_tile;
};

template <bool kGated>
__device__ __forceinline__ int first_col(const Tile& tile) {
  return tile.col_tile * kPanelCols * (kGated ? 1 : 2);
}

// The tiles of a block, in order.
struct TileWalk {
  const Params& params;
  const Shared& shared;
  int next, group = 0;

  __device__ __forceinline__ TileWalk(const Params& params_in, const Shared& shared_in)
      : params(params_in), shared(shared_in), next(static_cast<int>(blockIdx.x)) {}

  __device__ __forceinline__ bool take(Tile& tile) {
    const int num_groups = params.args.num_groups;
    while (group < num_groups && next >= shared.tiles_before[group + 1] * params.col_tiles) ++group;
    if (group == num_groups) return false;
    const int row_tiles = shared.tiles_before[group + 1] - shared.tiles_before[group];
    const int within = next - shared.tiles_before[group] * params.col_tiles;
    tile.group = group;
    tile.row = params.row_begin(group) + within % row_tiles * kTileRows;
    tile.end = params.row_begin(group + 1);
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

// The sums of one panel over a stage of e4m3, alone.
__device__ __forceinline__ void multiply_panel(const Stage& stage, int group, int panel,
                                               float (&sums)[64]) {
  const uint64_t x = panel_k_major(stage.x + group * kGroupRows * kDepthBytes),
                 w = panel_k_major(stage.w[panel]);
  mma_begin();
#pragma unroll
  for (uint32_t step = 0; step < 4; ++step)
    mma_e4m3(sums, x + step * kNextUnits, w + step * kNextUnits, step > 0 ? 1 : 0);
  mma_commit();
}

// The scales of a stage: of this thread's two rows, and of the two panels.
struct StageScales {
  float row[2], panel[2];
};

template <bool kGated>
struct ScaleReader {
  const float *rows[2], *panels[2];
  int64_t num_rows;

  __device__ __forceinline__ ScaleReader(const GroupedProducts& args, const Tile& tile, int row,
                                         int col0, int col1, int depth_steps)
      : num_rows(args.num_rows) {
    for (int half = 0; half < 2; ++half)
      rows[half] = args.x_scales + min(row + 8 * half, tile.end - 1);
    const GroupedMatrices& second = kGated ? args.up : args.w;
    const auto panel = [&](const GroupedMatrices& w, int col) {
      // A panel beyond the last column is multiplied with zeros.
      const int block = min(col, static_cast<int>(args.n) - 1) / kFp8Block;
      return w.scale_inv + tile.group * w.scale_stride + int64_t{block} * depth_steps;
    };
    panels[0] = panel(args.w, col0);
    panels[1] = panel(second, col1);
  }
  __device__ __forceinline__ StageScales read(int step) const {
    const int64_t at = step * num_rows;
    return {{rows[0][at], rows[1][at]}, {panels[0][step], panels[1][step]}};
  }
};

__device__ __forceinline__ void add_scaled(float (&sums)[64], const float (&part)[64],
                                           const StageScales& scales, int panel) {
  const float scale[2] = {scales.row[0] * scales.panel[panel], scales.row[1] * scales.panel[panel]};
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i] = fmaf(part[i], scale[i / 2 % 2], sums[i]);
}

// Writes 64 rows of a panel of 128 columns. A lane has two columns of each 8; two lanes exchange,
// so that each has four, and the four lanes of a row write 32 bytes together.
template <class Value>
__device__ __forceinline__ void store_panel(const GroupedProducts& args, int64_t first_row,
                                            int64_t end, int64_t first_col, const Value& value) {
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
      if (row < end && col < args.n)
        *reinterpret_cast<uint2*>(args.y16 + row * args.ldy + col) =
            odd ? make_uint2(other, high) : make_uint2(low, other);
    }
  }
}

__device__ __forceinline__ void store_f32_panel(const GroupedProducts& args, int64_t first_row,
                                                int64_t end, int64_t first_col,
                                                const float (&sums)[64]) {
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    if (row >= end) continue;
#pragma unroll
    for (int j = 0; j < kPanelCols / 8; ++j) {
      const int64_t col = first_col + 8 * j + 2 * (thread % 4);
      if (col >= args.n) continue;
      float2* y = reinterpret_cast<float2*>(args.y + row * args.ldy + col);
      float2 value = {sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]};
      if (args.accumulate) value = {y->x + value.x, y->y + value.y};
      *y = value;
    }
  }
}

template <bool kGated, bool kFp8, bool kF32Out>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_products_kernel(const __grid_constant__ Params params,
                            const __grid_constant__ CUtensorMap x_map,
                            const __grid_constant__ CUtensorMap w_map,
                            const __grid_constant__ CUtensorMap up_map) {
  wait_for_previous();
  extern __shared__ __align__(1024) unsigned char grouped_shared[];
  Shared& shared = *reinterpret_cast<Shared*>(
      grouped_shared + (1024 - shared_address(grouped_shared) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], kGroups * kGroupThreads / kWarpLanes);
    }
    fence_barrier_init();
    shared.tiles_before[0] = 0;
  }
  uint32_t before = 0;
  const int num_groups = params.args.num_groups;
  for (int first = 0; first < num_groups; first += kThreads) {
    const int g = first + static_cast<int>(threadIdx.x);
    const int rows = g < num_groups ? params.row_begin(g + 1) - params.row_begin(g) : 0;
    const uint32_t tiles = static_cast<uint32_t>(ceil_div_cuda(rows, kTileRows));
    const BlockScan scan = block_scan(tiles);
    if (g < num_groups)
      shared.tiles_before[g + 1] = static_cast<int32_t>(before + scan.before + tiles);
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
      const int col0 = first_col<kGated>(tile), col1 = kGated ? col0 : col0 + kPanelCols;
      for (int step = 0; step < params.depth_steps; ++step) {
        Stage& stage = shared.stages[at.stage];
        uint64_t* full = &shared.full[at.stage];
        barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
        barrier_arrive_expect(full, sizeof(Stage));
        copy_box_at(stage.x, &x_map, step * kDepthBytes, tile.row, 0, full);
        copy_box_at(stage.w[0], &w_map, step * kDepthBytes, col0, tile.group, full);
        copy_box_at(stage.w[1], kGated ? &up_map : &w_map, step * kDepthBytes, col1, tile.group,
                    full);
        at.advance();
      }
    }
    return;
  }

  take_registers<232>();
  const auto release = [&](uint32_t stage) { warp_arrive(&shared.empty[stage]); };
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
    const int col = first_col<kGated>(tile);
    float left[64], right[64];
    if constexpr (kFp8) {
      const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
      const ScaleReader<kGated> reader(params.args, tile,
                                       first_row + thread / 32 * 16 + thread % 32 / 4, col,
                                       kGated ? col : col + kPanelCols, params.depth_steps);
#pragma unroll
      for (int i = 0; i < 64; ++i) left[i] = right[i] = 0;
      StageScales next = reader.read(0);
      for (int step = 0; step < params.depth_steps; ++step) {
        const StageScales scales = next;
        if (step + 1 < params.depth_steps) next = reader.read(step + 1);
        const Stage& stage = shared.stages[at.stage];
        barrier_wait(&shared.full[at.stage], at.parity);
        float part[64];
        multiply_panel(stage, group, 0, part);
        mma_wait<0>();
        mma_landed(part);
        add_scaled(left, part, scales, 0);
        multiply_panel(stage, group, 1, part);
        mma_wait<0>();
        mma_landed(part);
        release(at.stage);
        add_scaled(right, part, scales, 1);
        at.advance();
      }
    } else {
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
    }
    if constexpr (kGated) {
      store_panel(params.args, first_row, tile.end, col,
                  [&](int i) { return silu(left[i]) * right[i]; });
    } else if constexpr (kF32Out) {
      store_f32_panel(params.args, first_row, tile.end, col, left);
      store_f32_panel(params.args, first_row, tile.end, col + kPanelCols, right);
    } else {
      store_panel(params.args, first_row, tile.end, col, [&](int i) { return left[i]; });
      store_panel(params.args, first_row, tile.end, col + kPanelCols,
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

// A warp for each block of 128 elements of a row, four elements a lane.
constexpr unsigned kQuantiseThreads = 128;

__global__ void __launch_bounds__(kQuantiseThreads) quantise_rows_kernel(const QuantiseRows args) {
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes,
            warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int64_t row = blockIdx.x, from = args.ids != nullptr ? args.ids[row] : row;
  for (int64_t block = warp; block * kFp8Block < args.k; block += kQuantiseThreads / kWarpLanes) {
    const int64_t col = block * kFp8Block + 4 * lane;
    float x[4] = {0, 0, 0, 0};
    if (col < args.k) {
      if (args.x16 != nullptr) {
        const uint2 bits = *reinterpret_cast<const uint2*>(args.x16 + from * args.ldx + col);
        x[0] = bf16_bits_to_f32(bits.x & 0xFFFFu), x[1] = bf16_bits_to_f32(bits.x >> 16);
        x[2] = bf16_bits_to_f32(bits.y & 0xFFFFu), x[3] = bf16_bits_to_f32(bits.y >> 16);
      } else {
        const float4 four = *reinterpret_cast<const float4*>(args.x + from * args.ldx + col);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
      }
    }
    float largest = 0;
    for (int i = 0; i < 4; ++i) largest = with_magnitude(largest, x[i]);
    const float scale = scale_for(warp_max(largest), 448.0f);
    uint32_t four = 0;
    for (int i = 0; i < 4; ++i)
      four |= static_cast<uint32_t>(quantised_fp8(x[i], scale)) << (8 * i);
    if (col < args.k) *reinterpret_cast<uint32_t*>(args.values + row * args.k + col) = four;
    if (lane == 0) args.scales[block * args.num_rows + row] = scale;
  }
}

}  // namespace

cudaError_t grouped_products(const GroupedProducts& args, int num_multiprocessors,
                             cudaStream_t stream) {
  const bool gated = args.up.first != nullptr, fp8 = args.w.scale_inv != nullptr;
  const int64_t row_bytes = (fp8 ? 1 : 2) * args.k;
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_groups < 1 || args.num_groups > kMaxGroups || row_bytes % 16 != 0 ||
      args.n % 8 != 0 || (args.y != nullptr && (gated || !fp8)))
    return cudaErrorInvalidValue;
  CUtensorMap x_map, w_map, up_map;
  const auto map_groups = [&](CUtensorMap* map, const GroupedMatrices& matrices) {
    return map_matrices(map, matrices.first, row_bytes, row_bytes, args.n, args.num_groups,
                        matrices.stride_bytes, kPanelCols);
  };
  cudaError_t status =
      map_matrices(&x_map, args.x, row_bytes, row_bytes, args.num_rows, 1, 16, kTileRows);
  if (status == cudaSuccess) status = map_groups(&w_map, args.w);
  if (status == cudaSuccess) status = map_groups(&up_map, gated ? args.up : args.w);
  if (status != cudaSuccess) return status;

  const int64_t tile_cols = gated ? kPanelCols : 2 * kPanelCols;
  const Params params{args, static_cast<int>(ceil_div_cuda(args.n, tile_cols)),
                      static_cast<int>(ceil_div_cuda<int64_t>(row_bytes, kDepthBytes))};
  const auto kernel = fp8 ? (gated               ? grouped_products_kernel<true, true, false>
                             : args.y != nullptr ? grouped_products_kernel<false, true, true>
                                                 : grouped_products_kernel<false, true, false>)
                          : (gated ? grouped_products_kernel<true, false, false>
                                   : grouped_products_kernel<false, false, false>);
  const int shared_bytes = static_cast<int>(sizeof(Shared)) + 1024;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  const int64_t most_tiles =
      std::min(args.num_rows, args.num_rows / kTileRows + args.num_groups) * params.col_tiles;
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

cudaError_t quantise_rows(const QuantiseRows& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  return start_kernel(quantise_rows_kernel, dim3(static_cast<unsigned>(args.num_rows)),
                      dim3(kQuantiseThreads), 0, stream, true, args);
}

}  // namespace indexcache::sm90
