#include "text/jinja_lexer.h"

#include <algorithm>

#include "base/error.h"
#include "text/jinja_strings.h"
#include "text/utf8.h"

namespace indexcache::jinja {

namespace {

constexpr std::string_view kOperators[] = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                           "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                           ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_start(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_name(char c) { return is_name_start(c) || is_digit(c); }

// "\r\n" and "\r" are "\n", and one line break at the end of the template is dropped.
std::string normalized(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  std::vector<Token> run() {
    while (at_ < source_.size()) root();
    add(Token::Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void wrong(const std::string& what) const { fail("line {}: {}", line_, what); }

  std::string_view rest() const { return std::string_view(source_).substr(at_); }
  bool looking_at(std::string_view text) const { return rest().starts_with(text); }

  void add(Token::Kind kind, std::string text) {
    tokens_.push_back({kind, std::move(text), line_});
  }

  void advance_to(size_t end) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(at_),
                                         source_.begin() + static_cast<ptrdiff_t>(end), '\n'));
    line_starting_ = end > 0 && end > at_ && source_[end - 1] == '\n';
    at_ = end;
  }

  size_t skip_space(size_t at) const {
    while (at < source_.size()) {
      const size_t length = space_length(source_, at);
      if (length == 0) break;
      at += length;
    }
    return at;
  }

  // The text before a tag, less what its sign and lstrip_blocks take.
  void data(size_t end, char sign, bool block) {
    std::string_view text = std::string_view(source_).substr(at_, end - at_);
    if (sign == '-') {
      text = text.substr(0, strip_end(text));
    } else if (sign != '+' && block) {
      const size_t newline = text.rfind('\n');
      const size_t begin = newline == text.npos ? 0 : newline + 1;
      const std::string_view last = text.substr(begin);
      if ((begin > 0 || line_starting_) && strip_end(last) == 0) text = text.substr(0, begin);
    }
    if (!text.empty()) add(Token::Kind::kData, std::string(text));
  }

  static char sign_of(char c) { return c == '-' || c == '+' ? c : '\0'; }
  char sign_at(size_t at) const { return at < source_.size() ? sign_of(source_[at]) : '\0'; }

  void root() {
    size_t tag = at_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= source_.size()) {
        add(Token::Kind::kData, source_.substr(at_));
        advance_to(source_.size());
        return;
      }
      const char kind = source_[tag + 1];
      if (kind == '%' || kind == '{' || kind == '#') break;
    }
    const char kind = source_[tag + 1];
    const char sign = sign_at(tag + 2);
    const size_t inside = tag + 2 + (sign != 0 ? 1 : 0);
    if (kind == '%') {
      if (const size_t body = raw_begin(inside); body != 0) return raw(tag, sign, body);
    }
    data(tag, sign, kind != '{');
    if (kind == '#') return comment(inside);
    advance_to(inside);
    add(kind == '%' ? Token::Kind::kBlockBegin : Token::Kind::kVariableBegin, "");
    this->inside(kind == '%');
  }

  // Where the text after "{% raw %}" begins; 0 when this is another tag.
  size_t raw_begin(size_t at) const {
    at = skip_space(at);
    if (!std::string_view(source_).substr(at).starts_with("raw")) return 0;
    at = skip_space(at + 3);
    const std::string_view end = std::string_view(source_).substr(at);
    if (end.starts_with("-%}")) return skip_space(at + 3);
    return end.starts_with("%}") ? at + 2 : 0;
  }

  void raw(size_t tag, char sign, size_t body) {
    data(tag, sign, true);
    advance_to(body);
    for (size_t at = at_; (at = source_.find("{%", at)) != std::string::npos; ++at) {
      const char end_sign = sign_at(at + 2);
      size_t name = skip_space(at + 2 + (end_sign != 0 ? 1 : 0));
      if (!std::string_view(source_).substr(name).starts_with("endraw")) continue;
      name = skip_space(name + 6);
      const size_t end = tag_end(name, true);
      if (end == 0) continue;
      data(at, end_sign, true);
      advance_to(end);
      return;
    }
    wrong("a raw block without an end");
  }

  // Behind a "%}" or "}}" at `at`, with the white space that belongs to it; 0 when there is none.
  size_t tag_end(size_t at, bool block) const {
    const std::string_view close = block ? "%}" : "}}";
    const std::string_view text = std::string_view(source_).substr(at);
    if (text.starts_with("-") && text.substr(1).starts_with(close)) return skip_space(at + 3);
    if (block && text.starts_with("+") && text.substr(1).starts_with(close)) return at + 3;
    if (!text.starts_with(close)) return 0;
    return block && text.substr(2).starts_with('\n') ? at + 3 : at + 2;
  }

  void comment(size_t at) {
    const size_t close = source_.find("#}", at);
    if (close == std::string::npos) wrong("a comment without an end");
    size_t end = close + 2;
    const char sign = close > at ? sign_of(source_[close - 1]) : '\0';
    if (sign == '-') {
      end = skip_space(end);
    } else if (sign == 0 && end < source_.size() && source_[end] == '\n') {
      ++end;
    }
    advance_to(end);
  }

  void inside(bool block) {
    std::string open;
    while (true) {
      advance_to(skip_space(at_));
      if (at_ >= source_.size()) wrong(block ? "a block tag without %}" : "{{ without }}");
      if (open.empty()) {
        if (const size_t end = tag_end(at_, block); end != 0) {
          add(block ? Token::Kind::kBlockEnd : Token::Kind::kVariableEnd, "");
          advance_to(end);
          return;
        }
      }
      const char c = source_[at_];
      if (is_digit(c)) {
        number();
      } else if (is_name_start(c)) {
        size_t end = at_;
        while (end < source_.size() && is_name(source_[end])) ++end;
        add(Token::Kind::kName, source_.substr(at_, end - at_));
        advance_to(end);
      } else if (c == '"' || c == '\'') {
        string(c);
      } else {
        operation(open);
      }
    }
  }

  void operation(std::string& open) {
    const auto it = std::ranges::find_if(kOperators, [&](auto o) { return looking_at(o); });
    if (it == std::end(kOperators)) wrong(fmt::format("unexpected {}", printable(rest(), 12)));
    const char c = (*it)[0];
    if (c == '(' || c == '[' || c == '{') open += c == '(' ? ')' : c == '[' ? ']' : '}';
    if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c) wrong(fmt::format("unexpected '{}'", c));
      open.pop_back();
    }
    add(Token::Kind::kOperator, std::string(*it));
    advance_to(at_ + it->size());
  }

  size_t digits(size_t at) const {
    while (at < source_.size() &&
           (is_digit(source_[at]) ||
            (source_[at] == '_' && at + 1 < source_.size() && is_digit(source_[at + 1])))) {
      ++at;
    }
    return at;
  }

  void number() {
    const bool after_dot = !tokens_.empty() && tokens_.back().text == "." &&
                           tokens_.back().kind == Token::Kind::kOperator;
    size_t end = digits(at_);
    bool floating = false;
    if (!after_dot) {
      if (end + 1 < source_.size() && source_[end] == '.' && is_digit(source_[end + 1])) {
        end = digits(end + 1);
        floating = true;
      }
      if (end < source_.size() && (source_[end] == 'e' || source_[end] == 'E')) {
        size_t power = end + 1;
        if (sign_at(power) != 0) ++power;
        if (power < source_.size() && is_digit(source_[power])) {
          end = digits(power);
          floating = true;
        }
      }
    }
    if (end < source_.size() && is_name(source_[end])) wrong("a number runs into a name");
    std::string text = source_.substr(at_, end - at_);
    std::erase(text, '_');
    add(floating ? Token::Kind::kFloat : Token::Kind::kInteger, text);
    advance_to(end);
  }

  void string(char quote) {
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) wrong("a string without an end");
    std::string value;
    if (!unescape(std::string_view(source_).substr(at_ + 1, end - at_ - 1), value))
      wrong("a string with an escape that is not supported");
    add(Token::Kind::kString, std::move(value));
    advance_to(end + 1);
  }

  std::string source_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> lex(std::string_view source) {
  if (const auto at = find_invalid_utf8(source)) fail("not valid UTF-8 at byte {}", *at);
  return Lexer(normalized(source)).run();
}

}  // namespace indexcache::jinja
