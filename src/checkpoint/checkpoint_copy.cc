#include "checkpoint/checkpoint_copy.h"

#include <algorithm>
#include <filesystem>
#include <map>

#include "base/error.h"
#include "checkpoint/safetensors_writer.h"

namespace indexcache {

namespace {
constexpr size_t kPieceBytes = 16 << 20;  // between two looks at the progress
}

CopiedTensors count_copy(const Checkpoint& source, const KeepTensor& keep) {
  CopiedTensors copied;
  for (const auto& [name, view] : source.tensors()) {
    const bool kept = keep(name);
    ++(kept ? copied.num_tensors : copied.left_out_tensors);
    (kept ? copied.num_bytes : copied.left_out_bytes) += static_cast<uint64_t>(view.num_bytes());
  }
  return copied;
}

CopiedTensors copy_tensors(const Checkpoint& source, const KeepTensor& keep,
                           const std::string& folder, const CopyProgress& progress) {
  const CopiedTensors copied = count_copy(source, keep);
  std::map<std::string, std::vector<TensorSpec>> files;
  std::map<std::string, std::string> weight_map;
  for (const auto& [name, view] : source.tensors()) {
    if (!keep(name)) continue;
    const std::string file = source.has_index()
                                 ? std::filesystem::path(source.file_of(view)).filename().string()
                                 : "model.safetensors";
    files[file].push_back({name, view.dtype, view.shape});
    weight_map[name] = file;
  }
  uint64_t done = 0;
  for (auto& [file, specs] : files) {
    stream_safetensors(folder + "/" + file, std::move(specs), source.metadata,
                       [&](const TensorSpec& spec, const ByteSink& sink) {
                         const TensorView& view = *source.find(spec.name);
                         std::span<const uint8_t> rest(view.data, spec.num_bytes());
                         while (!rest.empty()) {
                           const auto piece = rest.first(std::min(rest.size(), kPieceBytes));
                           sink(piece);
                           rest = rest.subspan(piece.size());
                           done += piece.size();
                           if (progress) progress(done);
                         }
                       });
  }
  if (source.has_index())
    write_shard_index(folder + "/model.safetensors.index.json", weight_map, copied.num_bytes);
  return copied;
}

}  // namespace indexcache
