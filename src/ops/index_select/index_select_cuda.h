// index_select on GPUs, for its table and for planning memory.
#pragma once

#include "ops/index_select/index_select.h"

namespace indexcache {

// Scores of as many queries as fit are held at once: more than this only for one query.
inline constexpr int64_t kIndexSelectWorkspaceBytes = 128 << 20;

// Any GPU.
void index_select_cuda(Exec& exec, const IndexSelectArgs& args);

// e4m3 keys on compute capability 9.0.
bool index_select_hopper_supported(const IndexSelectArgs& args);
void index_select_hopper(Exec& exec, const IndexSelectArgs& args);

// The shapes that it takes: rows of 128, up to 128 heads, index_topk up to 4096.
inline bool index_select_hopper_takes(int64_t num_heads, int64_t head_dim, int64_t k) {
  return head_dim == 128 && num_heads >= 1 && num_heads <= 128 && k >= 1 && k <= 4096;
}

// Scratch that a call takes at most, with that type of keys.
int64_t index_select_gpu_bytes(DType keys, int64_t num_heads, int64_t head_dim, int64_t num_tokens,
                               int64_t context);

}  // namespace indexcache
