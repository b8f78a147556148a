// Collects everything that is wrong with a checkpoint, so that one error tells all of it. What is
// printed and kept is bounded; what is counted is not.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace indexcache {

class ProblemList {
 public:
  static constexpr size_t kMaxShown = 50;

  template <class Describe>
  void add(Describe&& describe) {
    if (shown_.size() < kMaxShown) shown_.push_back(describe());
    ++count_;
  }

  size_t count() const { return count_; }
  // One line a problem, indented, and "and N more" where the list was cut.
  std::string text() const {
    std::string text;
    for (const std::string& problem : shown_) text += "\n  " + problem;
    if (count_ > shown_.size())
      text += "\n  and " + std::to_string(count_ - shown_.size()) + " more";
    return text;
  }

 private:
  size_t count_ = 0;
  std::vector<std::string> shown_;
};

}  // namespace indexcache
