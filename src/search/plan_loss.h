// The language-model loss of one model under many index plans, on the same token sequences.
//
// Plans that begin alike compute alike: what reaches a layer depends on the letters before it
// alone. So the hidden states and the selection before a layer may be kept under those letters (a
// prefix of the plan), and a later plan with the same prefix begins there. A loss is the same bit
// for bit wherever its computation began, because the layers run are the same code on the same
// rows.
//
// A state of one sequence is [S, hidden_size] f32, and the selection in force: index_topk positions
// of 2 bytes (4 when S > 65536) for each query beyond the first index_topk, which see no more than
// they may select. States between full layers share one selection.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "search/state_store.h"
#include "search/text_data.h"

namespace indexcache {

class PlanLoss {
 public:
  // `source` and `store` must outlive it. The context is the sequences' length; `options.plan` is
  // not used: any plan whose full layers have an indexer, of the adapter if there is one, can be
  // asked for.
  PlanLoss(const ModelSource& source, RunOptions options, TokenSequences data, StateStore* store);

  const Engine& engine() const { return engine_; }
  const IndexPlan& widest_plan() const { return widest_; }  // every layer that can be full is
  const TokenSequences& data() const { return data_; }
  size_t num_sequences() const { return data_.sequences.size(); }

  // The sum of negative log likelihoods, in nats, of a sequence's tokens after the first. Keeps the
  // states before the layers in `keep` (ascending) as far as the store has room.
  double nll(size_t sequence, const IndexPlan& plan, std::span<const int> keep = {});

  // Makes sure that the state before `layer` is kept. Where the store has no room, it is kept all
  // the same until drop_temporary(), or until another takes its place.
  void keep_state(size_t sequence, const IndexPlan& plan, int layer);
  void drop_temporary(size_t sequence);

  // The deepest layer before which a state is kept that this plan may begin with; 0: none.
  int deepest_state(size_t sequence, const IndexPlan& plan) const;

  // Drops the states whose prefix is not useful.
  void keep_only(size_t sequence, const std::function<bool(std::string_view prefix)>& useful);

  uint64_t store_bytes() const { return store_->max_bytes(); }
  uint64_t state_bytes() const;  // of a state with a selection of its own

  // Layers run so far, a layer over one sequence being 1.
  int64_t layer_forwards() const { return layer_forwards_; }

 private:
  struct State {
    StoredBytes hidden;
    std::shared_ptr<StoredBytes> selection;
    bool temporary = false;
  };
  struct Recording;
  using States = std::map<std::string, State, std::less<>>;

  double run(size_t sequence, const IndexPlan& plan, int last_layer, std::span<const int> keep,
             bool must_keep);
  const State* find_state(size_t sequence, std::string_view letters, int last_layer,
                          int* layer) const;
  Recording plan_recording(size_t sequence, std::string_view letters, int first_layer,
                           const State* start, std::span<const int> keep, bool must_keep);
  void restore_chunk(const State& state, int64_t first, int64_t count);
  void store_selection(StoredBytes& to, int64_t first, Selection selection);
  double chunk_nll(const BatchSequence& batch, std::span<const int32_t> targets);
  int64_t position_bytes() const { return data_.sequence_tokens() > 65536 ? 4 : 2; }
  uint64_t selection_bytes() const;

  TokenSequences data_;
  IndexPlan widest_;
  Engine engine_;
  SequenceCache cache_;
  std::vector<States> states_;  // one a sequence
  std::vector<double> row_nll_;
  std::vector<uint8_t> packed_;
  int64_t layer_forwards_ = 0;
  StateStore* store_;
};

}  // namespace indexcache
