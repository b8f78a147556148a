#include "model/forward.h"

#include <algorithm>

#include "base/checked.h"
#include "ops/gather_rows/gather_rows.h"
#include "ops/index_select/index_select.h"
#include "ops/layer_norm/layer_norm.h"
#include "ops/moe_combine/moe_combine.h"
#include "ops/moe_route/moe_route.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/rope/rope.h"
#include "ops/silu_mul/silu_mul.h"
#include "ops/sparse_mla/sparse_mla.h"
#include "ops/store_rows/store_rows.h"

namespace indexcache {

namespace {

// transformers builds q_a_layernorm and kv_a_layernorm with their class's default eps, whatever
// rms_norm_eps says (1e-5 in GLM). With 1e-5 the golden cases differ by 5e-6 a layer, enough to
// turn selections; with this by 4e-7.
constexpr double kLatentNormEps = 1e-6;

// What every step of the pass needs; the steps below are the paper's lines in order.
struct Pass {
  Exec& exec;
  const Model& model;
  KvCache& cache;
  Activations& a;
  int64_t T;

  const ModelConfig& config() const { return model.config; }

  void matmul_one(const float* x, const Weight& w, float* y, bool accumulate = false) {
    matmul_as(model.compute, x, w, y, accumulate);
  }

  void matmul_as(Compute compute, const float* x, const Weight& w, float* y,
                 bool accumulate = false) {
    const MatmulGroup group{x, w.cols, T, w, y, w.rows};
    matmul(exec, {{&group, 1}, compute, accumulate});
  }

  void norm(const float* x, int64_t ldx, const std::vector<float>& weight, double eps, float* y,
            int64_t ldy) {
    rms_norm(exec, {.x = x,
                    .ldx = ldx,
                    .weight = weight.data(),
                    .eps = static_cast<float>(eps),
                    .num_rows = T,
                    .row_elements = static_cast<int64_t>(weight.size()),
                    .y = y,
                    .ldy = ldy});
  }

  void rotate(const float* x, int64_t ldx, int64_t x_head_stride, int64_t num_heads,
              bool interleaved, float* y, int64_t ldy, int64_t y_head_stride) {
    rope(exec, {.x = x,
                .ldx = ldx,
                .x_head_stride = x_head_stride,
                .num_rows = T,
                .num_heads = num_heads,
                .rope_dim = config().attention.qk_rope_head_dim,
                .interleaved = interleaved,
                .cos = a.rope.cos.data(),
                .sin = a.rope.sin.data(),
                .y = y,
                .ldy = ldy,
                .y_head_stride = y_head_stride});
  }

  void project_queries_and_latent(const LayerWeights& w, int layer);
  void select(const LayerWeights& w, int layer);
  void attend(const LayerWeights& w, int layer);
  void dense_mlp(const MlpWeights& w);
  void mixture_of_experts(const MoeWeights& w);
};

// q = W_q_b norm(W_q_a x), absorbed into the latent space; c = norm(W_kv_a x) and k_pe go to the
// cache.
void Pass::project_queries_and_latent(const LayerWeights& w, int layer) {
  const AttentionConfig& attn = config().attention;
  const int64_t heads = attn.num_attention_heads, nope = attn.qk_nope_head_dim,
                latent = attn.kv_lora_rank;
  const int64_t row = latent + attn.qk_rope_head_dim;

  const MatmulGroup down[] = {
      {a.normed, config().hidden_size, T, w.q_a_proj, a.q_latent, attn.q_lora_rank},
      {a.normed, config().hidden_size, T, w.kv_a_proj_with_mqa, a.kv, row}};
  matmul(exec, {down, model.compute, false});
  norm(a.q_latent, attn.q_lora_rank, w.q_a_layernorm, kLatentNormEps, a.q_latent, attn.q_lora_rank);
  norm(a.kv, row, w.kv_a_layernorm, kLatentNormEps, a.kv, row);
  rotate(a.kv + latent, row, 0, 1, true, a.kv + latent, row, 0);
  store_rows(exec,
             {.x = a.kv, .ldx = row, .num_rows = T, .seqs = a.spans, .rows = cache.latent(layer)});

  matmul_one(a.q_latent, w.q_b_proj, a.q);
  std::vector<MatmulGroup> absorb;
  for (int64_t h = 0; h < heads; ++h) {
    absorb.push_back({a.q + h * attn.qk_head_dim(), heads * attn.qk_head_dim(), T,
                      w.w_uk_t[static_cast<size_t>(h)], a.q_absorbed + h * row, heads * row});
  }
  matmul(exec, {absorb, model.compute, false});
  rotate(a.q + nope, heads * attn.qk_head_dim(), attn.qk_head_dim(), heads, true,
         a.q_absorbed + latent, heads * row, row);
}

// The lightning indexer of a full layer. The factors index_n_heads^-1/2 index_head_dim^-1/2 on its
// weights are positive and common to all scores of a query, so they cannot change a selection and
// are left out.
void Pass::select(const LayerWeights& w, int layer) {
  const IndexerConfig& indexer = config().indexer;
  const int64_t heads = indexer.index_n_heads, dim = indexer.index_head_dim;
  const bool interleaved = indexer.indexer_rope_interleave;

  matmul_one(a.q_latent, w.indexer.wq_b, a.index_q);
  const MatmulGroup from_hidden[] = {
      {a.normed, config().hidden_size, T, w.indexer.wk, a.index_key, dim},
      {a.normed, config().hidden_size, T, w.indexer.weights_proj, a.index_weights, heads}};
  matmul(exec, {from_hidden, model.compute, false});
  rotate(a.index_q, heads * dim, dim, heads, interleaved, a.index_q, heads * dim, dim);
  layer_norm(exec, {.x = a.index_key,
                    .ldx = dim,
                    .weight = w.indexer.k_norm_weight.data(),
                    .bias = w.indexer.k_norm_bias.data(),
                    .eps = kIndexerNormEps,
                    .num_rows = T,
                    .row_elements = dim,
                    .y = a.index_key,
                    .ldy = dim});
  rotate(a.index_key, dim, 0, 1, interleaved, a.index_key, dim, 0);
  store_rows(exec, {.x = a.index_key,
                    .ldx = dim,
                    .num_rows = T,
                    .seqs = a.spans,
                    .rows = cache.indexer_keys(layer)});
  index_select(exec, {.q = a.index_q,
                      .weights = a.index_weights,
                      .num_heads = heads,
                      .head_dim = dim,
                      .keys = cache.indexer_keys(layer),
                      .seqs = a.spans,
                      .k = indexer.index_topk,
                      .positions = a.positions,
                      .counts = a.counts});
}

// Attention over the selection in force: this layer's own, or the one its source layer left behind.
void Pass::attend(const LayerWeights& w, int layer) {
  const AttentionConfig& attn = config().attention;
  const int64_t heads = attn.num_attention_heads, latent = attn.kv_lora_rank, v = attn.v_head_dim;

  sparse_mla(exec, {.q = a.q_absorbed,
                    .num_heads = heads,
                    .value_dim = latent,
                    .scale = attention_scale(config()),
                    .rows = cache.latent(layer),
                    .seqs = a.spans,
                    .positions = a.positions,
                    .counts = a.counts,
                    .k = config().indexer.index_topk,
                    .out = a.attended});
  std::vector<MatmulGroup> to_values;
  for (int64_t h = 0; h < heads; ++h) {
    to_values.push_back({a.attended + h * latent, heads * latent, T, w.w_uv[static_cast<size_t>(h)],
                         a.value + h * v, heads * v});
  }
  matmul(exec, {to_values, model.compute, false});
  matmul_one(a.value, w.o_proj, a.x, true);
}

// x += W_down (silu(W_gate n) * W_up n)
void Pass::dense_mlp(const MlpWeights& w) {
  const int64_t width = w.gate_proj.rows;
  const MatmulGroup in[] = {{a.normed, config().hidden_size, T, w.gate_proj, a.gate, width},
                            {a.normed, config().hidden_size, T, w.up_proj, a.up, width}};
  matmul(exec, {in, model.compute, false});
  silu_mul(exec, {.gate = a.gate, .up = a.up, .num_rows = T, .row_elements = width, .y = a.gate});
  matmul_one(a.gate, w.down_proj, a.x, true);
}

void Pass::mixture_of_experts(const MoeWeights& w) {
  const MoeConfig& moe = config().moe;
  const int64_t hidden = config().hidden_size, width = moe.moe_intermediate_size,
                taken = moe.num_experts_per_tok;

  // The router decides in float32 in every published engine, whatever the model's type.
  matmul_as(Compute::kF32, a.normed, w.gate, a.router_logits);
  moe_route(exec, {.logits = a.router_logits,
                   .correction_bias = w.e_score_correction_bias.data(),
                   .num_tokens = T,
                   .n_routed_experts = moe.n_routed_experts,
                   .num_experts_per_tok = taken,
                   .n_group = moe.n_group,
                   .topk_group = moe.topk_group,
                   .norm_topk_prob = moe.norm_topk_prob,
                   .routed_scaling_factor = static_cast<float>(moe.routed_scaling_factor),
                   .experts = a.experts,
                   .expert_weights = a.expert_weights});

  // Group the (token, expert) pairs by expert: expert e gets rows [begin[e], begin[e + 1]).
  std::vector<int64_t> begin(static_cast<size_t>(moe.n_routed_experts + 1));
  for (int64_t i = 0; i < T * taken; ++i) ++begin[static_cast<size_t>(a.experts[i] + 1)];
  for (size_t e = 1; e < begin.size(); ++e) begin[e] += begin[e - 1];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < T * taken; ++i) {
    const int64_t slot = next[static_cast<size_t>(a.experts[i])]++;
    a.slots[i] = static_cast<int32_t>(slot);
    a.slot_tokens[slot] = static_cast<int32_t>(i / taken);
  }

  gather_rows(exec, {.dtype = DType::kF32,
                     .table = reinterpret_cast<const uint8_t*>(a.normed),
                     .table_rows = T,
                     .row_elements = hidden,
                     .ids = a.slot_tokens,
                     .num_rows = T * taken,
                     .y = a.expert_rows});
  std::vector<MatmulGroup> in, out;
  for (size_t e = 0; e < w.experts.size(); ++e) {
    const int64_t rows = begin[e + 1] - begin[e];
    if (rows == 0) continue;
    const MlpWeights& expert = w.experts[e];
    float* x = a.expert_rows + begin[e] * hidden;
    in.push_back({x, hidden, rows, expert.gate_proj, a.gate + begin[e] * width, width});
    in.push_back({x, hidden, rows, expert.up_proj, a.up + begin[e] * width, width});
    out.push_back({a.gate + begin[e] * width, width, rows, expert.down_proj, x, hidden});
  }
  matmul(exec, {in, model.compute, false});
  silu_mul(exec,
           {.gate = a.gate, .up = a.up, .num_rows = T * taken, .row_elements = width, .y = a.gate});
  matmul(exec, {out, model.compute, false});
  moe_combine(exec, {.rows = a.expert_rows,
                     .slots = a.slots,
                     .weights = a.expert_weights,
                     .num_slots = taken,
                     .num_rows = T,
                     .row_elements = hidden,
                     .y = a.x});
  if (w.shared_experts.gate_proj.present()) dense_mlp(w.shared_experts);
}

// Adds the time since the last lap to whatever part it is given.
struct Stopwatch {
  double last = monotonic_seconds();

  double lap() {
    const double now = monotonic_seconds();
    return now - std::exchange(last, now);
  }
};

}  // namespace

DType cache_dtype(Compute compute) {
  return compute == Compute::kBF16 ? DType::kBF16 : DType::kF32;
}

KvCacheShape cache_shape(const ModelConfig& config, const IndexPlan& plan, Compute compute,
                         DType indexer_dtype, int64_t num_pages) {
  KvCacheShape shape;
  for (int layer = 0; layer < plan.num_layers(); ++layer)
    shape.layer_is_full.push_back(plan.is_full(layer));
  shape.latent_elements = config.attention.kv_lora_rank + config.attention.qk_rope_head_dim;
  shape.indexer_elements = config.indexer.index_head_dim;
  shape.dtype = cache_dtype(compute);
  shape.indexer_dtype = indexer_dtype;
  shape.num_pages = num_pages;
  return shape;
}

void begin_forward(const Model& model, Activations& a, std::span<const BatchSequence> batch) {
  a.token_ids.clear();
  a.token_positions.clear();
  a.spans.clear();
  for (const BatchSequence& sequence : batch) {
    const int64_t count = static_cast<int64_t>(sequence.tokens.size()),
                  first = sequence.cache->num_tokens;
    CHECK_GE(count, 1);
    CHECK_LE(sequence.num_logits, count);
    CHECK_GE(static_cast<int64_t>(sequence.cache->pages.size()) * kPageTokens, first + count);
    a.spans.push_back(
        {static_cast<int64_t>(a.token_ids.size()), count, first, sequence.cache->pages.data()});
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = sequence.tokens[static_cast<size_t>(i)];
      if (id < 0 || id >= model.config.vocab_size) {
        fail("token {} of the input is {}, expected 0 to {} (vocab_size {})", first + i, id,
             model.config.vocab_size - 1, model.config.vocab_size);
      }
      a.token_ids.push_back(id);
      a.token_positions.push_back(static_cast<int32_t>(first + i));
    }
  }
  CHECK_LE(static_cast<int64_t>(a.token_ids.size()), a.max_tokens);
  const RopeConfig& rope = model.config.rope;
  fill_rope_table(a.token_positions, rope_inv_freq(rope, model.config.attention.qk_rope_head_dim),
                  rope_cos_sin_scale(rope), &a.rope);
}

void run_embedding(Exec& exec, const Model& model, Activations& a, ForwardTimes* times) {
  Stopwatch watch;
  const Weight& embed = model.weights.embed_tokens;
  gather_rows(exec, {.dtype = embed.dtype,
                     .table = embed.data,
                     .table_rows = embed.rows,
                     .row_elements = model.config.hidden_size,
                     .ids = a.token_ids.data(),
                     .num_rows = static_cast<int64_t>(a.token_ids.size()),
                     .y = a.x});
  if (times != nullptr) times->head += watch.lap();
}

void run_layers(Exec& exec, const Model& model, KvCache& cache, Activations& a, int first_layer,
                int last_layer, const ForwardTap* tap, ForwardTimes* times) {
  const ModelConfig& config = model.config;
  CHECK_GE(first_layer, 0);
  CHECK_LE(last_layer, static_cast<int>(config.num_hidden_layers));
  const int64_t hidden = config.hidden_size, T = static_cast<int64_t>(a.token_ids.size());
  Stopwatch watch;
  ForwardTimes unused;
  ForwardTimes& t = times != nullptr ? *times : unused;
  t.layer_seconds.resize(model.weights.layers.size());
  Pass pass{exec, model, cache, a, T};
  const std::span<const float> residual(a.x, static_cast<size_t>(T * hidden));

  for (int layer = first_layer; layer < last_layer; ++layer) {
    const LayerWeights& w = model.weights.layers[static_cast<size_t>(layer)];
    const double start = watch.last;
    if (tap != nullptr && tap->hidden) tap->hidden(layer, residual);

    pass.norm(a.x, hidden, w.input_layernorm, config.rms_norm_eps, a.normed, hidden);
    pass.project_queries_and_latent(w, layer);
    t.attention += watch.lap();
    if (model.plan.is_full(layer)) {
      pass.select(w, layer);
      if (tap != nullptr && tap->selection) {
        tap->selection(layer, {{a.positions, static_cast<size_t>(T * config.indexer.index_topk)},
                               {a.counts, static_cast<size_t>(T)}});
      }
      t.indexer += watch.lap();
    }
    pass.attend(w, layer);
    t.attention += watch.lap();

    pass.norm(a.x, hidden, w.post_attention_layernorm, config.rms_norm_eps, a.normed, hidden);
    config.is_moe(layer) ? pass.mixture_of_experts(w.moe) : pass.dense_mlp(w.mlp);
    t.ffn += watch.lap();
    t.layer_seconds[static_cast<size_t>(layer)] += watch.last - start;
  }
}

void run_head(Exec& exec, const Model& model, Activations& a, std::span<const BatchSequence> batch,
              float* logits, const ForwardTap* tap, ForwardTimes* times) {
  const ModelConfig& config = model.config;
  const int64_t hidden = config.hidden_size, T = static_cast<int64_t>(a.token_ids.size());
  Stopwatch watch;
  // The rows that want logits are gathered to the front of `normed`; with a tap, all rows are shown
  // first.
  rms_norm(exec, {.x = a.x,
                  .ldx = hidden,
                  .weight = model.weights.norm.data(),
                  .eps = static_cast<float>(config.rms_norm_eps),
                  .num_rows = T,
                  .row_elements = hidden,
                  .y = a.normed,
                  .ldy = hidden});
  if (tap != nullptr && tap->hidden) {
    tap->hidden(static_cast<int>(config.num_hidden_layers),
                {a.normed, static_cast<size_t>(T * hidden)});
  }
  int64_t rows = 0, end = 0;
  for (const BatchSequence& sequence : batch) {
    end += static_cast<int64_t>(sequence.tokens.size());
    std::copy(a.normed + (end - sequence.num_logits) * hidden, a.normed + end * hidden,
              a.normed + rows * hidden);
    rows += sequence.num_logits;
  }
  if (rows > 0) {
    const MatmulGroup group{a.normed, hidden,           rows, model.weights.lm_head,
                            logits,   config.vocab_size};
    matmul(exec, {{&group, 1}, model.compute, false});
  }
  if (times != nullptr) times->head += watch.lap();
}

void forward(Exec& exec, const Model& model, KvCache& cache, Activations& a,
             std::span<BatchSequence> batch, float* logits, const ForwardTap* tap,
             ForwardTimes* times) {
  begin_forward(model, a, batch);
  run_embedding(exec, model, a, times);
  run_layers(exec, model, cache, a, 0, static_cast<int>(model.config.num_hidden_layers), tap,
             times);
  run_head(exec, model, a, batch, logits, tap, times);
  for (const BatchSequence& sequence : batch) {
    sequence.cache->num_tokens += static_cast<int64_t>(sequence.tokens.size());
  }
}

}  // namespace indexcache
