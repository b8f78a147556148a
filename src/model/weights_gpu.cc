// Weights on their way to a GPU: one block of its memory, filled tensor by tensor as the files are
// read.
#include <unordered_map>

#include "base/checked.h"
#include "device/cuda_upload.h"
#include "model/weights.h"

namespace indexcache {

namespace {

constexpr int64_t kScaleRows = 128;

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
    for (std::vector<Weight>* list : {&w.w_uk_t, &w.w_uv, &w.moe.gate_proj.experts,
                                      &w.moe.up_proj.experts, &w.moe.down_proj.experts}) {
      for (Weight& one : *list) weight(one);
    }
    mlp(w.mlp);
    mlp(w.moe.shared_experts);
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

template <class Visit>
void walk_expert_lists(Weights& weights, const Visit& visit) {
  for (LayerWeights& layer : weights.layers) {
    for (ExpertWeights* list : {&layer.moe.gate_proj, &layer.moe.up_proj, &layer.moe.down_proj}) {
      if (!list->experts.empty()) visit(*list);
    }
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
  walk_expert_lists(*weights, [&](ExpertWeights& list) {
    total += round_up(static_cast<int64_t>(list.experts.size() * sizeof(Weight)), kAlignment);
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
  walk_expert_lists(*weights, [&](ExpertWeights& list) {
    const size_t num_bytes = list.experts.size() * sizeof(Weight);
    uploader.copy(base + at, reinterpret_cast<const uint8_t*>(list.experts.data()), num_bytes);
    list.device_experts = reinterpret_cast<const Weight*>(base + at);
    at += round_up(static_cast<int64_t>(num_bytes), kAlignment);
  });
  exec.wait();
  weights->owned.clear();
  weights->floats.clear();
}

}  // namespace indexcache
