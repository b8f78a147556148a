// index_select on any GPU, for its table and for planning memory.
#pragma once

#include "ops/index_select/index_select.h"

namespace indexcache {

// Scores of as many queries as fit are held at once: more than this only for one query.
inline constexpr int64_t kIndexSelectWorkspaceBytes = 128 << 20;

void index_select_cuda(Exec& exec, const IndexSelectArgs& args);

}  // namespace indexcache
