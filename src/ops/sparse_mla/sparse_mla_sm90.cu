// Attention over gathered latent rows with the heads on the narrow side of the matrix instruction,
// so that its work is proportional to the real heads (rounded up to 8).
//
//   S^T [64 keys, N heads] = rows [64, 576] * q^T [576, N]
//   O^T [512, N heads]    += rows^T [512, 64 keys] * P^T [64, N]
//
// Both products take the same gathered tile from shared memory, the second one transposed.
//
// Floor, for 8192 tokens, k 2048, 20 heads (N = 24): every selected row is gathered from L2 once a
// token, 19.3 GB, 3.5 ms at 5.5 TB/s; 0.73 TFLOP, 1 ms at 720 TFLOP/s, but a wgmma of N = 24 is
// bound by reading its 64 x 16 tile of rows from shared memory, 16 + 6 cycles at 128 bytes a cycle:
// 68 of them a tile of 64 keys, 1500 cycles, against 3000 to gather it. So the gather is the floor,
// and its copies must never pause. (Joining neighbouring tokens over the union of their selections,
// measured at overlaps up to 0.85, gathers less and is no faster.)
//
// fp8 rows (656 bytes for 1152) are multiplied by their scales on the way, so that all else is the
// same. For the same call: 11 GB, 2 ms at 5.5 TB/s or 1770 cycles a tile. The warps that gather
// then store each tile as bf16, 576 cycles of the same shared memory that the products read for
// 1500: 2076 cycles a tile and 2.3 ms are the floor. 512 conversions a row, three instructions
// each, are 770 of those cycles for each of the four gathering warps. Measured on an H200, 4096
// tokens: 2.8 to 3.0 ms, bf16 rows 2.0 to 2.4, so fp8 rows save memory, not time.
//
// A block of 384 threads: one warpgroup gathers tiles of 64 rows (73,728 bytes) into two stages,
// two compute. How the two share the work:
// - kSplitKeys: one token, up to 32 heads; the warpgroups take alternate tiles and merge at the
// end.
// - kSplitHeads: one token, up to 64 heads at a time, half for each warpgroup.
#include <algorithm>

#include "device/previous_kernel.cuh"
#include "ops/kit/sm90_wgmma.cuh"
#include "ops/sparse_mla/sparse_mla_gather_sm90.cuh"

namespace indexcache::sm90 {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// --- the computing warpgroups ---

// Rows [0, kN) are the heads from `first_head` on, rounded to bf16; heads that are not there are
// zeros. By the `num_threads` threads that call it.
template <int kN>
__device__ void load_q(const SparseMlaSm90Args& args, int token, int first_head,
                       uint8_t (&q)[kPanels][kN * 128], int thread, int num_threads) {
  constexpr int kUnits = kLatentRow / 8;
  for (int i = thread; i < kN * kUnits; i += num_threads) {
    const int row = i / kUnits, unit = i % kUnits;
    uint4 value = {0, 0, 0, 0};
    if (first_head + row < args.num_heads) {
      const int64_t element =
          (static_cast<int64_t>(token) * args.num_heads + first_head + row) * kLatentRow + unit * 8;
      if (args.q_is_bf16) {
        value = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.q) + element);
      } else {
        const float4* from =
            reinterpret_cast<const float4*>(static_cast<const float*>(args.q) + element);
        const float4 a = from[0], b = from[1];
        const __nv_bfloat162 pairs[4] = {
            __floats2bfloat162_rn(a.x, a.y), __floats2bfloat162_rn(a.z, a.w),
            __floats2bfloat162_rn(b.x, b.y), __floats2bfloat162_rn(b.z, b.w)};
        value = *reinterpret_cast<const uint4*>(pairs);
      }
    }
    *reinterpret_cast<uint4*>(&q[unit / 8][row * 128 + ((unit % 8 ^ row % 8) << 4)]) = value;
  }
}

// The running softmax of one warpgroup. A thread has two keys of each tile (rows of S^T) and, of
// the heads (columns), kN / 4: 8 j + 2 (lane % 4) + {0, 1}. O^T has the same columns.
template <int kN>
struct Softmax {
  static constexpr int kOwn = kN / 4;
  float out[kValuePanels][kN / 2];
  float highest[kOwn];  // of the head; of all threads alike
  float sum[kOwn];      // this thread's keys only

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      highest[i] = __uint_as_float(0xFF800000u);
      sum[i] = 0;
    }
#pragma unroll
    for (int panel = 0; panel < kValuePanels; ++panel) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) out[panel][i] = 0;
    }
  }
};

__device__ __forceinline__ float finite_or_zero(float highest) {
  return highest == __uint_as_float(0xFF800000u) ? 0 : highest;
}

// Over the 16 keys of the warp: lanes with the same lane % 4.
template <class Combine>
__device__ __forceinline__ float over_keys(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, 4));
  x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, 8));
  return combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, 16));
}

// One value a head from each warp, combined over the four warps of the group.
template <int kN, class Combine>
__device__ __forceinline__ void over_warps(float (&values)[kN / 4], float (&warp_values)[4][kN],
                                           int group, Combine combine) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, c = lane % 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    if (lane < 4) {
      *reinterpret_cast<float2*>(&warp_values[warp][8 * j + 2 * c]) = {values[2 * j],
                                                                       values[2 * j + 1]};
    }
  }
  named_barrier(2 + group, 128);
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    float2 x = *reinterpret_cast<const float2*>(&warp_values[0][8 * j + 2 * c]);
#pragma unroll
    for (int other = 1; other < 4; ++other) {
      const float2 y = *reinterpret_cast<const float2*>(&warp_values[other][8 * j + 2 * c]);
      x = {combine(x.x, y.x), combine(x.y, y.y)};
    }
    values[2 * j] = x.x;
    values[2 * j + 1] = x.y;
  }
}

// One tile of keys. `wanted`: whether this thread's two keys count.
template <int kN, Mode kMode>
__device__ __forceinline__ void attend(Shared<kN, kMode>& shared, const uint8_t* q, int stage,
                                       int group, float scale_log2, const bool (&wanted)[2],
                                       Softmax<kN>& state) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, c = lane % 4;
  float scores[kN / 2];
  {
    const uint64_t a = panel_k_major(shared.rows[stage]);
    const uint64_t b = panel_k_major(q);
    mma_begin();
#pragma unroll
    for (int step = 0; step < kLatentRow / 16; ++step) {
      mma_bf16<0, 0>(scores, a + descriptor_step(step / 4 * kPanelBytes) + step % 4 * kNextUnits,
                     b + descriptor_step(step / 4 * kN * 128) + step % 4 * kNextUnits, step > 0);
    }
    mma_commit();
    mma_wait<0>();
    mma_landed(scores);
  }

  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  float highest[kN / 4];
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& score = scores[4 * j + 2 * row + e];
        score = wanted[row] ? score * scale_log2 : __uint_as_float(0xFF800000u);
      }
      highest[2 * j + e] = over_keys(fmaxf(scores[4 * j + e], scores[4 * j + 2 + e]), larger);
    }
  }
  over_warps<kN>(highest, shared.warp_values[group], group, larger);

  bool rescale = false;
  float factors[kN / 4];
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const float before = state.highest[i];
    state.highest[i] = fmaxf(before, highest[i]);
    factors[i] = exp2f(before - finite_or_zero(state.highest[i]));
    rescale = rescale || state.highest[i] != before;
    state.sum[i] *= factors[i];
  }
  uint8_t* weights = shared.weights[group];
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        pair[e] = exp2f(scores[4 * j + 2 * row + e] - finite_or_zero(state.highest[2 * j + e]));
        state.sum[2 * j + e] += pair[e];
      }
      const int block = (2 * warp + row) * (kN / 8) + j;
      *reinterpret_cast<__nv_bfloat162*>(weights + block * 128 + lane / 4 * 16 + c * 4) =
          __floats2bfloat162_rn(pair[0], pair[1]);
    }
  }
  fence_async_proxy();
  if (__any_sync(0xFFFFFFFFu, rescale)) {
#pragma unroll
    for (int panel = 0; panel < kValuePanels; ++panel) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) state.out[panel][i] *= factors[i / 4 * 2 + i % 2];
    }
  }
  named_barrier(2 + group, 128);

  const uint64_t a = panel_m_major(shared.rows[stage]);
  const uint64_t b = blocks_n_major(weights, 128, kN / 8 * 128);
#pragma unroll
  for (int panel = 0; panel < kValuePanels; ++panel) mma_landed(state.out[panel]);
  mma_begin();
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
    for (int panel = 0; panel < kValuePanels; ++panel) {
      mma_bf16<1, 1>(state.out[panel], a + descriptor_step(panel * kPanelBytes + step * 16 * 128),
                     b + descriptor_step(step * 2 * (kN / 8) * 128), 1);
    }
  }
  mma_commit();
  mma_wait<0>();
#pragma unroll
  for (int panel = 0; panel < kValuePanels; ++panel) mma_landed(state.out[panel]);
}

// Adds what the other warpgroup has left in `theirs` (one float of each thread after another).
template <int kN>
__device__ __forceinline__ void merge(Softmax<kN>& state, const float* theirs, int thread) {
  float mine[kN / 4], other[kN / 4];
  theirs += thread;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const float highest = theirs[i * 128];
    const float both = fmaxf(state.highest[i], highest);
    mine[i] = exp2f(state.highest[i] - finite_or_zero(both));
    other[i] = exp2f(highest - finite_or_zero(both));
    state.highest[i] = both;
    state.sum[i] = state.sum[i] * mine[i] + theirs[(kN / 4 + i) * 128] * other[i];
  }
#pragma unroll
  for (int panel = 0; panel < kValuePanels; ++panel) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int head = i / 4 * 2 + i % 2;
      state.out[panel][i] = state.out[panel][i] * mine[head] +
                            theirs[(kN / 2 + panel * kN / 2 + i) * 128] * other[head];
    }
  }
}

template <int kN>
__device__ __forceinline__ void leave(const Softmax<kN>& state, float* to, int thread) {
  to += thread;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    to[i * 128] = state.highest[i];
    to[(kN / 4 + i) * 128] = state.sum[i];
  }
#pragma unroll
  for (int panel = 0; panel < kValuePanels; ++panel) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) to[(kN / 2 + panel * kN / 2 + i) * 128] = state.out[panel][i];
  }
}

template <int kN>
__device__ __forceinline__ void write_out(const Params& params, const Item& item, int token,
                                          int first_head, bool empty, float (&warp_values)[4][kN],
                                          int group, Softmax<kN>& state) {
  const SparseMlaSm90Args& args = params.args;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, c = lane % 4;
  const auto add = [](float x, float y) { return x + y; };
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) state.sum[i] = over_keys(state.sum[i], add);
  named_barrier(2 + group, 128);  // the last tile's values have been read
  over_warps<kN>(state.sum, warp_values, group, add);
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const int head = first_head + i / 2 * 8 + 2 * c + i % 2;
    if (head >= args.num_heads) continue;
    // Without keys the output is zeros; keys whose scores are all -infinity make it 0 / 0.
    const float inverse = empty ? 0 : 1 / state.sum[i];
    const int64_t row = static_cast<int64_t>(token) * args.num_heads + head;
    const int dim = 16 * warp + lane / 4;
    const bool whole = params.num_parts == 1;
    const int64_t part_row = row * params.num_parts + item.part;
#pragma unroll
    for (int panel = 0; panel < kValuePanels; ++panel) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = state.out[panel][i / 2 * 4 + 2 * half + i % 2] * inverse;
        const int at = panel * 64 + dim + 8 * half;
        if (!whole) {
          params.part_out[part_row * kLatentDim + at] = value;
        } else if (args.out_is_bf16) {
          static_cast<__nv_bfloat16*>(args.out)[row * kLatentDim + at] = __float2bfloat16_rn(value);
        } else {
          static_cast<float*>(args.out)[row * kLatentDim + at] = value;
        }
      }
    }
    if (!whole && warp == 0 && lane < 4) {
      params.part_lse[part_row] =
          state.sum[i] == 0 ? __uint_as_float(0xFF800000u) : state.highest[i] + log2f(state.sum[i]);
    }
  }
}

template <int kN, Mode kMode>
__device__ void compute_loop(const Params& params, Shared<kN, kMode>& shared) {
  constexpr int kBothGroups = 1;  // named barriers; 2 and 3 are the warpgroups'
  const SparseMlaSm90Args& args = params.args;
  const float scale_log2 = args.scale * kLog2e;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int row = thread / 32 * 16 + lane / 4;
  constexpr bool kSplitKeys = kMode == Mode::kSplitKeys;
  uint32_t first_tile = 0;  // of the item, among all tiles of this block

  for (int index = blockIdx.x; index < params.num_items; index += gridDim.x) {
    const Item item = find_item<kN, kMode>(params, index);
    const int num_tiles = item.num_tiles();
    const int token = item.token;
    const int first_head = item.first_head + (kMode == Mode::kSplitHeads ? group * kN : 0);
    const int q_index = kSplitKeys ? 0 : group;
    if constexpr (kSplitKeys) {
      named_barrier(kBothGroups, 256);
      load_q<kN>(args, token, first_head, shared.q[0], threadIdx.x, 256);
      fence_async_proxy();
      named_barrier(kBothGroups, 256);
    } else {
      named_barrier(2 + group, 128);
      load_q<kN>(args, token, first_head, shared.q[q_index], thread, 128);
      fence_async_proxy();
      named_barrier(2 + group, 128);
    }

    Softmax<kN> state;
    state.reset();
    for (int tile = kSplitKeys ? group : 0; tile < num_tiles; tile += kSplitKeys ? 2 : 1) {
      const uint32_t count = first_tile + tile;
      const int stage = count % kStages;
      bool wanted[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = tile * kTileKeys + row + 8 * i;
        wanted[i] = key < item.num_keys;
      }
      barrier_wait(&shared.full[stage], count / kStages % 2);
      fence_async_proxy();  // cp.async has written rows, an ordinary store to
                            // the fence
      attend<kN, kMode>(shared, shared.q[q_index][0], stage, group, scale_log2, wanted, state);
      // The second warpgroup leaves its sums where its last tile was.
      const bool keep = kSplitKeys && group == 1 && tile + 2 >= num_tiles;
      if (!keep) barrier_arrive(&shared.empty[stage]);
    }
    if constexpr (kSplitKeys) {
      if (num_tiles >= 2) {
        const int last = num_tiles % 2 == 0 ? num_tiles - 1 : num_tiles - 2;  // an odd one
        const int stage = (first_tile + last) % kStages;
        float* place = reinterpret_cast<float*>(shared.rows[stage]);
        static_assert((kN / 2 + kValuePanels * kN / 2) * 128 * 4 <= sizeof(shared.rows[0]));
        // All warps of the second group have read the tile. The first has nothing to wait for, but
        // racecheck loses count of the next barrier where only one of the two has met before.
        named_barrier(2 + group, 128);
        if (group == 1) leave<kN>(state, place, thread);
        named_barrier(kBothGroups, 256);
        if (group == 0) {
          merge<kN>(state, place, thread);
          barrier_arrive(&shared.empty[stage]);
        }
      }
      if (group == 0)
        write_out<kN>(params, item, token, first_head, num_tiles == 0, shared.warp_values[0], 0,
                      state);
    } else {
      write_out<kN>(params, item, token, first_head, num_tiles == 0, shared.warp_values[group],
                    group, state);
    }
    first_tile += num_tiles;
  }
}

// Registers of a thread that gathers and of one that computes: 128 and 256 threads have 65,536.
template <int kN, bool kFp8>
constexpr int kGatherRegisters = !kFp8      ? 72
                                 : kN <= 24 ? 152
                                            : 104;
template <int kN, bool kFp8>
constexpr int kComputeRegisters = (504 - kGatherRegisters<kN, kFp8>) / 2;

template <int kN, Mode kMode, bool kFp8>
__global__ void __launch_bounds__(384, 1) sparse_mla_kernel(const __grid_constant__ Params params) {
  wait_for_previous();
  extern __shared__ uint8_t dynamic_memory[];
  auto& shared = *reinterpret_cast<Shared<kN, kMode>*>(
      dynamic_memory + (1024 - shared_address(dynamic_memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], kFp8 ? 256 : 128);
      barrier_init(&shared.empty[stage], kMode == Mode::kSplitKeys ? 128 : 256);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    give_registers<kGatherRegisters<kN, kFp8>>();
    if constexpr (kFp8) {
      gather_fp8<kN, kMode>(params, shared);
    } else {
      gather_bf16<kN, kMode>(params, shared);
    }
  } else {
    take_registers<kComputeRegisters<kN, kFp8>>();
    compute_loop<kN, kMode>(params, shared);
  }
}

// --- parts of one selection ---

// One block for each (token, head), four values a thread.
__global__ void __launch_bounds__(kLatentDim / 4) merge_parts(const Params params) {
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const float* lse = params.part_lse + row * params.num_parts;
  const float4* parts =
      reinterpret_cast<const float4*>(params.part_out + row * params.num_parts * kLatentDim);
  float highest = __uint_as_float(0xFF800000u);
  for (int part = 0; part < params.num_parts; ++part) highest = fmaxf(highest, lse[part]);
  highest = finite_or_zero(highest);
  float sum = 0;
  float4 out = {0, 0, 0, 0};
  for (int part = 0; part < params.num_parts; ++part) {
    // A part without keys is skipped, but NaN is not.
    if (lse[part] == __uint_as_float(0xFF800000u)) continue;
    const float weight = exp2f(lse[part] - highest);
    const float4 value = parts[part * (kLatentDim / 4) + threadIdx.x];
    sum += weight;
    out = {out.x + weight * value.x, out.y + weight * value.y, out.z + weight * value.z,
           out.w + weight * value.w};
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;
  out = {out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse};
  const int64_t at = row * (kLatentDim / 4) + threadIdx.x;
  if (params.args.out_is_bf16) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(out.x, out.y),
                                     __floats2bfloat162_rn(out.z, out.w)};
    static_cast<uint2*>(params.args.out)[at] = *reinterpret_cast<const uint2*>(pairs);
  } else {
    static_cast<float4*>(params.args.out)[at] = out;
  }
}

template <int kN, Mode kMode>
cudaError_t start(const Params& params, int num_multiprocessors, cudaStream_t stream) {
  const auto kernel = params.args.rows_are_fp8 ? sparse_mla_kernel<kN, kMode, true>
                                               : sparse_mla_kernel<kN, kMode, false>;
  const int num_bytes = sizeof(Shared<kN, kMode>) + 1024;
  static_assert(sizeof(Shared<kN, kMode>) + 1024 <= 227 * 1024);
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
  if (status != cudaSuccess) return status;
  return start_kernel(kernel,
                      dim3(static_cast<unsigned>(std::min(params.num_items, num_multiprocessors))),
                      dim3(384), static_cast<size_t>(num_bytes), stream, true, params);
}

bool splits_heads(int num_heads) { return num_heads > 32; }

int num_head_groups(int num_heads) { return splits_heads(num_heads) ? (num_heads + 63) / 64 : 1; }

}  // namespace

int sparse_mla_num_parts(int num_tokens, int num_heads, int k, int num_multiprocessors) {
  const int items = std::max(num_tokens * num_head_groups(num_heads), 1);
  const int tiles = (k + kTileKeys - 1) / kTileKeys;
  // Two tiles keep both warpgroups busy; parts beyond one wave wait for each other.
  return std::clamp(num_multiprocessors / items, 1, std::max((tiles + 1) / 2, 1));
}

int64_t sparse_mla_workspace(int num_tokens, int num_heads, int num_parts) {
  if (num_parts == 1) return 0;
  return int64_t{num_tokens} * num_heads * num_parts * (kLatentDim + 1) * 4;
}

cudaError_t sparse_mla_sm90(const SparseMlaSm90Args& args, int num_parts, void* workspace,
                            int num_multiprocessors, cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;
  Params params = {};
  params.args = args;
  params.num_head_groups = num_head_groups(args.num_heads);
  params.num_parts = num_parts;
  const int tiles = (args.k + kTileKeys - 1) / kTileKeys;
  params.part_keys = (tiles + num_parts - 1) / num_parts * kTileKeys;
  params.part_out = static_cast<float*>(workspace);
  params.part_lse =
      params.part_out + int64_t{args.num_tokens} * args.num_heads * num_parts * kLatentDim;
  params.num_items = args.num_tokens * params.num_head_groups * num_parts;
  cudaError_t status;
  if (splits_heads(args.num_heads)) {
    status = start<32, Mode::kSplitHeads>(params, num_multiprocessors, stream);
  } else if (args.num_heads > 24) {
    status = start<32, Mode::kSplitKeys>(params, num_multiprocessors, stream);
  } else if (args.num_heads > 16) {
    status = start<24, Mode::kSplitKeys>(params, num_multiprocessors, stream);
  } else if (args.num_heads > 8) {
    status = start<16, Mode::kSplitKeys>(params, num_multiprocessors, stream);
  } else {
    status = start<8, Mode::kSplitKeys>(params, num_multiprocessors, stream);
  }
  if (status != cudaSuccess || num_parts == 1) return status;
  return start_kernel(merge_parts, dim3(static_cast<unsigned>(args.num_tokens * args.num_heads)),
                      dim3(kLatentDim / 4), 0, stream, true, params);
}

}  // namespace indexcache::sm90
