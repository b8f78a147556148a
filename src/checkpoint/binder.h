// Matches what a model asks for with what a checkpoint holds. Problems are collected, not thrown
// one by one: finish() throws a single Error with every missing, misshapen, wrongly typed and
// surplus tensor (50 are printed, all are counted).
//
//   Binder binder(checkpoint);
//   binder.ignore_prefix("model.layers.78.", "multi-token prediction");
//   weights.norm = binder.require("model.norm.weight", {hidden_size}, {DType::kF32, DType::kBF16});
//   binder.finish();
//
// Views from require() are absent where there was a problem: read none before finish() has
// returned.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/problem_list.h"
#include "tensor/tensor.h"

namespace indexcache {

// A weight with its block scales (block_scales.h). Scales are absent unless the weight is stored as
// F8_E4M3.
struct ScaledView {
  TensorView weight;
  TensorView scales;
};

struct IgnoredTensors {
  std::string reason;
  uint64_t num_tensors = 0;
  uint64_t num_bytes = 0;
};

class Binder {
 public:
  explicit Binder(const Checkpoint& checkpoint);  // the checkpoint must outlive the binder

  TensorView require(const std::string& name, const Shape& shape, const std::vector<DType>& dtypes);
  TensorView optional(const std::string& name, const Shape& shape,
                      const std::vector<DType>& dtypes);
  // As require(); a weight found as F8_E4M3 also requires its scales.
  ScaledView require_scaled(const std::string& name, const Shape& shape,
                            const std::vector<DType>& dtypes);

  // Tensors nobody asks for whose names begin so are not surplus. Several prefixes may share a
  // reason.
  void ignore_prefix(const std::string& prefix, const std::string& reason);

  void finish();

  // After finish(): what was ignored, one entry a reason; and the same as a line for the log, empty
  // if nothing was.
  const std::vector<IgnoredTensors>& ignored() const { return ignored_; }
  std::string ignored_summary() const;

 private:
  TensorView look_up(const std::string& name, const Shape& shape, const std::vector<DType>& dtypes,
                     bool required);
  void sort_out_unasked();

  struct Prefix {
    std::string text;
    size_t reason;  // place in ignored_
  };

  const Checkpoint& checkpoint_;
  std::unordered_set<std::string> asked_;
  std::vector<Prefix> prefixes_;
  std::vector<IgnoredTensors> ignored_;
  ProblemList missing_, mismatched_, surplus_;
};

}  // namespace indexcache
