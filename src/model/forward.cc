#include "model/forward.h"

#include <algorithm>

#include "base/checked.h"
#include "ops/gather_rows/gather_rows.h"
#include "ops/index_select/index_select.h"
#include "ops/moe_combine/moe_combine.h"
#include "ops/moe_group/moe_group.h"
#include "ops/moe_mlp/moe_mlp.h"
#include "ops/moe_route/moe_route.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/rope/rope.h"
#include "ops/silu_mul/silu_mul.h"
#include "ops/sparse_mla/sparse_mla.h"
#include "ops/store_index_key/store_index_key.h"
#include "ops/store_latent/store_latent.h"
#include "ops/token_nll/token_nll.h"

namespace indexcache {

namespace {

// transformers builds q_a_layernorm and kv_a_layernorm with their class's default eps, whatever
// rms_norm_eps says (1e-5 in GLM). With 1e-5 the golden cases differ by 5e-6 a layer, enough to
// turn selections; with this by 4e-7.
constexpr double kLatentNormEps = 1e-6;

// Activations [T, ld] of either type.
struct Rows {
  float* f32;
  uint16_t* bf16;  // null: they are f32
  int64_t ld;

  Rows from(int64_t column) const {
    return {f32 + column, bf16 != nullptr ? bf16 + column : nullptr, ld};
  }
};

// What every step of the pass needs; the steps below are the paper's lines in order.
struct Pass {
  Exec& exec;
  const Model& model;
  KvCache& cache;
  Activations& a;
  int64_t T;

  const ModelConfig& config() const { return model.config; }

  // Whether products take and make bf16. Elsewhere activations are f32, whatever products round.
  bool rounded() const { return exec.device == Device::kCuda && model.compute != Compute::kF32; }

  // What a product takes or makes: f32, or bf16 where there is any.
  Rows rows(float* f32, uint16_t* bf16, int64_t ld) const {
    return {f32, rounded() ? bf16 : nullptr, ld};
  }
  Rows f32(float* data, int64_t ld) const { return {data, nullptr, ld}; }
  // Rows that are nothing but a product's result and the next one's input.
  Rows either(float* data, int64_t ld) const {
    return rows(data, reinterpret_cast<uint16_t*>(data), ld);
  }
  Rows normed() const { return rows(a.normed, a.normed16, config().hidden_size); }
  Rows q_latent() const { return rows(a.q_latent, a.q_latent16, config().attention.q_lora_rank); }

  MatmulGroup product(Rows x, const Weight& w, Rows y) const {
    MatmulGroup group{.ldx = x.ld, .m = T, .w = w, .ldy = y.ld};
    (x.bf16 != nullptr ? void(group.x16 = x.bf16) : void(group.x = x.f32));
    (y.bf16 != nullptr ? void(group.y16 = y.bf16) : void(group.y = y.f32));
    return group;
  }

  void matmul_one(Rows x, const Weight& w, Rows y, bool accumulate = false) {
    const MatmulGroup group = product(x, w, y);
    matmul(exec, {{&group, 1}, model.compute, accumulate});
  }

  void norm(const float* x, int64_t ldx, const VectorWeight& weight, double eps, Rows y,
            bool need_f32 = false) {
    rms_norm(exec, {.x = x,
                    .ldx = ldx,
                    .weight = weight.data,
                    .eps = static_cast<float>(eps),
                    .num_rows = T,
                    .row_elements = weight.size,
                    .y = y.bf16 == nullptr || need_f32 ? y.f32 : nullptr,
                    .ldy = y.ld,
                    .y16 = y.bf16});
  }

  void rotate(Rows x, int64_t x_head_stride, int64_t num_heads, bool interleaved, Rows y,
              int64_t y_head_stride) {
    rope(exec, {.x = x.bf16 != nullptr ? nullptr : x.f32,
                .ldx = x.ld,
                .x_head_stride = x_head_stride,
                .num_rows = T,
                .num_heads = num_heads,
                .rope_dim = config().attention.qk_rope_head_dim,
                .interleaved = interleaved,
                .cos = a.cos,
                .sin = a.sin,
                .y = y.f32,
                .ldy = y.ld,
                .y_head_stride = y_head_stride,
                .x16 = x.bf16});
  }

  void project_queries_and_latent(const LayerWeights& w, int layer);
  void select(const LayerWeights& w, int layer);
  void attend(const LayerWeights& w, int layer);
  void dense_mlp(const MlpWeights& w);
  void mixture_of_experts(const MoeWeights& w);
  void plain_experts(const MoeWeights& w);
  void fused_experts(const MoeWeights& w, int64_t taken);
};

// q = W_q_b norm(W_q_a x), absorbed into the latent space; c = norm(W_kv_a x) and k_pe go to the
// cache.
void Pass::project_queries_and_latent(const LayerWeights& w, int layer) {
  const AttentionConfig& attn = config().attention;
  const int64_t heads = attn.num_attention_heads, nope = attn.qk_nope_head_dim,
                latent = attn.kv_lora_rank;
  const int64_t row = latent + attn.qk_rope_head_dim;

  const MatmulGroup down[] = {product(normed(), w.q_a_proj, f32(a.q_latent, attn.q_lora_rank)),
                              product(normed(), w.kv_a_proj_with_mqa, f32(a.kv, row))};
  matmul(exec, {down, model.compute, false});
  norm(a.q_latent, attn.q_lora_rank, w.q_a_layernorm, kLatentNormEps, q_latent());
  store_latent(exec, {.x = a.kv,
                      .ldx = row,
                      .num_rows = T,
                      .latent_dim = latent,
                      .weight = w.kv_a_layernorm.data,
                      .eps = static_cast<float>(kLatentNormEps),
                      .cos = a.cos,
                      .sin = a.sin,
                      .seqs = a.spans,
                      .rows = cache.latent(layer),
                      .device_seqs = a.device_seqs});

  const Rows q = either(a.q, heads * attn.qk_head_dim());
  matmul_one(q_latent(), w.q_b_proj, q);
  std::vector<MatmulGroup> absorb;
  for (int64_t h = 0; h < heads; ++h) {
    absorb.push_back(product(q.from(h * attn.qk_head_dim()), w.w_uk_t[static_cast<size_t>(h)],
                             f32(a.q_absorbed + h * row, heads * row)));
  }
  matmul(exec, {absorb, model.compute, false});
  rotate(q.from(nope), attn.qk_head_dim(), heads, true, f32(a.q_absorbed + latent, heads * row),
         row);
}

// The lightning indexer of a full layer. The factors index_n_heads^-1/2 index_head_dim^-1/2 on its
// weights are positive and common to all scores of a query, so they cannot change a selection and
// are left out.
void Pass::select(const LayerWeights& w, int layer) {
  const IndexerConfig& indexer = config().indexer;
  const int64_t heads = indexer.index_n_heads, dim = indexer.index_head_dim;
  const bool interleaved = indexer.indexer_rope_interleave;

  const Rows q = f32(a.index_q, heads * dim), key = f32(a.index_key, dim);
  matmul_one(q_latent(), w.indexer.wq_b, q);
  const MatmulGroup from_hidden[] = {
      product(normed(), w.indexer.wk, key),
      product(normed(), w.indexer.weights_proj, f32(a.index_weights, heads))};
  matmul(exec, {from_hidden, model.compute, false});
  rotate(q, dim, heads, interleaved, q, dim);
  store_index_key(exec, {.x = a.index_key,
                         .ldx = dim,
                         .num_rows = T,
                         .weight = w.indexer.k_norm_weight.data,
                         .bias = w.indexer.k_norm_bias.data,
                         .eps = kIndexerNormEps,
                         .rope_dim = config().attention.qk_rope_head_dim,
                         .interleaved = interleaved,
                         .cos = a.cos,
                         .sin = a.sin,
                         .seqs = a.spans,
                         .rows = cache.indexer_keys(layer),
                         .device_seqs = a.device_seqs});
  index_select(exec, {.q = a.index_q,
                      .weights = a.index_weights,
                      .num_heads = heads,
                      .head_dim = dim,
                      .keys = cache.indexer_keys(layer),
                      .seqs = a.spans,
                      .k = indexer.index_topk,
                      .positions = a.positions,
                      .counts = a.counts,
                      .device_seqs = a.device_seqs,
                      .max_context = std::min(config().max_position_embeddings,
                                              cache.shape().num_pages * kPageTokens)});
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
                    .out = a.attended,
                    .device_seqs = a.device_seqs,
                    .f32_products = model.compute == Compute::kF32});
  const Rows value = either(a.value, heads * v);
  std::vector<MatmulGroup> to_values;
  for (int64_t h = 0; h < heads; ++h) {
    to_values.push_back(product(f32(a.attended + h * latent, heads * latent),
                                w.w_uv[static_cast<size_t>(h)], value.from(h * v)));
  }
  matmul(exec, {to_values, model.compute, false});
  matmul_one(value, w.o_proj, f32(a.x, config().hidden_size), true);
}

// x += W_down (silu(W_gate n) * W_up n)
void Pass::dense_mlp(const MlpWeights& w) {
  const int64_t width = w.gate_proj.rows;
  const Rows gate = f32(a.gate, width), up = f32(a.up, width);
  const MatmulGroup in[] = {product(normed(), w.gate_proj, gate), product(normed(), w.up_proj, up)};
  matmul(exec, {in, model.compute, false});
  silu_mul(exec, {.gate = a.gate, .up = a.up, .num_rows = T, .row_elements = width, .y = a.gate});
  matmul_one(gate, w.down_proj, f32(a.x, config().hidden_size), true);
}

void Pass::mixture_of_experts(const MoeWeights& w) {
  const MoeConfig& moe = config().moe;
  // On a GPU, unless in f32, the shared expert is one of the experts where it has their shape.
  const bool fused = rounded() && moe_mlp_takes(w.gate_proj.all[0], model.compute) &&
                     moe_mlp_takes(w.down_proj.all[0], model.compute);
  const bool shared = fused && w.gate_proj.all.size() > w.gate_proj.experts.size();
  const int64_t hidden = config().hidden_size, experts = moe.n_routed_experts + (shared ? 1 : 0),
                taken = moe.num_experts_per_tok + (shared ? 1 : 0);

  // The router decides in float32 in every published engine, whatever the model's type.
  const MatmulGroup router =
      product(f32(a.normed, hidden), w.gate, f32(a.router_logits, moe.n_routed_experts));
  matmul(exec, {{&router, 1}, Compute::kF32, false});
  moe_route(exec, {.logits = a.router_logits,
                   .correction_bias = w.e_score_correction_bias.data,
                   .num_tokens = T,
                   .n_routed_experts = moe.n_routed_experts,
                   .num_experts_per_tok = moe.num_experts_per_tok,
                   .n_group = moe.n_group,
                   .topk_group = moe.topk_group,
                   .norm_topk_prob = moe.norm_topk_prob,
                   .routed_scaling_factor = static_cast<float>(moe.routed_scaling_factor),
                   .shared_expert = shared,
                   .experts = a.experts,
                   .expert_weights = a.expert_weights});

  moe_group(exec, {.experts = a.experts,
                   .num_tokens = T,
                   .num_experts_per_tok = taken,
                   .n_routed_experts = experts,
                   .row_begin = a.row_begin,
                   .slots = a.slots,
                   .slot_tokens = a.slot_tokens});
  fused ? fused_experts(w, taken) : plain_experts(w);
  moe_combine(exec, {.rows = fused ? nullptr : a.expert_rows,
                     .slots = a.slots,
                     .weights = a.expert_weights,
                     .num_slots = taken,
                     .num_rows = T,
                     .row_elements = hidden,
                     .y = a.x,
                     .rows16 = fused ? reinterpret_cast<uint16_t*>(a.expert_rows) : nullptr});
  if (w.shared_experts.gate_proj.present() && !shared) dense_mlp(w.shared_experts);
}

// W_down (silu(W_gate n) * W_up n) of every expert's tokens, in three steps over f32 rows.
void Pass::plain_experts(const MoeWeights& w) {
  const int64_t hidden = config().hidden_size, width = config().moe.moe_intermediate_size,
                rows = T * config().moe.num_experts_per_tok;
  gather_rows(exec, {.dtype = DType::kF32,
                     .table = reinterpret_cast<const uint8_t*>(a.normed),
                     .table_rows = T,
                     .row_elements = hidden,
                     .ids = a.slot_tokens,
                     .num_rows = rows,
                     .y = a.expert_rows});
  const auto one = [](const float* x, int64_t ldx, const ExpertWeights& weights, float* y,
                      int64_t ldy) {
    return ExpertProduct{x, ldx, weights.experts, weights.device_experts, y, ldy};
  };
  const ExpertProduct in[] = {one(a.expert_rows, hidden, w.gate_proj, a.gate, width),
                              one(a.expert_rows, hidden, w.up_proj, a.up, width)};
  matmul_experts(exec, {in, a.row_begin, rows, model.compute});
  silu_mul(exec,
           {.gate = a.gate, .up = a.up, .num_rows = rows, .row_elements = width, .y = a.gate});
  const ExpertProduct out[] = {one(a.gate, width, w.down_proj, a.expert_rows, hidden)};
  matmul_experts(exec, {out, a.row_begin, rows, model.compute});
}

// The same in two, over bf16 rows; of `taken` experts a token.
void Pass::fused_experts(const MoeWeights& w, int64_t taken) {
  const auto matrices = [&](const ExpertWeights& weights) {
    const size_t count =
        taken > config().moe.num_experts_per_tok ? weights.all.size() : weights.experts.size();
    return ExpertMatrices{std::span(weights.all).first(count), weights.device_experts};
  };
  const ExpertRows rows{a.row_begin, T * taken};
  uint16_t* inner = reinterpret_cast<uint16_t*>(a.gate);
  moe_gate_up(exec, {.x = a.normed16,
                     .num_tokens = T,
                     .tokens = a.slot_tokens,
                     .rows = rows,
                     .gate = matrices(w.gate_proj),
                     .up = matrices(w.up_proj),
                     .y = inner});
  moe_down(exec, {.x = inner,
                  .rows = rows,
                  .down = matrices(w.down_proj),
                  .y = reinterpret_cast<uint16_t*>(a.expert_rows)});
}

// Adds the time since the last lap to the parts that it is given. On a GPU the times are known when
// finish() has waited for it.
class Stopwatch {
 public:
  Stopwatch(Exec& exec, bool wanted) : exec_(exec), wanted_(wanted) {
    if (wanted_ && exec_.device == Device::kCuda) exec_.cuda().start_laps();
  }

  void lap(double* part, double* layer = nullptr) {
    if (!wanted_) return;
    if (exec_.device == Device::kCuda) return exec_.cuda().lap(part, layer);
    const double now = monotonic_seconds(), seconds = now - std::exchange(last_, now);
    *part += seconds;
    if (layer != nullptr) *layer += seconds;
  }

  void finish() {
    if (wanted_ && exec_.device == Device::kCuda) exec_.cuda().read_laps();
  }

 private:
  Exec& exec_;
  bool wanted_;
  double last_ = monotonic_seconds();
};

// The rows of the residual stream, or what else has its shape, for the host to read.
std::span<const float> host_rows(Exec& exec, Activations& a, const float* rows, int64_t count) {
  const auto size = static_cast<size_t>(count);
  if (exec.device == Device::kCpu) return {rows, size};
  a.host_x.resize(size);
  exec.cuda().copy_out(a.host_x.data(), rows, size * sizeof(float));
  return a.host_x;
}

void show_selection(Exec& exec, Activations& a, const ForwardTap& tap, int layer, int64_t T,
                    int64_t k) {
  const auto size = static_cast<size_t>(T * k), rows = static_cast<size_t>(T);
  if (exec.device == Device::kCpu) {
    tap.selection(layer, {{a.positions, size}, {a.counts, rows}});
    return;
  }
  a.host_positions.resize(size);
  a.host_counts.resize(rows);
  exec.cuda().copy_out(a.host_positions.data(), a.positions, 4 * size);
  exec.cuda().copy_out(a.host_counts.data(), a.counts, 4 * rows);
  tap.selection(layer, {a.host_positions, a.host_counts});
  exec.cuda().copy_in(a.positions, a.host_positions.data(), 4 * size);
  exec.cuda().copy_in(a.counts, a.host_counts.data(), 4 * rows);
}

bool wants_hidden(const ForwardTap* tap, int index) {
  return tap != nullptr && tap->hidden && (!tap->wants_hidden || tap->wants_hidden(index));
}

bool wants_selection(const ForwardTap* tap, int layer) {
  return tap != nullptr && tap->selection && (!tap->wants_selection || tap->wants_selection(layer));
}

// Gives the ops the batch: on a GPU as one copy.
void place_inputs(Exec& exec, Activations& a) {
  if (exec.device == Device::kCpu) {
    a.ids = a.token_ids.data();
    a.cos = a.rope.cos.data();
    a.sin = a.rope.sin.data();
    return;
  }
  int64_t num_bytes = 0;
  const auto place = [&]<class T>(const std::vector<T>& values) {
    const int64_t at = num_bytes;
    num_bytes += round_up(static_cast<int64_t>(values.size() * sizeof(T)), int64_t{64});
    return at;
  };
  const int64_t ids = place(a.token_ids), cos = place(a.rope.cos), sin = place(a.rope.sin),
                seqs = place(a.spans);
  std::vector<int64_t> page_tables;
  for (const SeqSpan& span : a.spans) {
    page_tables.push_back(num_bytes);
    num_bytes +=
        4 * round_up(ceil_div(span.first_position + span.num_tokens, kPageTokens), int64_t{16});
  }
  if (a.inputs.num_bytes() < static_cast<size_t>(num_bytes)) {
    exec.wait();
    a.inputs = Memory();
    a.inputs = Memory(Device::kCuda, static_cast<size_t>(num_bytes + num_bytes / 2));
  }
  a.packed_inputs.resize(static_cast<size_t>(num_bytes));
  uint8_t* host = a.packed_inputs.data();
  const uint8_t* device = a.inputs.data();
  std::copy(a.token_ids.begin(), a.token_ids.end(), reinterpret_cast<int32_t*>(host + ids));
  std::copy(a.rope.cos.begin(), a.rope.cos.end(), reinterpret_cast<float*>(host + cos));
  std::copy(a.rope.sin.begin(), a.rope.sin.end(), reinterpret_cast<float*>(host + sin));
  for (size_t i = 0; i < a.spans.size(); ++i) {
    SeqSpan span = a.spans[i];
    std::copy_n(span.pages, ceil_div(span.first_position + span.num_tokens, kPageTokens),
                reinterpret_cast<int32_t*>(host + page_tables[i]));
    span.pages = reinterpret_cast<const int32_t*>(device + page_tables[i]);
    reinterpret_cast<SeqSpan*>(host + seqs)[i] = span;
  }
  exec.cuda().copy_in(a.inputs.data(), host, static_cast<size_t>(num_bytes));
  a.ids = reinterpret_cast<const int32_t*>(device + ids);
  a.cos = reinterpret_cast<const float*>(device + cos);
  a.sin = reinterpret_cast<const float*>(device + sin);
  a.device_seqs = reinterpret_cast<const SeqSpan*>(device + seqs);
}

}  // namespace

DType cache_dtype(Compute compute) { return compute == Compute::kF32 ? DType::kF32 : DType::kBF16; }

KvCacheShape cache_shape(const ModelConfig& config, const IndexPlan& plan, CacheTypes types,
                         int64_t num_pages) {
  KvCacheShape shape;
  for (int layer = 0; layer < plan.num_layers(); ++layer)
    shape.layer_is_full.push_back(plan.is_full(layer));
  shape.latent_elements = config.attention.kv_lora_rank + config.attention.qk_rope_head_dim;
  shape.indexer_elements = config.indexer.index_head_dim;
  shape.dtype = types.latent;
  if (types.latent == DType::kF8E4M3) shape.latent_fp8_elements = config.attention.kv_lora_rank;
  shape.indexer_dtype = types.indexer_keys;
  shape.num_pages = num_pages;
  return shape;
}

void begin_forward(Exec& exec, const Model& model, Activations& a,
                   std::span<const BatchSequence> batch) {
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
  place_inputs(exec, a);
}

void run_embedding(Exec& exec, const Model& model, Activations& a, ForwardTimes* times) {
  Stopwatch watch(exec, times != nullptr);
  const Weight& embed = model.weights.embed_tokens;
  gather_rows(exec, {.dtype = embed.dtype,
                     .table = embed.data,
                     .table_rows = embed.rows,
                     .row_elements = model.config.hidden_size,
                     .ids = a.ids,
                     .num_rows = static_cast<int64_t>(a.token_ids.size()),
                     .y = a.x});
  if (times != nullptr) watch.lap(&times->head);
  watch.finish();
}

void run_layers(Exec& exec, const Model& model, KvCache& cache, Activations& a, int first_layer,
                int last_layer, const ForwardTap* tap, ForwardTimes* times) {
  const ModelConfig& config = model.config;
  CHECK_GE(first_layer, 0);
  CHECK_LE(last_layer, static_cast<int>(config.num_hidden_layers));
  const int64_t hidden = config.hidden_size, T = static_cast<int64_t>(a.token_ids.size());
  Stopwatch watch(exec, times != nullptr);
  ForwardTimes unused;
  ForwardTimes& t = times != nullptr ? *times : unused;
  t.layer_seconds.resize(model.weights.layers.size());
  Pass pass{exec, model, cache, a, T};

  for (int layer = first_layer; layer < last_layer; ++layer) {
    const LayerWeights& w = model.weights.layers[static_cast<size_t>(layer)];
    double* seconds = &t.layer_seconds[static_cast<size_t>(layer)];
    if (wants_hidden(tap, layer)) tap->hidden(layer, host_rows(exec, a, a.x, T * hidden));

    pass.norm(a.x, hidden, w.input_layernorm, config.rms_norm_eps, pass.normed());
    pass.project_queries_and_latent(w, layer);
    watch.lap(&t.attention, seconds);
    if (model.plan.is_full(layer)) {
      pass.select(w, layer);
      if (wants_selection(tap, layer))
        show_selection(exec, a, *tap, layer, T, config.indexer.index_topk);
      watch.lap(&t.indexer, seconds);
    }
    pass.attend(w, layer);
    watch.lap(&t.attention, seconds);

    // The router takes f32.
    pass.norm(a.x, hidden, w.post_attention_layernorm, config.rms_norm_eps, pass.normed(),
              config.is_moe(layer));
    config.is_moe(layer) ? pass.mixture_of_experts(w.moe) : pass.dense_mlp(w.mlp);
    watch.lap(&t.ffn, seconds);
  }
  watch.finish();
}

namespace {

// The rows that want logits, after the final norm: of one sequence they are consecutive, those of
// several move to the front, in pieces that do not overlap. `x` stays: the caller looks at it for
// NaN.
const float* wanted_rows(Exec& exec, const Model& model, Activations& a,
                         std::span<const BatchSequence> batch, const ForwardTap* tap,
                         int64_t* num_rows) {
  const ModelConfig& config = model.config;
  const int64_t hidden = config.hidden_size, T = static_cast<int64_t>(a.token_ids.size());
  rms_norm(exec, {.x = a.x,
                  .ldx = hidden,
                  .weight = model.weights.norm.data,
                  .eps = static_cast<float>(config.rms_norm_eps),
                  .num_rows = T,
                  .row_elements = hidden,
                  .y = a.normed,
                  .ldy = hidden});
  const int last = static_cast<int>(config.num_hidden_layers);
  if (wants_hidden(tap, last)) tap->hidden(last, host_rows(exec, a, a.normed, T * hidden));
  int64_t rows = 0, end = 0;
  for (const BatchSequence& sequence : batch) {
    end += static_cast<int64_t>(sequence.tokens.size());
    const int64_t count = sequence.num_logits, from = end - count, shift = from - rows;
    for (int64_t i = 0; batch.size() > 1 && shift > 0 && i < count; i += shift) {
      exec.copy(a.normed + (rows + i) * hidden, a.normed + (from + i) * hidden,
                static_cast<size_t>(std::min(shift, count - i) * hidden) * sizeof(float));
    }
    rows += count;
  }
  *num_rows = rows;
  return batch.size() > 1 ? a.normed : a.normed + (T - rows) * hidden;
}

void logits_of(Exec& exec, const Model& model, const float* rows, int64_t num_rows, float* logits) {
  const MatmulGroup group{rows,   model.config.hidden_size, num_rows, model.weights.lm_head,
                          logits, model.config.vocab_size};
  matmul(exec, {{&group, 1}, model.compute, false});
}

}  // namespace

void run_head(Exec& exec, const Model& model, Activations& a, std::span<const BatchSequence> batch,
              float* logits, const ForwardTap* tap, ForwardTimes* times) {
  const int64_t hidden = model.config.hidden_size, vocab = model.config.vocab_size;
  Stopwatch watch(exec, times != nullptr);
  int64_t rows = 0;
  const float* wanted = wanted_rows(exec, model, a, batch, tap, &rows);
  const bool on_gpu = exec.device == Device::kCuda;
  const int64_t at_once = on_gpu ? a.logit_rows : std::max<int64_t>(rows, 1);
  for (int64_t first = 0; first < rows; first += at_once) {
    const int64_t count = std::min(at_once, rows - first);
    float* to = logits + first * vocab;
    logits_of(exec, model, wanted + first * hidden, count, on_gpu ? a.logits : to);
    if (on_gpu)
      exec.cuda().copy_out(to, a.logits, static_cast<size_t>(count * vocab) * sizeof(float));
  }
  if (times != nullptr) watch.lap(&times->head);
  watch.finish();
}

void run_head_nll(Exec& exec, const Model& model, Activations& a,
                  std::span<const BatchSequence> batch, std::span<const int32_t> targets,
                  std::span<double> nll) {
  const int64_t hidden = model.config.hidden_size, vocab = model.config.vocab_size;
  int64_t rows = 0;
  const float* wanted = wanted_rows(exec, model, a, batch, nullptr, &rows);
  CHECK_LE(targets.size(), static_cast<size_t>(rows));
  CHECK_EQ(nll.size(), targets.size());
  rows = static_cast<int64_t>(targets.size());
  const bool on_gpu = exec.device == Device::kCuda;
  if (on_gpu) {
    exec.cuda().copy_in(a.targets, targets.data(), targets.size_bytes());
  } else {
    a.host_logits.resize(static_cast<size_t>(rows * vocab));
  }
  float* logits = on_gpu ? a.logits : a.host_logits.data();
  const int64_t at_once = on_gpu ? a.logit_rows : std::max<int64_t>(rows, 1);
  for (int64_t first = 0; first < rows; first += at_once) {
    const int64_t count = std::min(at_once, rows - first);
    logits_of(exec, model, wanted + first * hidden, count, logits);
    token_nll(exec, {.logits = logits,
                     .num_rows = count,
                     .vocab_size = vocab,
                     .targets = (on_gpu ? a.targets : targets.data()) + first,
                     .nll = (on_gpu ? a.nll : nll.data()) + first});
  }
  if (on_gpu) exec.cuda().copy_out(nll.data(), a.nll, nll.size_bytes());
}

PassState new_state(Exec& exec, const Model& model, Activations& a) {
  const size_t rows = a.token_ids.size(),
               hidden = rows * static_cast<size_t>(model.config.hidden_size),
               selected = rows * static_cast<size_t>(model.config.indexer.index_topk);
  if (exec.device == Device::kCpu)
    return {{a.x, hidden}, {a.positions, selected}, {a.counts, rows}};
  a.host_x.resize(hidden);
  a.host_positions.resize(selected);
  a.host_counts.resize(rows);
  return {a.host_x, a.host_positions, a.host_counts};
}

void put_state(Exec& exec, const Model& model, Activations& a) {
  if (exec.device == Device::kCpu) return;
  const PassState state = new_state(exec, model, a);
  exec.cuda().copy_in(a.x, state.x.data(), state.x.size_bytes());
  exec.cuda().copy_in(a.positions, state.positions.data(), state.positions.size_bytes());
  exec.cuda().copy_in(a.counts, state.counts.data(), state.counts.size_bytes());
}

std::span<const float> read_residual(Exec& exec, const Model& model, Activations& a) {
  return host_rows(exec, a, a.x,
                   static_cast<int64_t>(a.token_ids.size()) * model.config.hidden_size);
}

namespace {

// One token and its logits for each sequence.
bool is_decode_step(const Activations& a, std::span<const BatchSequence> batch) {
  return batch.size() <= static_cast<size_t>(a.logit_rows) &&
         std::all_of(batch.begin(), batch.end(), [](const BatchSequence& sequence) {
           return sequence.tokens.size() == 1 && sequence.num_logits == 1;
         });
}

// A step of decoding, its batch begun, on a GPU. Seen for the first time it is run as it is, so
// that whatever is set up at first use (scratch, the library's plans) is there when it is recorded.
void run_decode_step(Exec& exec, const Model& model, KvCache& cache, Activations& a,
                     std::span<const BatchSequence> batch, float* logits) {
  const auto run = [&] {
    run_embedding(exec, model, a);
    run_layers(exec, model, cache, a, 0, static_cast<int>(model.config.num_hidden_layers));
    int64_t rows = 0;
    const float* wanted = wanted_rows(exec, model, a, batch, nullptr, &rows);
    logits_of(exec, model, wanted, rows, a.logits);
  };
  DecodeGraph& step = a.decode_graphs[static_cast<int64_t>(batch.size())];
  const auto bound = [&] {
    return DecodeGraph::Bound{.model = &model,
                              .cache = cache.latent(0).base,
                              .inputs = a.inputs.data(),
                              .scratch = exec.cuda().scratch(0),
                              .plan = model.plan,
                              .batch_invariant = exec.batch_invariant,
                              .forced = exec.forced};
  };
  if (step.bound != bound()) {
    run();
    step.bound = bound();
    step.graph = CudaGraph();
  } else {
    if (!step.graph.recorded()) step.graph.record(exec.cuda(), run);
    step.graph.launch(exec.cuda());
  }
  exec.cuda().copy_out(logits, a.logits,
                       batch.size() * static_cast<size_t>(model.config.vocab_size) * sizeof(float));
}

}  // namespace

void forward(Exec& exec, const Model& model, KvCache& cache, Activations& a,
             std::span<BatchSequence> batch, float* logits, const ForwardTap* tap,
             ForwardTimes* times) {
  begin_forward(exec, model, a, batch);
  if (exec.device == Device::kCuda && tap == nullptr && times == nullptr &&
      exec.profile == nullptr && is_decode_step(a, batch)) {
    run_decode_step(exec, model, cache, a, batch, logits);
  } else {
    run_embedding(exec, model, a, times);
    run_layers(exec, model, cache, a, 0, static_cast<int>(model.config.num_hidden_layers), tap,
               times);
    run_head(exec, model, a, batch, logits, tap, times);
  }
  for (const BatchSequence& sequence : batch) {
    sequence.cache->num_tokens += static_cast<int64_t>(sequence.tokens.size());
  }
}

}  // namespace indexcache
