// The golden cases: checkpoints with what Hugging Face transformers computed from them in float32
// on a CPU.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "engine/engine.h"

namespace indexcache {

inline const std::vector<std::string> kGoldenCases = {
    "glm-dsa-full", "glm-dsa-shared", "glm-dsa-pattern", "deepseek-v32-yarn", "glm-dsa-fp8"};

// The folder of a case, or "" where it is not on this machine.
inline std::string golden_folder(const std::string& name) {
  std::vector<std::string> roots;
  if (const char* root = std::getenv("INDEXCACHE_GOLDEN")) roots.push_back(root);
  roots.push_back(INDEXCACHE_SOURCE_DIR "/../shared/golden");
  roots.push_back(INDEXCACHE_SOURCE_DIR "/tests/golden");
  for (const std::string& root : roots) {
    if (std::filesystem::exists(root + "/" + name + "/expected.safetensors"))
      return root + "/" + name;
  }
  return "";
}

struct Golden {
  std::string folder;
  Checkpoint expected;

  explicit Golden(const std::string& folder_in)
      : folder(folder_in), expected(Checkpoint::open(folder_in + "/expected.safetensors")) {}

  const TensorView& tensor(const std::string& name) const {
    const TensorView* view = expected.find(name);
    if (view == nullptr) fail("{} has no {}", folder, name);
    return *view;
  }
  std::vector<int32_t> integers(const std::string& name) const {
    const TensorView& view = tensor(name);
    std::vector<int32_t> values(static_cast<size_t>(num_elements(view.shape)));
    std::copy_n(view.data, values.size() * sizeof(int32_t),
                reinterpret_cast<uint8_t*>(values.data()));
    return values;
  }
  std::vector<float> floats(const std::string& name) const { return to_f32(tensor(name)); }
};

// ||a - b|| / ||b||, infinite where either has NaN or the sizes differ.
inline double relative_error(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  const double error = std::sqrt(difference / norm);
  return std::isnan(error) ? INFINITY : error;
}

// Everything one run over a prompt shows.
struct Trace {
  std::vector<float> logits;                      // [S, V]
  std::vector<std::vector<float>> hidden;         // each [S, H]
  std::map<int, std::vector<int32_t>> positions;  // of full layers, [S, index_topk] ascending
};

inline Trace run_traced(Engine& engine, SequenceCache& sequence, std::span<const int32_t> tokens) {
  Trace trace;
  trace.hidden.resize(static_cast<size_t>(engine.model.config.num_hidden_layers + 1));
  ForwardTap tap;
  tap.hidden = [&](int index, std::span<const float> rows) {
    auto& all = trace.hidden[static_cast<size_t>(index)];
    all.insert(all.end(), rows.begin(), rows.end());
  };
  tap.selection = [&](int layer, Selection selection) {
    auto& all = trace.positions[layer];
    all.insert(all.end(), selection.positions.begin(), selection.positions.end());
  };
  PrefillHooks hooks;
  hooks.tap = &tap;
  hooks.chunk_logits = [&](int64_t, std::span<const float> rows) {
    trace.logits.insert(trace.logits.end(), rows.begin(), rows.end());
  };
  prefill(engine, sequence, tokens, nullptr, hooks);
  return trace;
}

}  // namespace indexcache
