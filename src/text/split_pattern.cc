#include "text/split_pattern.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "text/utf8.h"

namespace indexcache {

namespace {

bool is_ascii_letter(uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_ascii_digit(uint32_t c) { return c >= '0' && c <= '9'; }

// Unicode's simple case folding, restricted to the sets that have ASCII letters in them.
CodePointSet fold_ascii(const CodePointSet& set) {
  std::vector<CodePointRange> ranges = set.ranges;
  for (uint32_t lower = 'a'; lower <= 'z'; ++lower) {
    const uint32_t upper = lower - 'a' + 'A';
    if (!set.contains(lower) && !set.contains(upper)) continue;
    ranges.push_back({lower, lower});
    ranges.push_back({upper, upper});
    if (lower == 's') ranges.push_back({0x17F, 0x17F});    // LATIN SMALL LETTER LONG S
    if (lower == 'k') ranges.push_back({0x212A, 0x212A});  // KELVIN SIGN
  }
  return set_of_ranges(std::move(ranges));
}

class PatternParser {
 public:
  PatternParser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  SplitPattern parse_regex() {
    while (!done()) parse_item();
    if (!groups_.empty()) refuse("a group is not closed");
    return std::move(pattern_);
  }

  SplitPattern parse_literal() {
    while (!done()) add_set(set_of(next()));
    return std::move(pattern_);
  }

 private:
  struct Group {
    bool fold;     // the case-insensitivity outside, restored at the group's end
    bool is_look;  // lookahead or lookbehind
  };

  [[noreturn]] void refuse(std::string_view what) const {
    fail("{}: pattern \"{}\" at byte {}: {}", where_, printable(text_), at_, what);
  }

  bool done() const { return at_ >= text_.size(); }
  bool looking_at(std::string_view expected) const {
    return text_.substr(at_).starts_with(expected);
  }

  bool take(std::string_view expected) {
    if (!looking_at(expected)) return false;
    at_ += expected.size();
    return true;
  }

  uint32_t next() {
    if (done()) refuse("the pattern ends too early");
    const Utf8Step step = utf8_step(text_, at_);
    if (!step.valid) refuse("not valid UTF-8");
    at_ += step.length;
    return step.code_point;
  }

  void add_syntax(std::string syntax) { pattern_.parts.push_back({std::move(syntax), -1}); }

  void add_set(const CodePointSet& set) {
    const auto found = std::find(pattern_.sets.begin(), pattern_.sets.end(), set);
    pattern_.parts.push_back({"", static_cast<int>(found - pattern_.sets.begin())});
    if (found != pattern_.sets.end()) return;
    if (pattern_.sets.size() >= kMaxPatternSets) {
      refuse(fmt::format("more than {} different characters and classes", kMaxPatternSets));
    }
    pattern_.sets.push_back(set);
  }

  void parse_item() {
    uint32_t literal = 0;
    bool quantifiable = true;
    if (take("(")) {
      open_group();
      quantifiable = false;
    } else if (take(")")) {
      if (groups_.empty()) refuse("a ')' without its '('");
      fold_ = groups_.back().fold;
      quantifiable = !groups_.back().is_look;
      groups_.pop_back();
      add_syntax(")");
    } else if (take("|")) {
      add_syntax("|");
      quantifiable = false;
    } else if (take("[")) {
      add_set(parse_class());
    } else if (take(".")) {
      add_set(complement(set_of('\n')));
    } else if (take("\\")) {
      literal = parse_escape();
    } else {
      for (const char c : std::string_view("*+?{^$")) {
        if (looking_at({&c, 1})) refuse(fmt::format("'{}' is not supported here", c));
      }
      literal = next();
      add_literal(literal);
    }
    if (quantifiable && parse_quantifier()) literal = 0;
    previous_literal_ = literal;
  }

  void add_literal(uint32_t c) {
    if (!fold_) return add_set(set_of(c));
    if (c >= 0x80) refuse("only ASCII is supported inside (?i:..)");
    // Two letters that full case folding also finds as one character, for example U+FB06 for "st".
    for (const std::string_view pair : {"ss", "st", "ff", "fi", "fl"}) {
      if ((previous_literal_ | 0x20) == static_cast<uint32_t>(pair[0]) &&
          (c | 0x20) == static_cast<uint32_t>(pair[1])) {
        refuse(fmt::format("\"{}\" is not supported inside (?i:..)", pair));
      }
    }
    add_set(fold_ascii(set_of(c)));
  }

  void open_group() {
    Group group{fold_, false};
    if (!take("?")) {
      add_syntax("(?:");  // nothing refers to captures
    } else if (take("i:")) {
      fold_ = true;
      add_syntax("(?:");
    } else {
      bool known = false;
      for (const std::string_view kind : {":", ">", "=", "!", "<=", "<!"}) {
        if (!take(kind)) continue;
        known = true;
        group.is_look = kind != ":" && kind != ">";
        add_syntax("(?" + std::string(kind));
        break;
      }
      if (!known) refuse("this kind of group is not supported");
    }
    groups_.push_back(group);
  }

  bool parse_quantifier() {
    for (const std::string_view simple : {"*", "+", "?"}) {
      if (!take(simple)) continue;
      std::string syntax(simple);
      if (take("?")) {
        syntax += '?';
      } else if (take("+")) {
        syntax += '+';
      }
      add_syntax(std::move(syntax));
      return true;
    }
    if (!take("{")) return false;
    const int low = parse_count();
    int high = low;
    std::string syntax = fmt::format("{{{}", low);
    if (take(",")) {
      syntax += ',';
      if (!looking_at("}")) {
        high = parse_count();
        syntax += std::to_string(high);
      }
    }
    if (!take("}")) refuse("expected {n}, {n,} or {n,m}");
    if (high < low) refuse("expected n <= m in {n,m}");
    // Oniguruma and PCRE2 read a suffix here differently.
    if (looking_at("?") || looking_at("+")) refuse("a quantifier after {..} is not supported");
    add_syntax(syntax + "}");
    return true;
  }

  int parse_count() {
    int value = 0;
    if (done() || !is_ascii_digit(static_cast<uint8_t>(text_[at_])))
      refuse("expected a count in {..}");
    while (!done() && is_ascii_digit(static_cast<uint8_t>(text_[at_]))) {
      value = value * 10 + (text_[at_++] - '0');
      if (value > kMaxPatternRepeat)
        refuse(fmt::format("a count over {} is not supported", kMaxPatternRepeat));
    }
    return value;
  }

  // An escape outside of classes. Returns the literal, or 0 for a set.
  uint32_t parse_escape() {
    if (const std::optional<CodePointSet> set = parse_escaped_set()) {
      if (fold_) refuse("only ASCII is supported inside (?i:..)");
      add_set(*set);
      return 0;
    }
    const uint32_t c = parse_escaped_character();
    add_literal(c);
    return c;
  }

  std::optional<CodePointSet> parse_escaped_set() {
    const auto white = [] {
      const auto ranges = unicode_white_space();
      return set_of_ranges({ranges.begin(), ranges.end()});
    };
    if (take("s")) return white();
    if (take("S")) return complement(white());
    if (take("d")) return *category_set("Nd");
    if (take("D")) return complement(*category_set("Nd"));
    if (!looking_at("p{") && !looking_at("P{")) return std::nullopt;

    bool negate = take("P{");
    if (!negate) take("p{");
    if (take("^")) negate = !negate;
    const size_t end = text_.find('}', at_);
    if (end == std::string_view::npos) refuse("\\p{ without its '}'");
    const std::optional<CodePointSet> set = category_set(text_.substr(at_, end - at_));
    if (!set) refuse("not a general category of Unicode");
    at_ = end + 1;
    return negate ? complement(*set) : *set;
  }

  uint32_t parse_escaped_character() {
    if (take("t")) return '\t';
    if (take("n")) return '\n';
    if (take("v")) return '\v';
    if (take("f")) return '\f';
    if (take("r")) return '\r';
    if (take("e")) return 0x1B;
    if (take("a")) return '\a';
    if (take("x{")) {
      const uint32_t c = parse_hex(1, 8);
      if (!take("}")) refuse("\\x{ without its '}'");
      return c;
    }
    if (take("x")) {
      const uint32_t c = parse_hex(2, 2);
      if (c >= 0x80) refuse("\\xHH above 7F is a byte, not a character");
      return c;
    }
    if (take("u")) return parse_hex(4, 4);
    if (done()) refuse("the pattern ends after '\\'");
    const uint32_t c = static_cast<uint8_t>(text_[at_]);
    if (is_ascii_letter(c) || is_ascii_digit(c)) {
      refuse(fmt::format("\\{} is not supported", static_cast<char>(c)));
    }
    return next();
  }

  uint32_t parse_hex(int min_digits, int max_digits) {
    uint32_t value = 0;
    int digits = 0;
    for (; digits < max_digits && !done(); ++digits, ++at_) {
      const uint32_t c = static_cast<uint8_t>(text_[at_]);
      const uint32_t lower = c | 0x20;
      if (is_ascii_digit(c)) {
        value = value * 16 + (c - '0');
      } else if (lower >= 'a' && lower <= 'f') {
        value = value * 16 + (lower - 'a' + 10);
      } else {
        break;
      }
    }
    if (digits < min_digits || value > kMaxCodePoint || (value >= 0xD800 && value <= 0xDFFF)) {
      refuse("expected the hexadecimal digits of a character");
    }
    return value;
  }

  CodePointSet parse_class() {
    const bool negate = take("^");
    if (looking_at("]")) refuse("an empty class, or ']' unescaped in a class");
    std::vector<CodePointRange> ranges;
    while (!take("]")) {
      if (looking_at("[")) refuse("'[' inside a class is not supported unescaped");
      if (looking_at("&&")) refuse("'&&' inside a class is not supported");
      const size_t item_at = at_;
      uint32_t first = 0;
      if (take("\\")) {
        if (const std::optional<CodePointSet> set = parse_escaped_set()) {
          ranges.insert(ranges.end(), set->ranges.begin(), set->ranges.end());
          if (looking_at("-") && !looking_at("-]")) refuse("a range that begins with a class");
          continue;
        }
        first = parse_escaped_character();
      } else {
        first = next();
        const bool at_edge = ranges.empty() || looking_at("]");
        if (first == '-' && !at_edge) {
          at_ = item_at;
          refuse("'-' inside a class is not supported unescaped");
        }
      }
      uint32_t last = first;
      if (looking_at("-") && !looking_at("-]")) {
        take("-");
        if (looking_at("[")) refuse("'[' inside a class is not supported unescaped");
        if (take("\\")) {
          if (parse_escaped_set()) refuse("a range that ends with a class");
          last = parse_escaped_character();
        } else {
          last = next();
        }
        if (last < first) refuse("a range that runs backwards");
      }
      ranges.push_back({first, last});
    }
    CodePointSet set = set_of_ranges(std::move(ranges));
    if (fold_) {
      if (set.ranges.back().last >= 0x80) refuse("only ASCII is supported inside (?i:..)");
      set = fold_ascii(set);
    }
    return negate ? complement(set) : set;
  }

  std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
  bool fold_ = false;
  uint32_t previous_literal_ = 0;
  std::vector<Group> groups_;
  SplitPattern pattern_;
};

void check_size(std::string_view pattern, const std::string& where) {
  if (pattern.empty()) fail("{}: the pattern is empty", where);
  if (pattern.size() > kMaxPatternBytes) {
    fail("{}: the pattern has {} bytes, expected at most {}", where, pattern.size(),
         kMaxPatternBytes);
  }
}

}  // namespace

SplitPattern parse_split_regex(std::string_view pattern, const std::string& where) {
  check_size(pattern, where);
  return PatternParser(pattern, where).parse_regex();
}

SplitPattern parse_split_literal(std::string_view text, const std::string& where) {
  check_size(text, where);
  return PatternParser(text, where).parse_literal();
}

}  // namespace indexcache
