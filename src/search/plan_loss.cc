#include "search/plan_loss.h"

#include <algorithm>
#include <cstring>

namespace indexcache {

namespace {

RunOptions sized(RunOptions options, const IndexPlan& widest, const TokenSequences& data) {
  options.plan = to_string(widest);
  options.context = data.sequence_tokens();
  return options;
}

}  // namespace

// What a run is to write down, and where.
struct PlanLoss::Recording {
  std::map<int, State> states;                             // before these layers
  std::map<int, std::shared_ptr<StoredBytes>> selections;  // made by these full layers
};

PlanLoss::PlanLoss(const ModelSource& source, RunOptions options, TokenSequences data,
                   StateStore* store)
    : data_(std::move(data)),
      widest_(indexcache::widest_plan(source, options)),
      engine_(source, sized(options, widest_, data_)),
      states_(data_.sequences.size()),
      store_(store) {
  CHECK(engine_.cache.reserve(cache_, data_.sequence_tokens()));
}

uint64_t PlanLoss::selection_bytes() const {
  const int64_t k = engine_.model.config.indexer.index_topk;
  return static_cast<uint64_t>(std::max<int64_t>(data_.sequence_tokens() - k, 0) * k *
                               position_bytes());
}

uint64_t PlanLoss::state_bytes() const {
  return static_cast<uint64_t>(data_.sequence_tokens() * engine_.model.config.hidden_size) *
             sizeof(float) +
         selection_bytes();
}

const PlanLoss::State* PlanLoss::find_state(size_t sequence, std::string_view letters,
                                            int last_layer, int* layer) const {
  for (*layer = last_layer; *layer > 0; --*layer) {
    const auto found = states_[sequence].find(letters.substr(0, static_cast<size_t>(*layer)));
    if (found != states_[sequence].end()) return &found->second;
  }
  return nullptr;
}

int PlanLoss::deepest_state(size_t sequence, const IndexPlan& plan) const {
  int layer = 0;
  find_state(sequence, to_string(plan), plan.num_layers() - 1, &layer);
  return layer;
}

PlanLoss::Recording PlanLoss::plan_recording(size_t sequence, std::string_view letters,
                                             int first_layer, const State* start,
                                             std::span<const int> keep, bool must_keep) {
  Recording recording;
  const size_t hidden_bytes =
      static_cast<size_t>(data_.sequence_tokens() * engine_.model.config.hidden_size) *
      sizeof(float);
  bool temporary = false;
  const auto take = [&](size_t num_bytes) {
    std::optional<StoredBytes> bytes = store_->take(num_bytes);
    if (!bytes && must_keep) {
      temporary = true;
      bytes = store_->take(num_bytes, true);
    }
    return bytes;
  };
  for (const int layer : keep) {
    const std::string_view prefix = letters.substr(0, static_cast<size_t>(layer));
    if (layer <= first_layer || states_[sequence].contains(prefix)) continue;
    State state;
    const int source = static_cast<int>(prefix.rfind('F'));
    if (source < first_layer) {
      state.selection = start->selection;
    } else {
      std::shared_ptr<StoredBytes>& selection = recording.selections[source];
      if (selection == nullptr) {
        std::optional<StoredBytes> bytes = take(static_cast<size_t>(selection_bytes()));
        if (!bytes) continue;
        selection = std::make_shared<StoredBytes>(std::move(*bytes));
      }
      state.selection = selection;
    }
    std::optional<StoredBytes> hidden = take(hidden_bytes);
    if (!hidden) continue;
    state.hidden = std::move(*hidden);
    state.temporary = temporary;
    recording.states.emplace(layer, std::move(state));
  }
  std::erase_if(recording.selections, [](const auto& item) { return item.second == nullptr; });
  return recording;
}

void PlanLoss::store_selection(StoredBytes& to, int64_t first, Selection selection) {
  const int64_t k = engine_.model.config.indexer.index_topk, bytes = position_bytes();
  const int64_t count = static_cast<int64_t>(selection.counts.size());
  const int64_t begin = std::clamp<int64_t>(k - first, 0, count);  // queries before see all
  if (begin == count) return;
  const std::span<const int32_t> rows = selection.positions.subspan(static_cast<size_t>(begin * k));
  packed_.resize(rows.size() * static_cast<size_t>(bytes));
  if (bytes == 4) {
    std::memcpy(packed_.data(), rows.data(), rows.size_bytes());
  } else {
    uint16_t* packed = reinterpret_cast<uint16_t*>(packed_.data());
    for (size_t i = 0; i < rows.size(); ++i) packed[i] = static_cast<uint16_t>(rows[i]);
  }
  to.write(static_cast<size_t>((first + begin - k) * k * bytes), packed_.data(), packed_.size());
}

void PlanLoss::restore_chunk(const State& state, int64_t first, int64_t count) {
  const PassState pass = new_state(engine_.exec, engine_.model, engine_.activations);
  const int64_t k = engine_.model.config.indexer.index_topk, bytes = position_bytes();
  const size_t row_bytes = static_cast<size_t>(engine_.model.config.hidden_size) * sizeof(float);
  state.hidden.read(static_cast<size_t>(first) * row_bytes, pass.x.data(),
                    static_cast<size_t>(count) * row_bytes);

  const int64_t begin = std::clamp<int64_t>(k - first, 0, count);
  for (int64_t t = 0; t < count; ++t) {
    pass.counts[static_cast<size_t>(t)] = static_cast<int32_t>(std::min(k, first + t + 1));
    if (t >= begin) continue;
    int32_t* row = pass.positions.data() + t * k;
    for (int64_t j = 0; j < k; ++j) row[j] = j <= first + t ? static_cast<int32_t>(j) : -1;
  }
  if (begin == count) return put_state(engine_.exec, engine_.model, engine_.activations);
  packed_.resize(static_cast<size_t>((count - begin) * k * bytes));
  state.selection->read(static_cast<size_t>((first + begin - k) * k * bytes), packed_.data(),
                        packed_.size());
  int32_t* rows = pass.positions.data() + begin * k;
  if (bytes == 4) {
    std::memcpy(rows, packed_.data(), packed_.size());
  } else {
    const uint16_t* packed = reinterpret_cast<const uint16_t*>(packed_.data());
    std::copy_n(packed, (count - begin) * k, rows);
  }
  put_state(engine_.exec, engine_.model, engine_.activations);
}

// The sum over the chunk's rows that have a next token, in their order: the same for any number of
// threads.
double PlanLoss::chunk_nll(const BatchSequence& batch, std::span<const int32_t> targets) {
  row_nll_.resize(targets.size());
  run_head_nll(engine_.exec, engine_.model, engine_.activations, {&batch, 1}, targets, row_nll_);
  double sum = 0;
  for (const double nll : row_nll_) sum += nll;
  return sum;
}

double PlanLoss::run(size_t sequence, const IndexPlan& plan, int last_layer,
                     std::span<const int> keep, bool must_keep) {
  const std::vector<int32_t>& tokens = data_.sequences[sequence];
  const int64_t total = static_cast<int64_t>(tokens.size()),
                hidden = engine_.model.config.hidden_size;
  const bool with_loss = last_layer == plan.num_layers();
  const std::string letters = to_string(plan);
  int first_layer = 0;
  const State* start =
      find_state(sequence, letters, with_loss ? last_layer - 1 : last_layer, &first_layer);
  if (!with_loss && first_layer == last_layer) return 0;
  Recording recording = plan_recording(sequence, letters, first_layer, start, keep, must_keep);

  int64_t first = 0;
  const auto write_hidden = [&](int layer, std::span<const float> rows) {
    const auto found = recording.states.find(layer);
    if (found == recording.states.end()) return;
    found->second.hidden.write(static_cast<size_t>(first * hidden) * sizeof(float), rows.data(),
                               rows.size_bytes());
  };
  ForwardTap tap;
  tap.hidden = write_hidden;
  tap.wants_hidden = [&](int layer) { return recording.states.contains(layer); };
  tap.wants_selection = [&](int layer) { return recording.selections.contains(layer); };
  tap.selection = [&](int layer, Selection selection) {
    const auto found = recording.selections.find(layer);
    if (found != recording.selections.end()) store_selection(*found->second, first, selection);
  };

  engine_.model.plan = plan;
  double sum = 0;
  while (first < total) {
    const int64_t count = std::min(total - first, engine_.activations.max_tokens);
    cache_.num_tokens = first;
    const BatchSequence batch{
        &cache_, std::span(tokens).subspan(static_cast<size_t>(first), static_cast<size_t>(count)),
        with_loss ? count : 0};
    begin_forward(engine_.exec, engine_.model, engine_.activations, {&batch, 1});
    if (start == nullptr) {
      run_embedding(engine_.exec, engine_.model, engine_.activations);
    } else {
      restore_chunk(*start, first, count);
    }
    run_layers(engine_.exec, engine_.model, engine_.cache, engine_.activations, first_layer,
               last_layer, &tap);
    if (with_loss) {
      sum += chunk_nll(batch, std::span(tokens).subspan(
                                  static_cast<size_t>(first + 1),
                                  static_cast<size_t>(std::min(count, total - first - 1))));
    } else {
      write_hidden(last_layer, read_residual(engine_.exec, engine_.model, engine_.activations));
    }
    first += count;
  }
  layer_forwards_ += last_layer - first_layer;
  for (auto& [layer, state] : recording.states) {
    if (state.temporary) drop_temporary(sequence);
    states_[sequence].emplace(letters.substr(0, static_cast<size_t>(layer)), std::move(state));
  }
  return sum;
}

double PlanLoss::nll(size_t sequence, const IndexPlan& plan, std::span<const int> keep) {
  return run(sequence, plan, plan.num_layers(), keep, false);
}

void PlanLoss::keep_state(size_t sequence, const IndexPlan& plan, int layer) {
  if (layer == 0) return;
  run(sequence, plan, layer, {&layer, 1}, true);
}

void PlanLoss::drop_temporary(size_t sequence) {
  std::erase_if(states_[sequence], [](const auto& item) { return item.second.temporary; });
}

void PlanLoss::keep_only(size_t sequence,
                         const std::function<bool(std::string_view prefix)>& useful) {
  std::erase_if(states_[sequence], [&](const auto& item) { return !useful(item.first); });
}

}  // namespace indexcache
