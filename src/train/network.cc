#include "train/network.h"

#include "base/atomic_file.h"
#include "base/json.h"
#include "checkpoint/binder.h"

namespace indexcache {

namespace {

constexpr double kInitStd = 0.02;
// See model/forward.cc: transformers' q_a_layernorm and kv_a_layernorm have their own eps.
constexpr double kLatentNormEps = 1e-6;

struct Builder {
  Network& network;
  const ModelConfig& config;

  size_t add(std::vector<std::string> names, Shape tensor_shape, std::vector<int64_t> shape,
             ParameterGroup group, double init_std, double init_value = 0) {
    Parameter parameter;
    parameter.names = std::move(names);
    parameter.tensor_shape = std::move(tensor_shape);
    parameter.shape = std::move(shape);
    parameter.group = group;
    parameter.init_std = init_std;
    parameter.init_value = init_value;
    return network.parameters.add(std::move(parameter));
  }
  size_t matrix(const std::string& name, int64_t rows, int64_t cols,
                ParameterGroup group = kMatrices, double init_std = kInitStd) {
    return add({name}, {rows, cols}, {rows, cols}, group, init_std);
  }
  size_t vector(const std::string& name, int64_t size, double value,
                ParameterGroup group = kVectors) {
    return add({name}, {size}, {size}, group, 0, value);
  }
  // What adds to the residual stream starts smaller, so that its sum does not grow with depth.
  double residual_std() const {
    return kInitStd / std::sqrt(2.0 * static_cast<double>(config.num_hidden_layers));
  }

  MlpParameters mlp(const std::string& prefix, int64_t width) {
    const int64_t hidden = config.hidden_size;
    return {matrix(prefix + "gate_proj.weight", width, hidden),
            matrix(prefix + "up_proj.weight", width, hidden),
            matrix(prefix + "down_proj.weight", hidden, width, kMatrices, residual_std())};
  }

  MoeParameters moe(const std::string& prefix) {
    const MoeConfig& moe = config.moe;
    const int64_t hidden = config.hidden_size, width = moe.moe_intermediate_size;
    std::vector<std::string> gate, up, down;
    for (int64_t e = 0; e < moe.n_routed_experts; ++e) {
      const std::string expert = fmt::format("{}experts.{}.", prefix, e);
      gate.push_back(expert + "gate_proj.weight");
      up.push_back(expert + "up_proj.weight");
      down.push_back(expert + "down_proj.weight");
    }
    MoeParameters result;
    result.gate = matrix(prefix + "gate.weight", moe.n_routed_experts, hidden);
    result.bias = torch::zeros({moe.n_routed_experts}, network.device);
    result.load = torch::zeros({moe.n_routed_experts}, network.device);
    const std::vector<int64_t> in = {moe.n_routed_experts, width, hidden};
    result.gate_proj = add(gate, {width, hidden}, in, kMatrices, kInitStd);
    result.up_proj = add(up, {width, hidden}, in, kMatrices, kInitStd);
    result.down = add(down, {hidden, width}, {moe.n_routed_experts, hidden, width}, kMatrices,
                      residual_std());
    if (moe.n_shared_experts > 0)
      result.shared = mlp(prefix + "shared_experts.", moe.n_shared_experts * width);
    return result;
  }

  IndexerParameters indexer(const std::string& prefix) {
    const IndexerConfig& indexer = config.indexer;
    const int64_t dim = indexer.index_head_dim;
    IndexerParameters result;
    result.wq_b = matrix(prefix + "wq_b.weight", indexer.index_n_heads * dim,
                         config.attention.q_lora_rank, kIndexerMatrices);
    result.wk = matrix(prefix + "wk.weight", dim, config.hidden_size, kIndexerMatrices);
    result.k_norm_weight = vector(prefix + "k_norm.weight", dim, 1, kIndexerVectors);
    result.k_norm_bias = vector(prefix + "k_norm.bias", dim, 0, kIndexerVectors);
    result.weights_proj = matrix(prefix + "weights_proj.weight", indexer.index_n_heads,
                                 config.hidden_size, kIndexerMatrices);
    return result;
  }

  LayerParameters layer(int index) {
    const AttentionConfig& attn = config.attention;
    const std::string prefix = fmt::format("model.layers.{}.", index),
                      self_attn = prefix + "self_attn.";
    const int64_t hidden = config.hidden_size, heads = attn.num_attention_heads;
    LayerParameters result;
    result.input_layernorm = vector(prefix + "input_layernorm.weight", hidden, 1);
    result.post_attention_layernorm = vector(prefix + "post_attention_layernorm.weight", hidden, 1);
    result.q_a_proj = matrix(self_attn + "q_a_proj.weight", attn.q_lora_rank, hidden);
    result.q_a_layernorm = vector(self_attn + "q_a_layernorm.weight", attn.q_lora_rank, 1);
    result.q_b_proj =
        matrix(self_attn + "q_b_proj.weight", heads * attn.qk_head_dim(), attn.q_lora_rank);
    result.kv_a_proj = matrix(self_attn + "kv_a_proj_with_mqa.weight",
                              attn.kv_lora_rank + attn.qk_rope_head_dim, hidden);
    result.kv_a_layernorm = vector(self_attn + "kv_a_layernorm.weight", attn.kv_lora_rank, 1);
    result.kv_b_proj = matrix(self_attn + "kv_b_proj.weight",
                              heads * (attn.qk_nope_head_dim + attn.v_head_dim), attn.kv_lora_rank);
    result.o_proj = matrix(self_attn + "o_proj.weight", hidden, heads * attn.v_head_dim, kMatrices,
                           residual_std());
    if (network.plan.is_full(index)) result.indexer = indexer(self_attn + "indexer.");
    if (config.is_moe(index)) {
      result.moe = moe(prefix + "mlp.");
    } else {
      result.mlp = mlp(prefix + "mlp.", config.intermediate_size);
    }
    return result;
  }
};

std::string bias_name(size_t layer) {
  return fmt::format("model.layers.{}.mlp.gate.e_score_correction_bias", layer);
}

torch::Tensor make_rotations(const ModelConfig& config, torch::Device device) {
  const std::vector<float> speed = rope_inv_freq(config.rope, config.attention.qk_rope_head_dim);
  const torch::Tensor inv_freq =
      torch::from_blob(const_cast<float*>(speed.data()), {static_cast<int64_t>(speed.size())});
  const torch::Tensor angles =
      torch::outer(torch::arange(config.max_position_embeddings, torch::kFloat), inv_freq);
  return torch::polar(torch::full_like(angles, rope_cos_sin_scale(config.rope)), angles).to(device);
}

}  // namespace

Network make_network(const ModelConfig& config, const IndexPlan& plan, torch::Device device,
                     torch::ScalarType compute, const Trainable& trainable) {
  Network network;
  network.config = config;
  network.plan = plan;
  network.device = device;
  network.compute = compute;
  Builder builder{network, config};
  network.embed_tokens =
      builder.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size);
  for (int i = 0; i < config.num_hidden_layers; ++i) network.layers.push_back(builder.layer(i));
  network.norm = builder.vector("model.norm.weight", config.hidden_size, 1);
  network.lm_head = config.tie_word_embeddings
                        ? network.embed_tokens
                        : builder.matrix("lm_head.weight", config.vocab_size, config.hidden_size);
  network.parameters.allocate(
      device, compute,
      {trainable.backbone, trainable.backbone, trainable.indexers, trainable.indexers});
  network.rotations = make_rotations(config, device);
  return network;
}

void load_network(Network& network, const Checkpoint& checkpoint) {
  network.parameters.load(checkpoint);
  Binder binder(checkpoint);
  std::vector<TensorView> views(network.layers.size());
  for (size_t i = 0; i < network.layers.size(); ++i) {
    if (!network.layers[i].moe) continue;
    views[i] = binder.require(bias_name(i), {network.config.moe.n_routed_experts},
                              {DType::kF32, DType::kBF16, DType::kF16});
  }
  binder.ignore_prefix("", "read above");
  binder.finish();
  for (size_t i = 0; i < network.layers.size(); ++i) {
    if (!network.layers[i].moe) continue;
    std::vector<float> bias = to_f32(views[i]);
    network.layers[i].moe->bias.copy_(
        torch::from_blob(bias.data(), {static_cast<int64_t>(bias.size())}));
  }
}

void save_network(const Network& network, const std::string& folder, DType dtype,
                  uint64_t max_shard_bytes) {
  std::vector<TensorSpec> specs = network.parameters.specs(dtype, false);
  std::map<std::string, torch::Tensor> biases;
  for (size_t i = 0; i < network.layers.size(); ++i) {
    if (!network.layers[i].moe) continue;
    biases[bias_name(i)] = network.layers[i].moe->bias.to(torch::kCPU).contiguous();
    specs.push_back({bias_name(i), DType::kF32, {network.config.moe.n_routed_experts}});
  }
  const TensorSource parameters = network.parameters.source(dtype);
  write_sharded_safetensors(
      folder, specs, {{"format", "pt"}}, max_shard_bytes,
      [&](const TensorSpec& spec, const ByteSink& sink) {
        const auto bias = biases.find(spec.name);
        if (bias == biases.end()) return parameters(spec, sink);
        sink({static_cast<const uint8_t*>(bias->second.data_ptr()), spec.num_bytes()});
      });
  ModelConfig config = network.config;
  config.index_plan = network.plan;
  config.dtype = dtype == DType::kF32 ? "float32" : "bfloat16";
  config.quantization_config.reset();
  write_text_file(folder + "/config.json", config_json(config).dump(2) + "\n");
}

namespace {

torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps) {
#if INDEXCACHE_TORCH_AT_LEAST(2, 9)
  return torch::rms_norm(x, {x.size(-1)}, weight, eps);
#else
  const torch::Tensor x32 = x.to(torch::kFloat);
  const torch::Tensor scale = x32.square().mean(-1, true).add(eps).rsqrt();
  return x32.mul(scale).to(x.scalar_type()).mul(weight);
#endif
}

// The first 2 * pairs entries of the last dimension turned; x [T, n, D], rotations [T, pairs].
torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& rotations, bool interleaved) {
  const int64_t pairs = rotations.size(1), rest = x.size(-1) - 2 * pairs;
  const torch::Tensor turned_part = x.narrow(-1, 0, 2 * pairs).to(torch::kFloat);
  torch::Tensor turned;
  if (interleaved) {
    const torch::Tensor z =
        torch::view_as_complex(turned_part.contiguous().view({x.size(0), x.size(1), pairs, 2}));
    turned = torch::view_as_real(z.mul(rotations.unsqueeze(1))).flatten(-2);
  } else {
    const torch::Tensor z = torch::complex(turned_part.narrow(-1, 0, pairs).contiguous(),
                                           turned_part.narrow(-1, pairs, pairs).contiguous());
    const torch::Tensor y = torch::view_as_real(z.mul(rotations.unsqueeze(1)));
    turned = torch::cat({y.select(-1, 0), y.select(-1, 1)}, -1);
  }
  turned = turned.to(x.scalar_type());
  return rest == 0 ? turned : torch::cat({turned, x.narrow(-1, 2 * pairs, rest)}, -1);
}

// One pass over the layers; what a layer leaves for its group is in Group.
struct Pass {
  Network& network;
  const Batch& batch;
  const ForwardOptions& options;
  torch::Tensor rotations;  // of the batch's positions

  const torch::Tensor& value(size_t index) const { return network.parameters.value(index); }
  torch::Tensor linear(const torch::Tensor& x, size_t weight) const {
    return torch::linear(x, value(weight));
  }

  struct Group {
    int first = 0, end = 0;
    torch::Tensor selection;                 // i32 [T, topk]; kept for a second run
    std::optional<IndexerOutput> indexer;    // of the full layer
    std::vector<DenseTarget> dense_targets;  // one a layer
    std::vector<torch::Tensor> sparse_targets;
    bool again = false;  // activation checkpointing computes the group a second time
  };

  bool wants_target(const Group& group, int layer) const {
    return !group.again &&
           (options.indexer_loss == IndexerLoss::kMultiLayer ||
            (options.indexer_loss == IndexerLoss::kPerLayer && layer == group.first));
  }

  IndexerOutput run_indexer(const IndexerParameters& p, const torch::Tensor& normed,
                            const torch::Tensor& q_latent) const {
    const IndexerConfig& config = network.config.indexer;
    // The backbone may run without gradients around it; the loss differentiates this part alone.
    torch::AutoGradMode grad_mode(options.indexer_loss_weight > 0);
    const torch::Tensor x = normed.detach();
    const int64_t heads = config.index_n_heads, dim = config.index_head_dim;
    IndexerOutput out;
    out.q = rotate(linear(q_latent.detach(), p.wq_b).view({-1, heads, dim}), rotations,
                   config.indexer_rope_interleave);
    const torch::Tensor k = torch::layer_norm(linear(x, p.wk), {dim}, value(p.k_norm_weight),
                                              value(p.k_norm_bias), kIndexerNormEps);
    out.k = rotate(k.unsqueeze(1), rotations, config.indexer_rope_interleave).squeeze(1);
    out.w = linear(x, p.weights_proj)
                .to(torch::kFloat)
                .mul(1.0 / std::sqrt(static_cast<double>(heads * dim)));
    return out;
  }

  torch::Tensor attention(const LayerParameters& p, int layer, const torch::Tensor& normed,
                          Group& group) const {
    const AttentionConfig& config = network.config.attention;
    const int64_t T = batch.num_tokens, heads = config.num_attention_heads,
                  nope = config.qk_nope_head_dim, rope = config.qk_rope_head_dim,
                  latent = config.kv_lora_rank, v_dim = config.v_head_dim;
    const double scale = attention_scale(network.config);

    const torch::Tensor q_latent =
        rms_norm(linear(normed, p.q_a_proj), value(p.q_a_layernorm), kLatentNormEps);
    if (p.indexer && (options.attention == AttentionKind::kSparse ||
                      options.indexer_loss != IndexerLoss::kNone)) {
      if (!group.again) group.indexer = run_indexer(*p.indexer, normed, q_latent);
      if (options.attention == AttentionKind::kSparse && !group.again) {
        group.selection = select_tokens(*group.indexer, network.config.indexer.index_topk, batch);
      }
    }
    const torch::Tensor q = linear(q_latent, p.q_b_proj).view({T, heads, nope + rope});
    const torch::Tensor q_nope = q.narrow(2, 0, nope);
    const torch::Tensor q_pe = rotate(q.narrow(2, nope, rope), rotations, true);
    const torch::Tensor kv = linear(normed, p.kv_a_proj);
    const torch::Tensor c =
        rms_norm(kv.narrow(1, 0, latent), value(p.kv_a_layernorm), kLatentNormEps);
    const torch::Tensor k_pe = rotate(kv.narrow(1, latent, rope).unsqueeze(1), rotations, true);

    torch::Tensor out;
    if (options.attention == AttentionKind::kDense) {
      const torch::Tensor expanded = linear(c, p.kv_b_proj).view({T, heads, nope + v_dim});
      const torch::Tensor k =
          torch::cat({expanded.narrow(2, 0, nope), k_pe.expand({T, heads, rope})}, -1);
      const torch::Tensor full_q = torch::cat({q_nope, q_pe}, -1);
      out = dense_attention(full_q, k, expanded.narrow(2, nope, v_dim), scale, batch);
      if (wants_target(group, layer)) group.dense_targets.push_back({full_q.detach(), k.detach()});
    } else {
      const torch::Tensor kv_b = value(p.kv_b_proj).view({heads, nope + v_dim, latent});
      const torch::Tensor absorbed =
          torch::bmm(q_nope.transpose(0, 1), kv_b.narrow(1, 0, nope)).transpose(0, 1);
      const SparseAttention attended =
          sparse_attention(torch::cat({absorbed, q_pe}, -1), torch::cat({c, k_pe.squeeze(1)}, -1),
                           group.selection, latent, scale);
      out = torch::bmm(attended.output.transpose(0, 1), kv_b.narrow(1, nope, v_dim).transpose(1, 2))
                .transpose(0, 1);
      if (wants_target(group, layer)) group.sparse_targets.push_back(attended.probabilities);
    }
    return linear(out.reshape({T, heads * v_dim}), p.o_proj);
  }

  torch::Tensor mlp(const MlpParameters& p, const torch::Tensor& x) const {
    return linear(torch::silu(linear(x, p.gate)).mul(linear(x, p.up)), p.down);
  }

  // i64 [T, num_experts_per_tok]
  torch::Tensor route(const MoeParameters& p, const torch::Tensor& s) const {
    const MoeConfig& config = network.config.moe;
    torch::Tensor choice = s.detach().add(p.bias);
    if (config.n_group > 1) {
      const torch::Tensor by_group = choice.view({choice.size(0), config.n_group, -1});
      const torch::Tensor group_score = std::get<0>(by_group.topk(2, -1)).sum(-1);
      const torch::Tensor kept = std::get<1>(group_score.topk(config.topk_group, -1));
      const torch::Tensor left_out =
          torch::ones_like(group_score, torch::kBool).scatter_(1, kept, false);
      choice = by_group.masked_fill(left_out.unsqueeze(-1), -INFINITY).flatten(1);
    }
    return std::get<1>(choice.topk(config.num_experts_per_tok, -1));
  }

  torch::Tensor mixture_of_experts(const MoeParameters& p, const torch::Tensor& x,
                                   bool again) const {
    const MoeConfig& config = network.config.moe;
    const torch::Tensor s =
        torch::linear(x.to(torch::kFloat), value(p.gate).to(torch::kFloat)).sigmoid();
    const torch::Tensor experts = route(p, s);
    torch::Tensor weights = s.gather(1, experts);
    if (config.norm_topk_prob) weights = weights.div(weights.sum(-1, true).add(1e-20));
    weights = weights.mul(config.routed_scaling_factor).to(x.scalar_type());

    torch::Tensor y = config.n_routed_experts <= network.max_dense_experts
                          ? all_experts(p, x, experts, weights, again)
                          : taken_experts(p, x, experts, weights, again);
    return p.shared ? y + mlp(*p.shared, x) : y;
  }

  void count_load(const MoeParameters& p, const torch::Tensor& count, bool again) const {
    if (options.training && !again) p.load.add_(count);
  }

  torch::Tensor all_experts(const MoeParameters& p, const torch::Tensor& x,
                            const torch::Tensor& experts, const torch::Tensor& weights,
                            bool again) const {
    const int64_t T = x.size(0), num_experts = network.config.moe.n_routed_experts;
    const torch::Tensor weight =
        torch::zeros({T, num_experts}, weights.options()).scatter(1, experts, weights);
    count_load(p, weight.detach().gt(0).sum(0), again);
    const torch::Tensor gate = torch::linear(x, value(p.gate_proj).flatten(0, 1));
    const torch::Tensor up = torch::linear(x, value(p.up_proj).flatten(0, 1));
    const torch::Tensor hidden = torch::silu(gate).mul(up).view({T, num_experts, -1});
    return torch::linear(hidden.mul(weight.unsqueeze(-1)).flatten(1),
                         value(p.down).transpose(0, 1).flatten(1));
  }

  // (token, expert) pairs sorted by expert; one transfer to the host tells where each begins.
  torch::Tensor taken_experts(const MoeParameters& p, const torch::Tensor& x,
                              const torch::Tensor& experts, const torch::Tensor& weights,
                              bool again) const {
    const int64_t taken = experts.size(1), num_experts = network.config.moe.n_routed_experts;
    const torch::Tensor flat = experts.flatten();
    const torch::Tensor order = flat.argsort();
    const torch::Tensor count = torch::bincount(flat, {}, num_experts);
    count_load(p, count, again);
    const torch::Tensor host_count = count.to(torch::kCPU);
    const std::vector<int64_t> rows(host_count.data_ptr<int64_t>(),
                                    host_count.data_ptr<int64_t>() + num_experts);
    const auto inputs = x.index_select(0, order.div(taken, "floor")).split_with_sizes(rows);
    const auto gate = value(p.gate_proj).unbind(0), up = value(p.up_proj).unbind(0),
               down = value(p.down).unbind(0);
    std::vector<torch::Tensor> outputs;
    for (size_t e = 0; e < inputs.size(); ++e) {
      if (rows[e] == 0) continue;
      const torch::Tensor hidden =
          torch::silu(torch::linear(inputs[e], gate[e])).mul(torch::linear(inputs[e], up[e]));
      outputs.push_back(torch::linear(hidden, down[e]));
    }
    const torch::Tensor place =
        torch::empty_like(order).scatter_(0, order, torch::arange(order.size(0), order.options()));
    const torch::Tensor by_token =
        torch::cat(outputs).index_select(0, place).view({x.size(0), taken, -1});
    return torch::bmm(weights.unsqueeze(1), by_token).squeeze(1);
  }

  torch::Tensor run_group(torch::Tensor x, Group& group) const {
    const double eps = network.config.rms_norm_eps;
    for (int layer = group.first; layer < group.end; ++layer) {
      const LayerParameters& p = network.layers[static_cast<size_t>(layer)];
      x = x + attention(p, layer, rms_norm(x, value(p.input_layernorm), eps), group);
      const torch::Tensor normed = rms_norm(x, value(p.post_attention_layernorm), eps);
      x = x + (p.moe ? mixture_of_experts(*p.moe, normed, group.again) : mlp(*p.mlp, normed));
    }
    return x;
  }
};

// What a checkpointed group needs to run again, carried through autograd.
struct GroupRun : torch::CustomClassHolder {
  std::shared_ptr<Pass> pass;
  std::shared_ptr<Pass::Group> group;
};

// Keeps a group's input alone and runs the group again for the backward pass. The selection is
// kept: with it, and the same arithmetic, the second run is the first one.
struct CheckpointedGroup : torch::autograd::Function<CheckpointedGroup> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x,
                               const c10::intrusive_ptr<GroupRun>& run) {
    context->save_for_backward({x});
    context->saved_data["run"] = c10::IValue::make_capsule(run);
    return run->pass->run_group(x, *run->group);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto run =
        c10::static_intrusive_pointer_cast<GroupRun>(context->saved_data["run"].toCapsule());
    const torch::Tensor x = context->get_saved_variables()[0].detach().requires_grad_();
    torch::AutoGradMode grad_mode(true);
    run->group->again = true;
    torch::autograd::backward({run->pass->run_group(x, *run->group)}, {grads[0]});
    return {x.grad(), {}};
  }
};

// Ends a group: its indexer loss is taken, differentiated, and what it needed is dropped.
torch::Tensor indexer_loss(const Network& network, const Batch& batch,
                           const ForwardOptions& options, Pass::Group& group) {
  const double weight = options.indexer_loss_weight;
  torch::Tensor loss =
      options.attention == AttentionKind::kDense
          ? dense_indexer_loss(*group.indexer, group.dense_targets, attention_scale(network.config),
                               batch, weight)
          : sparse_indexer_loss(*group.indexer, group.selection, group.sparse_targets, weight);
  group.dense_targets.clear();
  group.sparse_targets.clear();
  return loss;
}

}  // namespace

ForwardResult forward(Network& network, const Batch& batch, const ForwardOptions& options) {
  CHECK_LE(batch.longest_document, network.config.max_position_embeddings);
  ForwardResult result;
  result.indexer_loss =
      torch::zeros({}, torch::TensorOptions().device(network.device).dtype(torch::kDouble));
  const auto pass = std::make_shared<Pass>(
      Pass{network, batch, options, network.rotations.index_select(0, batch.positions)});
  torch::Tensor x = torch::embedding(pass->value(network.embed_tokens), batch.tokens);
  int num_groups = 0;
  for (int first = 0; first < network.plan.num_layers();) {
    int end = first + 1;
    while (end < network.plan.num_layers() && !network.plan.is_full(end)) ++end;
    const auto group = std::make_shared<Pass::Group>();
    group->first = first;
    group->end = end;
    if (options.checkpoint_activations && x.requires_grad() && torch::GradMode::is_enabled()) {
      const auto run = c10::make_intrusive<GroupRun>();
      run->pass = pass;
      run->group = group;
      x = CheckpointedGroup::apply(x, run);
    } else {
      x = pass->run_group(x, *group);
    }
    if (options.indexer_loss != IndexerLoss::kNone)
      result.indexer_loss += indexer_loss(network, batch, options, *group);
    group->indexer.reset();
    if (group->selection.defined()) result.selections.push_back(group->selection);
    ++num_groups;
    first = end;
  }
  result.indexer_loss /= num_groups;
  result.hidden = rms_norm(x, pass->value(network.norm), network.config.rms_norm_eps);
  return result;
}

torch::Tensor logits(const Network& network, const torch::Tensor& hidden) {
  return torch::linear(hidden, network.parameters.value(network.lm_head)).to(torch::kFloat);
}

LanguageLoss language_loss(const Network& network, const torch::Tensor& hidden,
                           const Batch& batch) {
  constexpr int64_t kTokensAtATime = 8192;  // bounds the logits: 256 MiB at a vocabulary of 8192
  LanguageLoss result;
  torch::Tensor weighted = torch::zeros({}, batch.loss_weights.options());
  const auto f64 = batch.loss_weights.options().dtype(torch::kDouble);
  result.nll = torch::zeros({}, f64);
  for (int64_t first = 0; first < batch.num_tokens; first += kTokensAtATime) {
    const int64_t n = std::min(kTokensAtATime, batch.num_tokens - first);
    const torch::Tensor nll =
        torch::cross_entropy_loss(logits(network, hidden.narrow(0, first, n)),
                                  batch.targets.narrow(0, first, n), {}, at::Reduction::None);
    const torch::Tensor weights = batch.loss_weights.narrow(0, first, n);
    weighted = weighted + nll.mul(weights).sum();
    result.nll.add_(nll.detach().mul(weights.gt(0)).sum());
  }
  result.loss = weighted / batch.loss_weights.sum().clamp_min(1);
  result.num_targets = batch.loss_weights.gt(0).sum().to(torch::kDouble);
  return result;
}

void balance_experts(Network& network, double rate) {
  for (LayerParameters& layer : network.layers) {
    if (!layer.moe) continue;
    torch::Tensor& load = layer.moe->load;
    layer.moe->bias.add_(load.mean().sub(load).sign(), rate);
    load.zero_();
  }
}

}  // namespace indexcache
