#include "text/code_points.h"

#include <algorithm>
#include <span>
#include <string>

namespace indexcache {

namespace {

// In the order of GeneralCategory.
constexpr std::string_view kCategoryNames[] = {
    "lu", "ll", "lt", "lm", "lo", "mn", "mc", "me", "nd", "nl", "no", "pc", "pd", "ps", "pe",
    "pi", "pf", "po", "sm", "sc", "sk", "so", "zs", "zl", "zp", "cc", "cf", "cs", "co", "cn"};

constexpr std::pair<std::string_view, char> kGroupNames[] = {
    {"letter", 'l'}, {"mark", 'm'},      {"number", 'n'}, {"punctuation", 'p'},
    {"symbol", 's'}, {"separator", 'z'}, {"other", 'c'}};

bool in_ranges(std::span<const CodePointRange> ranges, uint32_t code_point) {
  const auto after = std::upper_bound(
      ranges.begin(), ranges.end(), code_point,
      [](uint32_t value, const CodePointRange& range) { return value < range.first; });
  return after != ranges.begin() && code_point <= (after - 1)->last;
}

std::string loose(std::string_view name) {
  std::string out;
  for (const char c : name) {
    if (c == ' ' || c == '_' || c == '-') continue;
    out.push_back(c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c);
  }
  return out;
}

}  // namespace

bool CodePointSet::contains(uint32_t code_point) const { return in_ranges(ranges, code_point); }

CodePointSet set_of_ranges(std::vector<CodePointRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const CodePointRange& a, const CodePointRange& b) { return a.first < b.first; });
  CodePointSet set;
  for (const CodePointRange& range : ranges) {
    if (!set.ranges.empty() && range.first <= set.ranges.back().last + 1) {
      set.ranges.back().last = std::max(set.ranges.back().last, range.last);
    } else {
      set.ranges.push_back(range);
    }
  }
  return set;
}

CodePointSet set_of(uint32_t code_point) { return {{{code_point, code_point}}}; }

CodePointSet complement(const CodePointSet& set) {
  CodePointSet out;
  uint32_t next = 0;
  for (const CodePointRange& range : set.ranges) {
    if (range.first > next) out.ranges.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next <= kMaxCodePoint) out.ranges.push_back({next, kMaxCodePoint});
  return out;
}

CodePointSet unite(const CodePointSet& a, const CodePointSet& b) {
  std::vector<CodePointRange> ranges = a.ranges;
  ranges.insert(ranges.end(), b.ranges.begin(), b.ranges.end());
  return set_of_ranges(std::move(ranges));
}

std::optional<CodePointSet> category_set(std::string_view name) {
  std::string wanted = loose(name);
  for (const auto& [long_name, letter] : kGroupNames) {
    if (wanted == long_name) wanted = letter;
  }
  if (wanted.empty() || wanted.size() > 2) return std::nullopt;

  const std::span<const CategoryRun> runs = unicode_category_runs();
  std::vector<CodePointRange> ranges;
  bool known = false;
  for (const std::string_view category : kCategoryNames) known |= category.starts_with(wanted);
  if (!known) return std::nullopt;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!kCategoryNames[static_cast<size_t>(runs[i].category)].starts_with(wanted)) continue;
    ranges.push_back({runs[i].first, i + 1 < runs.size() ? runs[i + 1].first - 1 : kMaxCodePoint});
  }
  return set_of_ranges(std::move(ranges));
}

bool is_white_space(uint32_t code_point) { return in_ranges(unicode_white_space(), code_point); }
bool is_word(uint32_t code_point) { return in_ranges(unicode_word(), code_point); }

}  // namespace indexcache
