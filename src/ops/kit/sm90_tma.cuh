// Hopper's copy engine: tensor maps (made on the host) and bulk copies from global to shared memory
// that complete on an mbarrier. Only for code compiled for sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ops/kit/sm90_barrier.cuh"

namespace indexcache::sm90 {

// From the driver, so that nothing links to it. Null where the driver is too old.
inline decltype(&cuTensorMapEncodeTiled) map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                                12000, cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(entry)
               : nullptr;
  }();
  return encode;
}

// Map of `num_groups` matrices of `num_rows` rows of row_bytes bytes, rows row_stride and matrices
// group_stride bytes apart. A copy takes 128 bytes of box_rows rows of one matrix and lays them out
// in shared memory (aligned to 1024 bytes) with the 128-byte swizzle: 16-byte unit u of row r lands
// in unit u ^ (r % 8). What lies beyond the ends is filled with zeros. `base` and the strides are
// multiples of 16; one group needs no group_stride but takes any such number.
inline cudaError_t map_matrices(CUtensorMap* map, const void* base, int64_t row_bytes,
                                int64_t row_stride, int64_t num_rows, int64_t num_groups,
                                int64_t group_stride, int box_rows) {
  if (map_encoder() == nullptr) return cudaErrorCallRequiresNewerDriver;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(row_bytes),
                               static_cast<cuuint64_t>(num_rows),
                               static_cast<cuuint64_t>(num_groups)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride),
                                 static_cast<cuuint64_t>(group_stride)};
  const cuuint32_t box[3] = {128, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  const CUresult result =
      map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(base), sizes, strides,
                    box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The same of matrices whose rows are 128 bytes, one after the other.
inline cudaError_t map_rows_of_128_bytes(CUtensorMap* map, const void* base, int64_t rows_per_group,
                                         int64_t num_groups, int64_t group_bytes, int box_rows) {
  return map_matrices(map, base, 128, 128, rows_per_group, num_groups, group_bytes, box_rows);
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts copying one box of `map` from `byte` of `row` of `group`. One thread.
__device__ __forceinline__ void copy_box_at(void* to, const CUtensorMap* map, int byte, int row,
                                            int group, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(byte), "r"(row), "r"(group), "r"(shared_address(barrier))
      : "memory");
}

// The same from the beginning of the row.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int row, int group,
                                         uint64_t* barrier) {
  copy_box_at(to, map, 0, row, group, barrier);
}

// Starts copying num_bytes; both ends and the length are multiples of 16. One thread.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, uint32_t num_bytes,
                                           uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(num_bytes), "r"(shared_address(barrier))
      : "memory");
}

// Copies 16 bytes per thread without passing through registers; writes zeros where !valid, and then
// reads nothing.
__device__ __forceinline__ void copy_16_or_zero(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

}  // namespace indexcache::sm90
