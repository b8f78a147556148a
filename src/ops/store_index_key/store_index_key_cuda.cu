#include "ops/kit/warp_rows.cuh"
#include "ops/store_index_key/store_index_key.h"

namespace indexcache {

namespace {

struct Store {
  const float* x;
  int64_t ldx, num_rows;
  const float* weight;
  const float* bias;
  float eps;
  int half;  // pairs that are rotated
  bool interleaved;
  const float* cos;
  const float* sin;
  const SeqSpan* seqs;
  int num_seqs;
  PagedRows rows;
  int64_t row_bytes;  // without its scale
  bool vector;        // quadruples of the row, of weight and bias and of the cache are aligned
};

// One warp a row, which is read once: kBlocks times 128 elements hold it.
template <DType dtype, int kBlocks>
__global__ void __launch_bounds__(kRowWarps* kWarpLanes) store_index_key_kernel(Store store) {
  wait_for_previous();
  __shared__ float rows[kRowWarps][kBlocks * kWarpElements];
  const int64_t token = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarpLanes;
  if (token >= store.num_rows) return;
  const int lane = threadIdx.x % kWarpLanes, n = static_cast<int>(store.rows.row_elements);
  const float* x = store.x + token * store.ldx;

  float held[kBlocks][4], weight[kBlocks][4], bias[kBlocks][4];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int i = b * kWarpElements + 4 * lane;
    load_quad(x, i, n, store.vector, held[b]);
    load_quad(store.weight, i, n, store.vector, weight[b]);
    load_quad(store.bias, i, n, store.vector, bias[b]);
  }
  const SeqSpan& seq = store.seqs[warp_find_seq(store.seqs, store.num_seqs, token)];
  const int64_t position = seq.first_position + token - seq.token_begin;

  float sum = 0, squares = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum += held[b][e];
  }
  const float mean = warp_sum(sum) / static_cast<float>(n);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      held[b][e] -= mean;
      if (b * kWarpElements + 4 * lane + e < n) squares += held[b][e] * held[b][e];
    }
  }
  const float scale = 1 / sqrtf(warp_sum(squares) / static_cast<float>(n) + store.eps);

  // Pairs may lie in two lanes.
  float* row = rows[threadIdx.x / kWarpLanes];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      row[b * kWarpElements + 4 * lane + e] = held[b][e] * scale * weight[b][e] + bias[b][e];
    }
  }
  __syncwarp();
  for (int j = lane; j < store.half; j += kWarpLanes) {
    const int first = store.interleaved ? 2 * j : j,
              second = store.interleaved ? 2 * j + 1 : j + store.half;
    const float a = row[first], b = row[second];
    const float c = store.cos[token * store.half + j], s = store.sin[token * store.half + j];
    row[first] = a * c - b * s;
    row[second] = a * s + b * c;
  }
  __syncwarp();

  float largest = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      held[b][e] = row[b * kWarpElements + 4 * lane + e];
      if (b * kWarpElements + 4 * lane + e < n) largest = with_magnitude(largest, held[b][e]);
    }
  }
  float row_scale = 0;
  if constexpr (dtype == DType::kI8 || dtype == DType::kF8E4M3) {
    row_scale = scale_for(warp_max(largest), dtype == DType::kI8 ? 127 : 448);
    if (lane == 0) *paged_scale(store.rows, seq.pages, position) = row_scale;
  }
  uint8_t* to = paged_row(store.rows, store.row_bytes, seq.pages, position);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
    store_quad<dtype>(to, b * kWarpElements + 4 * lane, n, store.vector, held[b], row_scale);
}

template <int kBlocks>
auto kernel_for(DType dtype) {
  return dtype == DType::kF32    ? store_index_key_kernel<DType::kF32, kBlocks>
         : dtype == DType::kBF16 ? store_index_key_kernel<DType::kBF16, kBlocks>
         : dtype == DType::kI8   ? store_index_key_kernel<DType::kI8, kBlocks>
                                 : store_index_key_kernel<DType::kF8E4M3, kBlocks>;
}

}  // namespace

bool store_index_key_cuda_supported(const StoreIndexKeyArgs& args) {
  return args.rows.row_elements <= kMaxWarpRow;
}

void store_index_key_cuda(Exec& exec, const StoreIndexKeyArgs& args) {
  if (args.num_rows == 0) return;
  Store store = {};
  store.x = args.x;
  store.ldx = args.ldx;
  store.num_rows = args.num_rows;
  store.weight = args.weight;
  store.bias = args.bias;
  store.eps = args.eps;
  store.half = static_cast<int>(args.rope_dim / 2);
  store.interleaved = args.interleaved;
  store.cos = args.cos;
  store.sin = args.sin;
  store.seqs = args.device_seqs;
  store.num_seqs = static_cast<int>(args.seqs.size());
  store.rows = args.rows;
  store.row_bytes = args.rows.row_elements * dtype_bytes(args.rows.dtype);
  store.vector = args.rows.row_elements % 4 == 0 && is_aligned(args.x, 4 * args.ldx, 16) &&
                 is_aligned(args.weight, 0, 16) && is_aligned(args.bias, 0, 16) &&
                 is_aligned(args.rows.base, 0, 16) && args.rows.page_bytes % 16 == 0 &&
                 store.row_bytes % 16 == 0;
  launch(args.rows.row_elements <= kWarpElements ? kernel_for<1>(args.rows.dtype)
                                                 : kernel_for<8>(args.rows.dtype),
         blocks_for(args.num_rows, kRowWarps), kRowWarps * kWarpLanes, 0, exec.cuda(), store);
}

}  // namespace indexcache
