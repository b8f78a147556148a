#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/splitter.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <map>
#include <span>
#include <unordered_map>

#include "base/error.h"
#include "text/utf8.h"

namespace indexcache {

namespace {

constexpr size_t kFirstWindow = 128;
constexpr size_t kMaxJitStack = 1 << 20;

using SetBits = std::bitset<kMaxPatternSets>;

// Half-open range of code points of the text.
struct Range {
  uint32_t begin;
  uint32_t end;
};

struct Alphabet {
  std::vector<uint8_t> symbol_of;   // by code point
  std::vector<SetBits> membership;  // by symbol: the sets that hold its code points
};

Alphabet make_alphabet(std::span<const CodePointSet> sets, const std::string& where) {
  if (sets.size() > kMaxPatternSets)
    fail("{}: {} different character classes, expected at most {}", where, sets.size(),
         kMaxPatternSets);
  // Which sets begin or end at each code point where anything changes.
  std::map<uint32_t, SetBits> toggles;
  toggles[0];
  for (size_t i = 0; i < sets.size(); ++i) {
    for (const CodePointRange& range : sets[i].ranges) {
      toggles[range.first].flip(i);
      toggles[range.last + 1].flip(i);
    }
  }
  Alphabet alphabet;
  alphabet.symbol_of.resize(kMaxCodePoint + 1);
  std::unordered_map<SetBits, size_t> symbols;
  SetBits current;
  for (auto it = toggles.begin(); it != toggles.end() && it->first <= kMaxCodePoint; ++it) {
    current ^= it->second;
    const auto [symbol, is_new] = symbols.try_emplace(current, symbols.size());
    if (is_new) alphabet.membership.push_back(current);
    if (symbols.size() > 256)
      fail("{}: the patterns tell more than 256 kinds of character apart", where);
    const auto after = std::next(it);
    const uint32_t end =
        after == toggles.end() ? kMaxCodePoint + 1 : std::min(after->first, kMaxCodePoint + 1);
    std::fill(alphabet.symbol_of.begin() + it->first, alphabet.symbol_of.begin() + end,
              static_cast<uint8_t>(symbol->second));
  }
  return alphabet;
}

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};

// One pattern over symbols.
struct Matcher {
  std::unique_ptr<pcre2_code, CodeDeleter> code;
  std::array<bool, 256> can_begin;  // symbols with which a match may begin
  SplitBehavior behavior;
  bool invert;
  std::string where;
};

std::string pattern_over_symbols(const SplitPattern& pattern,
                                 const std::vector<size_t>& set_numbers, const Alphabet& alphabet) {
  std::vector<std::string> classes;
  for (const size_t number : set_numbers) {
    std::string text = "[";
    for (size_t symbol = 0; symbol < alphabet.membership.size(); ++symbol) {
      if (alphabet.membership[symbol][number]) text += fmt::format("\\x{:02x}", symbol);
    }
    if (text.size() == 1) text += "^\\x00-\\xff";  // the empty set
    classes.push_back(text + "]");
  }
  std::string out;
  for (const SplitPattern::Part& part : pattern.parts) {
    out += part.set >= 0 ? classes[static_cast<size_t>(part.set)] : part.syntax;
  }
  return out;
}

Matcher compile(const SplitStage& stage, const std::vector<size_t>& set_numbers,
                const Alphabet& alphabet) {
  const std::string text = pattern_over_symbols(stage.pattern, set_numbers, alphabet);
  int error = 0;
  PCRE2_SIZE error_at = 0;
  Matcher matcher;
  matcher.behavior = stage.behavior;
  matcher.invert = stage.invert;
  matcher.where = stage.where;
  matcher.code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), 0,
                                   &error, &error_at, nullptr));
  if (matcher.code == nullptr) {
    std::array<PCRE2_UCHAR, 256> message{};
    pcre2_get_error_message(error, message.data(), message.size());
    fail("{}: the pattern does not compile: {}", stage.where,
         reinterpret_cast<const char*>(message.data()));
  }
  uint32_t matches_empty = 0;
  pcre2_pattern_info(matcher.code.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) fail("{}: the pattern matches the empty text", stage.where);

  const uint8_t* bitmap = nullptr;
  pcre2_pattern_info(matcher.code.get(), PCRE2_INFO_FIRSTBITMAP, &bitmap);
  uint32_t first_kind = 0;
  uint32_t first_unit = 0;
  pcre2_pattern_info(matcher.code.get(), PCRE2_INFO_FIRSTCODETYPE, &first_kind);
  pcre2_pattern_info(matcher.code.get(), PCRE2_INFO_FIRSTCODEUNIT, &first_unit);
  for (size_t symbol = 0; symbol < 256; ++symbol) {
    matcher.can_begin[symbol] = bitmap != nullptr ? (bitmap[symbol / 8] >> (symbol % 8)) & 1
                                : first_kind == 1 ? symbol == first_unit
                                                  : true;
  }
  // Without a JIT compiler for this machine PCRE2 interprets the same pattern.
  const int jit =
      pcre2_jit_compile(matcher.code.get(), PCRE2_JIT_COMPLETE | PCRE2_JIT_PARTIAL_HARD);
  if (jit == PCRE2_ERROR_NOMEMORY) fail("{}: the pattern is too large to compile", stage.where);
  return matcher;
}

// What PCRE2 needs to match; one for each thread.
class MatchState {
 public:
  MatchState()
      : data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        stack_(pcre2_jit_stack_create(32 * 1024, kMaxJitStack, nullptr)) {
    if (data_ == nullptr || context_ == nullptr || stack_ == nullptr) throw std::bad_alloc();
    pcre2_jit_stack_assign(context_, nullptr, stack_);
  }
  ~MatchState() {
    pcre2_match_data_free(data_);
    pcre2_match_context_free(context_);
    pcre2_jit_stack_free(stack_);
  }
  MatchState(const MatchState&) = delete;
  MatchState& operator=(const MatchState&) = delete;

  // The end of the match that begins at `at`, or `at` itself if there is none.
  size_t match_end(const Matcher& matcher, std::span<const uint8_t> symbols, size_t at,
                   size_t* budget) {
    for (size_t window = kFirstWindow;; window *= 2) {
      const bool whole = window >= symbols.size() - at;
      const size_t visible = whole ? symbols.size() : at + window;
      if (window > kFirstWindow) {
        if (window > *budget) too_slow(matcher);
        *budget -= window;
      }
      pcre2_set_match_limit(context_, static_cast<uint32_t>(std::min<size_t>(
                                          1000 + 16 * (visible - at), UINT32_MAX)));
      const uint32_t options =
          PCRE2_ANCHORED | (whole ? 0u : static_cast<uint32_t>(PCRE2_PARTIAL_HARD));
      const int rc =
          pcre2_match(matcher.code.get(), symbols.data(), visible, at, options, data_, context_);
      if (rc == PCRE2_ERROR_NOMATCH) return at;
      if (rc == PCRE2_ERROR_PARTIAL) continue;
      if (rc < 0) too_slow(matcher);
      return pcre2_get_ovector_pointer(data_)[1];
    }
  }

 private:
  [[noreturn]] static void too_slow(const Matcher& matcher) {
    fail("{}: the pattern needs too many steps on this text", matcher.where);
  }

  pcre2_match_data* data_;
  pcre2_match_context* context_;
  pcre2_jit_stack* stack_;
};

struct Segment {
  Range range;
  bool matched;
};

// Covers the piece with matches and what lies between them.
void find_segments(const Matcher& matcher, std::span<const uint8_t> symbols, Range piece,
                   MatchState& state, size_t* budget, std::vector<Segment>& out) {
  out.clear();
  const std::span<const uint8_t> text = symbols.subspan(piece.begin, piece.end - piece.begin);
  size_t unmatched_from = 0;
  const auto add = [&](size_t begin, size_t end, bool matched) {
    if (begin == end) return;
    out.push_back(
        {{piece.begin + static_cast<uint32_t>(begin), piece.begin + static_cast<uint32_t>(end)},
         matched != matcher.invert});
  };
  for (size_t at = 0; at < text.size();) {
    const size_t end =
        matcher.can_begin[text[at]] ? state.match_end(matcher, text, at, budget) : at;
    if (end == at) {
      ++at;
      continue;
    }
    add(unmatched_from, at, false);
    add(at, end, true);
    at = unmatched_from = end;
  }
  add(unmatched_from, text.size(), false);
}

void apply_behavior(SplitBehavior behavior, const std::vector<Segment>& segments,
                    std::vector<Range>& out) {
  switch (behavior) {
    case SplitBehavior::kIsolated:
      for (const Segment& segment : segments) out.push_back(segment.range);
      return;
    case SplitBehavior::kRemoved:
      for (const Segment& segment : segments) {
        if (!segment.matched) out.push_back(segment.range);
      }
      return;
    case SplitBehavior::kContiguous:
      for (size_t i = 0; i < segments.size(); ++i) {
        if (i > 0 && segments[i].matched == segments[i - 1].matched) {
          out.back().end = segments[i].range.end;
        } else {
          out.push_back(segments[i].range);
        }
      }
      return;
    case SplitBehavior::kMergedWithPrevious:
      for (size_t i = 0; i < segments.size(); ++i) {
        if (i > 0 && segments[i].matched && !segments[i - 1].matched) {
          out.back().end = segments[i].range.end;
        } else {
          out.push_back(segments[i].range);
        }
      }
      return;
    case SplitBehavior::kMergedWithNext:
      for (size_t i = 0; i < segments.size(); ++i) {
        out.push_back(segments[i].range);
        if (segments[i].matched && i + 1 < segments.size() && !segments[i + 1].matched) {
          out.back().end = segments[++i].range.end;
        }
      }
      return;
  }
}

}  // namespace

struct Splitter::Impl {
  Alphabet alphabet;
  std::vector<Matcher> matchers;
};

Splitter::Splitter(std::vector<SplitStage> stages) {
  auto impl = std::make_unique<Impl>();
  if (stages.empty()) {
    impl_ = std::move(impl);
    return;
  }
  std::vector<CodePointSet> sets;
  std::vector<std::vector<size_t>> numbers;  // by stage and its set: which of `sets`
  for (const SplitStage& stage : stages) {
    auto& stage_numbers = numbers.emplace_back();
    for (const CodePointSet& set : stage.pattern.sets) {
      const auto found = std::find(sets.begin(), sets.end(), set);
      stage_numbers.push_back(static_cast<size_t>(found - sets.begin()));
      if (found == sets.end()) sets.push_back(set);
    }
    if (sets.size() > kMaxPatternSets) break;
  }
  impl->alphabet = make_alphabet(sets, stages.back().where);
  for (size_t i = 0; i < stages.size(); ++i) {
    impl->matchers.push_back(compile(stages[i], numbers[i], impl->alphabet));
  }
  impl_ = std::move(impl);
}

Splitter::~Splitter() = default;
Splitter::Splitter(Splitter&&) noexcept = default;
Splitter& Splitter::operator=(Splitter&&) noexcept = default;

std::vector<std::string_view> Splitter::split(std::string_view text) const {
  CHECK_LT(text.size(), size_t{1} << 31);
  if (text.empty()) return {};
  if (impl_->matchers.empty()) return {text};

  std::vector<uint8_t> symbols;
  symbols.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    CHECK(step.valid);
    symbols.push_back(impl_->alphabet.symbol_of[step.code_point]);
    at += step.length;
  }

  std::vector<Range> pieces = {{0, static_cast<uint32_t>(symbols.size())}};
  std::vector<Range> finer;
  std::vector<Segment> segments;
  thread_local MatchState state;
  for (const Matcher& matcher : impl_->matchers) {
    // An honest pattern reads each window a few times; a million code points are free for short
    // texts.
    size_t budget = 1'000'000 + 64 * symbols.size();
    finer.clear();
    for (const Range& piece : pieces) {
      find_segments(matcher, symbols, piece, state, &budget, segments);
      apply_behavior(matcher.behavior, segments, finer);
    }
    pieces.swap(finer);
  }

  std::vector<std::string_view> out;
  out.reserve(pieces.size());
  size_t byte = 0;
  uint32_t index = 0;
  const auto byte_at = [&](uint32_t target) {
    for (; index < target; ++index) byte += utf8_step(text, byte).length;
    return byte;
  };
  for (const Range& piece : pieces) {
    const size_t begin = byte_at(piece.begin);
    out.push_back(text.substr(begin, byte_at(piece.end) - begin));
  }
  return out;
}

}  // namespace indexcache
