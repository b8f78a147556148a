// libtorch, and then our own CHECK again: both define the macros, so this header comes before any
// of base/.
#pragma once

#ifdef CHECK
#error "include train/torch.h before anything that includes base/error.h"
#endif

#include <torch/torch.h>

#undef CHECK
#undef CHECK_EQ
#undef CHECK_NE
#undef CHECK_LT
#undef CHECK_LE
#undef CHECK_GT
#undef CHECK_GE
#include "base/error.h"

// One source for Debian's libtorch 1.13 and the libtorch inside PyTorch 2.x.
#define INDEXCACHE_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) ||             \
   (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))
