#include "device/gpus.h"

#include <fmt/format.h>

namespace indexcache {

std::string cuda_unavailable_reason() {
  std::string why;
  const std::vector<Gpu> gpus = list_gpus(&why);
  if (gpus.empty()) return why;
  return fmt::format("{} is there, but this version runs its operations on the CPU only",
                     gpus[0].name);
}

}  // namespace indexcache
