// The angles of rotary position embedding for the tokens of a batch, shared by all layers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace indexcache {

struct RopeTable {
  std::vector<float> cos, sin;  // [num_tokens, inv_freq.size()]
};

// angle[t, j] = float32(positions[t]) * inv_freq[j], the product rounded to float32 as transformers
// does: at 200K tokens an exact product would differ from what the model was trained with by up to
// 0.01 rad. `factor` scales both tables (YaRN's attention factor; 1 otherwise).
void fill_rope_table(std::span<const int32_t> positions, std::span<const float> inv_freq,
                     float factor, RopeTable* table);

}  // namespace indexcache
