#include "text/task_filler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include "base/error.h"

namespace indexcache {
namespace {

constexpr size_t kEnough = 300;   // bytes after which a fragment ends where the text allows it
constexpr size_t kTooMuch = 800;  // bytes after which it ends anywhere

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

std::string_view without_leading_spaces(std::string_view text) {
  const auto first = std::ranges::find_if_not(text, is_space);
  return text.substr(first - text.begin());
}

// The bytes of `text` that the next fragment takes: whole lines where there are any in reach.
size_t fragment_size(std::string_view text) {
  size_t size = 0;
  while (size < text.size()) {
    if (size >= kTooMuch || (size >= kEnough && !is_space(text[size]))) return size;
    const size_t line_end = text.find('\n', size);
    const size_t next = line_end == std::string_view::npos ? text.size() : line_end + 1;
    if (next - size > kTooMuch) {
      if (size > 0) return size;
      const size_t space = text.rfind(' ', kTooMuch);
      if (space != std::string_view::npos && space > 0) return space;
      size_t cut = kTooMuch;
      while (cut > 0 && (static_cast<uint8_t>(text[cut]) & 0xC0) == 0x80) --cut;
      return cut > 0 ? cut : kTooMuch;
    }
    size = next;
  }
  return size;
}

bool is_sentence(std::string_view line) {
  if (line.size() < 40 || line.size() > 160) return false;
  const auto letters = std::ranges::count_if(
      line, [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == ' '; });
  return letters * 10 >= static_cast<ptrdiff_t>(line.size()) * 9 &&
         std::ranges::count(line, ' ') >= 5 && line.find("  ") == std::string_view::npos;
}

std::string_view sentence_in(std::string_view fragment) {
  for (size_t begin = 0; begin < fragment.size();) {
    const size_t end = fragment.find('\n', begin);
    std::string_view line = without_leading_spaces(fragment.substr(begin, end - begin));
    while (!line.empty() && is_space(line.back())) line.remove_suffix(1);
    if (is_sentence(line)) return line;
    begin = end + 1;
  }
  return {};
}

}  // namespace

TokenCounter count_bytes(double bytes_per_token) {
  return [bytes_per_token](std::string_view text) {
    return static_cast<int64_t>(std::ceil(static_cast<double>(text.size()) / bytes_per_token));
  };
}

TaskFiller::TaskFiller(const std::vector<std::string>& documents, TokenCounter count,
                       int num_threads)
    : count_(std::move(count)) {
  for (const std::string& document : documents) {
    if (document.size() >= std::numeric_limits<uint32_t>::max())
      fail("filler: a document has {} bytes, expected less than 4 GiB", document.size());
    const size_t first = fragments_.size();
    std::string_view rest = without_leading_spaces(document);
    while (!rest.empty()) {
      const size_t size = fragment_size(rest);
      const size_t offset = text_.size();
      text_ += rest.substr(0, size);
      if (text_.back() != '\n') text_ += '\n';
      fragments_.push_back({offset, static_cast<uint32_t>(text_.size() - offset), 0, 0});
      rest = without_leading_spaces(rest.substr(size));
    }
    for (size_t i = first; i < fragments_.size(); ++i)
      fragments_[i].document_end = fragments_.size();
  }
  if (fragments_.empty()) fail("filler: {} documents without any text", documents.size());

  std::atomic<size_t> next = 0;
  std::exception_ptr error;
  std::atomic<bool> failed = false;
  const auto work = [&] {
    constexpr size_t kStep = 256;
    for (size_t begin; !failed && (begin = next.fetch_add(kStep)) < fragments_.size();) {
      try {
        for (size_t i = begin; i < std::min(begin + kStep, fragments_.size()); ++i)
          fragments_[i].tokens = static_cast<uint32_t>(count_(text(i)));
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
    work();
  }
  if (error) std::rethrow_exception(error);
}

std::string_view TaskFiller::text(size_t fragment) const {
  return std::string_view(text_).substr(fragments_[fragment].offset, fragments_[fragment].size);
}

TaskFiller::Run TaskFiller::draw(Rng& rng, int64_t tokens) const {
  const size_t first = rng.below(fragments_.size());
  size_t last = first;
  int64_t drawn = 0;
  do {
    drawn += fragments_[last++].tokens;
  } while (drawn < tokens && last < fragments_[first].document_end);
  return {first, last};
}

std::string TaskFiller::sentence(Rng& rng) const {
  const size_t start = rng.below(fragments_.size());
  for (size_t i = 0; i < fragments_.size(); ++i) {
    const std::string_view line = sentence_in(text((start + i) % fragments_.size()));
    if (!line.empty()) return std::string(line);
  }
  // Filler without prose, such as tables of numbers.
  return "There is no sentence in the text around this one.";
}

}  // namespace indexcache
