// The fp8 indexer on Hopper: scores against a naive kernel, selections against a sort on the host
// of the kernel's own scores, then times. Prefill and decode. Built by tools/gpu/build.
//
//   bench_index_select [check|time]
#include <cuda_fp8.h>

#include <numeric>
#include <string>

#include "gpu_check.h"
#include "ops/index_select/index_select_sm90.cuh"

using namespace gpu_check;
using namespace indexcache;
using namespace indexcache::sm90;

namespace {

constexpr int64_t kPageBytes = kPageTokens * (kIndexDim + 4) + 64;

struct Run {
  int64_t first_position, num_tokens;
};

enum class Kind { kNormal, kTies, kMostlyNan, kRising, kPlateau };

__device__ float from_e4m3(uint8_t bits) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

// Scores, and what rounding of the sums is relative to.
__global__ void naive_scores(IndexScoreArgs args, int64_t stride, float* scores, float* sizes) {
  const int64_t token = blockIdx.y, s = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  int run = 0;
  while (run + 1 < args.num_seqs && args.seqs[run + 1].token_begin <= token) ++run;
  const SeqSpan seq = args.seqs[run];
  if (s > seq.first_position + token - seq.token_begin) return;
  const uint8_t* page = args.key_base + seq.pages[s / kPageTokens] * args.page_bytes;
  const uint8_t* key = page + s % kPageTokens * kIndexDim;
  const float scale =
      reinterpret_cast<const float*>(page + kPageTokens * kIndexDim)[s % kPageTokens];
  double sum = 0, size = 0;
  for (int h = 0; h < args.num_heads; ++h) {
    const uint8_t* q = args.q8 + (token * args.num_heads + h) * kIndexDim;
    float dot = 0, dot_size = 0;
    for (int d = 0; d < kIndexDim; ++d) {
      const float product = from_e4m3(q[d]) * from_e4m3(key[d]);
      dot += product;
      dot_size += fabsf(product);
    }
    const float weight = args.weights[token * args.num_heads + h];
    sum += double{weight} * (dot <= 0 ? 0 : dot);
    size += fabs(double{weight}) * dot_size;
  }
  scores[token * stride + s] = static_cast<float>(sum * scale);
  sizes[token * stride + s] = static_cast<float>(size * scale);
}

// Everything on the GPU for one batch.
struct Batch {
  int num_heads, padded_heads, k;
  std::vector<Run> runs;
  int64_t num_tokens = 0, longest = 0, num_pages = 0;
  std::vector<SeqSpan> spans;
  DeviceArray<int32_t> pages;
  DeviceArray<uint8_t> pool, q8;
  DeviceArray<float> weights, q, raw_weights;
  DeviceArray<SeqSpan> seqs;
  DeviceArray<int32_t> positions, counts;

  static int64_t pages_of(const std::vector<Run>& runs) {
    int64_t total = 0;
    for (const Run& run : runs)
      total += (run.first_position + run.num_tokens + kPageTokens - 1) / kPageTokens;
    return total;
  }
  static int64_t tokens_of(const std::vector<Run>& runs) {
    int64_t total = 0;
    for (const Run& run : runs) total += run.num_tokens;
    return total;
  }

  Batch(int heads, int top_k, const std::vector<Run>& batch_runs, Kind kind, uint64_t seed)
      : num_heads(heads),
        padded_heads(padded_index_heads(heads)),
        k(top_k),
        runs(batch_runs),
        num_tokens(tokens_of(runs)),
        num_pages(pages_of(runs)),
        pages(static_cast<size_t>(num_pages)),
        pool(static_cast<size_t>(num_pages * kPageBytes)),
        q8(static_cast<size_t>(num_tokens * padded_heads * kIndexDim)),
        weights(static_cast<size_t>(num_tokens * padded_heads)),
        q(static_cast<size_t>(num_tokens * heads * kIndexDim)),
        raw_weights(static_cast<size_t>(num_tokens * heads)),
        seqs(runs.size()),
        positions(static_cast<size_t>(num_tokens * k)),
        counts(static_cast<size_t>(num_tokens)) {
    Random random{seed};
    std::vector<int32_t> order(static_cast<size_t>(num_pages));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[random.below(static_cast<uint32_t>(i))]);
    pages.set(order);
    int64_t page = 0, token = 0;
    std::vector<SeqSpan> written;  // all rows of each sequence
    int64_t keys = 0;
    for (const Run& run : runs) {
      const int64_t length = run.first_position + run.num_tokens;
      spans.push_back({token, run.num_tokens, run.first_position, pages.data + page});
      written.push_back({keys, length, 0, pages.data + page});
      token += run.num_tokens;
      keys += length;
      page += (length + kPageTokens - 1) / kPageTokens;
      longest = std::max(longest, length);
    }
    seqs.set(spans);

    DeviceArray<float> x(static_cast<size_t>(keys * kIndexDim));
    fill_normal<<<1024, 256>>>(x.data, x.size, seed + 1);
    FINISH();
    if (kind != Kind::kNormal) {
      std::vector<float> host = x.get();
      for (int64_t i = 0; i < keys; ++i) {
        float* row = host.data() + i * kIndexDim;
        // Few different keys; few that are numbers; later ones larger.
        if (kind == Kind::kTies) std::copy_n(host.data() + i % 7 * kIndexDim, kIndexDim, row);
        if (kind == Kind::kMostlyNan && random.below(20) != 0) row[5] = NAN;
        // Most scores are exactly 0.
        if (kind == Kind::kPlateau && i % 50 != 0) {
          for (int d = 0; d < kIndexDim; ++d) row[d] = -std::fabs(row[d]);
        }
        if (kind == Kind::kRising) {
          for (int d = 0; d < kIndexDim; ++d)
            row[d] *= 0.2f + static_cast<float>(i) / static_cast<float>(keys);
        }
      }
      x.set(host);
    }
    DeviceArray<SeqSpan> all(written);
    OK(store_index_keys(x.data, all.data, static_cast<int>(all.size), static_cast<int>(keys),
                        pool.data, kPageBytes, nullptr));
    fill_normal<<<1024, 256>>>(q.data, q.size, seed + 2);
    fill_normal<<<1024, 256>>>(raw_weights.data, raw_weights.size, seed + 3);
    if (kind == Kind::kPlateau) {
      std::vector<float> host = q.get();
      for (float& v : host) v = std::fabs(v);
      q.set(host);
    }
    OK(quantise_queries(q.data, raw_weights.data, static_cast<int>(num_tokens), heads, padded_heads,
                        q8.data, weights.data, nullptr));
    FINISH();
  }

  IndexScoreArgs args() const {
    IndexScoreArgs args;
    args.q8 = q8.data;
    args.weights = weights.data;
    args.num_heads = padded_heads;
    args.num_tokens = static_cast<int>(num_tokens);
    args.key_base = pool.data;
    args.page_bytes = kPageBytes;
    args.num_pool_pages = num_pages;
    args.seqs = seqs.data;
    args.num_seqs = static_cast<int>(seqs.size);
    args.k = k;
    args.positions = positions.data;
    args.counts = counts.data;
    return args;
  }
  int num_blocks() const {
    const int64_t queries = 256 / padded_heads;
    int64_t blocks = 0;
    for (const Run& run : runs) blocks += (run.num_tokens + queries - 1) / queries;
    return static_cast<int>(blocks);
  }
};

// What the op says, from given scores.
std::vector<int32_t> select_on_host(const Batch& batch, const std::vector<float>& scores,
                                    std::vector<float>* kth) {
  const int k = batch.k;
  std::vector<int32_t> want(static_cast<size_t>(batch.num_tokens * k), -1);
  kth->assign(static_cast<size_t>(batch.num_tokens), -INFINITY);
  for (const SeqSpan& seq : batch.spans) {
    for (int64_t i = 0; i < seq.num_tokens; ++i) {
      const int64_t token = seq.token_begin + i, visible = seq.first_position + i + 1;
      const float* row = scores.data() + token * batch.longest;
      const auto score = [&](int32_t s) { return std::isnan(row[s]) ? -INFINITY : row[s]; };
      std::vector<int32_t> order(static_cast<size_t>(visible));
      std::iota(order.begin(), order.end(), 0);
      if (visible > k) {
        std::nth_element(order.begin(), order.begin() + k - 1, order.end(),
                         [&](int32_t a, int32_t b) {
                           return score(a) != score(b) ? score(a) > score(b) : a < b;
                         });
        (*kth)[static_cast<size_t>(token)] = score(order[static_cast<size_t>(k - 1)]);
        order.resize(static_cast<size_t>(k));
        std::sort(order.begin(), order.end());
      }
      std::copy(order.begin(), order.end(), want.begin() + token * k);
    }
  }
  return want;
}

int rows_that_differ(const Batch& batch, const std::vector<int32_t>& want) {
  const std::vector<int32_t> got = batch.positions.get(), counts = batch.counts.get();
  int wrong = 0;
  for (int64_t t = 0; t < batch.num_tokens; ++t) {
    const auto begin = want.begin() + t * batch.k, end = begin + batch.k;
    const auto count = std::count_if(begin, end, [](int32_t p) { return p >= 0; });
    if (counts[static_cast<size_t>(t)] == count &&
        std::equal(begin, end, got.begin() + t * batch.k))
      continue;
    if (wrong++ < 2) {
      int64_t i = 0;
      while (i < batch.k && begin[i] == got[static_cast<size_t>(t * batch.k + i)]) ++i;
      std::printf("  token %lld: count %d (want %lld), first difference at %lld: %d (want %d)\n",
                  static_cast<long long>(t), counts[static_cast<size_t>(t)],
                  static_cast<long long>(count), static_cast<long long>(i),
                  i < batch.k ? got[static_cast<size_t>(t * batch.k + i)] : 0,
                  i < batch.k ? begin[i] : 0);
    }
  }
  return wrong;
}

// Scores of `scores` that are further from the naive ones than the tensor core's sums explain, as a
// fraction of the sum of the sizes of all products.
double worst_score(const Batch& batch, const std::vector<float>& scores) {
  DeviceArray<float> naive(scores.size()), sizes(scores.size());
  const dim3 grid(static_cast<unsigned>((batch.longest + 127) / 128),
                  static_cast<unsigned>(batch.num_tokens));
  naive_scores<<<grid, 128>>>(batch.args(), batch.longest, naive.data, sizes.data);
  FINISH();
  const std::vector<float> want = naive.get(), size = sizes.get();
  double worst = 0;
  for (const SeqSpan& seq : batch.spans) {
    for (int64_t i = 0; i < seq.num_tokens; ++i) {
      for (int64_t s = 0; s <= seq.first_position + i; ++s) {
        const size_t at = static_cast<size_t>((seq.token_begin + i) * batch.longest + s);
        if (std::isnan(want[at]) && std::isnan(scores[at])) continue;
        const double error = std::fabs(double{scores[at]} - want[at]) / (double{size[at]} + 1e-30);
        worst = std::max(worst, std::isnan(error) ? INFINITY : error);
      }
    }
  }
  return worst;
}

// Hopper's e4m3 products keep about 13 bits below the largest term of an instruction's sum.
constexpr double kScoreTolerance = 0x1p-11;

void check_prefill(const char* name, int heads, int k, const std::vector<Run>& runs, Kind kind,
                   uint64_t seed) {
  Batch batch(heads, k, runs, kind, seed);
  const int sms = multiprocessors();
  DeviceArray<uint8_t> workspace(
      static_cast<size_t>(index_select_prefill_workspace(batch.padded_heads, sms)));
  DeviceArray<float> scores(static_cast<size_t>(batch.num_tokens * batch.longest));
  OK(index_select_prefill(batch.args(), batch.num_blocks(), nullptr, scores.data, batch.longest,
                          workspace.data, sms, nullptr));
  FINISH();
  // Blocks without a query that sees more than k are skipped: their scores stay NaN.
  std::vector<float> host = scores.get(), kth;
  const std::vector<int32_t> want = select_on_host(batch, host, &kth);
  int wrong = rows_that_differ(batch, want);
  report(wrong == 0, "prefill %s heads %d k %d: %d of %lld selections wrong", name, heads, k, wrong,
         static_cast<long long>(batch.num_tokens));
  {
    DeviceArray<float> naive(host.size()), sizes(host.size());
    const dim3 grid(static_cast<unsigned>((batch.longest + 127) / 128),
                    static_cast<unsigned>(batch.num_tokens));
    naive_scores<<<grid, 128>>>(batch.args(), batch.longest, naive.data, sizes.data);
    FINISH();
    const std::vector<float> right = naive.get();
    for (const SeqSpan& seq : batch.spans) {
      for (int64_t i = 0; i < seq.num_tokens; ++i) {
        if (seq.first_position + i >= batch.k) continue;
        const int64_t row = (seq.token_begin + i) * batch.longest;
        std::copy_n(right.begin() + row, batch.longest, host.begin() + row);
      }
    }
  }
  const double worst = worst_score(batch, host);
  report(worst <= kScoreTolerance, "prefill %s heads %d: worst score off by 2^%.1f of the sum",
         name, heads, std::log2(worst + 1e-30));
  OK(cudaMemset(batch.positions.data, 0xEE, batch.positions.size * 4));
  OK(index_select_prefill(batch.args(), batch.num_blocks(), nullptr, nullptr, 0, workspace.data,
                          sms, nullptr));
  FINISH();
  wrong = rows_that_differ(batch, want);
  report(wrong == 0, "prefill %s heads %d k %d, not keeping scores: %d wrong", name, heads, k,
         wrong);
  DeviceArray<float> bounds(kth);
  OK(cudaMemset(batch.positions.data, 0xEE, batch.positions.size * 4));
  OK(index_select_prefill(batch.args(), batch.num_blocks(), bounds.data, nullptr, 0, workspace.data,
                          sms, nullptr));
  FINISH();
  wrong = rows_that_differ(batch, want);
  report(wrong == 0, "prefill %s heads %d k %d, with bounds: %d wrong", name, heads, k, wrong);
}

// The whole op from f32 queries, by the way that it chooses itself.
void check_op(const char* name, int heads, int k, const std::vector<Run>& runs, uint64_t seed) {
  Batch batch(heads, k, runs, Kind::kNormal, seed);
  const int sms = multiprocessors();
  IndexSelectFp8Args args;
  args.q = batch.q.data;
  args.weights = batch.raw_weights.data;
  args.num_heads = heads;
  args.key_base = batch.pool.data;
  args.page_bytes = kPageBytes;
  args.num_pool_pages = batch.num_pages;
  args.seqs = batch.spans;
  args.device_seqs = batch.seqs.data;
  args.max_context = batch.longest;
  args.k = k;
  args.positions = batch.positions.data;
  args.counts = batch.counts.data;
  DeviceArray<uint8_t> workspace(static_cast<size_t>(index_select_fp8_workspace(args, sms)));
  OK(index_select_fp8(args, workspace.data, sms, nullptr));
  FINISH();
  DeviceArray<uint8_t> other(
      static_cast<size_t>(index_select_prefill_workspace(batch.padded_heads, sms)));
  const std::vector<int32_t> got = batch.positions.get();
  OK(cudaMemset(batch.positions.data, 0xEE, batch.positions.size * 4));
  OK(index_select_prefill(batch.args(), batch.num_blocks(), nullptr, nullptr, 0, other.data, sms,
                          nullptr));
  FINISH();
  report(got == batch.positions.get(), "op %s heads %d k %d: as by prefill", name, heads, k);
}

void time_prefill(int heads, int64_t queries, int64_t context, Kind kind) {
  Batch batch(heads, 2048, {{context - queries, queries}}, kind, 7);
  const int sms = multiprocessors();
  DeviceArray<uint8_t> workspace(
      static_cast<size_t>(index_select_prefill_workspace(batch.padded_heads, sms)));
  const double flops = 2.0 * heads * kIndexDim * static_cast<double>(queries) *
                       (static_cast<double>(context) - static_cast<double>(queries) / 2);
  const auto time = [&](const float* bounds) {
    return milliseconds(
        [&] {
          OK(index_select_prefill(batch.args(), batch.num_blocks(), bounds, nullptr, 0,
                                  workspace.data, sms, nullptr));
        },
        5);
  };
  const double whole = time(nullptr);
  DeviceArray<float> bounds(std::vector<float>(static_cast<size_t>(queries), 1e30f));
  const double scoring = time(bounds.data);
  std::printf(
      "prefill %lld x %lld, %d heads%s: %.3f ms (%.0f TFLOP/s), scoring alone %.3f ms (%.0f)\n",
      static_cast<long long>(queries), static_cast<long long>(context), heads,
      kind == Kind::kRising ? ", rising" : "", whole, flops / whole * 1e-9, scoring,
      flops / scoring * 1e-9);
  std::fflush(stdout);
}

void check_decode(const char* name, int heads, int k, const std::vector<Run>& runs, int max_queries,
                  Kind kind, uint64_t seed) {
  Batch batch(heads, k, runs, kind, seed);
  const int sms = multiprocessors();
  DeviceArray<float> scores(static_cast<size_t>(batch.num_tokens * batch.longest));
  OK(index_scores_decode(batch.args(), max_queries, scores.data, batch.longest, sms, nullptr));
  OK(select_rows(scores.data, batch.longest, batch.seqs.data, static_cast<int>(batch.seqs.size),
                 static_cast<int>(batch.num_tokens), k, batch.longest, batch.positions.data,
                 batch.counts.data, nullptr));
  FINISH();
  const std::vector<float> host = scores.get();
  const double worst = worst_score(batch, host);
  report(worst <= kScoreTolerance, "decode %s heads %d: worst score off by 2^%.1f of the sum", name,
         heads, std::log2(worst + 1e-30));
  std::vector<float> kth;
  const int wrong = rows_that_differ(batch, select_on_host(batch, host, &kth));
  report(wrong == 0, "decode %s heads %d k %d: %d of %lld selections wrong", name, heads, k, wrong,
         static_cast<long long>(batch.num_tokens));
  if (batch.num_tokens > 64) return;
  // The same bits as prefill.
  DeviceArray<uint8_t> workspace(
      static_cast<size_t>(index_select_prefill_workspace(batch.padded_heads, sms)));
  DeviceArray<float> others(scores.size);
  OK(index_select_prefill(batch.args(), batch.num_blocks(), nullptr, others.data, batch.longest,
                          workspace.data, sms, nullptr));
  FINISH();
  const std::vector<float> other = others.get();
  int64_t different = 0;
  for (const SeqSpan& seq : batch.spans) {
    if (seq.first_position < k) continue;
    for (int64_t i = 0; i < seq.num_tokens; ++i) {
      const size_t row = static_cast<size_t>((seq.token_begin + i) * batch.longest);
      for (int64_t s = 0; s <= seq.first_position + i; ++s) {
        const size_t at = row + static_cast<size_t>(s);
        different += !(other[at] == host[at] || (std::isnan(other[at]) && std::isnan(host[at])));
      }
    }
  }
  report(different == 0, "decode %s heads %d: %lld scores are not those of prefill", name, heads,
         static_cast<long long>(different));
}

void time_decode(int heads, int batch_size, int64_t context, int queries) {
  Batch batch(heads, 2048,
              std::vector<Run>(static_cast<size_t>(batch_size), {context - queries, queries}),
              Kind::kNormal, 9);
  const int sms = multiprocessors();
  DeviceArray<float> scores(static_cast<size_t>(batch.num_tokens * context));
  const double scoring = graph_microseconds([&](cudaStream_t stream) {
    OK(index_scores_decode(batch.args(), queries, scores.data, context, sms, stream));
  });
  const double select = graph_microseconds([&](cudaStream_t stream) {
    OK(select_rows(scores.data, context, batch.seqs.data, batch_size,
                   static_cast<int>(batch.num_tokens), 2048, context, batch.positions.data,
                   batch.counts.data, stream));
  });
  // A batch of 1 has its 26 MB of keys in L2 when it is replayed.
  std::printf(
      "decode batch %d x %lld, %d heads, %d queries: scores %.1f us (%.2f TB/s), top-k %.1f us\n",
      batch_size, static_cast<long long>(context), heads, queries, scoring,
      static_cast<double>(batch_size) * static_cast<double>(context) * 132 / scoring * 1e-6,
      select);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  print_device();
  if (what != "time") {
    const std::vector<Run> ragged = {{0, 70}, {3000, 45}, {0, 1}, {190, 300}, {9000, 17}};
    check_prefill("ragged", 32, 128, ragged, Kind::kNormal, 1);
    check_prefill("ragged", 32, 2048, {{1990, 120}, {20000, 9}}, Kind::kNormal, 2);
    check_prefill("one page", 32, 16, {{0, 64}, {10, 8}}, Kind::kNormal, 3);
    check_prefill("ragged", 64, 128, ragged, Kind::kNormal, 4);
    check_prefill("ragged", 16, 128, ragged, Kind::kNormal, 5);
    check_prefill("ragged", 128, 128, ragged, Kind::kNormal, 6);
    check_prefill("padded", 20, 128, ragged, Kind::kNormal, 7);
    check_prefill("ties", 32, 512, {{12000, 40}}, Kind::kTies, 8);
    check_prefill("plateau", 32, 512, {{12000, 40}}, Kind::kPlateau, 12);
    check_prefill("mostly NaN", 32, 512, {{5000, 40}}, Kind::kMostlyNan, 9);
    check_prefill("rising", 32, 2048, {{60000, 64}}, Kind::kRising, 10);
    check_prefill("long", 32, 2048, {{200000 - 128, 128}}, Kind::kNormal, 11);
    check_decode("ragged", 32, 128, {{5000, 1}, {0, 1}, {700, 1}, {63, 1}, {64, 1}, {127, 1}}, 1,
                 Kind::kNormal, 21);
    check_decode("two queries", 32, 256, {{5000, 2}, {30, 1}, {700, 2}}, 2, Kind::kNormal, 22);
    check_decode("ragged", 64, 128, {{5000, 1}, {900, 1}}, 1, Kind::kNormal, 23);
    check_decode("ragged", 16, 128, {{5000, 2}, {900, 1}}, 2, Kind::kNormal, 24);
    check_decode("ragged", 128, 128, {{5000, 1}, {900, 1}}, 1, Kind::kNormal, 25);
    check_decode("ties", 32, 512, {{12000, 1}, {3000, 1}}, 1, Kind::kTies, 26);
    check_decode("plateau", 32, 512, {{12000, 1}, {3000, 1}}, 1, Kind::kPlateau, 31);
    check_decode("mostly NaN", 32, 512, {{5000, 1}, {9000, 1}}, 1, Kind::kMostlyNan, 27);
    check_decode("long", 32, 2048, {{199999, 1}, {100000, 1}, {2047, 1}, {2048, 1}}, 1,
                 Kind::kNormal, 28);
    check_decode("batch", 32, 2048, std::vector<Run>(64, {6000, 1}), 1, Kind::kNormal, 29);
    check_decode("very long", 32, 2048, {{700000, 1}}, 1, Kind::kNormal, 30);
  }
  if (what != "time") {
    check_op("decode", 20, 128, {{5000, 2}, {900, 1}, {0, 1}}, 41);
    check_op("prefill", 32, 128, {{5000, 20}, {900, 1}, {0, 1}}, 42);
  }
  if (what != "check") {
    time_prefill(32, 8192, 200000, Kind::kNormal);
    time_prefill(32, 4096, 65536, Kind::kNormal);
    time_prefill(64, 8192, 200000, Kind::kNormal);
    time_prefill(32, 8192, 200000, Kind::kRising);
    for (const int batch : {1, 4, 8, 32}) time_decode(32, batch, 200000, 1);
    time_decode(32, 1, 200000, 2);
    time_decode(64, 8, 200000, 1);
  }
  return finish();
}
