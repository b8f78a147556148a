// Flags of commands that can make a model up: a shape by name, and what may be changed in it.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "engine/engine.h"
#include "model/shapes.h"
#include "model/synthetic.h"

namespace indexcache {

struct ShapeFlags {
  std::string name;
  std::string dtype = "bf16";
  std::string plan;  // of the made checkpoint; shared layers then have no indexer
  int64_t num_hidden_layers = 0;
  uint64_t seed = 1;
  bool similar = false;  // SyntheticKind::kSimilar
};

// `name_flag` is how the shape is given: "--synthetic", or "shape" for a positional argument.
void add_shape_flags(CLI::App* command, ShapeFlags* flags, const std::string& name_flag);

ModelConfig shape_config(const ShapeFlags& flags);
DType shape_dtype(const ShapeFlags& flags);

// The model in memory; an Error, before anything is made, if it does not fit.
ModelSource synthetic_source(const ShapeFlags& flags);

}  // namespace indexcache
