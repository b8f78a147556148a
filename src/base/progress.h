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

  // `note` stands behind the numbers.
  void update(int64_t done, const std::string& note = "");
  void set_total(int64_t total);  // where it turns out to be another
  void clear();                   // takes the bar away, for a line of text to stand there

 private:
  std::string label_, unit_;
  int64_t total_;
  bool terminal_;
  bool drawn_ = false;
  double start_, last_draw_;
};

}  // namespace indexcache
