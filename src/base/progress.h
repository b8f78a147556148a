// Progress of long work, on stderr: a bar that redraws itself on a terminal, a plain line now and
// then otherwise.
#pragma once

#include <cstdint>
#include <string>

namespace indexcache {

class Progress {
 public:
  // `unit` is what is counted: "tokens".
  Progress(std::string label, int64_t total, std::string unit);
  ~Progress();  // ends the bar's line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done);

 private:
  std::string label_, unit_;
  int64_t total_;
  bool terminal_;
  bool drawn_ = false;
  double start_, last_draw_;
};

}  // namespace indexcache
