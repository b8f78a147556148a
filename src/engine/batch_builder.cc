#include "engine/batch_builder.h"

#include <algorithm>

namespace indexcache {

std::vector<int64_t> share_rows(std::span<const RowDemand> demands, int64_t rows) {
  std::vector<int64_t> shares(demands.size());
  std::vector<size_t> prompts;  // oldest first
  const auto give = [&](size_t i, int64_t at_most) {
    const int64_t wanted = std::min(demands[i].pending, demands[i].most) - shares[i];
    const int64_t given = std::min({wanted, at_most, rows});
    shares[i] += given;
    rows -= given;
  };
  for (size_t i = 0; i < demands.size(); ++i) {
    if (demands[i].pending == 1) {
      give(i, 1);
    } else {
      prompts.push_back(i);
    }
  }
  if (prompts.empty()) return shares;
  const size_t oldest = prompts.front();
  give(oldest, (rows + 1) / 2);
  std::stable_sort(prompts.begin() + 1, prompts.end(),
                   [&](size_t a, size_t b) { return demands[a].pending < demands[b].pending; });
  for (size_t i = 1; i < prompts.size(); ++i) give(prompts[i], rows);
  give(oldest, rows);
  return shares;
}

}  // namespace indexcache
