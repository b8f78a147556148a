// Ends a stream of text before the first of some strings. What could be the beginning of one is
// held back until it is known not to be.
#pragma once

#include <string>
#include <vector>

namespace indexcache {

class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // The text that may go out now. After stopped() nothing does.
  std::string push(const std::string& text);
  // The stream has ended: what was held back is only text.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace indexcache
