// The index plan: which layer's selection each decoder layer uses. The only owner of that decision.
//
// A full layer (F) runs its indexer. A shared layer (S) uses the selection of the nearest full
// layer before it, and owns neither indexer weights nor indexer keys. Layer 0 is full; there is one
// letter for each of `num_hidden_layers` decoder layers; MTP layers are outside the plan.
//
// Uniform rule: full(i) <=> max(i - offset + 1, 0) % freq == 0, offset 2 and freq 1 unless given.
// This is the rule of the patch published with the IndexCache paper (arXiv 2603.12201) and of vLLM,
// SGLang, TensorRT-LLM and transformers: layers 0 .. offset-1 are full, then every freq-th, so freq
// 4 gives FFSSSFSSSF and GLM-5.2's offset 3 FFFSSSFSSSF.
//
// Errors: every function that reads outside text throws Error with the key, the position, what was
// found and what was expected. Nothing is repaired or ignored.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace indexcache {

constexpr int64_t kMaxPlanLayers =
    4096;  // far over any model; bounds what a hostile config can ask for
constexpr int64_t kDefaultTopkOffset = 2;

struct IndexPlan {
  // source[l] is the layer whose selection layer l uses; l is full iff source[l] == l.
  std::vector<int32_t> source;

  int num_layers() const { return static_cast<int>(source.size()); }
  bool is_full(int layer) const { return source[static_cast<size_t>(layer)] == layer; }
  int num_full() const;

  bool operator==(const IndexPlan&) const = default;
};

std::string to_string(const IndexPlan& plan);  // "FFSSSF", one letter a layer

// `where` begins the message of every Error, for example "config.json: \"index_topk_pattern\"".
IndexPlan all_full_plan(int num_layers);
IndexPlan plan_from_freq(int64_t freq, int64_t offset, int num_layers, const std::string& where);
IndexPlan plan_from_string(std::string_view letters, int num_layers, const std::string& where);

// A JSON array of "F", "S", "full" or "shared".
IndexPlan plan_from_list(const Json& list, int num_layers, const std::string& where);

// The plan that a config.json states: `indexer_types`, else `index_topk_pattern` (string or list),
// else `index_topk_freq` with `index_skip_topk_offset`, else all full. Null is absent. Fields that
// are there and disagree are an Error that shows both plans.
IndexPlan plan_from_config(const JsonObject& config, int num_layers);

// What a user writes to override the file's plan: "FSSF...", "1/4" (uniform at that retention:
// freq=4, offset=2), or "freq=4" / "freq=4,offset=3". A plan file's path is the caller's to
// recognise: see plan_file.h.
IndexPlan plan_from_override(std::string_view text, int num_layers);

// A layer that the plan makes full and for which the checkpoint ships no indexer is an Error that
// lists all such layers. `layer_has_indexer` has one entry for each layer of the plan. A shared
// layer whose weights are there is fine.
void check_indexer_weights(const IndexPlan& plan, const std::vector<bool>& layer_has_indexer,
                           const std::string& where);

}  // namespace indexcache
