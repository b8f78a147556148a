// The tokens of one forward pass: whole documents one behind the other, T tokens in all. No token
// sees another document.
#pragma once

#include "train/torch.h"

//
#include <cstdint>
#include <vector>

namespace indexcache {

struct Batch {
  int64_t num_tokens = 0;
  int64_t longest_document = 0;
  std::vector<int64_t> document_start;  // [T] on the host: the first token of each token's document

  // On the device.
  torch::Tensor tokens;        // i64 [T]
  torch::Tensor targets;       // i64 [T] the token that follows in the document
  torch::Tensor loss_weights;  // f32 [T] of the target; 0 at a document's last token
  torch::Tensor positions;     // i64 [T] within the document
  torch::Tensor starts;        // i64 [T] document_start
  torch::Tensor cumulative;    // i32 [documents + 1] where documents begin, and T
};

// A document of `tokens`; `weights` has the loss weight of each token as a target.
struct BatchDocument {
  std::vector<int32_t> tokens;
  std::vector<float> weights;
};
Batch make_batch(const std::vector<BatchDocument>& documents, torch::Device device);

// The queries of one chunk and the keys that any of them may see: [first, end) against
// [first_key, end).
struct Chunk {
  int64_t first = 0, end = 0, first_key = 0;
  int64_t num_queries() const { return end - first; }
  int64_t num_keys() const { return end - first_key; }
};

// Cuts the batch so that a chunk has at most `max_pairs` (query, key) pairs and 1024 queries, and
// at least one query. More queries would pair more documents with each other for nothing.
std::vector<Chunk> chunks(const Batch& batch, int64_t max_pairs);

// bool [queries, keys]: whether the query of the chunk may not see the key.
torch::Tensor hidden_pairs(const Batch& batch, const Chunk& chunk);

}  // namespace indexcache
