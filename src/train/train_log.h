// What a training run leaves in its log.csv, and reading it back.
//
// Columns: step, tokens, row_tokens, lr, loss (nats/token), indexer_loss (nats/token),
// gradient_norm, tokens_per_second, held_out, held_out_loss (nats/token), held_out_indexer_loss.
// A row is a training step or one held-out measurement; what does not apply is empty.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace indexcache {

struct TrainRow {
  int64_t step, tokens, row_tokens;
  double lr, loss, indexer_loss, gradient_norm, tokens_per_second;
};

struct HeldOutRow {
  int64_t step;
  std::string name;
  double loss, indexer_loss;
};

class TrainLog {
 public:
  // Keeps the rows up to `step` of a log that is there: a resumed run writes the rest anew.
  void open(const std::string& path, int64_t step);
  void add(const TrainRow& row);
  void add_held_out(const HeldOutRow& row);

 private:
  void append(const std::string& line);
  std::string path_;
};

struct TrainHistory {
  std::vector<TrainRow> steps;
  std::vector<HeldOutRow> held_out;
};
TrainHistory read_train_log(const std::string& path);

}  // namespace indexcache
