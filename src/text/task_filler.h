// Real text for long-context tasks to hide facts in.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/rng.h"

namespace indexcache {

// The number of tokens that a text becomes; called from several threads at once.
using TokenCounter = std::function<int64_t(std::string_view)>;
TokenCounter count_bytes(double bytes_per_token);  // where no tokenizer is at hand

// Real text to hide facts in. It is cut into fragments of whole lines, a few hundred bytes each,
// that end with a newline and do not begin with a space: the counts of fragments then add up for
// every tokenizer that breaks after newlines. Errors: no text at all; a document of 4 GiB.
class TaskFiller {
 public:
  // Counts with `num_threads` threads; the result does not depend on their number.
  TaskFiller(const std::vector<std::string>& documents, TokenCounter count, int num_threads = 1);

  // Consecutive fragments of some document: about `tokens` tokens or up to the document's end, at
  // least one fragment. As indices.
  struct Run {
    size_t first, last;  // [first, last)
  };
  Run draw(Rng& rng, int64_t tokens) const;

  std::string_view text(size_t fragment) const;
  int64_t tokens(size_t fragment) const { return fragments_[fragment].tokens; }
  int64_t count(std::string_view text) const { return count_(text); }

  // One line of prose, 40 to 160 bytes, without spaces around it.
  std::string sentence(Rng& rng) const;

 private:
  struct Fragment {
    size_t offset;
    uint32_t size;
    uint32_t tokens;
    size_t document_end;  // the index after the document's last fragment
  };
  std::string text_;
  std::vector<Fragment> fragments_;
  TokenCounter count_;
};

}  // namespace indexcache
