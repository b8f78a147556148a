#include "ops/index_select/index_select.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <vector>

#include "base/checked.h"
#include "device/cpu_features.h"
#include "ops/index_select/index_select_cuda.h"
#include "ops/index_select/index_select_kernel.h"
#include "ops/kit/isa.h"

namespace indexcache {

#define INDEXCACHE_DECLARE(isa, feature)       \
  namespace isa {                              \
  extern const IndexSelectKernel kIndexSelect; \
  }
INDEXCACHE_FOR_EACH_ISA(INDEXCACHE_DECLARE)
#undef INDEXCACHE_DECLARE

namespace {

// Consecutive queries of one sequence that are scored together. When there are fewer blocks than
// threads can share, the keys of each are cut into slices, and the candidates of the slices merged:
// the best k of all are among the best k of each slice, so the result is the same however many
// slices there are.
struct Block {
  const SeqSpan* seq;
  int64_t token;  // first row of q
  int64_t num_queries;
  int64_t first_position;
  int64_t num_slices = 1;
  int64_t slice_keys = 0;
  int64_t first_slice = 0;  // among the slices of all blocks

  int64_t num_keys() const { return first_position + num_queries; }
};

// Enough work that a slice's own costs (packing the queries, merging) do not show.
constexpr int64_t kMinSliceKeys = 1024;
constexpr int64_t kTasksPerThread = 4;

// The queries that see more than k tokens, those with the most keys first so that no long task is
// left to the end.
std::vector<Block> make_blocks(const IndexSelectArgs& args, int64_t lanes) {
  std::vector<Block> blocks;
  for (const SeqSpan& seq : args.seqs) {
    const int64_t end = seq.first_position + seq.num_tokens;
    for (int64_t at = std::max(seq.first_position, args.k); at < end; at += lanes) {
      blocks.push_back({.seq = &seq,
                        .token = seq.token_begin + at - seq.first_position,
                        .num_queries = std::min(lanes, end - at),
                        .first_position = at});
    }
  }
  std::sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) {
    return a.num_keys() != b.num_keys() ? a.num_keys() > b.num_keys() : a.token < b.token;
  });
  return blocks;
}

// Returns the number of slices of all blocks.
int64_t cut_into_slices(std::vector<Block>& blocks, int num_threads) {
  const int64_t wanted = num_threads == 1 ? 1 : num_threads * kTasksPerThread;
  const int64_t per_block = ceil_div(wanted, static_cast<int64_t>(blocks.size()));
  int64_t num_slices = 0;
  for (Block& block : blocks) {
    const int64_t keys = block.num_keys();
    block.slice_keys = std::max(round_up(ceil_div(keys, per_block), kPageTokens), kMinSliceKeys);
    block.num_slices = ceil_div(keys, block.slice_keys);
    if (block.num_slices == 1) block.slice_keys = keys;
    block.first_slice = num_slices;
    num_slices += block.num_slices;
  }
  return num_slices;
}

void select_all_visible(Exec& exec, const IndexSelectArgs& args) {
  for (const SeqSpan& seq : args.seqs) {
    const int64_t n = std::min(seq.num_tokens, std::max<int64_t>(args.k - seq.first_position, 0));
    exec.pool.parallel_for(n, [&](int64_t i, int) {
      const int64_t visible = seq.first_position + i + 1;
      int32_t* row = args.positions + (seq.token_begin + i) * args.k;
      std::iota(row, row + visible, 0);
      std::fill(row + visible, row + args.k, -1);
      args.counts[seq.token_begin + i] = static_cast<int32_t>(visible);
    });
  }
}

// Candidates of the slices of all blocks that have more than one: [slice][query of the block][k].
struct SliceResults {
  int32_t* ranks;
  int32_t* positions;
  int32_t* counts;  // [slice][query of the block]
};

template <const IndexSelectKernel* kKernel>
void run(Exec& exec, const IndexSelectArgs& args) {
  select_all_visible(exec, args);
  const int64_t lanes = kKernel->lanes, k = args.k;
  std::vector<Block> blocks = make_blocks(args, lanes);
  if (blocks.empty()) return;
  const int64_t num_slices = cut_into_slices(blocks, exec.pool.num_threads());
  const bool sliced = num_slices > static_cast<int64_t>(blocks.size());

  SliceResults results = {};
  if (sliced) {
    const int64_t num_rows = num_slices * lanes;
    int32_t* memory = reinterpret_cast<int32_t*>(
        exec.shared_scratch(static_cast<size_t>(num_rows * (2 * k + 1)) * sizeof(int32_t)));
    results = {memory, memory + num_rows * k, memory + num_rows * 2 * k};
  }
  std::vector<const Block*> block_of_slice;
  for (const Block& block : blocks) {
    block_of_slice.insert(block_of_slice.end(), static_cast<size_t>(block.num_slices), &block);
  }

  const auto task_of = [&](const Block& block, int64_t slice) {
    IndexSelectTask task = {};
    task.q = args.q + block.token * args.num_heads * args.head_dim;
    task.weights = args.weights + block.token * args.num_heads;
    task.num_queries = block.num_queries;
    task.first_position = block.first_position;
    task.num_heads = args.num_heads;
    task.head_dim = args.head_dim;
    task.key_base = args.keys.base;
    task.page_bytes = args.keys.page_bytes;
    task.pages = block.seq->pages;
    task.keys = args.keys.dtype == DType::kI8     ? IndexKeys::kI8
                : args.keys.dtype == DType::kBF16 ? IndexKeys::kBF16
                                                  : IndexKeys::kF32;
    task.key_begin = slice * block.slice_keys;
    task.key_end = std::min(task.key_begin + block.slice_keys, block.num_keys());
    task.k = k;
    task.stride = k;
    if (block.num_slices == 1) {
      task.positions = args.positions + block.token * k;
      task.counts = args.counts + block.token;
    } else {
      const int64_t row = (block.first_slice + slice) * lanes;
      task.ranks = results.ranks + row * k;
      task.positions = results.positions + row * k;
      task.counts = results.counts + row;
    }
    return task;
  };

  size_t num_bytes = 0;
  for (const Block& block : blocks) {
    num_bytes = std::max(num_bytes, kKernel->scratch_bytes(task_of(block, 0)));
    if (block.num_slices == 1) continue;
    num_bytes = std::max(num_bytes,
                         static_cast<size_t>(block.num_slices * k + lanes) * 2 * sizeof(int32_t));
  }

  exec.pool.parallel_for(num_slices, [&](int64_t i, int thread) {
    const Block& block = *block_of_slice[static_cast<size_t>(i)];
    IndexSelectTask task = task_of(block, i - block.first_slice);
    task.scratch = exec.scratch(thread, num_bytes);
    kKernel->scan(task);
  });
  if (!sliced) return;

  exec.pool.parallel_for(static_cast<int64_t>(blocks.size()) * lanes, [&](int64_t i, int thread) {
    const Block& block = blocks[static_cast<size_t>(i / lanes)];
    const int64_t query = i % lanes;
    if (block.num_slices == 1 || query >= block.num_queries) return;
    int32_t* ranks = reinterpret_cast<int32_t*>(exec.scratch(thread, num_bytes));
    int32_t* positions = ranks + block.num_slices * k + lanes;
    int64_t n = 0;
    for (int64_t slice = 0; slice < block.num_slices; ++slice) {
      const int64_t row = (block.first_slice + slice) * lanes + query;
      std::copy_n(results.ranks + row * k, results.counts[row], ranks + n);
      std::copy_n(results.positions + row * k, results.counts[row], positions + n);
      n += results.counts[row];
    }
    kKernel->keep_best(ranks, positions, n, k);
    std::copy_n(positions, k, args.positions + (block.token + query) * k);
    args.counts[block.token + query] = static_cast<int32_t>(k);
  });
}

bool has_int8_keys(const IndexSelectArgs& args) { return args.keys.dtype == DType::kI8; }
bool has_fp8_keys(const IndexSelectArgs& args) { return args.keys.dtype == DType::kF8E4M3; }

// The kernels without vpdpbusd sum int8 products in f32, which is exact below 2^24.
bool sums_are_exact(const IndexSelectArgs& args) {
  return !has_int8_keys(args) || args.head_dim < (1 << 24) / (127 * 127);
}

constexpr OpImpl<IndexSelectArgs> kImpls[] = {
    {"avx512bf16",
     [](const IndexSelectArgs& args) {
       return cpu_features().avx512_bf16 && !has_fp8_keys(args) &&
              (!has_int8_keys(args) || cpu_features().avx512_vnni);
     },
     run<&avx512bf16::kIndexSelect>},
    {"avx512",
     [](const IndexSelectArgs& args) {
       return cpu_features().avx512 && !has_fp8_keys(args) && sums_are_exact(args);
     },
     run<&avx512::kIndexSelect>},
    {"avx2",
     [](const IndexSelectArgs& args) {
       return cpu_features().avx2 && !has_fp8_keys(args) && sums_are_exact(args);
     },
     run<&avx2::kIndexSelect>},
#if defined(INDEXCACHE_CUDA) && !defined(INDEXCACHE_CUDA_EMULATION)
    {"sm90_fp8", index_select_hopper_supported, index_select_hopper, Device::kCuda},
#endif
#ifdef INDEXCACHE_CUDA
    {"cuda", [](const IndexSelectArgs&) { return true; }, index_select_cuda, Device::kCuda},
#endif
    {"ref", [](const IndexSelectArgs&) { return true; }, index_select_ref},
};

void check_contract(Device device, const IndexSelectArgs& args) {
  CHECK_GE(args.k, 1);
  CHECK_LE(args.k, std::numeric_limits<int32_t>::max() / 4);
  CHECK_GE(args.num_heads, 1);
  CHECK_GE(args.head_dim, 2);
  CHECK_EQ(args.head_dim % 2, 0);
  CHECK(args.keys.dtype == DType::kF32 || args.keys.dtype == DType::kBF16 ||
        rows_have_scales(args.keys.dtype));
  if (has_int8_keys(args)) CHECK_LE(args.head_dim, kMaxInt8HeadDim);
  if (rows_have_scales(args.keys.dtype)) CHECK_EQ(args.keys.page_bytes % 4, 0);
  CHECK_EQ(args.keys.row_elements, args.head_dim);
  CHECK_GE(args.keys.page_bytes, kPageTokens * paged_row_bytes(args.keys.dtype, args.head_dim));
  int64_t num_tokens = 0;
  for (const SeqSpan& seq : args.seqs) {
    CHECK_EQ(seq.token_begin, num_tokens);
    CHECK_GE(seq.num_tokens, 0);
    CHECK_GE(seq.first_position, 0);
    CHECK_LE(seq.first_position + seq.num_tokens, std::numeric_limits<int32_t>::max() - 64);
    CHECK(seq.num_tokens == 0 || seq.pages != nullptr || device == Device::kCuda);
    num_tokens += seq.num_tokens;
  }
  if (num_tokens == 0) return;
  CHECK(args.q != nullptr);
  CHECK(args.weights != nullptr);
  CHECK(args.keys.base != nullptr);
  CHECK(args.positions != nullptr);
  CHECK(args.counts != nullptr);
  CHECK(device == Device::kCpu || args.device_seqs != nullptr);
}

}  // namespace

std::span<const OpImpl<IndexSelectArgs>> index_select_impls() { return kImpls; }

void index_select(Exec& exec, const IndexSelectArgs& args) {
  check_contract(exec.device, args);
  run_op(exec, "index_select", kImpls, args, index_select_cost(args));
}

int64_t index_select_gpu_bytes(DType keys, int64_t num_heads, int64_t head_dim, int64_t num_tokens,
                               int64_t context) {
  const int64_t any = std::max(kIndexSelectWorkspaceBytes, 4 * context) +
                      num_tokens * num_heads * (head_dim + 4) + 512;
  if (keys != DType::kF8E4M3) return any;
  // The largest of what index_select_fp8_workspace() of index_select_sm90.cuh says: padded queries,
  // and the candidates of all multiprocessors (144 are on the chip), or the scores of a decode
  // step.
  const int64_t padded_heads =
      std::max<int64_t>(16, std::bit_ceil(static_cast<uint64_t>(num_heads)));
  const int64_t candidates = 144 * (256 / std::min<int64_t>(padded_heads, 256)) * 8192 * 8;
  return std::max(any, num_tokens * padded_heads * (head_dim + 4) + 512 +
                           std::max<int64_t>(candidates, 256 << 20));
}

Cost index_select_cost(const IndexSelectArgs& args) {
  double pairs = 0, tokens = 0, keys = 0;  // (query, key) pairs scored; queries; keys read
  for (const SeqSpan& seq : args.seqs) {
    tokens += static_cast<double>(seq.num_tokens);
    const int64_t end = seq.first_position + seq.num_tokens;
    // Queries that see more than k tokens: positions [begin, end), the one at p sees p + 1.
    const int64_t begin = std::max(seq.first_position, args.k);
    if (begin >= end) continue;
    pairs += static_cast<double>(end - begin) * static_cast<double>(begin + end + 1) / 2;
    keys += static_cast<double>(end);
  }
  const double heads = static_cast<double>(args.num_heads),
               dim = static_cast<double>(args.head_dim);
  const double k = static_cast<double>(args.k);
  return {.flops = 2 * heads * dim * pairs,
          .bytes = tokens * (4 * heads * dim + 4 * heads + 4 * k + 4) +
                   keys * static_cast<double>(paged_row_bytes(args.keys.dtype, args.head_dim))};
}

}  // namespace indexcache
