// Any bytes: either an Error, or tensors that lie inside the bytes, cover the data exactly, and
// come back the same after being written again.
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "checkpoint/nonfinite.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/safetensors_writer.h"

using namespace indexcache;

namespace {

std::string rewrite(const SafetensorsFile& file) {
  std::vector<TensorSpec> specs;
  for (const auto& [name, view] : file.tensors) specs.push_back({name, view.dtype, view.shape});
  std::string bytes = safetensors_header(&specs, file.metadata, "fuzz");
  for (const TensorSpec& spec : specs) {
    const TensorView& view = file.tensors.at(spec.name);
    bytes.append(reinterpret_cast<const char*>(view.data), spec.num_bytes());
  }
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  SafetensorsFile file;
  try {
    file = parse_safetensors({data, size}, "fuzz");
  } catch (const Error& e) {
    CHECK_LT(std::strlen(e.what()), 4096u);
    return 0;
  }
  uint64_t total = 0;
  for (const auto& [name, view] : file.tensors) {
    CHECK(view.data >= data && view.data + view.num_bytes() <= data + size);
    CHECK_LE(count_nonfinite(view).count, num_elements(view.shape));
    total += static_cast<uint64_t>(view.num_bytes());
  }
  CHECK_EQ(total, file.data_bytes);

  const std::string again = rewrite(file);
  const SafetensorsFile back = parse_safetensors(
      {reinterpret_cast<const uint8_t*>(again.data()), again.size()}, "rewritten");
  CHECK(back.metadata == file.metadata);
  CHECK_EQ(back.tensors.size(), file.tensors.size());
  for (const auto& [name, view] : file.tensors) {
    const TensorView& other = back.tensors.at(name);
    CHECK(other.dtype == view.dtype && other.shape == view.shape);
    CHECK(std::memcmp(other.data, view.data, static_cast<size_t>(view.num_bytes())) == 0);
  }
  return 0;
}
