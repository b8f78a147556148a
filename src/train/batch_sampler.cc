#include "train/batch_sampler.h"

#include <algorithm>

#include "base/rng.h"

namespace indexcache {

namespace {

BatchDocument take(const TokenFile& file, uint64_t begin, uint64_t end) {
  BatchDocument document;
  for (uint64_t i = begin; i < end; ++i) {
    document.tokens.push_back(file.token(i));
    document.weights.push_back(file.weights()[i]);
  }
  return document;
}

}  // namespace

BatchSampler::BatchSampler(std::vector<DataShare> data, uint64_t seed) : seed_(seed) {
  double total = 0;
  for (const DataShare& d : data) total += d.share;
  if (data.empty() || !(total > 0))
    fail("no training data: give at least one file with a share above 0");
  for (DataShare& d : data) {
    if (!(d.share >= 0)) fail("{}: share {} is negative", d.file.path(), d.share);
    Source source{std::move(d.file), d.share / total, {}, {}, 0};
    const auto documents = source.file.documents();
    for (uint64_t i = 0; i + 1 < documents.size(); ++i) {
      const auto weights =
          source.file.weights().subspan(documents[i], documents[i + 1] - documents[i]);
      const bool whole =
          std::any_of(weights.begin(), weights.end(), [](uint8_t w) { return w != 1; });
      source.whole.push_back(whole);
      whole ? source.whole_documents.push_back(i) : void(source.free_tokens += weights.size());
    }
    sources_.push_back(std::move(source));
  }
}

std::vector<BatchDocument> BatchSampler::row(Rng& rng, int64_t row_tokens,
                                             std::vector<double>& used) const {
  constexpr int64_t kTooShort = 32;  // what is left of a row is not worth a cut document
  constexpr int kTries = 32;
  std::vector<BatchDocument> documents;
  int64_t room = row_tokens;
  std::vector<bool> out_of_luck(sources_.size());
  while (room >= kTooShort) {
    // The file that is furthest behind its share.
    double total = 1;
    for (const double tokens : used) total += tokens;
    size_t best = sources_.size();
    double most = -INFINITY;
    for (size_t i = 0; i < sources_.size(); ++i) {
      const double behind = sources_[i].share * total - used[i];
      if (out_of_luck[i] || sources_[i].share == 0 || behind <= most) continue;
      best = i;
      most = behind;
    }
    if (best == sources_.size()) break;
    const Source& source = sources_[best];
    const auto bounds = source.file.documents();
    uint64_t begin = 0, end = 0;
    for (int i = 0; i < kTries && begin == end; ++i) {
      if (source.free_tokens == 0 || rng.below(source.file.num_tokens()) >= source.free_tokens) {
        const uint64_t d = source.whole_documents[rng.below(source.whole_documents.size())];
        if (bounds[d + 1] - bounds[d] <= static_cast<uint64_t>(room))
          begin = bounds[d], end = bounds[d + 1];
        continue;
      }
      const uint64_t place = rng.below(source.file.num_tokens());
      const auto d = static_cast<uint64_t>(std::upper_bound(bounds.begin(), bounds.end(), place) -
                                           bounds.begin() - 1);
      if (source.whole[d]) continue;
      const uint64_t length = bounds[d + 1] - bounds[d];
      // A long document is entered anywhere that leaves a full row.
      const auto row_length = static_cast<uint64_t>(row_tokens);
      begin = length <= row_length ? bounds[d] : std::min(place, bounds[d + 1] - row_length);
      end = std::min(bounds[d + 1], begin + static_cast<uint64_t>(room));
    }
    if (begin == end) {
      out_of_luck[best] = true;
      continue;
    }
    documents.push_back(take(source.file, begin, end));
    const auto length = static_cast<int64_t>(end - begin);
    used[best] += static_cast<double>(length);
    room -= length;
  }
  return documents;
}

std::vector<std::vector<BatchDocument>> BatchSampler::step(int64_t step, int64_t row_tokens,
                                                           int64_t batch_tokens,
                                                           int64_t micro_tokens) const {
  CHECK(row_tokens > 0 && batch_tokens >= row_tokens && micro_tokens >= row_tokens);
  std::vector<double> used(sources_.size());
  std::vector<std::vector<BatchDocument>> batches;
  int64_t in_batch = micro_tokens;  // rows, counted full
  for (int64_t row_index = 0; row_index < batch_tokens / row_tokens; ++row_index) {
    uint64_t state = seed_ ^ (static_cast<uint64_t>(step) << 24) ^ static_cast<uint64_t>(row_index);
    Rng rng(splitmix64(state));
    std::vector<BatchDocument> documents = row(rng, row_tokens, used);
    if (documents.empty()) continue;
    if (in_batch + row_tokens > micro_tokens) {
      batches.emplace_back();
      in_batch = 0;
    }
    in_batch += row_tokens;
    std::move(documents.begin(), documents.end(), std::back_inserter(batches.back()));
  }
  if (batches.empty()) {
    fail("{}: no document fits into {} tokens", sources_[0].file.path(), row_tokens);
  }
  return batches;
}

std::vector<std::vector<BatchDocument>> leading_documents(const TokenFile& file, int64_t num_tokens,
                                                          int64_t row_tokens,
                                                          int64_t micro_tokens) {
  std::vector<std::vector<BatchDocument>> batches;
  int64_t taken = 0, in_batch = micro_tokens;
  const auto bounds = file.documents();
  for (uint64_t d = 0; d + 1 < bounds.size() && taken < num_tokens; ++d) {
    const uint64_t length = std::min(bounds[d + 1] - bounds[d], static_cast<uint64_t>(row_tokens));
    if (in_batch + static_cast<int64_t>(length) > micro_tokens) {
      batches.emplace_back();
      in_batch = 0;
    }
    in_batch += static_cast<int64_t>(length);
    taken += static_cast<int64_t>(length);
    batches.back().push_back(take(file, bounds[d], bounds[d] + length));
  }
  return batches;
}

}  // namespace indexcache
