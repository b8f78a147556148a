#include "ops/store_rows/store_rows.h"

#include "ops/kit/cuda.cuh"

namespace indexcache {

namespace {

constexpr unsigned kThreads = 128;

struct Store {
  const float* x;
  int64_t ldx;
  const SeqSpan* seqs;
  int num_seqs;
  PagedRows rows;
};

// What block blockIdx.x writes.
struct Place {
  const float* x;
  const int32_t* pages;
  int64_t position;
};

__device__ Place place_of(const Store& store) {
  const int64_t token = blockIdx.x;
  const SeqSpan& seq = store.seqs[find_seq(store.seqs, store.num_seqs, token)];
  return {store.x + token * store.ldx, seq.pages, seq.first_position + token - seq.token_begin};
}

__global__ void __launch_bounds__(kThreads) store_f32(Store store) {
  const Place place = place_of(store);
  float* row = reinterpret_cast<float*>(
      paged_row(store.rows, 4 * store.rows.row_elements, place.pages, place.position));
  for (int64_t i = threadIdx.x; i < store.rows.row_elements; i += kThreads) row[i] = place.x[i];
}

__global__ void __launch_bounds__(kThreads) store_bf16(Store store) {
  const Place place = place_of(store);
  uint16_t* row = reinterpret_cast<uint16_t*>(
      paged_row(store.rows, 2 * store.rows.row_elements, place.pages, place.position));
  for (int64_t i = threadIdx.x; i < store.rows.row_elements; i += kThreads)
    row[i] = static_cast<uint16_t>(f32_to_bf16_bits(place.x[i]));
}

// The same bits as quantise_row of ops/kit/int8_rows.h.
__global__ void __launch_bounds__(kThreads) store_int8(Store store) {
  const Place place = place_of(store);
  int8_t* row = reinterpret_cast<int8_t*>(
      paged_row(store.rows, store.rows.row_elements, place.pages, place.position));
  const float scale = block_row_scale(place.x, store.rows.row_elements, 127);
  for (int64_t i = threadIdx.x; i < store.rows.row_elements; i += kThreads)
    row[i] = quantised(place.x[i], scale);
  if (threadIdx.x == 0) *paged_scale(store.rows, place.pages, place.position) = scale;
}

// The same bits as quantise_fp8_row of ops/kit/fp8_rows.h.
__global__ void __launch_bounds__(kThreads) store_fp8(Store store) {
  const Place place = place_of(store);
  uint8_t* row = paged_row(store.rows, store.rows.row_elements, place.pages, place.position);
  const float scale = block_row_scale(place.x, store.rows.row_elements, 448);
  for (int64_t i = threadIdx.x; i < store.rows.row_elements; i += kThreads)
    row[i] = quantised_fp8(place.x[i], scale);
  if (threadIdx.x == 0) *paged_scale(store.rows, place.pages, place.position) = scale;
}

}  // namespace

void store_rows_cuda(Exec& exec, const StoreRowsArgs& args) {
  if (args.num_rows == 0 || args.rows.row_elements == 0) return;
  const auto kernel = args.rows.dtype == DType::kF32    ? store_f32
                      : args.rows.dtype == DType::kBF16 ? store_bf16
                      : args.rows.dtype == DType::kI8   ? store_int8
                                                        : store_fp8;
  launch(kernel, blocks_for(args.num_rows, 1), kThreads, 0, exec.cuda(),
         Store{args.x, args.ldx, args.device_seqs, static_cast<int>(args.seqs.size()), args.rows});
}

}  // namespace indexcache
