// What a measured loss depends on, besides the plan: by these a journal knows its own losses again.
#pragma once

#include "base/json.h"
#include "search/plan_loss.h"

namespace indexcache {

// Names a checkpoint's weights: SHA-256 over every tensor's name, type and shape and 16 pieces of
// 256 bytes of its data. Training changes all of a tensor, so pieces tell checkpoints apart without
// reading them whole.
std::string weights_hash(const Checkpoint& checkpoint);

// model_fingerprint, weights_hash, data_hash, sequences, sequence_tokens, batch_tokens, compute,
// kernels (instruction sets), forced implementations, and indexers_hash with an indexer adapter.
Json loss_settings(const ModelSource& source, const PlanLoss& model);

}  // namespace indexcache
