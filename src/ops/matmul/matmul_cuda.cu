// matmul for any GPU: for few rows kernels that read every weight once, with tensor cores where it
// is bf16; a tile of tensor core products for bf16, and a tile of f32 products. Weights of every
// type are converted on their way to shared memory.
#include <algorithm>
#include <vector>

#include "ops/kit/narrow_mma.cuh"
#include "ops/matmul/matmul_groups.cuh"

namespace indexcache {

namespace {

// Elements [col, col + 8) of row `row` of w as f32, with block scales; 0 outside.
template <DType dtype>
__device__ __forceinline__ void load_weights(const CudaProduct& p, int64_t row, int64_t col,
                                             float (&to)[8]) {
  if (row >= p.n || col >= p.k) {
    for (int i = 0; i < 8; ++i) to[i] = 0;
    return;
  }
  const int64_t first = row * p.k + col;
  constexpr int kBytes = dtype == DType::kF32 ? 4 : dtype == DType::kF8E4M3 ? 1 : 2;
  const uint8_t* at = p.w + first * kBytes;
  if (col + 8 <= p.k && reinterpret_cast<uintptr_t>(at) % (8 * kBytes < 16 ? 8 : 16) == 0) {
    if constexpr (dtype == DType::kF32) {
      const float4 low = reinterpret_cast<const float4*>(at)[0],
                   high = reinterpret_cast<const float4*>(at)[1];
      to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
      to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    } else if constexpr (dtype == DType::kF8E4M3) {
      const uint2 bits = *reinterpret_cast<const uint2*>(at);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        to[i] = f8e4m3_bits_to_f32((i < 4 ? bits.x : bits.y) >> (i % 4 * 8) & 0xFFu);
    } else {
      const uint4 bits = *reinterpret_cast<const uint4*>(at);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t half = i % 2 == 0 ? words[i / 2] & 0xFFFFu : words[i / 2] >> 16;
        to[i] = dtype == DType::kBF16 ? bf16_bits_to_f32(half) : f16_bits_to_f32(half);
      }
    }
  } else {
    for (int i = 0; i < 8; ++i) to[i] = col + i < p.k ? element_at<dtype>(p.w, first + i) : 0;
  }
  if constexpr (dtype == DType::kF8E4M3) {
    const float scale = p.scale_inv[row / kScaleBlock * ceil_div_cuda<int64_t>(p.k, kScaleBlock) +
                                    col / kScaleBlock];
    for (int i = 0; i < 8; ++i) to[i] *= scale;
  }
}

__device__ __forceinline__ void load_input(const CudaProduct& p, int64_t row, int64_t col,
                                           float (&to)[4]) {
  if (p.x16 != nullptr) {
    const uint16_t* bits = p.x16 + row * p.ldx + col;
    for (int i = 0; i < 4; ++i) to[i] = row < p.m && col + i < p.k ? bf16_bits_to_f32(bits[i]) : 0;
    return;
  }
  const float* at = p.x + row * p.ldx + col;
  if (row < p.m && col + 4 <= p.k && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    const float4 four = *reinterpret_cast<const float4*>(at);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    for (int i = 0; i < 4; ++i) to[i] = row < p.m && col + i < p.k ? at[i] : 0;
  }
}

__device__ __forceinline__ void store_output(const CudaProduct& p, int64_t row, int64_t col,
                                             float value, bool accumulate) {
  if (row >= p.m || col >= p.n) return;
  if (p.y16 != nullptr) {
    p.y16[row * p.ldy + col] = static_cast<uint16_t>(f32_to_bf16_bits(value));
    return;
  }
  float* y = p.y + row * p.ldy + col;
  *y = accumulate ? *y + value : value;
}

// --- few rows: a warp for each column ---

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarpLanes;
constexpr int kRowChunk = 1024;  // of k, for which x lies in shared memory

// Four elements of a block of 128 that a warp has in a row of its lanes, as e4m3 holds them.
__device__ __forceinline__ void round_to_fp8(float (&four)[4]) {
  float largest = 0;
  for (int i = 0; i < 4; ++i) largest = with_magnitude(largest, four[i]);
  const float scale = scale_for(warp_max(largest), 448.0f);
  for (int i = 0; i < 4; ++i) four[i] = f8e4m3_bits_to_f32(quantised_fp8(four[i], scale)) * scale;
}

template <DType dtype, int kRows, class Products>
__global__ void __launch_bounds__(kRowThreads)
    matmul_rows_kernel(Products products, Compute compute, bool accumulate) {
  wait_for_previous();
  const CudaTile tile = products.template tile<kRows>();
  const CudaProduct& p = tile.product;
  const int64_t first_row = tile.row;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpLanes;
  if (first_row >= p.m || static_cast<int64_t>(blockIdx.x) * kRowWarps >= p.n) return;
  const int lane = threadIdx.x % kWarpLanes;
  const bool round = compute == Compute::kBF16;
  __shared__ __align__(16) float x[kRows][kRowChunk];
  float sums[kRows] = {};
  for (int64_t begin = 0; begin < p.k; begin += kRowChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kRowChunk / 4; i += kRowThreads) {
      const int row = i / (kRowChunk / 4), col = i % (kRowChunk / 4) * 4;
      float four[4];
      load_input(p, first_row + row, begin + col, four);
      if constexpr (dtype == DType::kF8E4M3) {
        if (compute == Compute::kFP8) round_to_fp8(four);
      }
      for (int j = 0; j < 4; ++j) x[row][col + j] = round ? rounded_to_bf16(four[j]) : four[j];
    }
    __syncthreads();
    for (int col = lane * 8; col < kRowChunk && begin + col < p.k; col += kWarpLanes * 8) {
      float w[8];
      load_weights<dtype>(p, n, begin + col, w);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (round) w[i] = rounded_to_bf16(w[i]);
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[row] += x[row][col + i] * w[i];
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum = warp_sum(sums[row]);
    if (lane == 0) store_output(p, first_row + row, n, sum, accumulate);
  }
}

// --- few rows and bf16 weights: 16 columns a block ---

template <int kTiles>
__global__ void __launch_bounds__(kNarrowThreads)
    matmul_narrow_kernel(ListedProducts products, bool accumulate) {
  wait_for_previous();
  constexpr int kRows = kTiles * kNarrowTileRows;
  const CudaTile tile = products.tile<kRows>();
  const CudaProduct& p = tile.product;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kNarrowCols;
  if (tile.row >= p.m || col >= p.n) return;
  const uint8_t* const w[1] = {p.w};
  narrow_products<kTiles>({.f32 = p.x, .bf16 = p.x16, .ld = p.ldx}, tile.row, p.m, w, col, p.n, p.k,
                          [&](int64_t row, int64_t n, const float(&sum)[1]) {
                            store_output(p, row, n, sum[0], accumulate);
                          });
}

// --- bf16 tiles: 8 warps, 2 x 4 of them, each with 64 x 32 of the tile ---

constexpr int kMmaThreads = 256, kMmaRows = 128, kMmaCols = 128, kMmaDepth = 32;
// In pairs. 20 words a row: the 8 rows and 4 columns that a warp reads at once lie in 32 banks.
constexpr int kMmaStride = kMmaDepth / 2 + 4;

struct MmaStage {
  uint32_t x[kMmaRows][kMmaStride], w[kMmaCols][kMmaStride];
};

template <DType dtype, class Products>
__global__ void __launch_bounds__(kMmaThreads)
    matmul_mma_kernel(Products products, bool accumulate) {
  wait_for_previous();
  const CudaTile tile = products.template tile<kMmaRows>();
  const CudaProduct& p = tile.product;
  const int64_t first_row = tile.row, first_col = static_cast<int64_t>(blockIdx.x) * kMmaCols;
  if (first_row >= p.m || first_col >= p.n) return;
  MmaStage* stages = dynamic_shared<MmaStage>();
  const int thread = threadIdx.x, lane = thread % kWarpLanes, warp = thread / kWarpLanes;
  const int g = lane / 4, c = lane % 4;
  const int warp_row = warp / 4 * 64, warp_col = warp % 4 * 32;

  float next_x[4][4], next_w[2][8];
  const auto load = [&](int64_t begin) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      load_input(p, first_row + thread / 8 + 32 * i, begin + thread % 8 * 4, next_x[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_weights<dtype>(p, first_col + thread / 4 + 64 * i, begin + thread % 4 * 8, next_w[i]);
  };
  const auto store = [&](MmaStage& stage) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t* row = stage.x[thread / 8 + 32 * i] + thread % 8 * 2;
      row[0] = bf16_pair(next_x[i][0], next_x[i][1]);
      row[1] = bf16_pair(next_x[i][2], next_x[i][3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t* row = stage.w[thread / 4 + 64 * i] + thread % 4 * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) row[j] = bf16_pair(next_w[i][2 * j], next_w[i][2 * j + 1]);
    }
  };

  float sums[4][4][4] = {};
  if (p.k > 0) {
    load(0);
    store(stages[0]);
  }
  __syncthreads();
  int now = 0;
  for (int64_t begin = 0; begin < p.k; begin += kMmaDepth) {
    const bool more = begin + kMmaDepth < p.k;
    if (more) load(begin + kMmaDepth);
    const MmaStage& stage = stages[now];
#pragma unroll
    for (int step = 0; step < kMmaDepth / 16; ++step) {
      uint32_t a[4][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t* row = stage.x[warp_row + 16 * i + g] + 8 * step + c;
        a[i][0] = row[0];
        a[i][1] = row[8 * kMmaStride];
        a[i][2] = row[4];
        a[i][3] = row[8 * kMmaStride + 4];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t* row = stage.w[warp_col + 8 * j + g] + 8 * step + c;
        b[j][0] = row[0];
        b[j][1] = row[4];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(sums[i][j], a[i], b[j]);
      }
    }
    if (more) store(stages[1 - now]);
    __syncthreads();
    now = 1 - now;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_row + warp_row + 16 * i + g,
                    col = first_col + warp_col + 8 * j + 2 * c;
      store_output(p, row, col, sums[i][j][0], accumulate);
      store_output(p, row, col + 1, sums[i][j][1], accumulate);
      store_output(p, row + 8, col, sums[i][j][2], accumulate);
      store_output(p, row + 8, col + 1, sums[i][j][3], accumulate);
    }
  }
}

// --- f32 tiles: 4 x 4 of the tile a thread ---

constexpr int kTileThreads = 256, kTileRows = 64, kTileCols = 64, kTileDepth = 16;

template <DType dtype, class Products>
__global__ void __launch_bounds__(kTileThreads)
    matmul_f32_kernel(Products products, bool accumulate) {
  wait_for_previous();
  const CudaTile tile = products.template tile<kTileRows>();
  const CudaProduct& p = tile.product;
  const int64_t first_row = tile.row, first_col = static_cast<int64_t>(blockIdx.x) * kTileCols;
  if (first_row >= p.m || first_col >= p.n) return;
  __shared__ float x[kTileDepth][kTileRows + 1], w[kTileDepth][kTileCols + 1];
  const int thread = threadIdx.x, row = thread / 16, col = thread % 16;
  float sums[4][4] = {};
  for (int64_t begin = 0; begin < p.k; begin += kTileDepth) {
    __syncthreads();
    float four[4];
    load_input(p, first_row + thread / 4, begin + thread % 4 * 4, four);
    for (int i = 0; i < 4; ++i) x[thread % 4 * 4 + i][thread / 4] = four[i];
    if (thread < kTileCols * kTileDepth / 8) {
      float eight[8];
      load_weights<dtype>(p, first_col + thread / 2, begin + thread % 2 * 8, eight);
      for (int i = 0; i < 8; ++i) w[thread % 2 * 8 + i][thread / 2] = eight[i];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k) {
      float left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = x[k][row + 16 * i];
#pragma unroll
      for (int j = 0; j < 4; ++j) right[j] = w[k][col + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[i] * right[j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_output(p, first_row + row + 16 * i, first_col + col + 16 * j, sums[i][j], accumulate);
  }
}

// --- rows as e4m3 holds them, in f32 ---

constexpr int kRoundThreads = 128;  // of a row

__global__ void __launch_bounds__(kRoundThreads)
    round_rows_to_fp8_kernel(CudaProduct p, float* to, int64_t ld) {
  wait_for_previous();
  const int64_t row = blockIdx.x;
  for (int64_t begin = 0; begin < ld; begin += 4 * kRoundThreads) {
    const int64_t col = begin + 4 * threadIdx.x;
    float four[4];
    load_input(p, row, col, four);
    round_to_fp8(four);
    for (int i = 0; i < 4; ++i) {
      if (col + i < p.k) to[row * ld + col + i] = four[i];
    }
  }
}

// For f32 products of many rows, where there is no fp8 tensor core for them: far from fast.
const float* rounded_to_fp8(CudaStream& stream, const CudaProduct& p, float* to) {
  launch(round_rows_to_fp8_kernel, dim3(static_cast<unsigned>(p.m)), kRoundThreads, 0, stream, p,
         to, p.k);
  return to;
}

// --- choosing ---

// The same with tensor cores.
constexpr int64_t kNarrowRows = 16;

struct Extent {
  int64_t rows, cols;  // the most rows and columns of one product
  unsigned depth;      // products
  int64_t row_tiles;   // 0: from `rows`
};

// All products have weights of one type; `few`: no product has more than kFewRows rows, or experts
// have few on average.
template <DType dtype, class Products>
void launch_products(CudaStream& stream, const Products& products, Extent extent, bool few,
                     Compute compute, bool accumulate) {
  const auto grid = [&](int64_t tile_rows, int64_t tile_cols) {
    const int64_t tiles =
        extent.row_tiles > 0 ? extent.row_tiles : ceil_div_cuda(extent.rows, tile_rows);
    return dim3(static_cast<unsigned>(ceil_div_cuda(extent.cols, tile_cols)),
                static_cast<unsigned>(tiles), extent.depth);
  };
  if (few && extent.rows == 1) {
    launch(matmul_rows_kernel<dtype, 1, Products>, grid(1, kRowWarps), kRowThreads, 0, stream,
           products, compute, accumulate);
  } else if (few && extent.rows <= 4) {
    launch(matmul_rows_kernel<dtype, 4, Products>, grid(4, kRowWarps), kRowThreads, 0, stream,
           products, compute, accumulate);
  } else if (few) {
    launch(matmul_rows_kernel<dtype, 8, Products>, grid(8, kRowWarps), kRowThreads, 0, stream,
           products, compute, accumulate);
  } else if (compute == Compute::kBF16) {
    launch(matmul_mma_kernel<dtype, Products>, grid(kMmaRows, kMmaCols), kMmaThreads,
           2 * sizeof(MmaStage), stream, products, accumulate);
  } else {
    launch(matmul_f32_kernel<dtype, Products>, grid(kTileRows, kTileCols), kTileThreads, 0, stream,
           products, accumulate);
  }
}

enum class Rows { kNarrow, kFew, kMany };

bool is_aligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}

Rows rows_of(const MatmulGroup& group, Compute compute) {
  const bool narrow = compute != Compute::kF32 && group.m <= kNarrowRows &&
                      group.w.dtype == DType::kBF16 && is_aligned(group.w.data, 2 * group.w.cols) &&
                      (group.x16 != nullptr ? is_aligned(group.x16, 2 * group.ldx)
                                            : is_aligned(group.x, 4 * group.ldx));
  return narrow ? Rows::kNarrow : group.m <= kFewRows ? Rows::kFew : Rows::kMany;
}

template <DType dtype>
void launch_list(CudaStream& stream, const ListedProducts& list, Extent extent, Rows rows,
                 const MatmulArgs& args) {
  if (rows != Rows::kNarrow) {
    launch_products<dtype>(stream, list, extent, rows == Rows::kFew,
                           compute_for(args.compute, dtype), args.accumulate);
    return;
  }
  const bool one_tile = extent.rows <= kNarrowTileRows;
  launch(one_tile ? matmul_narrow_kernel<1> : matmul_narrow_kernel<2>,
         dim3(blocks_for(extent.cols, kNarrowCols).x, 1, extent.depth), kNarrowThreads, 0, stream,
         list, args.accumulate);
}

}  // namespace

void matmul_cuda(Exec& exec, const MatmulArgs& args) {
  const auto through_f32 = [&](const MatmulGroup& group) {
    return compute_for(args.compute, group.w.dtype) == Compute::kFP8 && group.m > kFewRows;
  };
  int64_t rounded_elements = 0;
  for (const MatmulGroup& group : args.groups) {
    if (through_f32(group)) rounded_elements += group.m * group.w.cols;
  }
  float* rounded = rounded_elements == 0 ? nullptr
                                         : reinterpret_cast<float*>(exec.cuda().scratch(
                                               static_cast<size_t>(4 * rounded_elements)));
  for (const Rows rows : {Rows::kNarrow, Rows::kFew, Rows::kMany}) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3}) {
      for_weight_dtype(dtype, [&]<DType kType>() {
        ListedProducts list;
        Extent extent = {};
        const auto flush = [&] {
          if (extent.depth > 0) launch_list<kType>(exec.cuda(), list, extent, rows, args);
          extent = {};
        };
        for (const MatmulGroup& group : args.groups) {
          if (group.m == 0 || group.w.rows == 0 || group.w.dtype != kType) continue;
          if (rows_of(group, args.compute) != rows) continue;
          if (extent.depth == 0) std::fill_n(list.products, kProductsPerLaunch, CudaProduct{});
          list.products[extent.depth++] = {group.x,
                                           group.y,
                                           group.w.data,
                                           group.w.scale_inv,
                                           group.ldx,
                                           group.ldy,
                                           static_cast<int32_t>(group.m),
                                           static_cast<int32_t>(group.w.rows),
                                           static_cast<int32_t>(group.w.cols),
                                           group.x16,
                                           group.y16};
          if (through_f32(group)) {
            CudaProduct& product = list.products[extent.depth - 1];
            product.x = rounded_to_fp8(exec.cuda(), product, rounded);
            product.x16 = nullptr;
            product.ldx = product.k;
            rounded += group.m * group.w.cols;
          }
          extent.rows = std::max(extent.rows, group.m);
          extent.cols = std::max(extent.cols, group.w.rows);
          if (extent.depth == kProductsPerLaunch) flush();
        }
        flush();
      });
    }
  }
}

void matmul_experts_cuda(Exec& exec, const MatmulExpertsArgs& args) {
  if (args.num_rows == 0) return;
  for (const ExpertProduct& product : args.products) {
    const Weight& first = product.weights[0];
    if (first.rows == 0) continue;
    const int64_t num_experts = static_cast<int64_t>(product.weights.size());
    // An expert that gets more rows than others reads its weights once for each tile of them.
    const bool few = args.num_rows <= kFewRows * num_experts;
    const Compute compute = compute_for(args.compute, first.dtype);
    const int64_t tile = few                         ? (args.num_rows <= num_experts ? 4 : 8)
                         : compute == Compute::kBF16 ? kMmaRows
                                                     : kTileRows;
    const Extent extent = {tile, first.rows, 1,
                           std::min(args.num_rows, args.num_rows / tile + num_experts)};
    ExpertProduct on_gpu = product;
    on_gpu.weights = {};
    if (compute == Compute::kFP8 && !few) {
      const CudaProduct rows = {.x = product.x,
                                .ldx = product.ldx,
                                .m = static_cast<int32_t>(args.num_rows),
                                .k = static_cast<int32_t>(first.cols)};
      on_gpu.x = rounded_to_fp8(exec.cuda(), rows,
                                reinterpret_cast<float*>(exec.cuda().scratch(
                                    static_cast<size_t>(4 * args.num_rows * first.cols))));
      on_gpu.ldx = first.cols;
    }
    const ExpertProducts products{on_gpu, args.row_begin, static_cast<int32_t>(num_experts),
                                  static_cast<int32_t>(first.rows),
                                  static_cast<int32_t>(first.cols)};
    for_weight_dtype(first.dtype, [&]<DType kType>() {
      launch_products<kType>(exec.cuda(), products, extent, few, compute, false);
    });
  }
}

}  // namespace indexcache
