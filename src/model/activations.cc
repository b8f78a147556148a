#include <algorithm>

#include "base/checked.h"
#include "model/forward.h"
#include "ops/index_select/index_select_cuda.h"

namespace indexcache {

namespace {

// Hands out 64-byte aligned pieces of one block; with a null base it only counts.
struct Carver {
  uint8_t* base;
  uint64_t used = 0;

  template <class T>
  void take(T** pointer, int64_t count) {
    *pointer = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<uint64_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  }
};

// Logits of a chunk of a long vocabulary are larger than all the rest, and leave a GPU at once.
constexpr int64_t kLogitRows = 256;

uint64_t carve(const ModelConfig& config, int64_t T, Device device, uint8_t* base, Activations* a) {
  const AttentionConfig& attn = config.attention;
  const IndexerConfig& indexer = config.indexer;
  const MoeConfig& moe = config.moe;
  const int64_t heads = attn.num_attention_heads, row = attn.kv_lora_rank + attn.qk_rope_head_dim;
  const bool gpu = device == Device::kCuda;
  const int64_t shared = gpu ? 1 : 0;  // a shared expert may be one of the experts
  const int64_t slots = T * (moe.num_experts_per_tok + (moe.num_experts_per_tok > 0 ? shared : 0));
  const int64_t shared_width = moe.moe_intermediate_size * moe.n_shared_experts;
  const int64_t mlp =
      std::max({T * config.intermediate_size, slots * moe.moe_intermediate_size, T * shared_width});

  Carver c{base};
  c.take(&a->x, T * config.hidden_size);
  c.take(&a->normed, T * config.hidden_size);
  c.take(&a->q_latent, T * attn.q_lora_rank);
  c.take(&a->normed16, gpu ? T * config.hidden_size : 0);
  c.take(&a->q_latent16, gpu ? T * attn.q_lora_rank : 0);
  c.take(&a->q, T * heads * attn.qk_head_dim());
  c.take(&a->kv, T * row);
  c.take(&a->q_absorbed, T * heads * row);
  c.take(&a->attended, T * heads * attn.kv_lora_rank);
  c.take(&a->value, T * heads * attn.v_head_dim);
  c.take(&a->index_q, T * indexer.index_n_heads * indexer.index_head_dim);
  c.take(&a->index_key, T * indexer.index_head_dim);
  c.take(&a->index_weights, T * indexer.index_n_heads);
  c.take(&a->positions, T * indexer.index_topk);
  c.take(&a->counts, T);
  c.take(&a->gate, mlp);
  c.take(&a->up, mlp);
  c.take(&a->router_logits, T * moe.n_routed_experts);
  c.take(&a->experts, slots);
  c.take(&a->expert_weights, slots);
  c.take(&a->row_begin, T > 0 ? moe.n_routed_experts + 1 + shared : 0);
  c.take(&a->slots, slots);
  c.take(&a->slot_tokens, slots);
  c.take(&a->expert_rows, slots * config.hidden_size);
  a->logit_rows = gpu ? std::min(T, kLogitRows) : 0;
  c.take(&a->logits, a->logit_rows * config.vocab_size);
  c.take(&a->targets, gpu ? T : 0);
  c.take(&a->nll, gpu ? T : 0);
  return c.used;
}

}  // namespace

Activations::Activations(const ModelConfig& config, int64_t max_tokens_in, Device device)
    : max_tokens(max_tokens_in) {
  memory = Memory(device, carve(config, max_tokens, device, nullptr, this));
  carve(config, max_tokens, device, memory.data(), this);
}

uint64_t activation_bytes(const ModelConfig& config, int64_t max_tokens, Device device) {
  Activations empty(config, 0);
  return carve(config, max_tokens, device, nullptr, &empty);
}

uint64_t gpu_workspace_bytes(const ModelConfig& config, DType indexer_dtype, int64_t max_tokens,
                             int64_t context) {
  const AttentionConfig& attn = config.attention;
  const IndexerConfig& indexer = config.indexer;
  const int64_t select = index_select_gpu_bytes(indexer_dtype, indexer.index_n_heads,
                                                indexer.index_head_dim, max_tokens, context);
  // Operands of the library's products in bf16: the widest input, the largest weight.
  const int64_t widest =
      std::max({config.hidden_size, config.intermediate_size,
                attn.num_attention_heads * (attn.qk_head_dim() + attn.v_head_dim)});
  const int64_t gathered =
      max_tokens * (config.moe.num_experts_per_tok + 1) * config.hidden_size;  // rows of experts
  const int64_t products =
      2 * (std::max(max_tokens * widest, gathered) + config.vocab_size * config.hidden_size);
  // The batch itself.
  const int64_t inputs = max_tokens * (4 + 4 * attn.qk_rope_head_dim + 64) + context / 8;
  return static_cast<uint64_t>(std::max(select, products) + inputs);
}

}  // namespace indexcache
