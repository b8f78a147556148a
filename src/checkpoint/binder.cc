#include "checkpoint/binder.h"

#include <algorithm>

#include "base/error.h"
#include "base/units.h"
#include "checkpoint/block_scales.h"

namespace indexcache {

namespace {

std::string describe(const Shape& shape, const std::vector<DType>& dtypes) {
  std::string text = shape_string(shape);
  for (size_t i = 0; i < dtypes.size(); ++i) {
    text += fmt::format("{}{}", i ? " or " : " ", dtype_name(dtypes[i]));
  }
  return text;
}

}  // namespace

Binder::Binder(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

TensorView Binder::look_up(const std::string& name, const Shape& shape,
                           const std::vector<DType>& dtypes, bool required) {
  const bool first_time = asked_.insert(name).second;
  const TensorView* found = checkpoint_.find(name);
  TensorView absent{dtypes.at(0), shape, nullptr};
  if (found == nullptr) {
    if (required && first_time) {
      missing_.add([&] {
        return fmt::format("\"{}\": missing, expected {}", printable(name),
                           describe(shape, dtypes));
      });
    }
    return absent;
  }
  const bool dtype_fits = std::find(dtypes.begin(), dtypes.end(), found->dtype) != dtypes.end();
  if (found->shape == shape && dtype_fits) return *found;
  if (first_time) {
    mismatched_.add([&] {
      return fmt::format("\"{}\": found {} {}, expected {} (in {})", printable(name),
                         shape_string(found->shape), dtype_name(found->dtype),
                         describe(shape, dtypes), printable(checkpoint_.file_of(*found), 400));
    });
  }
  return absent;
}

TensorView Binder::require(const std::string& name, const Shape& shape,
                           const std::vector<DType>& dtypes) {
  return look_up(name, shape, dtypes, true);
}

TensorView Binder::optional(const std::string& name, const Shape& shape,
                            const std::vector<DType>& dtypes) {
  return look_up(name, shape, dtypes, false);
}

ScaledView Binder::require_scaled(const std::string& name, const Shape& shape,
                                  const std::vector<DType>& dtypes) {
  ScaledView result;
  result.weight = require(name, shape, dtypes);
  // Ask by the dtype in the file, also where the weight's shape is wrong: its scales are then not
  // surplus as well.
  const TensorView* found = checkpoint_.find(name);
  if (found != nullptr && found->dtype == DType::kF8E4M3) {
    result.scales = require(scale_name(name), scale_shape(found->shape),
                            {DType::kF32, DType::kBF16, DType::kF8E8M0});
  }
  return result;
}

void Binder::ignore_prefix(const std::string& prefix, const std::string& reason) {
  auto it = std::find_if(ignored_.begin(), ignored_.end(),
                         [&](const IgnoredTensors& entry) { return entry.reason == reason; });
  if (it == ignored_.end()) it = ignored_.insert(it, {reason, 0, 0});
  prefixes_.push_back({prefix, static_cast<size_t>(it - ignored_.begin())});
}

void Binder::sort_out_unasked() {
  for (const auto& [name, view] : checkpoint_.tensors()) {
    if (asked_.contains(name)) continue;
    const auto prefix = std::find_if(prefixes_.begin(), prefixes_.end(),
                                     [&](const Prefix& p) { return name.starts_with(p.text); });
    if (prefix != prefixes_.end()) {
      IgnoredTensors& entry = ignored_[prefix->reason];
      ++entry.num_tensors;
      entry.num_bytes += static_cast<uint64_t>(view.num_bytes());
    } else {
      surplus_.add([&] {
        return fmt::format("\"{}\": surplus, {} {} that this model has no place for",
                           printable(name), dtype_name(view.dtype), shape_string(view.shape));
      });
    }
  }
}

void Binder::finish() {
  sort_out_unasked();
  std::erase_if(ignored_, [](const IgnoredTensors& entry) { return entry.num_tensors == 0; });
  prefixes_.clear();
  if (missing_.count() + mismatched_.count() + surplus_.count() == 0) return;
  fail(
      "{}: the checkpoint does not fit its configuration: {} tensors missing, {} of wrong shape or "
      "dtype, {} surplus:{}{}{}",
      printable(checkpoint_.path, 400), missing_.count(), mismatched_.count(), surplus_.count(),
      mismatched_.text(), missing_.text(), surplus_.text());
}

std::string Binder::ignored_summary() const {
  std::string text;
  for (const IgnoredTensors& entry : ignored_) {
    text += fmt::format("{}{} tensors ({}): {}", text.empty() ? "ignored " : "; ",
                        entry.num_tensors, format_bytes(entry.num_bytes), entry.reason);
  }
  return text;
}

}  // namespace indexcache
