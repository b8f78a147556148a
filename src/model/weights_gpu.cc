// Weights on their way to a GPU: one block of its memory, filled tensor by tensor as the files are
// read.
#include <array>
#include <unordered_map>

#include "base/checked.h"
#include "device/cuda_upload.h"
#include "model/weights.h"

namespace indexcache {

namespace {

constexpr int64_t kScaleRows = 128;

// The matrices of the routed experts, and the shared expert's (absent where there is none).
struct ExpertList {
  ExpertWeights* experts;
  Weight* shared;
};
std::array<ExpertList, 3> expert_lists(MoeWeights& moe) {
  MlpWeights& shared = moe.shared_experts;
  return {{{&moe.gate_proj, &shared.gate_proj},
           {&moe.up_proj, &shared.up_proj},
           {&moe.down_proj, &shared.down_proj}}};
}

// Calls visit(const T*& pointer, int64_t num_bytes) for every pointer to weights.
template <class Visit>
struct Walk {
  const Visit& visit;

  void weight(Weight& w) const {
    visit(w.data, w.rows * w.cols * dtype_bytes(w.dtype));
    if (w.scale_inv != nullptr)
      visit(w.scale_inv, 4 * ceil_div(w.rows, kScaleRows) * ceil_div(w.cols, kScaleRows));
  }
  void vector(VectorWeight& v) const { visit(v.data, 4 * v.size); }
  void mlp(MlpWeights& w) const {
    weight(w.gate_proj);
    weight(w.up_proj);
    weight(w.down_proj);
  }
  void layer(LayerWeights& w) const {
    for (VectorWeight* v :
         {&w.input_layernorm, &w.post_attention_layernorm, &w.q_a_layernorm, &w.kv_a_layernorm,
          &w.indexer.k_norm_weight, &w.indexer.k_norm_bias, &w.moe.e_score_correction_bias})
      vector(*v);
    for (Weight* one : {&w.q_a_proj, &w.q_b_proj, &w.kv_a_proj_with_mqa, &w.o_proj, &w.indexer.wq_b,
                        &w.indexer.wk, &w.indexer.weights_proj, &w.moe.gate})
      weight(*one);
    for (std::vector<Weight>* list : {&w.w_uk_t, &w.w_uv}) {
      for (Weight& one : *list) weight(one);
    }
    mlp(w.mlp);
    // A shared expert lies behind the routed ones.
    for (const auto& [list, shared] : expert_lists(w.moe)) {
      for (Weight& one : list->experts) weight(one);
      weight(*shared);
    }
  }
  void all(Weights& weights) const {
    weight(weights.embed_tokens);
    vector(weights.norm);
    weight(weights.lm_head);
    for (LayerWeights& w : weights.layers) layer(w);
  }
};

template <class Visit>
void walk(Weights& weights, const Visit& visit) {
  Walk<Visit>{visit}.all(weights);
}

// Whether the shared expert may be one more of the experts.
bool shared_is_like_them(MoeWeights& moe) {
  for (const auto& [list, shared] : expert_lists(moe)) {
    const Weight& first = list->experts[0];
    if (!shared->present() || shared->dtype != first.dtype || shared->rows != first.rows ||
        shared->cols != first.cols)
      return false;
  }
  return true;
}

template <class Visit>
void walk_expert_lists(Weights& weights, const Visit& visit) {
  for (LayerWeights& layer : weights.layers) {
    if (layer.moe.gate_proj.experts.empty()) continue;
    const bool with_shared = shared_is_like_them(layer.moe);
    for (const auto& [list, shared] : expert_lists(layer.moe))
      visit(*list, with_shared ? shared : nullptr);
  }
}

}  // namespace

void move_to_gpu(Exec& exec, Weights* weights) {
  constexpr int64_t kAlignment = 256;
  // A tied head is the embedding: what has a place is not copied again.
  std::unordered_map<const void*, int64_t> places;
  int64_t total = 0;
  walk(*weights, [&](const auto*& pointer, int64_t num_bytes) {
    if (pointer != nullptr && places.emplace(pointer, total).second)
      total += round_up(num_bytes, kAlignment);
  });
  const int64_t lists = total;
  walk_expert_lists(*weights, [&](ExpertWeights& list, const Weight*) {
    total += round_up(static_cast<int64_t>((list.experts.size() + 1) * sizeof(Weight)), kAlignment);
  });
  weights->device = CudaMemory(static_cast<size_t>(total));
  uint8_t* base = weights->device.data();

  CudaUploader uploader(exec.cuda(), exec.pool);
  std::unordered_map<const void*, bool> copied;
  walk(*weights, [&]<class T>(const T*& pointer, int64_t num_bytes) {
    if (pointer == nullptr) return;
    uint8_t* to = base + places.at(pointer);
    if (copied.emplace(pointer, true).second)
      uploader.copy(to, reinterpret_cast<const uint8_t*>(pointer), static_cast<size_t>(num_bytes));
    pointer = reinterpret_cast<const T*>(to);
  });
  int64_t at = lists;
  walk_expert_lists(*weights, [&](ExpertWeights& list, const Weight* shared) {
    list.all = list.experts;
    if (shared != nullptr) list.all.push_back(*shared);
    const size_t num_bytes = list.all.size() * sizeof(Weight);
    uploader.copy(base + at, reinterpret_cast<const uint8_t*>(list.all.data()), num_bytes);
    list.device_experts = reinterpret_cast<const Weight*>(base + at);
    at += round_up(static_cast<int64_t>((list.experts.size() + 1) * sizeof(Weight)), kAlignment);
  });
  exec.wait();
  weights->owned.clear();
  weights->floats.clear();
}

}  // namespace indexcache
