// How the rows of one step are shared between running requests.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace indexcache {

struct RowDemand {
  int64_t pending = 0;  // tokens that are not in the cache yet; 1 for a request that decodes
  int64_t most = 0;     // rows it may have in one step
};

// Rows for each, 0 to min(pending, most), at most `rows` in all. `demands` are by age, oldest
// first.
//
// Each request with one token left gets its row first. Of the rows that are left the oldest prompt
// is sure of half, so that it always moves on; the others share the other half, the shortest rest
// first, so that a short prompt waits a step and not for the long ones before it. What they leave
// goes to the oldest too: alone, a prompt has all rows.
std::vector<int64_t> share_rows(std::span<const RowDemand> demands, int64_t rows);

}  // namespace indexcache
