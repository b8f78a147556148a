// How much the selections of different layers have in common: mean |T_i and T_j| / index_topk over
// the queries that see more than index_topk tokens (the others select all they see), for all pairs
// of full layers. What makes sharing possible (IndexCache, arXiv 2603.12201, appendix A).
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "engine/engine.h"

namespace indexcache {

struct Overlap {
  std::vector<int> layers;  // the full layers of the plan it was measured under, ascending
  // [layers, layers] row-major. The standard error is that of the mean over sequences, each
  // sequence being one observation, since the queries of one are alike; 0 with one sequence.
  std::vector<double> mean, standard_error;
  double chance = 0;  // what independent random selections would have: mean of index_topk / visible
  int64_t num_queries = 0, num_sequences = 0, index_topk = 0;

  size_t size() const { return layers.size(); }
  double at(size_t i, size_t j) const { return mean[i * size() + j]; }
  double error_at(size_t i, size_t j) const { return standard_error[i * size() + j]; }
};

// Runs each sequence through the engine. Error where no query of a sequence sees more than
// index_topk tokens.
Overlap measure_overlap(Engine& engine, const std::vector<std::vector<int32_t>>& sequences,
                        const std::function<void(int64_t tokens_done)>& progress = {});

// The mean over neighbouring layers; 0 with one layer.
double adjacent_mean(const Overlap& overlap);

// Groups of neighbouring layers, [first, last] as indices into `layers`: beginning with every layer
// alone, the two neighbouring groups with the highest mean overlap between them become one, as long
// as that mean is at least `threshold`.
std::vector<std::pair<size_t, size_t>> overlap_clusters(const Overlap& overlap, double threshold);

std::string overlap_text(const Overlap& overlap);  // a heat map of digits, and the figures
std::string overlap_csv(const Overlap& overlap);   // one row a pair
Json overlap_json(const Overlap& overlap);

}  // namespace indexcache
