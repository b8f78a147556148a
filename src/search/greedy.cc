#include "search/greedy.h"

#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "search/race.h"

namespace indexcache {

namespace {

// Sequences that every candidate of a race is seen on before any is dropped.
constexpr size_t kMinRaceSequences = 3;
// What a race gives away: a candidate is dropped when it can be better than the best so far by no
// more than this share of the loss. Replayed on the exact search of the demo model (16 sequences,
// any order of them), 2e-4 costs 17% of the plain search and 5e-4 14%: the first steps, where ten
// layers can go and nothing is lost, are what a race spends its time on.
constexpr double kRaceTolerance = 5e-4;

struct Interrupted {};

struct Candidate {
  int layer;          // turned shared
  int restored = -1;  // turned full
  IndexPlan plan;
  bool alive = true;
  std::vector<double> nll;  // a sequence, as far as seen

  // Where it departs from the plan it comes from, and the last layer whose letter differs.
  int fork() const { return restored < 0 ? layer : std::min(layer, restored); }
  int last_change() const { return std::max(layer, restored); }
};

IndexPlan with_letter(const IndexPlan& plan, int layer, bool full) {
  std::string letters = to_string(plan);
  letters[static_cast<size_t>(layer)] = full ? 'F' : 'S';
  return plan_from_string(letters, plan.num_layers(), "search");
}

struct Search {
  PlanLoss& model;
  LossJournal& journal;
  const SearchOptions& options;
  const SearchEvents& events;
  IndexPlan trunk;                // the plan so far
  std::vector<double> trunk_nll;  // of each sequence
  SearchResult result;
  double start_seconds = monotonic_seconds();
  SearchProgress progress;

  double measure(size_t sequence, const IndexPlan& plan, std::span<const int> keep);
  std::vector<int> flips(int block) const;
  std::vector<int> kept_layers(std::span<const Candidate> candidates) const;
  void measure_all(size_t sequence, std::span<Candidate> candidates, std::span<const int> keep);
  void drop_hopeless(std::span<Candidate> candidates) const;
  Candidate* best_of(std::span<Candidate> candidates) const;
  Candidate* play_round(std::span<Candidate> candidates);
  void commit(const Candidate& winner, int num_candidates, std::vector<SearchStep>* steps);
  double loss_of(const Candidate& candidate) const;
  void run_greedy();
  void run_swaps();
  void run();
};

double sum(std::span<const double> values) {
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

double Search::measure(size_t sequence, const IndexPlan& plan, std::span<const int> keep) {
  const std::string letters = to_string(plan);
  if (const std::optional<double> known = journal.find(letters, sequence)) return *known;
  if (events.stop != nullptr && *events.stop) throw Interrupted{};
  const double nll = model.nll(sequence, plan, keep);
  if (!std::isfinite(nll)) {
    fail(
        "the loss of plan {} on calibration sequence {} is {}, expected a number; no plan was made",
        letters, sequence, nll);
  }
  journal.add(letters, sequence, nll);
  return nll;
}

double Search::loss_of(const Candidate& candidate) const {
  return sum(candidate.nll) / (static_cast<double>(candidate.nll.size()) *
                               static_cast<double>(model.data().sequence_tokens() - 1));
}

// The layers that may be shared next, of one block or of all (-1).
std::vector<int> Search::flips(int block) const {
  const auto& starts = options.block_starts;
  std::vector<int> layers;
  for (int layer = 0; layer < trunk.num_layers(); ++layer) {
    if (!trunk.is_full(layer) || std::binary_search(starts.begin(), starts.end(), layer)) continue;
    const auto next = std::upper_bound(starts.begin(), starts.end(), layer);
    if (block < 0 || next - starts.begin() - 1 == block) layers.push_back(layer);
  }
  return layers;
}

// The layers before which candidates' states are kept because another candidate, of this round or
// the next, may begin there: every layer where one may depart, or every second one, and so on, as
// the store has room. The current plan's own states come first.
std::vector<int> Search::kept_layers(std::span<const Candidate> candidates) const {
  std::vector<int> layers = flips(-1);
  for (const Candidate& candidate : candidates) {
    if (candidate.restored >= 0) layers.push_back(candidate.restored);
  }
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  const uint64_t states = model.store_bytes() / (model.state_bytes() * model.num_sequences());
  if (states <= layers.size()) return {};
  for (size_t stride = 1; stride <= layers.size(); ++stride) {
    std::vector<int> kept;
    for (size_t i = stride - 1; i < layers.size(); i += stride) kept.push_back(layers[i]);
    uint64_t needed = layers.size();
    for (const Candidate& candidate : candidates) {
      const auto begin = std::upper_bound(kept.begin(), kept.end(), candidate.fork());
      needed += static_cast<uint64_t>(kept.end() - begin);
    }
    if (needed <= states) return kept;
  }
  return {};
}

void Search::measure_all(size_t sequence, std::span<Candidate> candidates,
                         std::span<const int> keep) {
  for (Candidate& candidate : candidates) {
    ++progress.done;
    ++progress.all_done;
    if (!candidate.alive) continue;  // what it was spared counts as done
    if (!journal.find(to_string(candidate.plan), sequence) &&
        model.deepest_state(sequence, candidate.plan) < candidate.fork()) {
      model.keep_state(sequence, trunk, candidate.fork());
    }
    // A swap's state is of no use to others once both its letters have changed.
    const auto end = candidate.restored < 0
                         ? keep.end()
                         : std::upper_bound(keep.begin(), keep.end(), candidate.last_change());
    candidate.nll.push_back(measure(sequence, candidate.plan, {keep.begin(), end}));
    if (events.progress) events.progress(progress);
  }
  model.drop_temporary(sequence);
}

Candidate* Search::best_of(std::span<Candidate> candidates) const {
  Candidate* best = nullptr;
  for (Candidate& candidate : candidates) {
    if (candidate.alive && (best == nullptr || sum(candidate.nll) < sum(best->nll)))
      best = &candidate;
  }
  return best;
}

void Search::drop_hopeless(std::span<Candidate> candidates) const {
  const Candidate* best = best_of(candidates);
  const double tolerance = kRaceTolerance * sum(best->nll) / static_cast<double>(best->nll.size());
  for (Candidate& candidate : candidates) {
    if (candidate.alive && &candidate != best &&
        not_better(candidate.nll, best->nll, *options.confidence, tolerance))
      candidate.alive = false;
  }
}

// All candidates on all sequences, or until the race has dropped them; the best one, which has seen
// all sequences. Nothing when the metric is flat.
Candidate* Search::play_round(std::span<Candidate> candidates) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::pair(a.fork(), a.layer) < std::pair(b.fork(), b.layer);
  });
  const std::vector<int> keep = kept_layers(candidates);
  const int64_t measurements = static_cast<int64_t>(candidates.size() * model.num_sequences());
  progress.num_full = trunk.num_full();
  progress.candidates = progress.alive = static_cast<int>(candidates.size());
  progress.best_layer = -1;
  progress.done = 0;
  progress.total = measurements;
  progress.all_total = std::max(progress.all_total, progress.all_done + measurements);
  bool flat = true;
  for (size_t sequence = 0; sequence < model.num_sequences(); ++sequence) {
    measure_all(sequence, candidates, keep);
    for (const Candidate& candidate : candidates)
      flat = flat && (!candidate.alive || candidate.nll.back() == trunk_nll[sequence]);
    if (options.confidence && sequence + 1 >= kMinRaceSequences) drop_hopeless(candidates);
    const Candidate* best = best_of(candidates);
    progress.alive = static_cast<int>(std::count_if(candidates.begin(), candidates.end(),
                                                    [](const Candidate& c) { return c.alive; }));
    progress.best_layer = best->layer;
    progress.best_loss = loss_of(*best);
  }
  result.plain_layer_forwards += measurements * trunk.num_layers();
  return flat ? nullptr : best_of(candidates);
}

void Search::commit(const Candidate& winner, int num_candidates, std::vector<SearchStep>* steps) {
  trunk = winner.plan;
  trunk_nll = winner.nll;
  const std::string letters = to_string(trunk);
  // What the next round can begin with: this plan, or this plan with one more layer shared.
  for (size_t sequence = 0; sequence < model.num_sequences(); ++sequence) {
    model.keep_only(sequence, [&](std::string_view prefix) {
      int shared = 0;
      for (size_t i = 0; i < prefix.size(); ++i) {
        if (prefix[i] == letters[i]) continue;
        if (prefix[i] == 'F' || ++shared > 1) return false;
      }
      return true;
    });
  }
  SearchStep step;
  step.layer = winner.layer;
  step.restored = winner.restored;
  step.loss = loss_of(winner);
  step.plan = trunk;
  step.candidates = num_candidates;
  step.seconds = monotonic_seconds() - start_seconds;
  step.layer_forwards = model.layer_forwards();
  step.plain_layer_forwards = result.plain_layer_forwards;
  steps->push_back(step);
  if (events.step) events.step(step);
}

void Search::run_greedy() {
  const int num_blocks = static_cast<int>(options.block_starts.size());
  for (int turn = 0, idle = 0; trunk.num_full() > options.keep_full && idle < num_blocks; ++turn) {
    const int block = num_blocks == 1 ? -1 : turn % num_blocks;
    std::vector<Candidate> candidates;
    for (const int layer : flips(block))
      candidates.push_back({.layer = layer, .plan = with_letter(trunk, layer, false)});
    if (candidates.empty()) {
      ++idle;
      continue;
    }
    idle = 0;
    const Candidate* winner = play_round(candidates);
    if (winner == nullptr) {
      if (!options.accept_flat) {
        fail(
            "sharing any of {} layers leaves every loss as it was, to the last bit: the metric is "
            "flat, no plan was made",
            candidates.size());
      }
      winner = best_of(candidates);
    }
    const double before = result.loss;
    commit(*winner, static_cast<int>(candidates.size()), &result.steps);
    const SearchStep& step = result.steps.back();
    if (options.budget && step.loss > result.start_loss * (1 + *options.budget)) {
      result.loss = before;
      return;
    }
    result.plan = step.plan;
    result.loss = step.loss;
  }
}

void Search::run_swaps() {
  for (;;) {
    std::vector<Candidate> candidates;
    for (const int layer : flips(-1)) {
      for (int other = 1; other < trunk.num_layers(); ++other) {
        if (trunk.is_full(other) || !model.widest_plan().is_full(other)) continue;
        candidates.push_back({.layer = layer,
                              .restored = other,
                              .plan = with_letter(with_letter(trunk, layer, false), other, true)});
      }
    }
    if (candidates.empty()) return;
    const Candidate* winner = play_round(candidates);
    if (winner == nullptr || loss_of(*winner) >= result.loss) return;
    commit(*winner, static_cast<int>(candidates.size()), &result.swaps);
    result.plan = trunk;
    result.loss = result.swaps.back().loss;
  }
}

void Search::run() {
  trunk = model.widest_plan();
  result.plan = trunk;
  // All steps are foreseen: where a budget ends is not known beforehand.
  const int num_blocks = static_cast<int>(options.block_starts.size());
  const int num_flips = static_cast<int>(flips(-1).size());
  const int last = std::max(options.keep_full - (trunk.num_full() - num_flips), 0);
  for (int full = num_flips; full > last; --full) {
    progress.all_total +=
        std::max(full / num_blocks, 1) * static_cast<int64_t>(model.num_sequences());
  }
  try {
    const std::vector<int> keep = kept_layers({});
    for (size_t i = 0; i < model.num_sequences(); ++i) {
      trunk_nll.push_back(measure(i, trunk, keep));
    }
    Candidate start{.layer = 0, .plan = trunk, .nll = trunk_nll};
    result.start_loss = result.loss = loss_of(start);
    if (events.start) events.start(result.start_loss);
    run_greedy();
    if (options.refine) {
      // A budget may have ended one step too far.
      if (trunk != result.plan) {
        trunk = result.plan;
        trunk_nll.clear();
        for (size_t i = 0; i < model.num_sequences(); ++i)
          trunk_nll.push_back(measure(i, trunk, {}));
      }
      run_swaps();
    }
  } catch (const Interrupted&) {
    result.interrupted = true;
  }
  result.layer_forwards = model.layer_forwards();
}

}  // namespace

SearchResult search_plan(PlanLoss& model, LossJournal& journal, const SearchOptions& options,
                         const SearchEvents& events) {
  CHECK_GE(options.keep_full, 1);
  CHECK(!options.block_starts.empty() && options.block_starts[0] == 0);
  CHECK(std::is_sorted(options.block_starts.begin(), options.block_starts.end()));
  Search search{.model = model, .journal = journal, .options = options, .events = events};
  search.run();
  return search.result;
}

MeanLoss mean_loss(PlanLoss& model, LossJournal& journal, const IndexPlan& plan) {
  const std::string letters = to_string(plan);
  const double targets = static_cast<double>(model.data().sequence_tokens() - 1);
  std::vector<double> nlls;
  for (size_t i = 0; i < model.num_sequences(); ++i) {
    std::optional<double> nll = journal.find(letters, i);
    if (!nll) {
      nll = model.nll(i, plan);
      if (!std::isfinite(*nll)) fail("the loss of plan {} on sequence {} is {}", letters, i, *nll);
      journal.add(letters, i, *nll);
    }
    nlls.push_back(*nll);
  }
  const double n = static_cast<double>(nlls.size());
  MeanLoss mean{.loss = sum(nlls) / (n * targets)};
  double squares = 0;
  for (const double nll : nlls) squares += std::pow(nll / targets - mean.loss, 2);
  if (nlls.size() > 1) mean.standard_error = std::sqrt(squares / (n - 1) / n);
  return mean;
}

IndexPlan even_plan(int num_layers, int num_full) {
  CHECK(num_full >= 1 && num_full <= num_layers);
  std::string letters(static_cast<size_t>(num_layers), 'S');
  for (int i = 0; i < num_full; ++i) letters[static_cast<size_t>(i) * num_layers / num_full] = 'F';
  return plan_from_string(letters, num_layers, "even plan");
}

}  // namespace indexcache
