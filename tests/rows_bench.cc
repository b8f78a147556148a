// The ops that memory bounds, every implementation that this machine can run.
//
//   GB/s      by the contract's least traffic (every operand once)
//   copy_pct  GB/s in % of what all threads reach copying memory with memcpy, measured here
// The operands are 8192 rows of 1024: beyond the cache, as at prefill.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "base/rng.h"
#include "device/cpu_features.h"
#include "ops/gather_rows/gather_rows.h"
#include "ops/moe_combine/moe_combine.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/rope/rope.h"
#include "ops/silu_mul/silu_mul.h"
#include "ops/store_index_key/store_index_key.h"
#include "ops/store_latent/store_latent.h"

namespace indexcache {
namespace {

constexpr int64_t kRows = 8192, kElements = 1024;
constexpr int64_t kCount = kRows * kElements;

double copy_bytes_per_second(Exec& exec) {
  const std::vector<uint8_t> from(size_t{256} << 20, 1);
  std::vector<uint8_t> to(from.size());
  const int64_t items = 64, part = static_cast<int64_t>(from.size()) / items;
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double start = monotonic_seconds();
    exec.pool.parallel_for(items, [&](int64_t i, int) {
      std::memcpy(to.data() + i * part, from.data() + i * part, static_cast<size_t>(part));
    });
    best = std::max(best, 2.0 * static_cast<double>(from.size()) / (monotonic_seconds() - start));
  }
  return best;
}

// The data that all of them work on.
struct Operands {
  std::vector<float> a, b, y, row, angles, weights;
  std::vector<uint16_t> table, cache;
  std::vector<int32_t> ids, pages;
  std::vector<SeqSpan> seqs;

  Operands() : a(kCount), b(kCount), y(kCount), table(kCount), cache(kCount) {
    Rng rng(1);
    for (float& x : a) x = static_cast<float>(rng.uniform()) - 0.5f;
    b = a;
    row.assign(kElements, 1.5f);
    angles.assign(kRows * 32, 0.5f);
    weights.assign(kRows, 0.25f);
    for (uint16_t& x : table) x = static_cast<uint16_t>(rng.next() >> 50);
    ids.resize(kRows);
    std::iota(ids.begin(), ids.end(), 0);
    for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[rng.below(i)]);
    pages.resize(kRows / kPageTokens);
    std::iota(pages.begin(), pages.end(), 0);
    seqs = {{0, kRows, 0, pages.data()}};
  }

  PagedRows cached() {
    return {DType::kBF16, kElements, kPageTokens * kElements * 2,
            reinterpret_cast<uint8_t*>(cache.data()), kRows / kPageTokens};
  }
};

struct Case {
  const char* op;
  std::function<void(Exec&, Operands&)> run;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"rms_norm",
       [](Exec& e, Operands& o) {
         rms_norm(e, {o.a.data(), kElements, o.row.data(), 1e-5f, kRows, kElements, o.y.data(),
                      kElements});
       }},
      {"rope",
       [](Exec& e, Operands& o) {
         rope(e, {o.a.data(), kElements, 64, kRows, kElements / 64, 64, true, o.angles.data(),
                  o.angles.data(), o.y.data(), kElements, 64});
       }},
      {"silu_mul",
       [](Exec& e, Operands& o) {
         silu_mul(e, {o.a.data(), o.b.data(), kRows, kElements, o.y.data()});
       }},
      {"gather_rows",
       [](Exec& e, Operands& o) {
         gather_rows(e, {DType::kBF16, reinterpret_cast<const uint8_t*>(o.table.data()), kRows,
                         kElements, o.ids.data(), kRows, o.y.data()});
       }},
      {"store_latent",
       [](Exec& e, Operands& o) {
         store_latent(e, {.x = o.a.data(),
                          .ldx = kElements,
                          .num_rows = kRows,
                          .latent_dim = kElements - 64,
                          .weight = o.row.data(),
                          .eps = 1e-6f,
                          .cos = o.angles.data(),
                          .sin = o.angles.data(),
                          .seqs = o.seqs,
                          .rows = o.cached()});
       }},
      {"store_index_key",
       [](Exec& e, Operands& o) {
         store_index_key(e, {.x = o.a.data(),
                             .ldx = kElements,
                             .num_rows = kRows,
                             .weight = o.row.data(),
                             .bias = o.row.data(),
                             .eps = 1e-6f,
                             .rope_dim = 64,
                             .cos = o.angles.data(),
                             .sin = o.angles.data(),
                             .seqs = o.seqs,
                             .rows = o.cached()});
       }},
      {"moe_combine",
       [](Exec& e, Operands& o) {
         moe_combine(
             e, {o.a.data(), o.ids.data(), o.weights.data(), 2, kRows / 2, kElements, o.y.data()});
       }},
  };
  return all;
}

void run_case(benchmark::State& state, const Case& c, const std::string& impl) {
  static Operands operands;
  static Exec exec(num_usable_cpus());
  static const double copy_rate = copy_bytes_per_second(exec);
  Profile profile;
  exec.profile = &profile;
  exec.forced = {{c.op, impl}};
  for (auto _ : state) c.run(exec, operands);
  const OpTime& time = profile.ops[c.op];
  exec.profile = nullptr;
  const double rate = time.cost.bytes / time.seconds;
  state.counters["GB/s"] = rate / 1e9;
  state.counters["copy_pct"] = 100 * rate / copy_rate;
}

const bool registered = [] {
  for (const Case& c : cases()) {
    std::vector<std::string> impls = {"ref"};
    if (cpu_features().avx2) impls.insert(impls.begin(), "avx2");
    if (cpu_features().avx512) impls.insert(impls.begin(), "avx512");
    for (const std::string& impl : impls) {
      benchmark::RegisterBenchmark((std::string(c.op) + "/" + impl).c_str(),
                                   [&c, impl](benchmark::State& s) { run_case(s, c, impl); })
          ->UseRealTime();
    }
  }
  return true;
}();

}  // namespace
}  // namespace indexcache
