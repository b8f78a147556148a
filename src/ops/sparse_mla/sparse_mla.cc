#include "ops/sparse_mla/sparse_mla.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "base/checked.h"
#include "ops/sparse_mla/sparse_mla_cpu.h"
#include "ops/sparse_mla/sparse_mla_impl.h"

namespace indexcache {

static_assert(kSparseMlaPageTokens == kPageTokens);

namespace {

struct Kernel {
  decltype(&avx2::sparse_mla_scratch_bytes) scratch_bytes;
  decltype(&avx2::sparse_mla_span) span;
  decltype(&avx2::sparse_mla_merge) merge;
};

// Positions per span. A few tokens alone would leave threads idle, so their selections are split;
// how depends on the arguments only, so that the result is the same for any number of threads.
int64_t choose_span(int64_t num_tokens, int64_t k) {
  constexpr int64_t kItems = 64;       // enough for the largest machines to share a decode step
  constexpr int64_t kLeastSpan = 128;  // below this, merging costs as much as attending
  const int64_t spans_per_token = std::max<int64_t>(kItems / num_tokens, 1);
  return std::max(round_up(ceil_div(k, spans_per_token), kLeastSpan), kLeastSpan);
}

void run_kernel(Exec& exec, const SparseMlaArgs& args, const Kernel& kernel) {
  const int64_t num_tokens =
      args.seqs.empty() ? 0 : args.seqs.back().token_begin + args.seqs.back().num_tokens;
  if (num_tokens == 0) return;
  const bool bf16 = args.rows.dtype == DType::kBF16;
  const int64_t heads = args.num_heads;
  const size_t scratch_bytes =
      kernel.scratch_bytes(heads, args.value_dim, args.rows.row_elements, bf16);
  // Whole selections are the one split that is the same for every number of tokens.
  const int64_t span_length = exec.batch_invariant ? args.k : choose_span(num_tokens, args.k);
  const int64_t spans_per_token = ceil_div(args.k, span_length);
  const bool split = spans_per_token > 1;
  // Of each span: out [heads, value_dim], max [heads], sum [heads].
  const int64_t part_stride = heads * (args.value_dim + 2);
  float* parts = nullptr;
  if (split) {
    parts = reinterpret_cast<float*>(
        exec.shared_scratch(static_cast<size_t>(num_tokens * spans_per_token * part_stride) * 4));
  }
  exec.pool.parallel_for(num_tokens * spans_per_token, [&](int64_t item, int thread) {
    const int64_t token = item / spans_per_token;
    const SeqSpan& seq =
        *std::prev(std::upper_bound(args.seqs.begin(), args.seqs.end(), token,
                                    [](int64_t t, const SeqSpan& s) { return t < s.token_begin; }));
    const int64_t begin = item % spans_per_token * span_length;
    const int64_t count = std::min(span_length, args.counts[token] - begin);
    if (split && count <= 0) return;
    SparseMlaSpan span;
    span.q = args.q + token * heads * args.rows.row_elements;
    span.num_heads = heads;
    span.value_dim = args.value_dim;
    span.row_elements = args.rows.row_elements;
    span.scale = args.scale;
    span.rows_are_bf16 = bf16;
    span.base = args.rows.base;
    span.page_bytes = args.rows.page_bytes;
    span.pages = seq.pages;
    span.positions = args.positions + token * args.k + begin;
    span.count = count;
    span.scratch = exec.scratch(thread, scratch_bytes);
    if (split) {
      float* part = parts + (token * spans_per_token + begin / span_length) * part_stride;
      span.out = part;
      span.max = part + heads * args.value_dim;
      span.sum = span.max + heads;
    } else {
      span.out = args.out + token * heads * args.value_dim;
      span.max = span.sum = nullptr;
    }
    kernel.span(span);
  });
  if (!split) return;
  exec.pool.parallel_for(num_tokens * heads, [&](int64_t item, int) {
    const int64_t token = item / heads, head = item % heads;
    float* out = args.out + item * args.value_dim;
    if (args.counts[token] == 0) {
      std::fill_n(out, args.value_dim, 0.0f);
      return;
    }
    const float* part = parts + token * spans_per_token * part_stride;
    const float* max = part + heads * args.value_dim + head;
    kernel.merge({.part = part + head * args.value_dim,
                  .part_stride = part_stride,
                  .max = max,
                  .sum = max + heads,
                  .max_stride = part_stride,
                  .num_parts = ceil_div(args.counts[token], span_length),
                  .value_dim = args.value_dim,
                  .out = out});
  });
}

#define INDEXCACHE_SPARSE_MLA_IMPL(isa, feature)                                 \
  {                                                                              \
#isa,                                                                          \
        [](const SparseMlaArgs& args) {                                            \
          return cpu_features().feature && args.rows.dtype != DType::kF8E4M3;      \
        },                                                                         \
        [](Exec& exec, const SparseMlaArgs& args) {                                \
          run_kernel(exec, args,                                                   \
                     {isa::sparse_mla_scratch_bytes, isa::sparse_mla_span,         \
                      isa::sparse_mla_merge});                                     \
        } \
  }

constexpr OpImpl<SparseMlaArgs> kTable[] = {
    INDEXCACHE_SPARSE_MLA_IMPL(avx512bf16, avx512_bf16),
    INDEXCACHE_SPARSE_MLA_IMPL(avx512, avx512),
    INDEXCACHE_SPARSE_MLA_IMPL(avx2, avx2),
#if defined(INDEXCACHE_CUDA) && !defined(INDEXCACHE_CUDA_EMULATION)
    {"sm90", sparse_mla_hopper_supported, sparse_mla_hopper, Device::kCuda},
#endif
#ifdef INDEXCACHE_CUDA
    {"cuda_mma", sparse_mla_cuda_mma_supported, sparse_mla_cuda_mma, Device::kCuda},
    {"cuda", sparse_mla_cuda_supported, sparse_mla_cuda, Device::kCuda},
#endif
    {"ref", [](const SparseMlaArgs&) { return true; }, sparse_mla_ref},
};

void check_contract(Device device, const SparseMlaArgs& args) {
  CHECK_GE(args.num_heads, 1);
  CHECK_LE(args.num_heads, 128);
  CHECK_GE(args.value_dim, 2);
  CHECK_EQ(args.value_dim % 2, 0);
  CHECK_GE(args.rows.row_elements, args.value_dim);
  CHECK_EQ(args.rows.row_elements % 2, 0);
  CHECK(std::isfinite(args.scale));
  CHECK(args.rows.dtype == DType::kF32 || args.rows.dtype == DType::kBF16 ||
        args.rows.dtype == DType::kF8E4M3);
  CHECK_EQ(args.rows.fp8_elements, args.rows.dtype == DType::kF8E4M3 ? args.value_dim : 0);
  CHECK_EQ(args.rows.fp8_elements % kFp8Block, 0);
  CHECK_GE(args.k, 1);
  int64_t num_tokens = 0;
  for (const SeqSpan& seq : args.seqs) {
    CHECK_EQ(seq.token_begin, num_tokens);
    CHECK_GE(seq.num_tokens, 0);
    CHECK_GE(seq.first_position, 0);
    num_tokens += seq.num_tokens;
  }
  if (num_tokens == 0) return;
  CHECK(args.q != nullptr && args.out != nullptr && args.counts != nullptr &&
        args.positions != nullptr && args.rows.base != nullptr);
  CHECK(device == Device::kCpu || args.device_seqs != nullptr);
  if (device == Device::kCuda) return;  // the host cannot look at the selection
  for (const SeqSpan& seq : args.seqs) {
    for (int64_t i = 0; i < seq.num_tokens; ++i) {
      const int64_t token = seq.token_begin + i;
      const int64_t count = args.counts[token];
      CHECK_GE(count, 0);
      CHECK_LE(count, args.k);
      const int32_t* positions = args.positions + token * args.k;
      int32_t previous = -1;
      for (int64_t s = 0; s < count; ++s) {
        CHECK_LT(previous, positions[s]);
        previous = positions[s];
      }
      CHECK_LE(previous, seq.first_position + i);
    }
  }
}

}  // namespace

std::span<const OpImpl<SparseMlaArgs>> sparse_mla_impls() { return kTable; }

Cost sparse_mla_cost(Device device, const SparseMlaArgs& args) {
  double pairs = 0, tokens = 0;
  for (const SeqSpan& seq : args.seqs) {
    tokens += static_cast<double>(seq.num_tokens);
    for (int64_t i = 0; i < seq.num_tokens; ++i) {
      // On a GPU as many as the indexer selects.
      const int64_t count = device == Device::kCpu ? args.counts[seq.token_begin + i]
                                                   : std::min(args.k, seq.first_position + i + 1);
      pairs += static_cast<double>(count);
    }
  }
  const double dims = static_cast<double>(args.rows.row_elements + args.value_dim);
  const double heads = static_cast<double>(args.num_heads);
  const double row_bytes = static_cast<double>(args.rows.row_bytes());
  // q and out in f32, each selected row, and its position.
  return {2 * heads * dims * pairs, 4 * tokens * heads * dims + pairs * (row_bytes + 4)};
}

void sparse_mla(Exec& exec, const SparseMlaArgs& args) {
  check_contract(exec.device, args);
  run_op(exec, "sparse_mla", kTable, args,
         exec.profile != nullptr ? sparse_mla_cost(exec.device, args) : Cost{});
}

}  // namespace indexcache
