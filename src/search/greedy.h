// The greedy search for an index plan (IndexCache, arXiv 2603.12201, Algorithm 1): from all layers
// full, each step shares the layer whose sharing costs least language-model loss, every candidate
// on the same sequences. Layer 0 stays full. Ties go to the lower layer.
//
// Beyond the paper:
//   - computation begins where a plan departs from what is known (plan_loss.h): same losses bit for
//     bit at half the work or less;
//   - with a confidence, candidates are dropped before all sequences are seen, once they are worse
//     than the best so far by paired differences (race.h);
//   - with `refine`, swaps of a full and a shared layer at the end, as long as one lowers the loss.
// From the paper: with several blocks, the first layer of each stays full and each block in turn
// shares its best layer, so the plan can be cut into pipeline stages there.
//
// Order of work: sequence by sequence, and on each all candidates from the first layer to the last,
// so one state a sequence is enough. Where the store has room, the states of the current plan are
// kept between steps, then those of the candidates: sharing layer m changes nothing that candidate
// l < m computed before m.
//
// Errors: a loss that is not finite; a flat metric, when every candidate has the loss of the plan
// it came from, on every sequence, to the last bit. Both end the search without a result.
#pragma once

#include <atomic>
#include <functional>
#include <optional>
#include <vector>

#include "search/loss_journal.h"
#include "search/plan_loss.h"

namespace indexcache {

struct SearchOptions {
  int keep_full = 1;             // stop at this many full layers
  std::optional<double> budget;  // or before the loss has grown by more than this share: 0.005
  std::vector<int> block_starts = {0};  // ascending, the first is 0
  std::optional<double> confidence;     // of a race; unset: exact
  bool refine = false;
  bool accept_flat = false;
};

struct SearchStep {
  int layer = 0;                                         // the one turned shared
  int restored = -1;                                     // a swap: the one turned full again
  double loss = 0;                                       // nats a token, over all sequences
  IndexPlan plan;                                        // after it
  int candidates = 0;                                    // that were compared
  double seconds = 0;                                    // since the search began
  int64_t layer_forwards = 0, plain_layer_forwards = 0;  // so far: done, and without any saving
};

struct SearchProgress {
  int num_full = 0;                     // of the plan that the candidates come from
  int candidates = 0, alive = 0;        // of this round; alive: not dropped by the race
  int64_t done = 0, total = 0;          // measurements of this round: a candidate on a sequence
  int64_t all_done = 0, all_total = 0;  // of the whole search; swaps are not foreseen
  int best_layer = -1;                  // so far; -1: no sequence is done
  double best_loss = 0;                 // nats a token over the sequences seen
};

struct SearchEvents {
  std::function<void(double all_full_loss)> start;
  std::function<void(const SearchProgress&)> progress;
  std::function<void(const SearchStep&)> step;
  const std::atomic<bool>* stop = nullptr;  // Ctrl-C
};

struct SearchResult {
  double start_loss = 0;          // of the plan with every possible layer full
  std::vector<SearchStep> steps;  // with a budget, the last may be over it
  std::vector<SearchStep> swaps;
  IndexPlan plan;  // the answer
  double loss = 0;
  int64_t layer_forwards = 0, plain_layer_forwards = 0;
  bool interrupted = false;  // then the rest is what was reached
};

SearchResult search_plan(PlanLoss& model, LossJournal& journal, const SearchOptions& options,
                         const SearchEvents& events = {});

// The mean loss of a plan over all sequences, nats a token, with its standard error over sequences
// (0 with one sequence).
struct MeanLoss {
  double loss = 0, standard_error = 0;
};
MeanLoss mean_loss(PlanLoss& model, LossJournal& journal, const IndexPlan& plan);

// `num_full` full layers as evenly spaced as can be, the first being layer 0.
IndexPlan even_plan(int num_layers, int num_full);

}  // namespace indexcache
