#include "checkpoint/nonfinite.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "checkpoint/problem_list.h"

namespace indexcache {

namespace {

// An element is NaN or infinite if all bits of `kMask` are set: the exponent of the IEEE types,
// exponent and mantissa where a format has NaN only.
template <class Bits, Bits kMask>
Nonfinite scan(const TensorView& view) {
  // Blocks that fit the first-level cache: count without branches, and look for the index only
  // where there is something.
  constexpr int64_t kBlock = 4096;
  const int64_t size = num_elements(view.shape);
  Nonfinite result;
  const auto bad = [&](int64_t i) {
    Bits bits;
    std::memcpy(&bits, view.data + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    return (bits & kMask) == kMask;
  };
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    // A counter as wide as the elements keeps the loop in full vectors; a byte would overflow, so
    // bytes only say "any".
    Bits count = 0;
    if constexpr (sizeof(Bits) == 1) {
      for (int64_t i = begin; i < end; ++i) count |= static_cast<Bits>(bad(i));
    } else {
      for (int64_t i = begin; i < end; ++i) count = static_cast<Bits>(count + bad(i));
    }
    if (count == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (!bad(i)) continue;
      if (result.count++ == 0) result.first = i;
    }
  }
  return result;
}

}  // namespace

Nonfinite count_nonfinite(const TensorView& view) {
  switch (view.dtype) {
    case DType::kF64:
      return scan<uint64_t, 0x7FF0000000000000>(view);
    case DType::kF32:
      return scan<uint32_t, 0x7F800000>(view);
    case DType::kBF16:
      return scan<uint16_t, 0x7F80>(view);
    case DType::kF16:
      return scan<uint16_t, 0x7C00>(view);
    case DType::kF8E4M3:
      return scan<uint8_t, 0x7F>(view);
    case DType::kF8E5M2:
      return scan<uint8_t, 0x7C>(view);
    case DType::kF8E8M0:
      return scan<uint8_t, 0xFF>(view);
    default:
      return {};
  }
}

void check_finite(const Checkpoint& checkpoint) {
  ProblemList problems;
  for (const auto& [name, view] : checkpoint.tensors()) {
    const Nonfinite found = count_nonfinite(view);
    if (found.count == 0) continue;
    problems.add([&] {
      return fmt::format("tensor \"{}\" in {}: {} of {} values, the first at element {}",
                         printable(name), printable(checkpoint.file_of(view), 400), found.count,
                         num_elements(view.shape), found.first);
    });
  }
  if (problems.count() > 0) {
    fail("{}: found NaN or infinite values in {} tensors, expected finite weights:{}",
         printable(checkpoint.path, 400), problems.count(), problems.text());
  }
}

}  // namespace indexcache
