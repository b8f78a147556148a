// How each serving engine turns config.json fields into full and shared layers, engine by engine,
// beside our own rule. For the fixtures, which hold our rule to theirs, and for `export`, which
// prints only lines that give the same plan.
//
// A rule returns the F/S string that the engine would run. Where the engine raises, the rule throws
// Error that names the engine and its exception. The engines differ from us, and from each other,
// only in what they let pass:
//
//                      list entries     pattern too short  freq null  freq 0        layer 0 S
//   vLLM, vllm-ascend  "S" is shared    the rest is full   TypeError  ZeroDivision  accepted
//   SGLang             "S"              the rest is full   1          ZeroDivision  accepted
//   TensorRT-LLM       "S", "s"         the rest is full   1          1             forced full
//   transformers       "shared"         IndexError         TypeError  1             fails later
//   THUDM patch        "S"              IndexError         TypeError  ZeroDivision  accepted
//   indexcache         F S full shared  refused            1          refused       refused
//
// Versions read: vLLM deepseek_v2.py 002d6073, SGLang configs/model_config.py (2026-06),
// TensorRT-LLM llm_args.py (PR 15574), transformers configuration_glm_moe_dsa.py 008e5743,
// vllm-ascend 182b75ea, THUDM/IndexCache 08d22d6.
#pragma once

#include <span>
#include <string>

#include "base/json.h"

namespace indexcache {

struct EngineRule {
  const char* name;
  std::string (*plan)(const Json& config, int num_layers);
};

std::span<const EngineRule> engine_rules();
const EngineRule& engine_rule(
    const std::string& name);  // Error for an unknown name, listing the known ones

}  // namespace indexcache
