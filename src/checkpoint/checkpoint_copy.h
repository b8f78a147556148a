// Copies a part of a checkpoint's tensors into another folder, in the layout of the source: the
// same file names, and in each the tensors that are kept. A shard of which nothing is kept is left
// out. Values are copied bit by bit.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "checkpoint/checkpoint.h"

namespace indexcache {

struct CopiedTensors {
  uint64_t num_tensors = 0, num_bytes = 0;            // kept
  uint64_t left_out_tensors = 0, left_out_bytes = 0;  // not
};

using KeepTensor = std::function<bool(std::string_view name)>;
// Called with the bytes done so far. May throw to end the copy.
using CopyProgress = std::function<void(uint64_t bytes_done)>;

// What a copy would hold.
CopiedTensors count_copy(const Checkpoint& source, const KeepTensor& keep);

CopiedTensors copy_tensors(const Checkpoint& source, const KeepTensor& keep,
                           const std::string& folder, const CopyProgress& progress);

}  // namespace indexcache
