// indexcache inspect: what a checkpoint is and what it needs, from its headers alone. Headers that
// `run` would refuse are refused.

#include <map>
#include <memory>

#include "base/json.h"
#include "base/log.h"
#include "checkpoint/manifest.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/shape_flags.h"
#include "device/gpus.h"
#include "device/thread_pool.h"

namespace indexcache {

namespace {

struct InspectFlags {
  CommonFlags common;
  ShapeFlags shape;
  bool json = false, tensors = false, sha256 = false;
  std::string verify;
};

// The tensors' names, types and shapes; of a shape by name, as they would be.
std::vector<TensorSpec> list_specs(const InspectFlags& flags, ModelSource* source) {
  if (!flags.shape.name.empty()) {
    ShapeFlags shape = flags.shape;  // a shape has the indexers that the plan needs
    shape.plan = flags.common.run.plan;
    source->config = shape_config(shape);
    return checkpoint_specs(source->config, shape_dtype(flags.shape));
  }
  *source = open_model(flags.common.model);
  return list_tensors(source->checkpoint);
}

int inspect(const InspectFlags& flags) {
  if (flags.shape.name.empty() == flags.common.model.empty())
    throw CLI::ValidationError("inspect", "expected either -m or --synthetic");
  RunOptions options = run_options(flags.common);
  const int num_threads = options.num_threads > 0 ? options.num_threads : num_usable_cpus();
  if (flags.sha256) {
    fmt::print("{}", sha256_manifest(flags.common.model, num_threads));
    return 0;
  }
  if (!flags.verify.empty()) {
    const size_t num_files = verify_manifest(flags.common.model, flags.verify, num_threads);
    info("{} files are as {} says", num_files, printable(flags.verify, 400));
  }
  ModelSource source;
  std::vector<TensorSpec> own_specs = list_specs(flags, &source);
  const LaidOver laid =
      lay_over(source.config, std::move(own_specs),
               flags.shape.name.empty() ? flags.common.model : flags.shape.name, options);
  const ModelConfig& config = laid.config;
  const std::vector<TensorSpec>& specs = laid.specs;
  const IndexPlan plan = plan_in_force(config, laid.layer_has_indexer, options, laid.where);
  const Compute compute = resolve_compute(specs, options);
  const MemoryPlan memory = plan_memory(config, specs, plan, compute, options);
  const CacheTypes cached = cache_types(config, compute, options);
  if (flags.shape.name.empty())
    check_weights(source.checkpoint, config, plan, laid.adapter ? &*laid.adapter : nullptr);

  std::map<std::string, uint64_t> bytes_by_type;
  uint64_t parameters = 0;
  for (const TensorSpec& spec : specs) {
    bytes_by_type[dtype_name(spec.dtype)] += spec.num_bytes();
    if (!spec.name.ends_with("_scale_inv"))
      parameters += static_cast<uint64_t>(num_elements(spec.shape));
  }

  if (flags.json) {
    Json out = {{"architecture", model_architecture_name(config.model_type)},
                {"model_type", model_type_name(config.model_type)},
                {"num_hidden_layers", config.num_hidden_layers},
                {"plan", to_string(plan)},
                {"num_full", plan.num_full()},
                {"index_topk", config.indexer.index_topk},
                {"fingerprint", config.fingerprint},
                {"parameters", parameters},
                {"weights_bytes", memory.weights_bytes},
                {"owned_bytes", memory.owned_bytes},
                {"cache_bytes_per_token", memory.cache_bytes_per_token},
                {"context", memory.context},
                {"cache_bytes", memory.cache_bytes},
                {"activation_bytes", memory.activation_bytes},
                {"needed_bytes", memory.total()},
                {"available_bytes",
                 options.device == Device::kCuda ? cuda_free_bytes() : available_memory_bytes()},
                {"compute", compute_name(compute)},
                {"kv_cache", cached_name(cached.latent)},
                {"indexer_keys", cached_name(cached.indexer_keys)},
                {"tensors", specs.size()}};
    for (const auto& [type, bytes] : bytes_by_type) out["bytes_by_dtype"][type] = bytes;
    if (laid.adapter) out["indexers"] = options.indexers;
    fmt::print("{}\n", out.dump(2));
    return 0;
  }
  const AttentionConfig& attn = config.attention;
  const IndexerConfig& indexer = config.indexer;
  fmt::print("architecture  {} ({})\n", model_architecture_name(config.model_type),
             model_type_name(config.model_type));
  fmt::print(
      "layers        {}, hidden {}, vocabulary {}, {:.3f} billion parameters in {} tensors\n",
      config.num_hidden_layers, config.hidden_size, config.vocab_size,
      static_cast<double>(parameters) / 1e9, specs.size());
  fmt::print("attention     {} heads, q_lora_rank {}, kv_lora_rank {}, nope {} + rope {}, v {}\n",
             attn.num_attention_heads, attn.q_lora_rank, attn.kv_lora_rank, attn.qk_nope_head_dim,
             attn.qk_rope_head_dim, attn.v_head_dim);
  fmt::print("indexer       {} heads x {}, index_topk {}, {} rope\n", indexer.index_n_heads,
             indexer.index_head_dim, indexer.index_topk,
             indexer.indexer_rope_interleave ? "interleaved" : "half-split");
  if (config.moe.n_routed_experts > 0) {
    fmt::print("experts       {} routed + {} shared, {} a token, width {}\n",
               config.moe.n_routed_experts, config.moe.n_shared_experts,
               config.moe.num_experts_per_tok, config.moe.moe_intermediate_size);
  }
  fmt::print("plan          {} ({} full of {})\n", to_string(plan), plan.num_full(),
             plan.num_layers());
  if (laid.adapter) {
    fmt::print("indexers      {}, trained under {}\n", printable(options.indexers, 400),
               laid.adapter->plan);
  }
  fmt::print("dtypes       ");
  for (const auto& [type, bytes] : bytes_by_type) fmt::print(" {} {}", type, format_bytes(bytes));
  fmt::print(
      "\nmemory        {} at {} tokens = weights {} + copies {} + cache {} ({} B/token) + "
      "activations {}\n",
      format_bytes(memory.total()), memory.context, format_bytes(memory.weights_bytes),
      format_bytes(memory.owned_bytes), format_bytes(memory.cache_bytes),
      memory.cache_bytes_per_token, format_bytes(memory.activation_bytes + memory.workspace_bytes));
  if (options.device == Device::kCuda) {
    fmt::print("this GPU      {}, {} free\n", hardware_name(options.device),
               format_bytes(cuda_free_bytes()));
  } else {
    fmt::print("this machine  {} available\n", format_bytes(available_memory_bytes()));
  }
  if (flags.tensors) {
    for (const TensorSpec& spec : specs) {
      fmt::print("{:8} {:18} {}\n", dtype_name(spec.dtype), shape_string(spec.shape),
                 printable(spec.name));
    }
  }
  return 0;
}

}  // namespace

void add_inspect_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* command = program->add_subcommand(
      "inspect", "Say what a checkpoint is, its plan and the memory it needs");
  command->footer(
      "Example: indexcache inspect -m models/demo -c 32768\n"
      "         indexcache inspect --synthetic glm-5.2 -c 200000 --plan 1/4\n"
      "         indexcache inspect -m models/demo --sha256 > demo.sha256\n"
      "         indexcache inspect -m models/demo --verify demo.sha256");
  add_model_flag(command, &flags->common, false);
  add_run_flags(command, &flags->common);
  add_shape_flags(command, &flags->shape, "--synthetic");
  CLI::Option* tensors = command->add_flag("--tensors", flags->tensors, "List every tensor");
  CLI::Option* json = command->add_flag("--json", flags->json, "One JSON object");
  CLI::Option* verify = command->add_option(
      "--verify", flags->verify, "First compare the model's files with their sums in this file");
  verify->excludes("--synthetic");
  command
      ->add_flag("--sha256", flags->sha256,
                 "Print only the SHA-256 sums of the model's files, as sha256sum does")
      ->excludes("--synthetic", tensors, json, verify);
  command->callback([flags, exit_code] { *exit_code = inspect(*flags); });
}

}  // namespace indexcache
