// Indexer adapters: trained indexers alone, to be laid over a base checkpoint.
//
// A safetensors file that holds the indexer tensors of the full layers of one plan, under the names
// that they have in the checkpoint, and this metadata:
//
//   format              "indexcache-indexers"
//   version             "1"
//   plan                the F/S string they were trained under
//   model_fingerprint   config_fingerprint() of the base model
//   how                 JSON: the settings of the training run
//
// Errors: another format or version, a missing field, named with file and field.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors_writer.h"
#include "plan/index_plan.h"

namespace indexcache {

struct IndexerAdapter {
  std::string plan;
  std::string model_fingerprint;
  std::string how;
  Checkpoint tensors;  // of a file that was opened
};

IndexerAdapter open_indexer_adapter(const std::string& path);

// Its plan, for a model of `num_layers` layers: an Error if it is none.
IndexPlan adapter_plan(const IndexerAdapter& adapter, int num_layers);

void write_indexer_adapter(const std::string& path, const IndexerAdapter& adapter,
                           std::vector<TensorSpec> specs, const TensorSource& source);

}  // namespace indexcache
