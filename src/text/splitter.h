// Splits text into the pieces that byte-pair encoding works on, as a Sequence of Split
// pre-tokenizers says.
//
// How: code points that no pattern tells apart are one symbol, so a whole family of patterns needs
// well under 256 of them. Text becomes one byte a code point, and PCRE2 matches over those bytes
// with ordinary 256-bit classes. So the Unicode version is ours, not the library's, and a class of
// 140,000 letters costs no more than [a-z].
//
// Time is bounded by the text's length: an attempt at a match sees a window that doubles only while
// the attempt runs into its end, steps inside it are limited, and windows are charged to a budget.
// A pattern that exceeds either is an Error that names the file and its Split.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/split_pattern.h"

namespace indexcache {

// What happens to the text that a pattern matches ("the-final--countdown" split at "-"):
enum class SplitBehavior {
  kRemoved,             // the final countdown
  kIsolated,            // the - final - - countdown
  kMergedWithPrevious,  // the- final- - countdown
  kMergedWithNext,      // the -final - -countdown
  kContiguous,          // the - final -- countdown
};

struct SplitStage {
  SplitPattern pattern;
  SplitBehavior behavior;
  bool invert;        // what does not match takes the place of what matches
  std::string where;  // for error messages
};

class Splitter {
 public:
  explicit Splitter(std::vector<SplitStage> stages);
  ~Splitter();
  Splitter(Splitter&&) noexcept;
  Splitter& operator=(Splitter&&) noexcept;

  // The non-empty pieces of valid UTF-8 text of less than 2 GiB, in order, as views into it. Safe
  // from several threads.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace indexcache
