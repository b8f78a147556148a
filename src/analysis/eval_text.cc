#include "analysis/eval_text.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <numbers>

#include "base/checked.h"
#include "engine/sampler.h"

namespace indexcache {

namespace {

struct RowScore {
  double nll, kl;
  bool same_top;
};

struct Sums {
  double nll = 0, kl = 0, same_top = 0;
};

double log_sum_exp(std::span<const float> row) {
  const float top = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float logit : row) sum += std::exp(static_cast<double>(logit) - top);
  return std::log(sum) + top;
}

double kl_divergence(std::span<const float> reference, double reference_norm,
                     std::span<const float> row) {
  const double norm = log_sum_exp(row);
  double sum = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    const double log_p = static_cast<double>(reference[i]) - reference_norm;
    sum += std::exp(log_p) * (log_p - (static_cast<double>(row[i]) - norm));
  }
  return sum;
}

size_t top_token(std::span<const float> row) {
  return static_cast<size_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

// A variant at work on one sequence.
struct Lane {
  const Variant* variant;
  KvCache cache;
  SequenceCache sequence = {};
  std::vector<Sums> sums = {};  // one a sequence
};

void run_chunk(Lane& lane, std::span<const int32_t> tokens, std::vector<float>* logits) {
  Engine& engine = *lane.variant->engine;
  BatchSequence batch{&lane.sequence, tokens, static_cast<int64_t>(tokens.size())};
  logits->resize(tokens.size() * static_cast<size_t>(engine.model.config.vocab_size));
  engine.model.plan = lane.variant->plan;
  forward(engine.exec, engine.model, lane.cache, engine.activations, {&batch, 1}, logits->data());
}

// `of` is taken at the sequences in order.
template <class Of>
Estimate estimate(const std::vector<Sums>& sums, double tokens_each, const Of& of) {
  const double n = static_cast<double>(sums.size());
  Estimate out;
  for (size_t i = 0; i < sums.size(); ++i) out.mean += of(i);
  out.mean /= n * tokens_each;
  double squares = 0;
  for (size_t i = 0; i < sums.size(); ++i) squares += std::pow(of(i) / tokens_each - out.mean, 2);
  if (sums.size() > 1) out.error = std::sqrt(squares / (n - 1) / n);
  return out;
}

}  // namespace

double TextScore::perplexity() const { return std::exp(nll.mean); }

std::vector<TextScore> score_text(const std::vector<Variant>& variants,
                                  const std::vector<std::vector<int32_t>>& sequences,
                                  int64_t num_target_bytes,
                                  const std::function<void(int64_t)>& progress) {
  CHECK(!variants.empty() && !sequences.empty());
  const int64_t length = static_cast<int64_t>(sequences[0].size());
  CHECK_GE(length, 2);
  int64_t chunk = length;
  std::deque<Lane> lanes;
  for (const Variant& variant : variants) {
    const Model& model = variant.engine->model;
    const CacheTypes types = cache_types(model.config, model.compute, variant.engine->options);
    lanes.push_back({&variant, KvCache(cache_shape(model.config, variant.plan, types,
                                                   ceil_div(length, kPageTokens)),
                                       variant.engine->exec.device)});
    chunk = std::min(chunk, variant.engine->activations.max_tokens);
  }
  const size_t vocab = static_cast<size_t>(variants[0].engine->model.config.vocab_size);

  std::vector<float> reference, logits;
  std::vector<double> reference_norm;
  std::vector<RowScore> rows;
  int64_t done = 0;
  for (const std::vector<int32_t>& tokens : sequences) {
    CHECK_EQ(static_cast<int64_t>(tokens.size()), length);
    for (Lane& lane : lanes) {
      CHECK(lane.cache.reserve(lane.sequence, length));
      lane.sums.emplace_back();
    }
    for (int64_t first = 0; first < length; first += chunk) {
      const int64_t count = std::min(chunk, length - first);
      const int64_t targets = std::min(count, length - 1 - first);
      const auto part =
          std::span(tokens).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
      for (Lane& lane : lanes) {
        const bool is_reference = &lane == &lanes[0];
        std::vector<float>& out = is_reference ? reference : logits;
        run_chunk(lane, part, &out);
        const auto row_of = [vocab](const std::vector<float>& all, int64_t i) {
          return std::span(all).subspan(static_cast<size_t>(i) * vocab, vocab);
        };
        rows.resize(static_cast<size_t>(targets));
        reference_norm.resize(static_cast<size_t>(targets));
        lane.variant->engine->exec.pool.parallel_for(targets, [&](int64_t i, int) {
          const size_t r = static_cast<size_t>(i);
          const auto row = row_of(out, i);
          if (is_reference) reference_norm[r] = log_sum_exp(row);
          rows[r].nll = negative_log_likelihood(row, tokens[static_cast<size_t>(first + i + 1)]);
          rows[r].kl =
              is_reference ? 0 : kl_divergence(row_of(reference, i), reference_norm[r], row);
          rows[r].same_top = is_reference || top_token(row_of(reference, i)) == top_token(row);
        });
        Sums& sums = lane.sums.back();
        for (const RowScore& row : rows) {
          sums.nll += row.nll;
          sums.kl += row.kl;
          sums.same_top += row.same_top;
        }
        done += count;
        if (progress) progress(done);
      }
    }
    for (Lane& lane : lanes) lane.cache.release(lane.sequence);
  }

  const double each = static_cast<double>(length - 1);
  std::vector<TextScore> scores;
  for (const Lane& lane : lanes) {
    const std::vector<Sums>& sums = lane.sums;
    const std::vector<Sums>& base = lanes[0].sums;
    TextScore score;
    score.nll = estimate(sums, each, [&](size_t i) { return sums[i].nll; });
    score.nll_increase = estimate(sums, each, [&](size_t i) { return sums[i].nll - base[i].nll; });
    score.kl = estimate(sums, each, [&](size_t i) { return sums[i].kl; });
    score.top1_agreement = estimate(sums, each, [&](size_t i) { return sums[i].same_top; });
    score.bits_per_byte = score.nll.mean * each * static_cast<double>(sequences.size()) /
                          std::numbers::ln2 / static_cast<double>(num_target_bytes);
    scores.push_back(score);
  }
  return scores;
}

}  // namespace indexcache
