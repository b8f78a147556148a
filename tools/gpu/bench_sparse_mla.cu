// Sparse MLA on Hopper against loops in double on the GPU, then times. Built by tools/gpu/build.
//
//   bench_sparse_mla [check|time]
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <numeric>
#include <string>

#include "gpu_check.h"
#include "ops/sparse_mla/sparse_mla_sm90.cuh"

using namespace gpu_check;
using namespace indexcache;
using namespace indexcache::sm90;

namespace {

__host__ __device__ constexpr int64_t row_bytes(bool fp8) { return fp8 ? 656 : kLatentRow * 2; }
__host__ __device__ constexpr int64_t page_bytes(bool fp8) {
  return kPageTokens * row_bytes(fp8) + 32;
}
constexpr float kLargest = 1.7320508f;  // of the elements of rows

struct Run {
  int64_t first_position, num_tokens;
};

__device__ float uniform(uint64_t z) {
  z *= 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<float>(z >> 40) * 0x1p-24f;
}

// fp8: e4m3, of each 128 with a scale of its own, then bf16.
__global__ void fill_rows(uint8_t* pool, bool fp8, int64_t num_pages, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
       i < num_pages * kPageTokens * kLatentRow; i += int64_t{gridDim.x} * blockDim.x) {
    const float x = (2 * uniform(seed + static_cast<uint64_t>(i) + 1) - 1) * kLargest;
    const int64_t row = i / kLatentRow, e = i % kLatentRow;
    uint8_t* to = pool + row / kPageTokens * page_bytes(fp8) + row % kPageTokens * row_bytes(fp8);
    if (!fp8) {
      reinterpret_cast<__nv_bfloat16*>(to)[e] = __float2bfloat16(x);
    } else if (e >= kLatentDim) {
      reinterpret_cast<__nv_bfloat16*>(to + 528)[e - kLatentDim] = __float2bfloat16(x);
    } else {
      const float share = 0.3f + 0.7f * uniform(~(seed + static_cast<uint64_t>(row * 4 + e / 128)));
      to[e] = __nv_cvt_float_to_fp8(x / kLargest * 448, __NV_SATFINITE, __NV_E4M3);
      if (e % 128 == 0) reinterpret_cast<float*>(to + 512)[e / 128] = share * kLargest / 448;
    }
  }
}

__device__ double element(const uint8_t* row, bool fp8, int e) {
  if (!fp8) return double{__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[e])};
  if (e >= kLatentDim)
    return double{
        __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row + 528)[e - kLatentDim])};
  const __half_raw half = __nv_cvt_fp8_to_halfraw(row[e], __NV_E4M3);
  return double{__half2float(half) * reinterpret_cast<const float*>(row + 512)[e / 128]};
}

// One block for each (token, head); `bound` is what the op's contract allows an element to be off,
// divided by the largest row element.
__global__ void naive_attention(SparseMlaSm90Args args, float* out, float* bound) {
  extern __shared__ double weights[];
  __shared__ double sum, highest, size;
  const int64_t token = blockIdx.x / args.num_heads;
  int run = 0;
  while (run + 1 < args.num_seqs && args.seqs[run + 1].token_begin <= token) ++run;
  const int32_t* pages = args.seqs[run].pages;
  const int n = args.counts[token];
  const auto row_of = [&](int s) {
    const int32_t p = args.positions[token * args.k + s];
    return args.rows + pages[p / kPageTokens] * args.page_bytes +
           p % kPageTokens * row_bytes(args.rows_are_fp8);
  };
  const float* q = static_cast<const float*>(args.q) + int64_t{blockIdx.x} * kLatentRow;
  __shared__ float sizes[256];
  sizes[threadIdx.x] = 0;
  for (int s = threadIdx.x; s < n; s += blockDim.x) {
    const uint8_t* row = row_of(s);
    double dot = 0, dot_size = 0;
    for (int i = 0; i < kLatentRow; ++i) {
      const double product = double{q[i]} * element(row, args.rows_are_fp8, i);
      dot += product;
      dot_size += fabs(product);
    }
    weights[s] = args.scale * dot;
    sizes[threadIdx.x] = fmaxf(sizes[threadIdx.x], static_cast<float>(args.scale * dot_size));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    highest = -INFINITY;
    sum = size = 0;
    for (int s = 0; s < n; ++s) highest = fmax(highest, weights[s]);
    for (int s = 0; s < n; ++s) sum += weights[s] = exp(weights[s] - highest);
    for (int i = 0; i < 256; ++i) size = fmax(size, double{sizes[i]});
    const double rounding = args.rows_are_fp8 ? 0x1p-8 : 0x1p-9;
    bound[blockIdx.x] = static_cast<float>(fmin((rounding + 580 * 0x1p-24) * size, 2.0) + rounding +
                                           (3.0 * n + 32) * 0x1p-24);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kLatentDim; d += blockDim.x) {
    double value = 0;
    for (int s = 0; s < n; ++s)
      value += weights[s] / sum * element(row_of(s), args.rows_are_fp8, d);
    out[int64_t{blockIdx.x} * kLatentDim + d] = static_cast<float>(value);
  }
}

struct Batch {
  bool fp8;
  int num_heads, k;
  int64_t num_tokens = 0, num_pages = 0;
  std::vector<SeqSpan> spans;
  DeviceArray<int32_t> pages;
  DeviceArray<uint8_t> pool;
  DeviceArray<SeqSpan> seqs;
  DeviceArray<float> q, out;
  DeviceArray<int32_t> positions, counts;

  static int64_t total(const std::vector<Run>& runs, bool tokens) {
    int64_t sum = 0;
    for (const Run& run : runs) {
      sum += tokens ? run.num_tokens
                    : (run.first_position + run.num_tokens + kPageTokens - 1) / kPageTokens;
    }
    return sum;
  }

  // Neighbouring tokens share `shared` of their selections, about.
  Batch(bool fp8_rows, int heads, int top_k, const std::vector<Run>& runs, double shared,
        int count_step, uint64_t seed)
      : fp8(fp8_rows),
        num_heads(heads),
        k(top_k),
        num_tokens(total(runs, true)),
        num_pages(total(runs, false)),
        pages(static_cast<size_t>(num_pages)),
        pool(static_cast<size_t>(num_pages * page_bytes(fp8))),
        seqs(runs.size()),
        q(static_cast<size_t>(num_tokens * heads * kLatentRow)),
        out(static_cast<size_t>(num_tokens * heads * kLatentDim)),
        positions(static_cast<size_t>(num_tokens * k)),
        counts(static_cast<size_t>(num_tokens)) {
    Random random{seed};
    std::vector<int32_t> order(static_cast<size_t>(num_pages));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[random.below(static_cast<uint32_t>(i))]);
    pages.set(order);
    fill_rows<<<1024, 256>>>(pool.data, fp8, num_pages, seed);
    fill_normal<<<1024, 256>>>(q.data, q.size, seed + 1);
    std::vector<int32_t> all(positions.size, INT32_MAX), number(counts.size);
    int64_t page = 0, token = 0;
    for (const Run& run : runs) {
      spans.push_back({token, run.num_tokens, run.first_position, pages.data + page});
      std::vector<int32_t> before;
      for (int64_t i = 0; i < run.num_tokens; ++i, ++token) {
        const int64_t visible = run.first_position + i + 1;
        int64_t count = std::min<int64_t>(k, visible);
        if (count_step > 0) count = std::min<int64_t>(count, (token * count_step) % (k + 1));
        std::vector<int32_t> own;
        for (const int32_t p : before) {
          if (random.uniform() < shared) own.push_back(p);
        }
        std::vector<char> taken;
        if (count * 2 >= visible) {
          own.resize(static_cast<size_t>(visible));
          std::iota(own.begin(), own.end(), 0);
          for (size_t j = own.size(); j > 1; --j)
            std::swap(own[j - 1], own[random.below(static_cast<uint32_t>(j))]);
        } else {
          while (static_cast<int64_t>(own.size()) < count + 64)
            own.push_back(static_cast<int32_t>(random.below(static_cast<uint32_t>(visible))));
          std::sort(own.begin(), own.end());
          own.erase(std::unique(own.begin(), own.end()), own.end());
          while (static_cast<int64_t>(own.size()) > count)
            own.erase(own.begin() + random.below(static_cast<uint32_t>(own.size())));
        }
        own.resize(static_cast<size_t>(std::min<int64_t>(count, static_cast<int64_t>(own.size()))));
        std::sort(own.begin(), own.end());
        std::copy(own.begin(), own.end(), all.begin() + token * k);
        number[static_cast<size_t>(token)] = static_cast<int32_t>(own.size());
        before = own;
      }
      page += (run.first_position + run.num_tokens + kPageTokens - 1) / kPageTokens;
    }
    positions.set(all);
    counts.set(number);
    seqs.set(spans);
    FINISH();
  }

  SparseMlaSm90Args args() const {
    SparseMlaSm90Args args;
    args.q = q.data;
    args.num_heads = num_heads;
    args.scale = 0.0625f;
    args.rows = pool.data;
    args.rows_are_fp8 = fp8;
    args.page_bytes = page_bytes(fp8);
    args.seqs = seqs.data;
    args.num_seqs = static_cast<int>(seqs.size);
    args.num_tokens = static_cast<int>(num_tokens);
    args.positions = positions.data;
    args.counts = counts.data;
    args.k = k;
    args.out = out.data;
    return args;
  }
};

// Elements of the output that are further off than the contract allows.
void compare(const Batch& batch, const char* name) {
  DeviceArray<float> naive(batch.out.size),
      bound(static_cast<size_t>(batch.num_tokens * batch.num_heads));
  OK(cudaFuncSetAttribute(naive_attention, cudaFuncAttributeMaxDynamicSharedMemorySize,
                          batch.k * 8));
  naive_attention<<<static_cast<unsigned>(batch.num_tokens * batch.num_heads), 256, batch.k * 8>>>(
      batch.args(), naive.data, bound.data);
  FINISH();
  const std::vector<float> got = batch.out.get(), want = naive.get(), bounds = bound.get();
  const std::vector<int32_t> counts = batch.counts.get();
  double worst = 0, error = 0, norm = 0;
  size_t worst_at = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const size_t row = i / kLatentDim, token = row / static_cast<size_t>(batch.num_heads);
    const double expected = counts[token] == 0 ? 0 : want[i];
    const double off = std::fabs(got[i] - expected);
    error += off * off;
    norm += expected * expected;
    const double relative = counts[token] == 0 ? (off == 0 ? 0 : INFINITY)
                                               : off / (double{bounds[row]} * double{kLargest});
    if (!(relative <= worst)) {
      worst = std::isnan(relative) ? INFINITY : relative;
      worst_at = i;
    }
  }
  report(worst <= 1 && std::sqrt(error / norm) < 0.01,
         "%s %s heads %d k %d tokens %lld: relative error %.2e, worst %.3f of its bound (token %zu "
         "head %zu dim %zu)",
         name, batch.fp8 ? "fp8" : "bf16", batch.num_heads, batch.k,
         static_cast<long long>(batch.num_tokens), std::sqrt(error / norm), worst,
         worst_at / kLatentDim / static_cast<size_t>(batch.num_heads),
         worst_at / kLatentDim % static_cast<size_t>(batch.num_heads), worst_at % kLatentDim);
}

void check(const char* name, bool fp8, int heads, int k, const std::vector<Run>& runs,
           int count_step, int num_parts, uint64_t seed) {
  const Batch batch(fp8, heads, k, runs, 0.6, count_step, seed);
  const int sms = multiprocessors();
  DeviceArray<uint8_t> workspace(static_cast<size_t>(
      sparse_mla_workspace(static_cast<int>(batch.num_tokens), heads, num_parts)));
  OK(sparse_mla_sm90(batch.args(), num_parts, workspace.data, sms, nullptr));
  FINISH();
  compare(batch, name);
}

void time_prefill(bool fp8, int heads, int64_t tokens, int64_t context, double shared) {
  const Batch batch(fp8, heads, 2048, {{context - tokens, tokens}}, shared, 0, 5);
  const int sms = multiprocessors();
  const double gathered = static_cast<double>(tokens) * 2048 * static_cast<double>(row_bytes(fp8));
  const double flops = static_cast<double>(tokens) * 2048 * heads * 2 * (kLatentRow + kLatentDim);
  const double single =
      milliseconds([&] { OK(sparse_mla_sm90(batch.args(), 1, nullptr, sms, nullptr)); }, 5);
  std::printf("prefill %s %lld x %lld, %d heads: %.3f ms (%.0f useful TFLOP/s, gather %.2f TB/s)\n",
              fp8 ? "fp8" : "bf16", static_cast<long long>(tokens), static_cast<long long>(context),
              heads, single, flops / single * 1e-9, gathered / single * 1e-9);
  std::fflush(stdout);
}

void time_decode(bool fp8, int heads, int batch_size, int64_t context) {
  const Batch batch(fp8, heads, 2048,
                    std::vector<Run>(static_cast<size_t>(batch_size), {context - 1, 1}), 0, 0, 6);
  const int sms = multiprocessors();
  const int parts = sparse_mla_num_parts(batch_size, heads, 2048, sms);
  DeviceArray<uint8_t> workspace(
      static_cast<size_t>(sparse_mla_workspace(batch_size, heads, parts)));
  const double time = graph_microseconds([&](cudaStream_t stream) {
    OK(sparse_mla_sm90(batch.args(), parts, workspace.data, sms, stream));
  });
  std::printf("decode %s batch %d x %lld, %d heads, %d parts: %.1f us\n", fp8 ? "fp8" : "bf16",
              batch_size, static_cast<long long>(context), heads, parts, time);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  print_device();
  if (what != "time") {
    const std::vector<Run> ragged = {{0, 70}, {3000, 45}, {0, 1}, {190, 100}};
    for (const bool fp8 : {false, true}) {
      check("one tile", fp8, 20, 64, {{63, 1}}, 0, 1, 1);
      check("two tiles", fp8, 20, 128, {{127, 1}}, 0, 1, 2);
      check("one token", fp8, 20, 2048, {{5000, 1}}, 0, 1, 3);
      for (const int heads : {20, 8, 16, 24, 32, 3, 64, 40, 128}) {
        check("ragged", fp8, heads, 256, ragged, 0, 1, 10 + static_cast<uint64_t>(heads));
        check("any count", fp8, heads, 300, ragged, 37, 1, 20 + static_cast<uint64_t>(heads));
      }
      check("parts", fp8, 20, 2048, {{9000, 1}, {100, 1}, {3000, 2}}, 0, 16, 50);
      check("parts, any count", fp8, 20, 2048, {{9000, 1}, {8000, 3}}, 700, 7, 51);
      check("parts", fp8, 64, 2048, {{9000, 1}}, 0, 8, 52);
      check("many", fp8, 20, 2048, {{20000, 600}}, 0, 1, 70);
    }
  }
  if (what != "check") {
    for (const bool fp8 : {false, true}) {
      time_prefill(fp8, 20, 4096, 200000, 0.0);
      time_prefill(fp8, 20, 4096, 200000, 0.6);
      time_prefill(fp8, 20, 4096, 200000, 0.85);
      time_prefill(fp8, 32, 4096, 200000, 0.6);
      time_prefill(fp8, 64, 2048, 200000, 0.6);
      for (const int batch : {1, 4, 8, 32, 64}) time_decode(fp8, 20, batch, 200000);
      time_decode(fp8, 64, 1, 200000);
    }
  }
  return finish();
}
