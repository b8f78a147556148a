#include "analysis/overlap.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/checked.h"

namespace indexcache {

namespace {

// Sums of |T_i and T_j| over queries, for i <= j: whole numbers, so the order does not matter.
struct PairCounts {
  size_t num_layers;
  std::vector<int64_t> counts = std::vector<int64_t>(num_layers * num_layers);

  // `rows`: one ascending row of `k` positions a layer, all at most `position`.
  void add(std::span<const int32_t* const> rows, int64_t k, int64_t position,
           std::vector<uint64_t>* bits) {
    const size_t words = static_cast<size_t>(position / 64 + 1);
    bits->assign(words * num_layers, 0);
    for (size_t i = 0; i < num_layers; ++i) {
      uint64_t* row = bits->data() + i * words;
      for (int64_t t = 0; t < k; ++t) row[rows[i][t] / 64] |= uint64_t{1} << (rows[i][t] % 64);
    }
    for (size_t i = 0; i < num_layers; ++i) {
      const uint64_t* a = bits->data() + i * words;
      for (size_t j = i; j < num_layers; ++j) {
        const uint64_t* b = bits->data() + j * words;
        int64_t common = 0;
        for (size_t w = 0; w < words; ++w) common += std::popcount(a[w] & b[w]);
        counts[i * num_layers + j] += common;
      }
    }
  }
};

double mean_between(const Overlap& overlap, std::pair<size_t, size_t> a,
                    std::pair<size_t, size_t> b) {
  double sum = 0;
  for (size_t i = a.first; i <= a.second; ++i) {
    for (size_t j = b.first; j <= b.second; ++j) sum += overlap.at(i, j);
  }
  return sum / static_cast<double>((a.second - a.first + 1) * (b.second - b.first + 1));
}

}  // namespace

Overlap measure_overlap(Engine& engine, const std::vector<std::vector<int32_t>>& sequences,
                        const std::function<void(int64_t)>& progress) {
  const IndexPlan& plan = engine.model.plan;
  const int64_t k = engine.model.config.indexer.index_topk;
  Overlap out;
  out.index_topk = k;
  out.num_sequences = static_cast<int64_t>(sequences.size());
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    if (plan.is_full(layer)) out.layers.push_back(layer);
  }
  const size_t L = out.size();

  std::vector<std::vector<int32_t>> selections(static_cast<size_t>(plan.num_layers()));
  ForwardTap tap;
  tap.selection = [&](int layer, Selection selection) {
    selections[static_cast<size_t>(layer)].assign(selection.positions.begin(),
                                                  selection.positions.end());
  };
  std::vector<std::vector<double>> shares;  // of each sequence, [L, L]
  int64_t done = 0;
  for (const std::vector<int32_t>& tokens : sequences) {
    const int64_t total = static_cast<int64_t>(tokens.size());
    if (total <= k) {
      fail("a sequence of {} tokens does not exceed index_topk {}: every query selects all it sees",
           total, k);
    }
    const size_t threads = static_cast<size_t>(engine.exec.pool.num_threads());
    std::vector<PairCounts> counts(threads, PairCounts{L});
    std::vector<std::vector<uint64_t>> bits(threads);
    SequenceCache cache;
    for (int64_t first = 0; first < total;) {
      const int64_t count = std::min(total - first, engine.activations.max_tokens);
      PrefillHooks hooks{.tap = &tap};
      prefill(engine, cache,
              std::span(tokens).subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
              nullptr, hooks);
      const int64_t begin = std::clamp<int64_t>(k - first, 0, count);
      engine.exec.pool.parallel_for(count - begin, [&](int64_t item, int thread) {
        const int64_t row = begin + item;
        std::vector<const int32_t*> rows;
        for (const int layer : out.layers)
          rows.push_back(selections[static_cast<size_t>(layer)].data() + row * k);
        counts[static_cast<size_t>(thread)].add(rows, k, first + row,
                                                &bits[static_cast<size_t>(thread)]);
      });
      first += count;
      done += count;
      if (progress) progress(done);
    }
    engine.cache.release(cache);
    out.num_queries += total - k;
    for (int64_t visible = k + 1; visible <= total; ++visible)
      out.chance += static_cast<double>(k) / static_cast<double>(visible);
    std::vector<double> share(L * L);
    for (size_t i = 0; i < L; ++i) {
      for (size_t j = i; j < L; ++j) {
        int64_t sum = 0;
        for (const PairCounts& part : counts) sum += part.counts[i * L + j];
        share[i * L + j] = share[j * L + i] =
            static_cast<double>(sum) / static_cast<double>((total - k) * k);
      }
    }
    shares.push_back(std::move(share));
  }

  out.chance /= static_cast<double>(out.num_queries);
  const double n = static_cast<double>(shares.size());
  out.mean.resize(L * L);
  out.standard_error.resize(L * L);
  for (size_t p = 0; p < L * L; ++p) {
    for (const auto& share : shares) out.mean[p] += share[p] / n;
    double squares = 0;
    for (const auto& share : shares) squares += std::pow(share[p] - out.mean[p], 2);
    if (shares.size() > 1) out.standard_error[p] = std::sqrt(squares / (n - 1) / n);
  }
  return out;
}

double adjacent_mean(const Overlap& overlap) {
  double sum = 0;
  for (size_t i = 0; i + 1 < overlap.size(); ++i) sum += overlap.at(i, i + 1);
  return overlap.size() > 1 ? sum / static_cast<double>(overlap.size() - 1) : 0;
}

std::vector<std::pair<size_t, size_t>> overlap_clusters(const Overlap& overlap, double threshold) {
  std::vector<std::pair<size_t, size_t>> groups;
  for (size_t i = 0; i < overlap.size(); ++i) groups.push_back({i, i});
  while (groups.size() > 1) {
    size_t best = 0;
    double highest = -1;
    for (size_t g = 0; g + 1 < groups.size(); ++g) {
      const double mean = mean_between(overlap, groups[g], groups[g + 1]);
      if (mean > highest) {
        highest = mean;
        best = g;
      }
    }
    if (highest < threshold) break;
    groups[best].second = groups[best + 1].second;
    groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
  return groups;
}

std::string overlap_text(const Overlap& overlap) {
  const size_t L = overlap.size();
  std::string out =
      fmt::format("mean overlap of selections, % of index_topk {}: {} queries of {} sequences\n",
                  overlap.index_topk, overlap.num_queries, overlap.num_sequences);
  out += "layer";
  for (const int layer : overlap.layers) out += fmt::format("{:>4}", layer);
  out += "\n";
  double worst_error = 0;
  for (size_t i = 0; i < L; ++i) {
    out += fmt::format("{:>5}", overlap.layers[i]);
    for (size_t j = 0; j < L; ++j) {
      out += fmt::format("{:>4.0f}", 100 * overlap.at(i, j));
      worst_error = std::max(worst_error, overlap.error_at(i, j));
    }
    out += "\n";
  }
  if (overlap.num_sequences > 1) {
    out += fmt::format("largest standard error {:.2f}% (over {} sequences)\n", 100 * worst_error,
                       overlap.num_sequences);
  }
  if (L < 2) return out;
  const double adjacent = adjacent_mean(overlap);
  out +=
      fmt::format("neighbouring layers: {:.1f}% on average\ngroups at that mean: ", 100 * adjacent);
  for (const auto& [first, last] : overlap_clusters(overlap, adjacent)) {
    out += first == last ? fmt::format(" {}", overlap.layers[first])
                         : fmt::format(" {}-{}", overlap.layers[first], overlap.layers[last]);
  }
  return out + "\n";
}

std::string overlap_csv(const Overlap& overlap) {
  std::string out = "layer_a,layer_b,overlap,standard_error\n";
  for (size_t i = 0; i < overlap.size(); ++i) {
    for (size_t j = 0; j < overlap.size(); ++j) {
      out += fmt::format("{},{},{},{}\n", overlap.layers[i], overlap.layers[j], overlap.at(i, j),
                         overlap.error_at(i, j));
    }
  }
  return out;
}

Json overlap_json(const Overlap& overlap) {
  const size_t L = overlap.size();
  Json mean = Json::array(), error = Json::array(), groups = Json::array();
  for (size_t i = 0; i < L; ++i) {
    const auto row = [&](const std::vector<double>& all) {
      return std::vector<double>(all.begin() + static_cast<std::ptrdiff_t>(i * L),
                                 all.begin() + static_cast<std::ptrdiff_t>((i + 1) * L));
    };
    mean.push_back(row(overlap.mean));
    error.push_back(row(overlap.standard_error));
  }
  const double adjacent = adjacent_mean(overlap);
  for (const auto& [first, last] : overlap_clusters(overlap, adjacent))
    groups.push_back({overlap.layers[first], overlap.layers[last]});
  return {{"layers", overlap.layers},
          {"index_topk", overlap.index_topk},
          {"num_queries", overlap.num_queries},
          {"num_sequences", overlap.num_sequences},
          {"adjacent_mean", adjacent},
          {"chance", overlap.chance},
          {"groups", groups},
          {"overlap", mean},
          {"standard_error", error}};
}

}  // namespace indexcache
