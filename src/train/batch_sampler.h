// Which documents a step trains on. A pure function of (files, options, step): a resumed run sees
// what an uninterrupted one would have seen, whatever happened before.
//
// A step is `batch_tokens` of tokens in rows of at most `row_tokens`; a row is filled with whole
// documents one behind the other, and the last one may be cut. Documents with a loss weight other
// than 1 (a task with its answer) are never cut: those that do not fit a row are passed over. A
// document longer than a row is entered at a random place. Files get their shares in tokens, within
// a step.
#pragma once

#include <string>
#include <vector>

#include "train/batch.h"

//
#include "base/rng.h"
#include "train/token_file.h"

namespace indexcache {

struct DataShare {
  TokenFile file;
  double share = 1;
};

class BatchSampler {
 public:
  BatchSampler(std::vector<DataShare> data, uint64_t seed);

  // About `batch_tokens` tokens, never more, as micro-batches of at most `micro_tokens`.
  std::vector<std::vector<BatchDocument>> step(int64_t step, int64_t row_tokens,
                                               int64_t batch_tokens, int64_t micro_tokens) const;

 private:
  struct Source {
    TokenFile file;
    double share;
    std::vector<bool> whole;                // documents that must not be cut
    std::vector<uint64_t> whole_documents;  // their numbers
    uint64_t free_tokens = 0;               // tokens of the others
  };
  std::vector<BatchDocument> row(Rng& rng, int64_t row_tokens, std::vector<double>& used) const;

  std::vector<Source> sources_;
  uint64_t seed_;
};

// The first documents of a file, whole, cut to `row_tokens`: what a held-out loss is measured on.
std::vector<std::vector<BatchDocument>> leading_documents(const TokenFile& file, int64_t num_tokens,
                                                          int64_t row_tokens, int64_t micro_tokens);

}  // namespace indexcache
