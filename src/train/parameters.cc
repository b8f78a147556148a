#include "train/parameters.h"

#include <cstring>
#include <numeric>
#include <unordered_map>

#include "base/rng.h"
#include "checkpoint/binder.h"
#include "checkpoint/block_scales.h"

namespace indexcache {

namespace {

bool is_indexer(ParameterGroup group) {
  return group == kIndexerMatrices || group == kIndexerVectors;
}

int64_t count(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

}  // namespace

size_t Parameters::add(Parameter parameter) {
  CHECK_EQ(count(parameter.shape), static_cast<int64_t>(parameter.names.size()) *
                                       indexcache::num_elements(parameter.tensor_shape));
  all_.push_back(std::move(parameter));
  return all_.size() - 1;
}

void Parameters::allocate(torch::Device device, torch::ScalarType compute,
                          const std::array<bool, kNumGroups>& trainable) {
  trainable_ = trainable;
  std::array<int64_t, kNumGroups> size = {};
  for (Parameter& parameter : all_) {
    parameter.offset = size[parameter.group];
    size[parameter.group] += count(parameter.shape);
  }
  const auto options = torch::TensorOptions().device(device);
  for (int g = 0; g < kNumGroups; ++g) {
    const auto group = static_cast<size_t>(g);
    master_[group] = torch::zeros({size[group]}, options.dtype(torch::kFloat));
    compute_[group] = torch::zeros({size[group]}, options.dtype(compute));
    if (!trainable[group]) continue;
    gradient_[group] = torch::zeros({size[group]}, options.dtype(torch::kFloat));
    compute_gradient_[group] = torch::zeros({size[group]}, options.dtype(compute));
  }
  for (Parameter& parameter : all_) {
    const auto part = [&](const torch::Tensor& flat) {
      return flat.narrow(0, parameter.offset, count(parameter.shape)).view(parameter.shape);
    };
    parameter.value = part(compute_[parameter.group]).detach();
    if (!trainable[parameter.group]) continue;
    parameter.value.requires_grad_();
    // autograd adds in place to a gradient that is there.
    parameter.value.mutable_grad() = part(compute_gradient_[parameter.group]);
  }
}

int64_t Parameters::num_elements() const {
  int64_t total = 0;
  for (const Parameter& parameter : all_) total += count(parameter.shape);
  return total;
}

torch::Tensor Parameters::master_of(const Parameter& parameter, size_t tensor) const {
  const int64_t elements = indexcache::num_elements(parameter.tensor_shape);
  return master_[parameter.group].narrow(
      0, parameter.offset + static_cast<int64_t>(tensor) * elements, elements);
}

void Parameters::initialise(uint64_t seed) {
  // Drawn on the CPU: the same network on every device.
  for (const Parameter& parameter : all_) {
    for (size_t i = 0; i < parameter.names.size(); ++i) {
      torch::Tensor master = master_of(parameter, i);
      if (parameter.init_std == 0) {
        master.fill_(parameter.init_value);
        continue;
      }
      Rng rng(seed ^ std::hash<std::string>()(parameter.names[i]));
      std::vector<float> values(static_cast<size_t>(master.numel()));
      for (float& value : values) value = rng.normal() * static_cast<float>(parameter.init_std);
      master.copy_(torch::from_blob(values.data(), {master.numel()}));
    }
  }
  cast_masters();
}

void Parameters::load_if(const Checkpoint& checkpoint, bool indexers_only) {
  static const std::vector<DType> kTypes = {DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3};
  Binder binder(checkpoint);
  std::vector<std::vector<ScaledView>> found(all_.size());
  for (size_t p = 0; p < all_.size(); ++p) {
    if (indexers_only && !is_indexer(all_[p].group)) continue;
    for (const std::string& name : all_[p].names)
      found[p].push_back(binder.require_scaled(name, all_[p].tensor_shape, kTypes));
  }
  // What the network does not have: MTP layers, indexers of shared layers, the router's biases.
  binder.ignore_prefix("model.layers.", "not trained");
  binder.finish();
  for (size_t p = 0; p < all_.size(); ++p) {
    for (size_t i = 0; i < found[p].size(); ++i) {
      const ScaledView& view = found[p][i];
      const std::string where = checkpoint.path + ": " + all_[p].names[i];
      std::vector<float> values =
          view.weight.dtype == DType::kF8E4M3
              ? dequantize_blocks(view.weight, read_block_scales(view.weight, view.scales, where))
              : to_f32(view.weight);
      torch::Tensor master = master_of(all_[p], i);
      master.copy_(torch::from_blob(values.data(), {master.numel()}));
    }
  }
  cast_masters();
}

void Parameters::load(const Checkpoint& checkpoint) { load_if(checkpoint, false); }
void Parameters::load_indexers(const Checkpoint& from) { load_if(from, true); }

void Parameters::cast_masters() {
  torch::NoGradGuard no_grad;
  for (size_t group = 0; group < kNumGroups; ++group) compute_[group].copy_(master_[group]);
}

void Parameters::collect_gradients() {
  torch::NoGradGuard no_grad;
  for (size_t group = 0; group < kNumGroups; ++group) {
    if (!trainable_[group]) continue;
    gradient_[group].add_(compute_gradient_[group]);
    compute_gradient_[group].zero_();
  }
}

void Parameters::clear_gradients() {
  for (size_t group = 0; group < kNumGroups; ++group)
    if (trainable_[group]) gradient_[group].zero_();
}

std::vector<TensorSpec> Parameters::specs(DType dtype, bool indexers_only) const {
  std::vector<TensorSpec> specs;
  for (const Parameter& parameter : all_) {
    if (indexers_only && !is_indexer(parameter.group)) continue;
    for (const std::string& name : parameter.names)
      specs.push_back({name, dtype, parameter.tensor_shape});
  }
  return specs;
}

TensorSource Parameters::source(DType dtype) const {
  CHECK(dtype == DType::kF32 || dtype == DType::kBF16);
  std::unordered_map<std::string, std::pair<const Parameter*, size_t>> place;
  for (const Parameter& parameter : all_)
    for (size_t i = 0; i < parameter.names.size(); ++i) place[parameter.names[i]] = {&parameter, i};
  return [this, dtype, place = std::move(place)](const TensorSpec& spec, const ByteSink& sink) {
    const auto& [parameter, tensor] = place.at(spec.name);
    const torch::Tensor values =
        master_of(*parameter, tensor)
            .to(torch::kCPU, dtype == DType::kF32 ? torch::kFloat : torch::kBFloat16)
            .contiguous();
    sink({static_cast<const uint8_t*>(values.data_ptr()), spec.num_bytes()});
  };
}

}  // namespace indexcache
