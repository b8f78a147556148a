// Whether ops/kit/sm90_wgmma.cuh describes operands as the hardware reads them: each kind of
// operand with small integers (exact products) against loops on the host. To be run first when a
// Hopper kernel is wrong. Built by tools/gpu/build.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "gpu_check.h"
#include "ops/kit/sm90_barrier.cuh"
#include "ops/kit/sm90_tma.cuh"
#include "ops/kit/sm90_wgmma.cuh"

using namespace gpu_check;
using namespace indexcache::sm90;

template <int kN>
__device__ void write_fragment(const float (&d)[kN / 2], float* out) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  for (int j = 0; j < kN / 8; ++j) {
    for (int e = 0; e < 2; ++e) {
      out[row * kN + 8 * j + 2 * c + e] = d[4 * j + e];
      out[(row + 8) * kN + 8 * j + 2 * c + e] = d[4 * j + 2 + e];
    }
  }
}

// D [64, kN] = A [64, 128] B^T [kN, 128], e4m3; A by the copy engine, B by ordinary stores.
template <int kN>
__global__ void e4m3_kernel(const __grid_constant__ CUtensorMap a_map, const uint8_t* b,
                            float* out) {
  __shared__ alignas(1024) uint8_t a_panel[64 * 128];
  __shared__ alignas(1024) uint8_t b_panel[kN * 128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    fence_barrier_init();
    barrier_arrive_expect(&full, 64 * 128);
    copy_box(a_panel, &a_map, 0, 1, &full);  // the second group
  }
  for (int i = threadIdx.x; i < kN * 128; i += 128) {
    const int row = i / 128, unit = i % 128 / 16;
    b_panel[row * 128 + ((unit ^ row % 8) << 4) + i % 16] = b[i];
  }
  fence_async_proxy();
  __syncthreads();
  barrier_wait(&full, 0);
  float d[kN / 2];
  mma_begin();
  for (int step = 0; step < 4; ++step) {
    mma_e4m3(d, panel_k_major(a_panel) + step * kNextUnits,
             panel_k_major(b_panel) + step * kNextUnits, step > 0);
  }
  mma_commit();
  mma_wait<0>();
  mma_landed(d);
  write_fragment<kN>(d, out);
}

// S [64, kN] = A [64, 64] B^T [kN, 64] and O [64, kN] = A^T [64 (columns of A), 64] P [64, kN],
// bf16, A by cp.async.
template <int kN>
__global__ void bf16_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, const __nv_bfloat16* p,
                            float* s_out, float* o_out) {
  __shared__ alignas(1024) uint8_t a_panel[64 * 128];
  __shared__ alignas(1024) uint8_t b_panel[kN * 128];
  __shared__ alignas(128) uint8_t blocks[64 * kN * 2];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 128);
    fence_barrier_init();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    const int row = i / 8, unit = i % 8;
    copy_16_or_zero(shared_address(a_panel) + row * 128 + ((unit ^ row % 8) << 4),
                    a + row * 64 + unit * 8, row < 60);  // the last rows must become zeros
  }
  barrier_arrive_after_copies(&full);
  for (int i = threadIdx.x; i < kN * 64; i += 128) {
    const int row = i / 64, unit = i % 64 / 8;
    *reinterpret_cast<__nv_bfloat16*>(b_panel + row * 128 + ((unit ^ row % 8) << 4) + i % 8 * 2) =
        b[i];
  }
  for (int i = threadIdx.x; i < 64 * kN; i += 128) {
    const int k = i / kN, n = i % kN;
    *reinterpret_cast<__nv_bfloat16*>(blocks + (k / 8 * (kN / 8) + n / 8) * 128 + k % 8 * 16 +
                                      n % 8 * 2) = p[i];
  }
  fence_async_proxy();
  __syncthreads();
  barrier_wait(&full, 0);
  fence_async_proxy();
  float s[kN / 2], o[kN / 2];
  for (int i = 0; i < kN / 2; ++i) o[i] = 1;  // is added to
  mma_landed(o);
  mma_begin();
  for (int step = 0; step < 4; ++step) {
    mma_bf16<0, 0>(s, panel_k_major(a_panel) + step * kNextUnits,
                   panel_k_major(b_panel) + step * kNextUnits, step > 0);
  }
  for (int step = 0; step < 4; ++step) {
    mma_bf16<1, 1>(
        o, panel_m_major(a_panel) + descriptor_step(step * 2048),
        blocks_n_major(blocks, 128, kN / 8 * 128) + descriptor_step(step * 2 * (kN / 8) * 128), 1);
  }
  mma_commit();
  mma_wait<0>();
  mma_landed(s);
  mma_landed(o);
  write_fragment<kN>(s, s_out);
  write_fragment<kN>(o, o_out);
}

float small_integer(Random& random) { return static_cast<float>(random.below(9)) - 4; }

int count_wrong(const std::vector<float>& got, const std::vector<float>& want) {
  int wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) wrong += !(got[i] == want[i]);
  return wrong;
}

template <int kN>
void check_e4m3(Random& random) {
  std::vector<float> a(2 * 64 * 128), b(kN * 128), want(64 * kN);
  std::vector<uint8_t> a8(a.size() + 2 * 256), b8(b.size());
  constexpr int kGroupBytes = 64 * 128 + 256;  // with something between groups, as in a pool
  for (int group = 0; group < 2; ++group) {
    for (int i = 0; i < 64 * 128; ++i) {
      const float x = small_integer(random);
      a[group * 64 * 128 + i] = x;
      a8[group * kGroupBytes + i] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    }
  }
  for (int i = 0; i < kN * 128; ++i) {
    b[i] = small_integer(random);
    b8[i] = __nv_cvt_float_to_fp8(b[i], __NV_SATFINITE, __NV_E4M3);
  }
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < 128; ++k) want[m * kN + n] += a[64 * 128 + m * 128 + k] * b[n * 128 + k];
    }
  }
  DeviceArray<uint8_t> da(a8), db(b8);
  DeviceArray<float> out(64 * kN);
  CUtensorMap map;
  OK(map_rows_of_128_bytes(&map, da.data, 64, 2, kGroupBytes, 64));
  e4m3_kernel<kN><<<1, 128>>>(map, db.data, out.data);
  FINISH();
  const int wrong = count_wrong(out.get(), want);
  report(wrong == 0, "e4m3 m64n%dk32, A by tensor map: %d of %d wrong", kN, wrong, 64 * kN);
}

template <int kN>
void check_bf16(Random& random) {
  std::vector<__nv_bfloat16> a(64 * 64), b(kN * 64), p(64 * kN);
  for (auto& x : a) x = __float2bfloat16(small_integer(random));
  for (auto& x : b) x = __float2bfloat16(small_integer(random));
  for (auto& x : p) x = __float2bfloat16(small_integer(random));
  std::vector<float> s(64 * kN), o(64 * kN, 1.0f);
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < 64; ++k) {
        if (m < 60)
          s[m * kN + n] += __bfloat162float(a[m * 64 + k]) * __bfloat162float(b[n * 64 + k]);
        if (k < 60)
          o[m * kN + n] += __bfloat162float(a[k * 64 + m]) * __bfloat162float(p[k * kN + n]);
      }
    }
  }
  DeviceArray<__nv_bfloat16> da(a), db(b), dp(p);
  DeviceArray<float> s_out(64 * kN), o_out(64 * kN);
  bf16_kernel<kN><<<1, 128>>>(da.data, db.data, dp.data, s_out.data, o_out.data);
  FINISH();
  const int s_wrong = count_wrong(s_out.get(), s), o_wrong = count_wrong(o_out.get(), o);
  report(s_wrong == 0, "bf16 m64n%dk16, both K-major: %d of %d wrong", kN, s_wrong, 64 * kN);
  report(o_wrong == 0, "bf16 m64n%dk16, A M-major, B N-major blocks: %d of %d wrong", kN, o_wrong,
         64 * kN);
}

int main() {
  print_device();
  Random random{20261124};
  check_e4m3<16>(random);
  check_e4m3<32>(random);
  check_e4m3<64>(random);
  check_e4m3<128>(random);
  check_bf16<8>(random);
  check_bf16<16>(random);
  check_bf16<24>(random);
  check_bf16<32>(random);
  return finish();
}
