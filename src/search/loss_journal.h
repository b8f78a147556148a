// Every loss that a search has measured, on disk as soon as it is known, so that a search killed at
// any moment loses one measurement at most. A search asks here before it computes; run again over
// the same journal it takes the same decisions from the same numbers and ends in the same plan
// file.
//
// The file is JSON lines: first {"version": 1, "settings": {...}}, then one
// {"plan": "FSF...", "sequence": 3, "nll": 123.4} a measurement, in nats. A last line without an
// end, which a kill can leave, is dropped. The settings are what a loss depends on; a journal with
// others is an Error that names each difference. Two processes cannot hold one journal.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace indexcache {

class LossJournal {
 public:
  // `path` empty: nothing is written. `resume`: an existing file is read and continued; without it,
  // an existing file is an Error.
  LossJournal(const std::string& path, const Json& settings, size_t num_sequences, bool resume);

  std::optional<double> find(const std::string& plan, size_t sequence) const;
  void add(const std::string& plan, size_t sequence, double nll);
  int64_t num_read() const { return num_read_; }

 private:
  void read(const std::string& text, const Json& settings);

  std::string path_;
  size_t num_sequences_;
  std::map<std::string, std::vector<std::optional<double>>> losses_;
  int64_t num_read_ = 0;

  struct Descriptor {
    int fd = -1;
    Descriptor() = default;
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
  };
  Descriptor file_;
};

}  // namespace indexcache
