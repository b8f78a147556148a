#include "train/batch.h"

#include <algorithm>

namespace indexcache {

Batch make_batch(const std::vector<BatchDocument>& documents, torch::Device device) {
  Batch batch;
  std::vector<int64_t> tokens, targets, positions;
  std::vector<float> weights;
  std::vector<int32_t> cumulative = {0};
  for (const BatchDocument& document : documents) {
    const auto length = static_cast<int64_t>(document.tokens.size());
    CHECK(length > 0 && document.weights.size() == document.tokens.size());
    for (size_t i = 0; i < document.tokens.size(); ++i) {
      const bool last = i + 1 == document.tokens.size();
      tokens.push_back(document.tokens[i]);
      targets.push_back(last ? 0 : document.tokens[i + 1]);
      weights.push_back(last ? 0.0f : document.weights[i + 1]);
      positions.push_back(static_cast<int64_t>(i));
      batch.document_start.push_back(batch.num_tokens);
    }
    batch.num_tokens += length;
    batch.longest_document = std::max(batch.longest_document, length);
    cumulative.push_back(static_cast<int32_t>(batch.num_tokens));
  }
  const auto on_device = [&](auto& values, torch::ScalarType type) {
    return torch::from_blob(values.data(), {static_cast<int64_t>(values.size())}, type)
        .clone()
        .to(device);
  };
  batch.tokens = on_device(tokens, torch::kLong);
  batch.targets = on_device(targets, torch::kLong);
  batch.loss_weights = on_device(weights, torch::kFloat);
  batch.positions = on_device(positions, torch::kLong);
  batch.starts = on_device(batch.document_start, torch::kLong);
  batch.cumulative = on_device(cumulative, torch::kInt);
  return batch;
}

std::vector<Chunk> chunks(const Batch& batch, int64_t max_pairs) {
  constexpr int64_t kMaxQueries = 1024;
  std::vector<Chunk> result;
  for (int64_t first = 0; first < batch.num_tokens;) {
    const int64_t first_key = batch.document_start[static_cast<size_t>(first)];
    int64_t end = first + 1;
    // Grows by steps: the number of keys grows with the number of queries.
    while (end < batch.num_tokens && end - first < kMaxQueries &&
           (end + 1 - first) * (end + 1 - first_key) <= max_pairs)
      ++end;
    result.push_back({first, end, first_key});
    first = end;
  }
  return result;
}

torch::Tensor hidden_pairs(const Batch& batch, const Chunk& chunk) {
  const auto on_device = torch::TensorOptions().device(batch.tokens.device()).dtype(torch::kLong);
  const torch::Tensor query = torch::arange(chunk.first, chunk.end, on_device).unsqueeze(1);
  const torch::Tensor key = torch::arange(chunk.first_key, chunk.end, on_device).unsqueeze(0);
  const torch::Tensor start = batch.starts.narrow(0, chunk.first, chunk.num_queries()).unsqueeze(1);
  return key.gt(query).logical_or_(key.lt(start));
}

}  // namespace indexcache
