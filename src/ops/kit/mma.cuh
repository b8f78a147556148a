// The tensor cores of any GPU since Ampere, one warp at a time: d += a b for a 16x16 tile of a, a
// 16x8 tile of b, in bf16 with f32 sums.
//
// Of lane l, g = l / 4 and c = l % 4 (PTX ISA, mma.m16n8k16), registers hold pairs, the first
// element in the low half:
//   a[0] = a(g, 2c..), a[1] = a(g + 8, 2c..), a[2] = a(g, 2c + 8..), a[3] = a(g + 8, 2c + 8..)
//   b[0] = b(2c.., g), b[1] = b(2c + 8.., g)
//   d[0], d[1] = d(g, 2c..), d[2], d[3] = d(g + 8, 2c..)
#pragma once

#include "ops/kit/cuda.cuh"

namespace indexcache {

#ifdef INDEXCACHE_CUDA_EMULATION

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  } own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  Operands of_lane[kWarpLanes];
  const uint8_t* all = emulation::exchange(kAllLanes, &own, sizeof(own));
  for (unsigned l = 0; l < kWarpLanes; ++l) of_lane[l] = emulation::exchanged<Operands>(all, l);
  const auto half = [](uint32_t pair, int which) {
    return bf16_bits_to_f32(which == 0 ? pair & 0xFFFF : pair >> 16);
  };
  const int g = static_cast<int>(emulation::lane() / 4),
            c = static_cast<int>(emulation::lane() % 4);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, col = 2 * c + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = of_lane[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t right = of_lane[col * 4 + k % 8 / 2].b[k / 8];
      d[i] += half(left, k % 2) * half(right, k % 2);
    }
  }
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  const uint8_t* all = emulation::exchange(kAllLanes, &row, sizeof(row));
  const unsigned g = emulation::lane() / 4, c = emulation::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const auto* low = emulation::exchanged<const uint16_t*>(all, 8 * i + 2 * c);
    const auto* high = emulation::exchanged<const uint16_t*>(all, 8 * i + 2 * c + 1);
    to[i] = low[g] | static_cast<uint32_t>(high[g]) << 16;
  }
}

inline void copy_16_bytes_async(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void wait_for_async_copies() {}

#else

// What a thread has started is there after this, for other threads after a barrier as well.
__device__ __forceinline__ void copy_16_bytes_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void wait_for_async_copies() {
  asm volatile("cp.async.wait_all;\n" ::: "memory");
}

// Lane 8 i + r gives the address of row r of matrix i, 8 elements of 16 bits in shared memory. Gets
// (2c, g) and (2c + 1, g) of the four: the b of mma where rows of the matrix go along its sum.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace indexcache
