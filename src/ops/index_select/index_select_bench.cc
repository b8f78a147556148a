// Random queries, keys and weights; pages shuffled. The times include the selection. `best`
// counters come from the fastest of the iterations, because a shared machine slows some of them;
// `peak_pct` compares them with what the same threads reach with the instruction alone, all
// operands in registers. With int8 keys flops are integer operations. Keys follow each other
// closely in the list, so that a filter by shape compares them under the same load.
#include "ops/index_select/index_select.h"

#include <benchmark/benchmark.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "base/checked.h"
#include "base/rng.h"
#include "device/cpu_features.h"
#include "ops/kit/int8_rows.h"

namespace indexcache {
namespace {

constexpr int kChains = 16;  // more than latency * rate of any of these instructions
constexpr int64_t kRounds = 400000;

// Each runs kRounds * kChains instructions and returns the flops done.
__attribute__((target("avx512f,avx512bf16"))) double dot_loop() {
  __m512 sums[kChains] = {};
  const __m512 x = _mm512_set1_ps(1e-3f);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (__m512& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
      asm volatile("" : "+v"(sum));
    }
  }
  return 64.0 * kChains * kRounds;
}

__attribute__((target("avx512f,avx512vnni"))) double int8_loop() {
  __m512i sums[kChains] = {};
  const __m512i x = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (__m512i& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, x, x);
      asm volatile("" : "+v"(sum));
    }
  }
  return 128.0 * kChains * kRounds;
}

__attribute__((target("avx512f"))) double fma512_loop() {
  __m512 sums[kChains] = {};
  const __m512 x = _mm512_set1_ps(1e-3f);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (__m512& sum : sums) {
      sum = _mm512_fmadd_ps(sum, x, x);
      asm volatile("" : "+v"(sum));
    }
  }
  return 32.0 * kChains * kRounds;
}

__attribute__((target("avx2,fma"))) double fma256_loop() {
  constexpr int kChains256 = 12;  // of 16 registers
  __m256 sums[kChains256] = {};
  const __m256 x = _mm256_set1_ps(1e-3f);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (__m256& sum : sums) {
      sum = _mm256_fmadd_ps(sum, x, x);
      asm volatile("" : "+x"(sum));
    }
  }
  return 16.0 * kChains256 * kRounds;
}

double peak_flops(Exec& exec, const std::string& impl, DType keys) {
  const auto loop = impl == "avx2"                                 ? fma256_loop
                    : impl == "avx512bf16" && keys == DType::kBF16 ? dot_loop
                    : impl == "avx512bf16" && keys == DType::kI8   ? int8_loop
                                                                   : fma512_loop;
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    std::vector<double> done(static_cast<size_t>(exec.pool.num_threads()));
    const double start = monotonic_seconds();
    exec.pool.parallel_for(std::ssize(done), [&](int64_t item, int) { done[item] = loop(); });
    const double seconds = monotonic_seconds() - start;
    best = std::max(best, std::accumulate(done.begin(), done.end(), 0.0) / seconds);
  }
  return best;
}

struct Shape {
  int64_t heads, dim, k, context, tokens;  // the last `tokens` positions of the context are queries
  DType keys;
};

void run(benchmark::State& state, const Shape& shape, const std::string& impl, int threads) {
  Exec exec(threads);
  exec.forced["index_select"] = impl;
  Rng rng(1);
  std::vector<float> q(static_cast<size_t>(shape.tokens * shape.heads * shape.dim));
  std::vector<float> weights(static_cast<size_t>(shape.tokens * shape.heads));
  for (float& x : q) x = rng.normal();
  for (float& x : weights) x = rng.normal();
  std::vector<int32_t> pages(static_cast<size_t>(ceil_div(shape.context, kPageTokens)));
  std::iota(pages.begin(), pages.end(), 0);
  for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[rng.below(i)]);
  const int64_t page_bytes = kPageTokens * paged_row_bytes(shape.keys, shape.dim);
  HostMemory pool(pages.size() * static_cast<size_t>(page_bytes));
  const PagedRows keys = {shape.keys, shape.dim, page_bytes, pool.data()};
  std::vector<float> key(static_cast<size_t>(shape.dim));
  for (int64_t p = 0; p < shape.context; ++p) {
    for (float& x : key) {
      // A sum of uniform numbers: near enough to normal, and much faster to make.
      const uint64_t bits = rng.next();
      x = static_cast<float>((bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF)) /
              65536.0f -
          1.5f;
    }
    uint8_t* row = keys.row(pages.data(), p);
    if (shape.keys == DType::kI8) {
      *keys.scale(pages.data(), p) =
          quantise_row(key.data(), shape.dim, reinterpret_cast<int8_t*>(row));
    } else if (shape.keys == DType::kBF16) {
      std::transform(key.begin(), key.end(), reinterpret_cast<uint16_t*>(row), f32_to_bf16);
    } else {
      std::copy(key.begin(), key.end(), reinterpret_cast<float*>(row));
    }
  }
  std::vector<int32_t> positions(static_cast<size_t>(shape.tokens * shape.k));
  std::vector<int32_t> counts(static_cast<size_t>(shape.tokens));
  const SeqSpan seq = {0, shape.tokens, shape.context - shape.tokens, pages.data()};
  IndexSelectArgs args;
  args.q = q.data();
  args.weights = weights.data();
  args.num_heads = shape.heads;
  args.head_dim = shape.dim;
  args.keys = keys;
  args.seqs = {&seq, 1};
  args.k = shape.k;
  args.positions = positions.data();
  args.counts = counts.data();

  double best = 1e30;
  for (auto _ : state) {
    const double start = monotonic_seconds();
    index_select(exec, args);
    best = std::min(best, monotonic_seconds() - start);
  }
  const Cost cost = index_select_cost(args);
  const double peak = peak_flops(exec, impl, shape.keys);
  state.counters["best_us_per_token"] = best * 1e6 / static_cast<double>(shape.tokens);
  state.counters["best_GFLOP/s"] = cost.flops / best * 1e-9;
  state.counters["best_GB/s"] = cost.bytes / best * 1e-9;
  state.counters["peak_GFLOP/s"] = peak * 1e-9;
  state.counters["peak_pct"] = 100 * cost.flops / best / peak;
}

const int kRegistered = [] {
  const int cpus = num_usable_cpus();
  for (const OpImpl<IndexSelectArgs>& impl : index_select_impls()) {
    const std::string name = impl.name;
    if (!impl.supported({}) || name == "ref") continue;
    for (const auto& [heads, dim, k] :
         {std::array<int64_t, 3>{32, 128, 2048}, {64, 128, 2048}, {8, 64, 256}}) {
      for (const int64_t context : {4096, 8192, 16384, 65536}) {
        for (const int64_t tokens : {1, 64}) {
          for (int threads = 1; threads <= cpus; threads = threads < cpus ? cpus : cpus + 1) {
            for (const DType keys : {DType::kI8, DType::kBF16, DType::kF32}) {
              const Shape shape = {heads, dim, k, context, tokens, keys};
              benchmark::RegisterBenchmark(
                  fmt::format("index_select/{}/{}/{}x{}/k:{}/context:{}/tokens:{}/threads:{}", name,
                              dtype_name(keys), heads, dim, k, context, tokens, threads)
                      .c_str(),
                  [=](benchmark::State& state) { run(state, shape, name, threads); })
                  ->UseRealTime()
                  ->Unit(benchmark::kMicrosecond);
            }
          }
        }
      }
    }
  }
  return 0;
}();

}  // namespace
}  // namespace indexcache
