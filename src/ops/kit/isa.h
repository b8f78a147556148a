// A `*_cpu.cc` file is compiled once for each instruction set, each time into its own namespace,
// and the op's table chooses at run time. Such a file may include only its op's headers and
// ops/kit/vec.h, and may define nothing inline with external linkage: one copy of an inline
// function would serve the whole program after linking, and the copy with AVX-512 instructions
// would run on a CPU without them. tools/check_isa asserts that no weak symbol is in these objects.
#pragma once

#include "device/cpu_features.h"

// X(namespace, cpu feature)
#define INDEXCACHE_FOR_EACH_ISA(X) \
  X(avx2, avx2)                    \
  X(avx512, avx512)                \
  X(avx512bf16, avx512_bf16)

// Declares one function in the namespace of every instruction set.
#define INDEXCACHE_DECLARE_FOR_ISAS(...) \
  namespace avx2 {                       \
  __VA_ARGS__;                           \
  }                                      \
  namespace avx512 {                     \
  __VA_ARGS__;                           \
  }                                      \
  namespace avx512bf16 {                 \
  __VA_ARGS__;                           \
  }
