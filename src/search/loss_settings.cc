#include "search/loss_settings.h"

#include <algorithm>

#include "base/sha256.h"
#include "device/gpus.h"

namespace indexcache {

std::string weights_hash(const Checkpoint& checkpoint) {
  constexpr int64_t kPieces = 16, kPieceBytes = 256;
  std::string sample;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    sample += fmt::format("{} {} {}\n", name, dtype_name(tensor.dtype), shape_string(tensor.shape));
    const int64_t total = tensor.num_bytes();
    for (int64_t i = 0; i < kPieces; ++i) {
      const int64_t begin = total * i / kPieces;
      const int64_t count = std::min(kPieceBytes, total * (i + 1) / kPieces - begin);
      sample.append(reinterpret_cast<const char*>(tensor.data) + begin, static_cast<size_t>(count));
    }
  }
  return sha256_hex(sample);
}

Json loss_settings(const ModelSource& source, const PlanLoss& model) {
  const Engine& engine = model.engine();
  Json forced = Json::object();
  for (const auto& [op, implementation] : engine.options.forced_ops) forced[op] = implementation;
  Json settings = {{"model_fingerprint", source.config.fingerprint},
                   {"weights_hash", weights_hash(source.checkpoint)},
                   {"data_hash", model.data().hash},
                   {"sequences", model.num_sequences()},
                   {"sequence_tokens", model.data().sequence_tokens()},
                   {"batch_tokens", engine.activations.max_tokens},
                   {"compute", compute_name(engine.model.compute)},
                   {"kernels", kernel_names(engine.options.device)},
                   {"forced", forced}};
  if (engine.adapter) settings["indexers_hash"] = weights_hash(engine.adapter->tensors);
  return settings;
}

}  // namespace indexcache
