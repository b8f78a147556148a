// Sets of code points, as a pre-tokenizer's pattern names them.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "text/unicode_tables.h"

namespace indexcache {

// Sorted, disjoint, not touching.
struct CodePointSet {
  std::vector<CodePointRange> ranges;

  bool contains(uint32_t code_point) const;
  bool operator==(const CodePointSet&) const = default;
};

CodePointSet set_of_ranges(std::vector<CodePointRange> ranges);  // any order, may overlap
CodePointSet set_of(uint32_t code_point);
CodePointSet complement(const CodePointSet& set);
CodePointSet unite(const CodePointSet& a, const CodePointSet& b);

// A general category by its one- or two-letter name (L, Lu) or, for the seven groups, its long name
// (Letter). Upper and lower case, spaces, '_' and '-' do not matter. nullopt: no such category.
std::optional<CodePointSet> category_set(std::string_view name);

bool is_white_space(uint32_t code_point);
bool is_word(uint32_t code_point);

}  // namespace indexcache
