#include "ops/rope/rope_table.h"

#include <cmath>

namespace indexcache {

void fill_rope_table(std::span<const int32_t> positions, std::span<const float> inv_freq,
                     float factor, RopeTable* table) {
  table->cos.resize(positions.size() * inv_freq.size());
  table->sin.resize(positions.size() * inv_freq.size());
  size_t i = 0;
  for (const int32_t position : positions) {
    for (const float frequency : inv_freq) {
      const float angle = static_cast<float>(position) * frequency;
      table->cos[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * factor;
      table->sin[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * factor;
      ++i;
    }
  }
}

}  // namespace indexcache
