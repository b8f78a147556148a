// sparse_mla on Hopper, as a line of the op's table.
#include <climits>

#include "device/cuda.cuh"
#include "device/gpus.h"
#include "ops/sparse_mla/sparse_mla_impl.h"
#include "ops/sparse_mla/sparse_mla_sm90.cuh"

namespace indexcache {

bool sparse_mla_hopper_supported(const SparseMlaArgs& args) {
  const PagedRows& rows = args.rows;
  // fp8 rows are found by their distance in 16 bytes.
  const bool fp8 = rows.dtype == DType::kF8E4M3 && !args.f32_products &&
                   rows.num_pages * (rows.page_bytes / 16) < int64_t{UINT32_MAX};
  return first_gpu_is_hopper() && (rows.dtype == DType::kBF16 || fp8) &&
         args.value_dim == sm90::kLatentDim && rows.row_elements == sm90::kLatentRow &&
         rows.page_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(rows.base) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.q) % 16 == 0;
}

void sparse_mla_hopper(Exec& exec, const SparseMlaArgs& args) {
  const int64_t num_tokens =
      args.seqs.empty() ? 0 : args.seqs.back().token_begin + args.seqs.back().num_tokens;
  if (num_tokens == 0) return;
  CHECK(num_tokens <= INT_MAX);
  CudaStream& stream = exec.cuda();
  sm90::SparseMlaSm90Args a;
  a.q = args.q;
  a.num_heads = static_cast<int>(args.num_heads);
  a.scale = args.scale;
  a.rows = args.rows.base;
  a.rows_are_fp8 = args.rows.dtype == DType::kF8E4M3;
  a.page_bytes = args.rows.page_bytes;
  a.seqs = args.device_seqs;
  a.num_seqs = static_cast<int>(args.seqs.size());
  a.num_tokens = static_cast<int>(num_tokens);
  a.positions = args.positions;
  a.counts = args.counts;
  a.k = static_cast<int>(args.k);
  a.out = args.out;
  const int parts = exec.batch_invariant
                        ? 1
                        : sm90::sparse_mla_num_parts(a.num_tokens, a.num_heads, a.k,
                                                     stream.num_multiprocessors());
  const int64_t workspace = sm90::sparse_mla_workspace(a.num_tokens, a.num_heads, parts);
  check_cuda(sm90::sparse_mla_sm90(a, parts, stream.scratch(static_cast<size_t>(workspace)),
                                   stream.num_multiprocessors(), stream_of(stream)),
             "sparse MLA");
}

}  // namespace indexcache
