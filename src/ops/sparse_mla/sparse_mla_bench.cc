// Random rows and queries; the selections are random positions of a long cache ("scattered") or
// runs of 16 at random places ("clustered"). peak_GFLOP/s is what one thread reaches with the
// multiply instruction alone, operands in registers. GFLOP/s and gathered_GB/s are by the clock;
// peak_pct is by CPU time of all threads, waiting included, so that it also holds on a machine that
// is shared with others.
#include <benchmark/benchmark.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <numeric>
#include <string>
#include <vector>

#include "base/rng.h"
#include "device/cpu_features.h"
#include "ops/sparse_mla/sparse_mla_impl.h"

namespace indexcache {
namespace {

constexpr int kChains = 16;  // more than latency * throughput of any of these instructions

__attribute__((target("avx512f,avx512bf16"))) double bf16_flops(int64_t rounds) {
  __m512 acc[kChains] = {};
  __m512 x = _mm512_set1_ps(1e-3f);
  for (int64_t r = 0; r < rounds; ++r) {
    for (__m512& a : acc) {
      a = _mm512_dpbf16_ps(a, (__m512bh)x, (__m512bh)x);
      asm volatile("" : "+v"(a));
    }
  }
  asm volatile("" : : "v"(acc[0]));
  return 64.0 * kChains * static_cast<double>(rounds);
}

__attribute__((target("avx512f"))) double avx512_flops(int64_t rounds) {
  __m512 acc[kChains] = {};
  __m512 x = _mm512_set1_ps(1e-3f);
  for (int64_t r = 0; r < rounds; ++r) {
    for (__m512& a : acc) {
      a = _mm512_fmadd_ps(a, x, x);
      asm volatile("" : "+v"(a));
    }
  }
  asm volatile("" : : "v"(acc[0]));
  return 32.0 * kChains * static_cast<double>(rounds);
}

__attribute__((target("avx2,fma"))) double avx2_flops(int64_t rounds) {
  __m256 acc[12] = {};
  __m256 x = _mm256_set1_ps(1e-3f);
  for (int64_t r = 0; r < rounds; ++r) {
    for (__m256& a : acc) {
      a = _mm256_fmadd_ps(a, x, x);
      asm volatile("" : "+x"(a));
    }
  }
  asm volatile("" : : "x"(acc[0]));
  return 16.0 * 12 * static_cast<double>(rounds);
}

double process_cpu_seconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// FLOP/s of one thread: best of several tries.
double peak_flops(double (*flops)(int64_t)) {
  double best = 0;
  for (int i = 0; i < 30; ++i) {
    const double start = process_cpu_seconds();
    const double done = flops(100000);
    best = std::max(best, done / (process_cpu_seconds() - start));
  }
  return best;
}

struct Shape {
  const char* name;
  int64_t num_heads, value_dim, rope_dim, k, context, num_tokens;
  DType dtype;
  bool clustered;
};

void run(benchmark::State& state, const Shape& shape, const OpImpl<SparseMlaArgs>& impl,
         int num_threads) {
  Rng rng(1);
  Exec exec(num_threads);
  const int64_t row_elements = shape.value_dim + shape.rope_dim;
  const int64_t num_pages = shape.context / kPageTokens;
  const int64_t row_bytes = row_elements * dtype_bytes(shape.dtype);
  HostMemory cache(static_cast<size_t>(num_pages * kPageTokens * row_bytes));
  for (int64_t i = 0; i < num_pages * kPageTokens * row_elements; ++i) {
    const float x = rng.normal();
    if (shape.dtype == DType::kBF16) {
      reinterpret_cast<uint16_t*>(cache.data())[i] = f32_to_bf16(x);
    } else {
      reinterpret_cast<float*>(cache.data())[i] = x;
    }
  }
  std::vector<int32_t> pages(static_cast<size_t>(num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[rng.below(i)]);
  std::vector<float> q(static_cast<size_t>(shape.num_tokens * shape.num_heads * row_elements));
  for (float& x : q) x = rng.normal();
  std::vector<float> out(static_cast<size_t>(shape.num_tokens * shape.num_heads * shape.value_dim));
  std::vector<int32_t> positions;
  const int64_t run_length = shape.clustered ? 16 : 1;
  const int64_t visible = shape.context - shape.num_tokens;
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::vector<int32_t> starts(static_cast<size_t>(visible / run_length));
    for (size_t i = 0; i < starts.size(); ++i) starts[i] = static_cast<int32_t>(i * run_length);
    for (size_t i = 0; i < static_cast<size_t>(shape.k / run_length); ++i) {
      std::swap(starts[i], starts[i + rng.below(starts.size() - i)]);
    }
    starts.resize(static_cast<size_t>(shape.k / run_length));
    std::sort(starts.begin(), starts.end());
    for (const int32_t start : starts) {
      for (int32_t i = 0; i < run_length; ++i) positions.push_back(start + i);
    }
  }
  const std::vector<int32_t> counts(static_cast<size_t>(shape.num_tokens),
                                    static_cast<int32_t>(shape.k));
  const SeqSpan seq{0, shape.num_tokens, visible, pages.data()};
  SparseMlaArgs args;
  args.q = q.data();
  args.num_heads = shape.num_heads;
  args.value_dim = shape.value_dim;
  args.scale = 1 / std::sqrt(static_cast<float>(row_elements));
  args.rows = {shape.dtype, row_elements, kPageTokens * row_bytes, cache.data()};
  args.seqs = {&seq, 1};
  args.positions = positions.data();
  args.counts = counts.data();
  args.k = shape.k;
  args.out = out.data();

  const bool dot = impl.name == std::string("avx512bf16") && shape.dtype == DType::kBF16;
  const auto peak = dot ? bf16_flops : impl.name == std::string("avx2") ? avx2_flops : avx512_flops;
  const double ceiling = peak_flops(peak);
  exec.forced["sparse_mla"] = impl.name;
  double best = 1e30, best_cpu = 1e30;
  for (auto _ : state) {
    const double start = monotonic_seconds(), cpu_start = process_cpu_seconds();
    sparse_mla(exec, args);
    best = std::min(best, monotonic_seconds() - start);
    best_cpu = std::min(best_cpu, process_cpu_seconds() - cpu_start);
    benchmark::DoNotOptimize(out.data());
  }
  const Cost cost = sparse_mla_cost(Device::kCpu, args);
  const double gathered = static_cast<double>(shape.num_tokens * shape.k * row_bytes);
  state.counters["GFLOP/s"] = cost.flops / best * 1e-9;
  state.counters["peak_GFLOP/s"] = ceiling * 1e-9;
  state.counters["peak_pct"] = 100 * cost.flops / best_cpu / ceiling;
  state.counters["gathered_GB/s"] = gathered / best * 1e-9;
  state.counters["us/token"] = best / static_cast<double>(shape.num_tokens) * 1e6;
}

const int kRegistered = [] {
  static constexpr Shape kShapes[] = {
      {"h16_512+64_k2048_bf16_scattered", 16, 512, 64, 2048, 16384, 64, DType::kBF16, false},
      {"h16_512+64_k2048_bf16_clustered", 16, 512, 64, 2048, 16384, 64, DType::kBF16, true},
      {"h16_512+64_k2048_bf16_decode", 16, 512, 64, 2048, 16384, 1, DType::kBF16, false},
      {"h8_128+32_k256_bf16_scattered", 8, 128, 32, 256, 16384, 256, DType::kBF16, false},
      {"h8_128+32_k256_bf16_decode", 8, 128, 32, 256, 16384, 1, DType::kBF16, false},
      {"h20_512+64_k2048_bf16_scattered", 20, 512, 64, 2048, 16384, 64, DType::kBF16, false},
      {"h64_512+64_k2048_bf16_scattered", 64, 512, 64, 2048, 16384, 64, DType::kBF16, false},
      {"h128_512+64_k2048_bf16_scattered", 128, 512, 64, 2048, 16384, 64, DType::kBF16, false},
      {"h16_512+64_k2048_f32_scattered", 16, 512, 64, 2048, 16384, 64, DType::kF32, false},
      {"h64_512+64_k2048_f32_scattered", 64, 512, 64, 2048, 16384, 64, DType::kF32, false},
  };
  for (const Shape& shape : kShapes) {
    for (const OpImpl<SparseMlaArgs>& impl : sparse_mla_impls()) {
      if (impl.name == std::string("ref") || !impl.supported({})) continue;
      for (const int threads : {1, 2}) {
        const std::string name =
            fmt::format("sparse_mla/{}/{}/t{}", impl.name, shape.name, threads);
        benchmark::RegisterBenchmark(
            name.c_str(),
            [&shape, &impl, threads](benchmark::State& s) { run(s, shape, impl, threads); })
            ->Unit(benchmark::kMillisecond)
            ->UseRealTime();
      }
    }
  }
  return 0;
}();

}  // namespace
}  // namespace indexcache
