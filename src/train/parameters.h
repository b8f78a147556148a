// The trainable tensors of a network, laid out flat.
//
// All parameters of one group lie in one flat f32 tensor, the master that the optimiser updates,
// and in one flat tensor of the compute type, from which the forward pass takes its views. So an
// optimiser step, the gradient's norm and the cast to bf16 are a handful of kernels, not a handful
// for each of 500 tensors: at 26M parameters an AdamW step over separate tensors costs 24 ms of
// launches alone.
#pragma once

#include "train/torch.h"

//
#include <array>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors_writer.h"

namespace indexcache {

// Matrices decay, vectors (norms, biases) do not; indexers learn apart from the backbone.
enum ParameterGroup { kMatrices, kVectors, kIndexerMatrices, kIndexerVectors, kNumGroups };

struct Parameter {
  std::vector<std::string> names;  // tensors of the checkpoint; several lie one behind the other
  Shape tensor_shape;              // of each
  std::vector<int64_t> shape;      // of `value`
  ParameterGroup group;
  double init_std = 0;  // of a new network; 0: filled with `init_value`
  double init_value = 0;
  int64_t offset = 0;   // in its group's flat tensors
  torch::Tensor value;  // leaf in the compute type
};

class Parameters {
 public:
  // Declares one; valid until allocate(). Returns its place in all().
  size_t add(Parameter parameter);

  // Makes the flat tensors, all zero. `trainable` says which groups get gradients.
  void allocate(torch::Device device, torch::ScalarType compute,
                const std::array<bool, kNumGroups>& trainable);

  const std::vector<Parameter>& all() const { return all_; }
  const torch::Tensor& value(size_t index) const { return all_[index].value; }
  bool trainable(ParameterGroup group) const { return trainable_[group]; }
  int64_t num_elements() const;

  torch::Tensor master(ParameterGroup group) const { return master_[group]; }  // f32, flat
  // The sum of what collect_gradients() brought since clear_gradients(); f32, flat, undefined for a
  // frozen group.
  torch::Tensor gradient(ParameterGroup group) const { return gradient_[group]; }

  void initialise(uint64_t seed);              // a new network
  void load(const Checkpoint& checkpoint);     // every tensor, or an Error that lists all problems
  void load_indexers(const Checkpoint& from);  // as load(), of the indexers alone

  void cast_masters();       // after each change of the masters
  void collect_gradients();  // adds the compute-type gradients to the f32 ones and clears them
  void clear_gradients();

  // What a checkpoint of this network holds, as `dtype`; a source for the writers.
  std::vector<TensorSpec> specs(DType dtype, bool indexers_only) const;
  TensorSource source(DType dtype) const;

 private:
  torch::Tensor master_of(const Parameter& parameter, size_t tensor) const;
  void load_if(const Checkpoint& checkpoint, bool indexers_only);

  std::vector<Parameter> all_;
  std::array<bool, kNumGroups> trainable_ = {};
  std::array<torch::Tensor, kNumGroups> master_, compute_, gradient_, compute_gradient_;
};

}  // namespace indexcache
