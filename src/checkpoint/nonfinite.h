// Looking for values that no healthy checkpoint has: NaN and infinity. The format does not check
// values, and one of them spoils every token after it.
#pragma once

#include <cstdint>

#include "checkpoint/checkpoint.h"
#include "tensor/tensor.h"

namespace indexcache {

struct Nonfinite {
  int64_t count = 0;
  int64_t first = -1;  // row-major element index; -1 if there is none
};

// Reads the tensor once. Integer tensors have none by nature.
Nonfinite count_nonfinite(const TensorView& view);

// All tensors; an Error that lists each with a count, the first index and the file. Reads the whole
// checkpoint.
void check_finite(const Checkpoint& checkpoint);

}  // namespace indexcache
