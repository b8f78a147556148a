// A copy of a checkpoint made for one index plan: without the indexers of shared layers, and with
// the plan in its config.json in every spelling that engines read (plan/export_lines.h), as GLM-5.2
// is shipped. Everything else is as in the source: tensors bit by bit, shards by name, the indexers
// of MTP layers, and the small files that belong to a model (tokenizer, templates, licence ...).
//
// The copy runs under its plan and under every plan that makes fewer layers full.
//
// The folder appears whole or not at all. Errors: a path at which something is, a plan that needs
// an indexer which the source lacks, a small file that is a link out of the source, any failed
// write.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/checkpoint_copy.h"
#include "checkpoint/config.h"

namespace indexcache {

struct SlimCheckpoint {
  CopiedTensors tensors;
  std::vector<std::string> files;     // small files that were copied
  std::vector<std::string> left_out;  // files of the source that were not
  Json config;                        // as written
};

// What the copy would hold.
CopiedTensors count_slim_checkpoint(const Checkpoint& source, const IndexPlan& plan);

SlimCheckpoint write_slim_checkpoint(const std::string& source_folder, const Checkpoint& source,
                                     const ModelConfig& config, const IndexPlan& plan,
                                     const std::string& folder, const CopyProgress& progress = {});

}  // namespace indexcache
