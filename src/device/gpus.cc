#include "device/gpus.h"

#include <fmt/format.h>

#include "device/cpu_features.h"

namespace indexcache {

std::string hardware_name(Device device) {
  if (device == Device::kCpu) return cpu_name();
  std::string why;
  const std::vector<Gpu> gpus = list_gpus(&why);
  return gpus.empty() ? why : gpus[0].name;
}

std::string kernel_names(Device device) {
  if (device == Device::kCpu) return cpu_isa_names();
  std::string why;
  const std::vector<Gpu> gpus = list_gpus(&why);
  if (gpus.empty()) return why;
  return fmt::format("cuda {}.{}", gpus[0].compute_capability / 10,
                     gpus[0].compute_capability % 10);
}

bool first_gpu_is_hopper() {
  static const bool hopper = [] {
    std::string why;
    const std::vector<Gpu> gpus = list_gpus(&why);
    return !gpus.empty() && gpus[0].compute_capability == 90;
  }();
  return hopper;
}

std::string cuda_unavailable_reason() {
  std::string why;
  const std::vector<Gpu> gpus = list_gpus(&why);
  if (gpus.empty()) return why;
  // What the oldest machine code in this program is for.
  if (gpus[0].compute_capability < 80)
    return fmt::format("{} has compute capability {}.{}, expected 8.0 or later", gpus[0].name,
                       gpus[0].compute_capability / 10, gpus[0].compute_capability % 10);
  return "";
}

}  // namespace indexcache
