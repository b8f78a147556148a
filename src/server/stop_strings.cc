#include "server/stop_strings.h"

#include <algorithm>
#include <string_view>

namespace indexcache {

std::string StopStrings::push(const std::string& text) {
  if (stopped_) return {};
  held_ += text;
  size_t stop = held_.size();
  for (const std::string& wanted : stops_) {
    const size_t at = held_.find(wanted);
    if (at < stop) {
      stop = at;
      stopped_ = true;
    }
  }
  if (stopped_) {
    std::string out = held_.substr(0, stop);
    held_.clear();
    return out;
  }
  size_t hold = 0;
  for (const std::string& wanted : stops_) {
    for (size_t n = std::min(wanted.size() - 1, held_.size()); n > hold; --n) {
      if (std::string_view(held_).ends_with(std::string_view(wanted).substr(0, n))) {
        hold = n;
        break;
      }
    }
  }
  std::string out = held_.substr(0, held_.size() - hold);
  held_.erase(0, held_.size() - hold);
  return out;
}

std::string StopStrings::finish() {
  std::string out;
  std::swap(out, held_);
  return out;
}

}  // namespace indexcache
