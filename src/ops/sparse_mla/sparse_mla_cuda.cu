// sparse_mla for any GPU, by online softmax: a block attends with some heads of one token to a part
// of its selection, some rows at a time. Where tokens are few, the parts are small and a second
// kernel merges them.
//
// "cuda" takes any sizes, in f32 arithmetic, 16 heads and 16 rows at a time. "cuda_mma" takes bf16
// and fp8 rows with the value_dim of published models, 32 heads and 32 rows at a time on tensor
// cores.
//
// Of a token 2 H (row_elements + value_dim) flops for each selected row, which is read once for
// each 16 or 32 heads.
#include <algorithm>

#include "base/checked.h"
#include "ops/kit/mma.cuh"
#include "ops/sparse_mla/sparse_mla_impl.h"

namespace indexcache {

namespace {

constexpr int kThreads = 256, kHeads = 16, kRows = 16, kValuesPerThread = 2;
constexpr int kValues = kThreads * kValuesPerThread;  // of one block
static_assert(kHeads * kRows == kThreads);

struct Attention {
  const float* q;
  int64_t num_heads, value_dim, row_elements, k;
  float scale;
  PagedRows rows;
  int64_t row_bytes;
  const SeqSpan* seqs;
  int num_seqs;
  const int32_t* positions;
  const int32_t* counts;
  float* out;
  int64_t num_parts, part_rows;  // of each selection
  // With parts: [num_tokens, num_parts, num_heads, value_dim], and [num_tokens, num_parts,
  // num_heads] of each of max and sum.
  float* part_out;
  float* part_max;
  float* part_sum;
};

__device__ __forceinline__ float of_16_lanes_max(float value) {
  for (int bits = 8; bits > 0; bits /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

__device__ __forceinline__ float of_16_lanes_sum(float value) {
  for (int bits = 8; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

template <DType dtype>
__global__ void __launch_bounds__(kThreads) attend_kernel(Attention a) {
  wait_for_previous();
  const int64_t token = blockIdx.x / a.num_parts, part = blockIdx.x % a.num_parts;
  const int64_t first_head = static_cast<int64_t>(blockIdx.y) * kHeads,
                first_value = static_cast<int64_t>(blockIdx.z) * kValues;
  const int64_t count = a.counts[token], begin = part * a.part_rows,
                end = count < begin + a.part_rows ? count : begin + a.part_rows;
  if (part > 0 && begin >= count) return;  // merging looks at parts that have rows
  const int thread = threadIdx.x;
  const int stride = static_cast<int>(a.row_elements) + 1;  // apart in banks
  float* q = dynamic_shared<float>();
  float* rows = q + kHeads * stride;
  __shared__ float weights[kHeads][kRows], rescale[kHeads], total[kHeads];

  for (int i = thread; i < kHeads * static_cast<int>(a.row_elements); i += kThreads) {
    const int head = i / static_cast<int>(a.row_elements), e = i % static_cast<int>(a.row_elements);
    q[head * stride + e] = first_head + head < a.num_heads
                               ? a.q[(token * a.num_heads + first_head + head) * a.row_elements + e]
                               : 0.0f;
  }
  const SeqSpan& seq = a.seqs[find_seq(a.seqs, a.num_seqs, token)];
  const int32_t* positions = a.positions + token * a.k;

  const int my_head = thread / kRows, my_row = thread % kRows;  // for scores
  float max = minus_infinity(), sum = 0;
  float out[kHeads][kValuesPerThread] = {};
  for (int64_t first = begin; first < end; first += kRows) {
    __syncthreads();
    for (int i = thread; i < kRows * static_cast<int>(a.row_elements); i += kThreads) {
      const int row = i / static_cast<int>(a.row_elements),
                e = i % static_cast<int>(a.row_elements);
      float value = 0;
      if (first + row < end) {
        const uint8_t* from = paged_row(a.rows, a.row_bytes, seq.pages, positions[first + row]);
        if constexpr (dtype == DType::kF8E4M3) {
          value = fp8_latent_at(from, static_cast<int>(a.value_dim), e);
        } else {
          value = element_at<dtype>(from, e);
        }
      }
      rows[row * stride + e] = value;
    }
    __syncthreads();
    float dot = 0;
    for (int e = 0; e < static_cast<int>(a.row_elements); ++e)
      dot += q[my_head * stride + e] * rows[my_row * stride + e];
    const bool there = first + my_row < end;
    const float score = there ? a.scale * dot : minus_infinity();
    const float new_max = fmaxf(max, of_16_lanes_max(score));
    // Scores of -infinity alone weigh 0 until a higher one comes; subtracted from each other they
    // would be NaN.
    const float base = new_max == minus_infinity() ? 0.0f : new_max;
    const float weight = there ? expf(score - base) : 0.0f;
    const float factor = max == minus_infinity() ? 0.0f : expf(max - base);
    sum = sum * factor + of_16_lanes_sum(weight);
    max = new_max;
    weights[my_head][my_row] = weight;
    if (my_row == 0) rescale[my_head] = factor;
    __syncthreads();
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
#pragma unroll
      for (int j = 0; j < kValuesPerThread; ++j) {
        const int64_t d = first_value + thread + j * kThreads;
        if (d >= a.value_dim) continue;
        float value = out[head][j] * rescale[head];
        for (int row = 0; row < kRows; ++row) value += weights[head][row] * rows[row * stride + d];
        out[head][j] = value;
      }
    }
  }
  if (my_row == 0) {
    total[my_head] = sum;
    if (a.num_parts > 1 && first_value == 0 && first_head + my_head < a.num_heads) {
      const int64_t at = (token * a.num_parts + part) * a.num_heads + first_head + my_head;
      a.part_max[at] = max;
      a.part_sum[at] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    if (first_head + head >= a.num_heads) break;
#pragma unroll
    for (int j = 0; j < kValuesPerThread; ++j) {
      const int64_t d = first_value + thread + j * kThreads;
      if (d >= a.value_dim) continue;
      if (a.num_parts > 1) {
        a.part_out[((token * a.num_parts + part) * a.num_heads + first_head + head) * a.value_dim +
                   d] = out[head][j];
      } else {
        a.out[(token * a.num_heads + first_head + head) * a.value_dim + d] =
            count == 0 ? 0.0f : out[head][j] / total[head];
      }
    }
  }
}

// --- bf16 rows on tensor cores: 8 warps ---
//
// Scores of 32 heads and 32 rows are 2 x 4 tiles of mma, one a warp. Of the output each warp has
// value_dim / 8 columns.

constexpr int kMmaHeads = 32, kMmaRows = 32;
constexpr int kPad = 8;  // elements between rows in shared memory: 4 words further in banks

struct MmaShared {
  float scores[kMmaHeads][kMmaRows + 1];
  uint16_t weights[kMmaHeads][kMmaRows + kPad];
  float rescale[kMmaHeads], total[kMmaHeads];
};

// Elements e to e + 7 of a row in fp8, which is a multiple of 4 bytes, as bf16.
__device__ __forceinline__ uint4 dequantised_8(const uint8_t* row, int fp8_elements, int e) {
  const uint8_t* scales = row + fp8_elements;
  if (e >= fp8_elements) {
    const auto* from = reinterpret_cast<const uint32_t*>(
        scales + fp8_elements / static_cast<int>(kFp8Block) * 4 + 2 * (e - fp8_elements));
    return make_uint4(from[0], from[1], from[2], from[3]);
  }
  const float scale = reinterpret_cast<const float*>(scales)[e / static_cast<int>(kFp8Block)];
  const uint32_t* from = reinterpret_cast<const uint32_t*>(row + e);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = from[i / 2] >> (i % 2 * 16);
    pairs[i] = bf16_pair(f8e4m3_bits_to_f32(two & 0xFF) * scale,
                         f8e4m3_bits_to_f32(two >> 8 & 0xFF) * scale);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <int kTiles, bool kFp8>  // kTiles: of 8 columns a warp, value_dim / 64
__global__ void __launch_bounds__(kThreads, 2) attend_mma_kernel(Attention a) {
  wait_for_previous();
  const int64_t token = blockIdx.x / a.num_parts, part = blockIdx.x % a.num_parts;
  const int first_head = static_cast<int>(blockIdx.y) * kMmaHeads;
  const int64_t count = a.counts[token], begin = part * a.part_rows,
                end = count < begin + a.part_rows ? count : begin + a.part_rows;
  if (part > 0 && begin >= count) return;
  const int thread = threadIdx.x, lane = thread % kWarpLanes, warp = thread / kWarpLanes;
  const int g = lane / 4, c = lane % 4;
  const int row_elements = static_cast<int>(a.row_elements), stride = row_elements + kPad;
  MmaShared& shared = *dynamic_shared<MmaShared>();
  uint16_t* q = reinterpret_cast<uint16_t*>(&shared + 1);
  uint16_t* rows = q + kMmaHeads * stride;
  const auto words = [](const uint16_t* at) { return reinterpret_cast<const uint32_t*>(at); };

  for (int i = thread; i < kMmaHeads * row_elements / 2; i += kThreads) {
    const int head = i / (row_elements / 2), e = i % (row_elements / 2) * 2;
    uint32_t pair = 0;
    if (first_head + head < a.num_heads) {
      const float* from = a.q + (token * a.num_heads + first_head + head) * a.row_elements + e;
      pair = bf16_pair(from[0], from[1]);
    }
    *reinterpret_cast<uint32_t*>(q + head * stride + e) = pair;
  }
  const SeqSpan& seq = a.seqs[find_seq(a.seqs, a.num_seqs, token)];
  const int32_t* positions = a.positions + token * a.k;

  // For the softmax: 8 threads a head, 4 rows each.
  const int my_head = thread / 8, my_row = thread % 8 * 4;
  float max = minus_infinity(), sum = 0;
  float out[2][kTiles][4] = {};
  for (int64_t first = begin; first < end; first += kMmaRows) {
    __syncthreads();
    const int chunks = row_elements / 8;
    for (int i = thread; i < kMmaRows * chunks; i += kThreads) {
      const int row = i / chunks, e = i % chunks * 8;
      uint16_t* to = rows + row * stride + e;
      if (first + row < end) {
        const uint8_t* from = paged_row(a.rows, a.row_bytes, seq.pages, positions[first + row]);
        if constexpr (kFp8) {
          *reinterpret_cast<uint4*>(to) = dequantised_8(from, static_cast<int>(a.value_dim), e);
        } else {
          copy_16_bytes_async(to, from + 2 * e);
        }
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      }
    }
    wait_for_async_copies();
    __syncthreads();

    {
      const int head = warp / 4 * 16, row = warp % 4 * 8;
      float scores[4] = {};
      for (int e = 0; e < row_elements; e += 16) {
        const uint32_t* left = words(q + (head + g) * stride + e) + c;
        const uint32_t* below = words(q + (head + g + 8) * stride + e) + c;
        const uint32_t* right = words(rows + (row + g) * stride + e) + c;
        mma_bf16(scores, {left[0], below[0], left[4], below[4]}, {right[0], right[4]});
      }
      shared.scores[head + g][row + 2 * c] = scores[0];
      shared.scores[head + g][row + 2 * c + 1] = scores[1];
      shared.scores[head + g + 8][row + 2 * c] = scores[2];
      shared.scores[head + g + 8][row + 2 * c + 1] = scores[3];
    }
    __syncthreads();

    float score[4], highest = minus_infinity();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      score[j] = first + my_row + j < end ? a.scale * shared.scores[my_head][my_row + j]
                                          : minus_infinity();
      highest = fmaxf(highest, score[j]);
    }
    for (int bits = 4; bits > 0; bits /= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, bits));
    const float new_max = fmaxf(max, highest);
    const float base = new_max == minus_infinity() ? 0.0f : new_max;
    const float factor = max == minus_infinity() ? 0.0f : expf(max - base);
    float weight[4], of_rows = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weight[j] = first + my_row + j < end ? expf(score[j] - base) : 0.0f;
      of_rows += weight[j];
    }
    for (int bits = 4; bits > 0; bits /= 2) of_rows += __shfl_xor_sync(kAllLanes, of_rows, bits);
    sum = sum * factor + of_rows;
    max = new_max;
    uint32_t* to = reinterpret_cast<uint32_t*>(&shared.weights[my_head][my_row]);
    to[0] = bf16_pair(weight[0], weight[1]);
    to[1] = bf16_pair(weight[2], weight[3]);
    if (my_row == 0) shared.rescale[my_head] = factor;
    __syncthreads();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float upper = shared.rescale[16 * i + g], lower = shared.rescale[16 * i + g + 8];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        out[i][j][0] *= upper;
        out[i][j][1] *= upper;
        out[i][j][2] *= lower;
        out[i][j][3] *= lower;
      }
    }
#pragma unroll
    for (int step = 0; step < kMmaRows / 16; ++step) {
      uint32_t left[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t* upper = words(&shared.weights[16 * i + g][16 * step]) + c;
        const uint32_t* lower = words(&shared.weights[16 * i + g + 8][16 * step]) + c;
        left[i][0] = upper[0];
        left[i][1] = lower[0];
        left[i][2] = upper[4];
        left[i][3] = lower[4];
      }
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        // Matrices: rows 0..7 and 8..15 of the step for tile j, the same for tile j + 1.
        const int row = 16 * step + lane % 16, column = (warp * kTiles + j + lane / 16) * 8;
        uint32_t right[4];
        load_transposed(right, rows + row * stride + column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_bf16(out[i][j], left[i], {right[0], right[1]});
          mma_bf16(out[i][j + 1], left[i], {right[2], right[3]});
        }
      }
    }
  }

  if (my_row == 0) {
    shared.total[my_head] = sum;
    if (a.num_parts > 1 && first_head + my_head < a.num_heads) {
      const int64_t at = (token * a.num_parts + part) * a.num_heads + first_head + my_head;
      a.part_max[at] = max;
      a.part_sum[at] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = 16 * i + 8 * half + g;
      if (first_head + head >= a.num_heads) continue;
      const int64_t slot = a.num_parts > 1
                               ? (token * a.num_parts + part) * a.num_heads + first_head + head
                               : token * a.num_heads + first_head + head;
      float* to =
          (a.num_parts > 1 ? a.part_out : a.out) + slot * a.value_dim + warp * kTiles * 8 + 2 * c;
      const float total = a.num_parts > 1 ? 1.0f : shared.total[head];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        to[8 * j] = count == 0 ? 0.0f : out[i][j][2 * half] / total;
        to[8 * j + 1] = count == 0 ? 0.0f : out[i][j][2 * half + 1] / total;
      }
    }
  }
}

size_t mma_shared_bytes(int64_t row_elements) {
  return sizeof(MmaShared) +
         static_cast<size_t>((kMmaHeads + kMmaRows) * (row_elements + kPad)) * sizeof(uint16_t);
}

// --- merging ---

constexpr int kMergeThreads = 128;

// One block a token and head.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(Attention a) {
  wait_for_previous();
  const int64_t token = blockIdx.x, head = blockIdx.y, count = a.counts[token];
  const int64_t parts = ceil_div_cuda(count, a.part_rows);
  const int64_t first = token * a.num_parts * a.num_heads + head;
  float max = minus_infinity();
  for (int64_t part = 0; part < parts; ++part)
    max = fmaxf(max, a.part_max[first + part * a.num_heads]);
  const float base = max == minus_infinity() ? 0.0f : max;
  float sum = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t at = first + part * a.num_heads;
    sum += a.part_sum[at] * expf(a.part_max[at] - base);
  }
  for (int64_t d = threadIdx.x; d < a.value_dim; d += kMergeThreads) {
    float value = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t at = first + part * a.num_heads;
      value += a.part_out[at * a.value_dim + d] * expf(a.part_max[at] - base);
    }
    a.out[(token * a.num_heads + head) * a.value_dim + d] = count == 0 ? 0.0f : value / sum;
  }
}

size_t shared_bytes(int64_t row_elements) {
  return static_cast<size_t>((kHeads + kRows) * (row_elements + 1)) * sizeof(float);
}

int64_t choose_parts(int64_t num_tokens, int64_t head_groups, int64_t k) {
  constexpr int64_t kBlocks = 512;    // a few for each multiprocessor of the largest GPUs
  constexpr int64_t kLeastRows = 64;  // below this, merging costs as much as attending
  return std::clamp<int64_t>(kBlocks / (num_tokens * head_groups), 1, ceil_div(k, kLeastRows));
}

// Runs `kernel`, of which a block has `heads` heads, and merges.
void attend(Exec& exec, const SparseMlaArgs& args, void (*kernel)(Attention), int64_t heads,
            int64_t value_groups, size_t num_shared_bytes) {
  const int64_t num_tokens =
      args.seqs.empty() ? 0 : args.seqs.back().token_begin + args.seqs.back().num_tokens;
  if (num_tokens == 0) return;
  const int64_t head_groups = ceil_div(args.num_heads, heads);
  Attention a = {};
  a.q = args.q;
  a.num_heads = args.num_heads;
  a.value_dim = args.value_dim;
  a.row_elements = args.rows.row_elements;
  a.k = args.k;
  a.scale = args.scale;
  a.rows = args.rows;
  a.row_bytes = args.rows.row_bytes();
  a.seqs = args.device_seqs;
  a.num_seqs = static_cast<int>(args.seqs.size());
  a.positions = args.positions;
  a.counts = args.counts;
  a.out = args.out;
  a.num_parts = choose_parts(num_tokens, head_groups, args.k);
  a.part_rows = round_up(ceil_div(args.k, a.num_parts), int64_t{kMmaRows});
  a.num_parts = ceil_div(args.k, a.part_rows);
  if (a.num_parts > 1) {
    const int64_t rows = num_tokens * a.num_parts * args.num_heads;
    a.part_out = reinterpret_cast<float*>(
        exec.cuda().scratch(static_cast<size_t>(rows * (args.value_dim + 2)) * sizeof(float)));
    a.part_max = a.part_out + rows * args.value_dim;
    a.part_sum = a.part_max + rows;
  }
  launch(kernel,
         dim3(blocks_for(num_tokens * a.num_parts, 1).x, static_cast<unsigned>(head_groups),
              static_cast<unsigned>(value_groups)),
         kThreads, num_shared_bytes, exec.cuda(), a);
  if (a.num_parts > 1) {
    launch(merge_kernel,
           dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>(args.num_heads)),
           kMergeThreads, 0, exec.cuda(), a);
  }
}

constexpr size_t kSharedLimit = 99 * 1024;  // what every GPU since Ampere has

}  // namespace

bool sparse_mla_cuda_supported(const SparseMlaArgs& args) {
  return shared_bytes(args.rows.row_elements) <= kSharedLimit;
}

void sparse_mla_cuda(Exec& exec, const SparseMlaArgs& args) {
  attend(exec, args,
         args.rows.dtype == DType::kF32    ? attend_kernel<DType::kF32>
         : args.rows.dtype == DType::kBF16 ? attend_kernel<DType::kBF16>
                                           : attend_kernel<DType::kF8E4M3>,
         kHeads, ceil_div(args.value_dim, int64_t{kValues}), shared_bytes(args.rows.row_elements));
}

bool sparse_mla_cuda_mma_supported(const SparseMlaArgs& args) {
  const bool fp8 = args.rows.dtype == DType::kF8E4M3 && !args.f32_products;
  return (args.rows.dtype == DType::kBF16 || fp8) &&
         (args.value_dim == 512 || args.value_dim == 128) && args.rows.row_elements % 16 == 0 &&
         args.rows.page_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(args.rows.base) % 16 == 0 &&
         mma_shared_bytes(args.rows.row_elements) <= kSharedLimit;
}

void sparse_mla_cuda_mma(Exec& exec, const SparseMlaArgs& args) {
  const bool fp8 = args.rows.dtype == DType::kF8E4M3;
  attend(exec, args,
         args.value_dim == 512 ? (fp8 ? attend_mma_kernel<8, true> : attend_mma_kernel<8, false>)
                               : (fp8 ? attend_mma_kernel<2, true> : attend_mma_kernel<2, false>),
         kMmaHeads, 1, mma_shared_bytes(args.rows.row_elements));
}

}  // namespace indexcache
