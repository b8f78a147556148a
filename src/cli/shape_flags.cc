#include "cli/shape_flags.h"

#include "base/units.h"
#include "plan/plan_file.h"

namespace indexcache {

void add_shape_flags(CLI::App* command, ShapeFlags* flags, const std::string& name_flag) {
  std::string names;
  for (const std::string& name : shape_names()) names += (names.empty() ? "" : ", ") + name;
  command->add_option(name_flag, flags->name, "Random weights in a known shape: " + names);
  command
      ->add_option("--weights", flags->dtype, "Type of the random weights: f32, f16, bf16 or fp8")
      ->capture_default_str();
  command->add_option("--layers", flags->num_hidden_layers,
                      "Use only this many of the shape's layers");
  command->add_option("--weights-seed", flags->seed, "Seed of the random weights")
      ->capture_default_str();
}

DType shape_dtype(const ShapeFlags& flags) {
  if (flags.dtype == "f32") return DType::kF32;
  if (flags.dtype == "f16") return DType::kF16;
  if (flags.dtype == "bf16") return DType::kBF16;
  if (flags.dtype == "fp8") return DType::kF8E4M3;
  fail("--weights {}: expected f32, f16, bf16 or fp8", printable(flags.dtype));
}

ModelConfig shape_config(const ShapeFlags& flags) {
  ModelConfig config = named_shape(flags.name);
  if (flags.num_hidden_layers != 0) {
    if (flags.num_hidden_layers < 1 || flags.num_hidden_layers > config.num_hidden_layers) {
      fail("--layers {}: expected 1 to {}", flags.num_hidden_layers, config.num_hidden_layers);
    }
    config.num_hidden_layers = flags.num_hidden_layers;
    config.mlp_layer_types.resize(static_cast<size_t>(config.num_hidden_layers));
    config.index_plan.source.resize(static_cast<size_t>(config.num_hidden_layers));
  }
  if (!flags.plan.empty()) {
    config.index_plan =
        resolve_plan(flags.plan, static_cast<int>(config.num_hidden_layers), config.fingerprint);
  }
  config.dtype = flags.dtype == "f32" ? "float32" : flags.dtype == "f16" ? "float16" : "bfloat16";
  if (shape_dtype(flags) == DType::kF8E4M3) config.quantization_config.emplace();
  return parse_config(config_json(config), flags.name);
}

ModelSource synthetic_source(const ShapeFlags& flags) {
  const ModelConfig config = shape_config(flags);
  uint64_t bytes = 0;
  for (const TensorSpec& spec : checkpoint_specs(config, shape_dtype(flags)))
    bytes += spec.num_bytes();
  const uint64_t available = available_memory_bytes();
  if (available != 0 && bytes > available) {
    fail("--synthetic {}: the weights need {}, found {} available; --layers makes fewer",
         flags.name, format_bytes(bytes), format_bytes(available));
  }
  const SyntheticKind kind = flags.similar ? SyntheticKind::kSimilar : SyntheticKind::kPlain;
  return {config, synthetic_checkpoint(config, shape_dtype(flags), flags.seed, kind), true};
}

}  // namespace indexcache
