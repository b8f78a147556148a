// index_select in fp8 on Hopper, as a line of the op's table. A call whose sequences have few
// tokens each (decode) launches the same kernels with the same arguments whatever the contexts, so
// that it may be captured in a graph; scratch that it needs is taken before a capture by running it
// once.
#include <algorithm>
#include <climits>

#include "device/cuda.cuh"
#include "device/gpus.h"
#include "ops/index_select/index_select_cuda.h"
#include "ops/index_select/index_select_sm90.cuh"

namespace indexcache {

bool index_select_hopper_supported(const IndexSelectArgs& args) {
  const PagedRows& keys = args.keys;
  return first_gpu_is_hopper() && keys.dtype == DType::kF8E4M3 &&
         index_select_hopper_takes(args.num_heads, args.head_dim, args.k) && keys.num_pages > 0 &&
         keys.page_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(keys.base) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.q) % 16 == 0;
}

void index_select_hopper(Exec& exec, const IndexSelectArgs& args) {
  static_assert(sm90::kIndexDim == 128 && sm90::kMaxIndexTopK == 4096);
  int64_t num_tokens = 0, longest = 0;
  for (const SeqSpan& seq : args.seqs) {
    num_tokens += seq.num_tokens;
    if (seq.num_tokens > 0) longest = std::max(longest, seq.first_position + seq.num_tokens);
  }
  if (num_tokens == 0) return;
  CHECK(num_tokens <= INT_MAX);
  CudaStream& stream = exec.cuda();
  const int multiprocessors = stream.num_multiprocessors();
  sm90::IndexSelectFp8Args a;
  a.q = args.q;
  a.weights = args.weights;
  a.num_heads = static_cast<int>(args.num_heads);
  a.key_base = args.keys.base;
  a.page_bytes = args.keys.page_bytes;
  a.num_pool_pages = args.keys.num_pages;
  a.seqs = args.seqs;
  a.device_seqs = args.device_seqs;
  a.max_context = std::max(args.max_context, longest);
  a.k = static_cast<int>(args.k);
  a.positions = args.positions;
  a.counts = args.counts;
  const auto workspace = static_cast<size_t>(sm90::index_select_fp8_workspace(a, multiprocessors));
  check_cuda(
      sm90::index_select_fp8(a, stream.scratch(workspace), multiprocessors, stream_of(stream)),
      "scoring and selecting in fp8");
}

}  // namespace indexcache
