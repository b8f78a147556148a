// matmul on the shapes of DeepSeek-V3.2 and GLM layers, every implementation that this machine can
// run.
//
//   peak_pct  GFLOP/s in % of what all threads reach with the best multiply-add of that type,
//   registers only read_pct  GB/s by the contract's cost in % of what all threads reach reading
//   memory
// Decode shapes walk through enough copies of the weights that none is left in the cache.
#include <benchmark/benchmark.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "base/rng.h"
#include "device/cpu_features.h"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {
namespace {

constexpr size_t kBeyondCacheBytes = size_t{256} << 20;
constexpr int64_t kPeakSteps = 4'000'000;

struct BenchShape {
  const char* what;
  int64_t m, k, n;
  int64_t num_groups;
};

constexpr BenchShape kShapes[] = {
    {"proj", 512, 1024, 512, 1},    {"proj", 512, 512, 4096, 1},    {"proj", 512, 1024, 576, 1},
    {"proj", 512, 4096, 1024, 1},   {"ffn", 512, 1024, 2048, 1},    {"ffn", 512, 2048, 1024, 1},
    {"heads", 512, 192, 512, 16},   {"heads", 512, 512, 256, 16},   {"heads", 512, 64, 128, 8},
    {"experts", 128, 1024, 512, 8}, {"experts", 128, 512, 1024, 8}, {"experts", 16, 1024, 512, 8},
    {"decode", 1, 1024, 2048, 1},   {"decode", 1, 4096, 1024, 1},   {"decode", 1, 512, 4096, 1},
    {"decode", 1, 1024, 512, 8},    {"decode", 4, 1024, 2048, 1},   {"decode", 8, 1024, 2048, 1},
    {"decode", 8, 256, 1024, 1},    {"experts", 2, 256, 96, 8},
};

__attribute__((target("avx512f,avx512bf16"))) void dot_peak() {
  __m512 sum[16] = {};
  const __m512i a = _mm512_set1_epi32(0x3F803F81), b = _mm512_set1_epi32(0x3E803F80);
  for (int64_t i = 0; i < kPeakSteps; ++i) {
#pragma GCC unroll 16
    for (__m512& s : sum) {
      s = _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
      asm volatile("" : "+v"(s));
    }
  }
}

__attribute__((target("avx512f"))) void fma512_peak() {
  __m512 sum[16] = {};
  const __m512 a = _mm512_set1_ps(1.1f), b = _mm512_set1_ps(0.3f);
  for (int64_t i = 0; i < kPeakSteps; ++i) {
#pragma GCC unroll 16
    for (__m512& s : sum) {
      s = _mm512_fmadd_ps(a, b, s);
      asm volatile("" : "+v"(s));
    }
  }
}

__attribute__((target("avx2,fma"))) void fma256_peak() {
  __m256 sum[12] = {};
  const __m256 a = _mm256_set1_ps(1.1f), b = _mm256_set1_ps(0.3f);
  for (int64_t i = 0; i < kPeakSteps; ++i) {
#pragma GCC unroll 12
    for (__m256& s : sum) {
      s = _mm256_fmadd_ps(a, b, s);
      asm volatile("" : "+x"(s));
    }
  }
}

__attribute__((target("avx2"))) void read_all(const uint8_t* data, size_t num_bytes) {
  __m256i sum[8] = {};
  for (size_t i = 0; i < num_bytes; i += 256) {
#pragma GCC unroll 8
    for (size_t j = 0; j < 8; ++j) {
      sum[j] = _mm256_xor_si256(
          sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
    }
  }
  for (__m256i& s : sum) asm volatile("" : "+x"(s));
}

template <class Body>
double best_seconds(Exec& exec, int64_t num_items, const Body& body) {
  double best = 1e9;
  for (int run = 0; run < 5; ++run) {
    const double start = monotonic_seconds();
    exec.pool.parallel_for(num_items, body);
    best = std::min(best, monotonic_seconds() - start);
  }
  return best;
}

struct Ceilings {
  double bf16_flops = 0, f32_flops = 0, read_bytes = 0;  // a second
};

const Ceilings& ceilings() {
  static const Ceilings measured = [] {
    Exec exec(num_usable_cpus());
    const int64_t threads = exec.pool.num_threads();
    const auto steps = static_cast<double>(threads * kPeakSteps);
    Ceilings result;
    const bool wide = cpu_features().avx512;
    const double fma =
        best_seconds(exec, threads, [&](int64_t, int) { wide ? fma512_peak() : fma256_peak(); });
    result.f32_flops = steps * 2 * (wide ? 16 * 16 : 12 * 8) / fma;
    result.bf16_flops = result.f32_flops;
    if (cpu_features().avx512_bf16) {
      result.bf16_flops =
          steps * 16 * 64 / best_seconds(exec, threads, [](int64_t, int) { dot_peak(); });
    }
    const std::vector<uint8_t> memory(kBeyondCacheBytes, 1);
    const size_t piece = size_t{1} << 20;
    const auto num_pieces = static_cast<int64_t>(memory.size() / piece);
    result.read_bytes =
        static_cast<double>(memory.size()) / best_seconds(exec, num_pieces, [&](int64_t i, int) {
          read_all(memory.data() + static_cast<size_t>(i) * piece, piece);
        });
    return result;
  }();
  return measured;
}

std::vector<uint8_t> random_weights(DType dtype, int64_t count) {
  Rng rng(1);
  std::vector<uint8_t> bytes(static_cast<size_t>(count * dtype_bytes(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(rng.uniform() * 2 - 1);
    const uint16_t half = dtype == DType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
    uint8_t* p = bytes.data() + i * dtype_bytes(dtype);
    if (dtype == DType::kF32) std::memcpy(p, &value, 4);
    if (dtype == DType::kF16 || dtype == DType::kBF16) std::memcpy(p, &half, 2);
    if (dtype == DType::kF8E4M3) *p = f32_to_f8e4m3(value);
  }
  return bytes;
}

void run_shape(benchmark::State& state, const char* impl, const BenchShape& shape, DType dtype) {
  const auto [what, m, k, n, num_groups] = shape;
  const int64_t weight_bytes = n * k * dtype_bytes(dtype);
  const int64_t copies = m > 8 ? 1
                               : std::max<int64_t>(1, static_cast<int64_t>(kBeyondCacheBytes) /
                                                          (weight_bytes * num_groups));
  const std::vector<uint8_t> weights = random_weights(dtype, n * k * num_groups * copies);
  const std::vector<float> scales(static_cast<size_t>((n / 128 + 1) * (k / 128 + 1)), 0.013f);
  const bool heads = std::string_view(what) == "heads";
  Rng rng(2);
  std::vector<float> x(static_cast<size_t>(m * k * num_groups));
  for (float& value : x) value = rng.normal();
  std::vector<float> y(static_cast<size_t>(m * n * num_groups));

  Exec exec(num_usable_cpus());
  exec.forced["matmul"] = impl;
  std::vector<MatmulGroup> groups(static_cast<size_t>(num_groups));
  MatmulArgs args{groups, dtype == DType::kF32 ? Compute::kF32 : Compute::kBF16};
  int64_t copy = 0;
  for (auto _ : state) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const uint8_t* w = weights.data() + (copy * num_groups + g) * weight_bytes;
      // Heads are slices of a wide row; experts and the rest are matrices of their own.
      groups[static_cast<size_t>(g)] = {x.data() + (heads ? g * k : g * m * k),
                                        heads ? num_groups * k : k,
                                        m,
                                        {dtype, n, k, w, scales.data()},
                                        y.data() + (heads ? g * n : g * m * n),
                                        heads ? num_groups * n : n};
    }
    matmul(exec, args);
    copy = (copy + 1) % copies;
  }
  const Cost cost = matmul_cost(args);
  const auto calls = static_cast<double>(state.iterations());
  const double flops_peak =
      args.compute == Compute::kBF16 ? ceilings().bf16_flops : ceilings().f32_flops;
  const auto rate = [&](double amount) {
    return benchmark::Counter(amount * calls, benchmark::Counter::kIsRate);
  };
  state.counters["GFLOP/s"] = rate(cost.flops * 1e-9);
  state.counters["GB/s"] = rate(cost.bytes * 1e-9);
  state.counters["peak_pct"] = rate(cost.flops / flops_peak * 100);
  state.counters["read_pct"] = rate(cost.bytes / ceilings().read_bytes * 100);
}

const bool kRegistered = [] {
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3, DType::kF16, DType::kF32}) {
    for (const BenchShape& shape : kShapes) {
      for (const OpImpl<MatmulArgs>& impl : matmul_impls()) {
        // Asked with the dtype only: what a shape can change, support for tiles, is the same here.
        const MatmulGroup group = {nullptr, shape.k,
                                   shape.m, {dtype, shape.n, shape.k, nullptr, nullptr},
                                   nullptr, shape.n};
        const MatmulArgs args{{&group, 1}, dtype == DType::kF32 ? Compute::kF32 : Compute::kBF16};
        if (std::string_view(impl.name) == "ref" || !impl.supported(args)) continue;
        const std::string name =
            fmt::format("matmul/{}/{}/{}/{}x{}x{}x{}", impl.name, dtype_name(dtype), shape.what,
                        shape.num_groups, shape.m, shape.k, shape.n);
        benchmark::RegisterBenchmark(name.c_str(),
                                     [name = impl.name, &shape, dtype](benchmark::State& state) {
                                       run_shape(state, name, shape, dtype);
                                     })
            ->UseRealTime()
            ->Unit(benchmark::kMicrosecond);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace indexcache
