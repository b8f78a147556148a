#include "text/jinja_parser.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "text/jinja_lexer.h"

namespace indexcache::jinja {

namespace {

using TokenKind = Token::Kind;
using Kind = Expr::Kind;

std::string describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kBlockEnd:
      return "%}";
    case TokenKind::kVariableEnd:
      return "}}";
    default:
      return printable(token.text, 40);
  }
}

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Block run() {
    Block block = statements({});
    if (current().kind != TokenKind::kEnd) unexpected();
    return block;
  }

 private:
  const Token& current() const { return tokens_[at_]; }
  const Token& next_token() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  void advance() {
    if (at_ + 1 < tokens_.size()) ++at_;
  }
  [[noreturn]] void wrong(const std::string& what) const {
    fail("line {}: {}", current().line, what);
  }
  [[noreturn]] void unexpected() const { wrong(fmt::format("unexpected {}", describe(current()))); }

  bool is_operator(std::string_view text) const {
    return current().kind == TokenKind::kOperator && current().text == text;
  }
  bool is_name(std::string_view text) const {
    return current().kind == TokenKind::kName && current().text == text;
  }
  bool skip_operator(std::string_view text) {
    if (!is_operator(text)) return false;
    advance();
    return true;
  }
  bool skip_name(std::string_view text) {
    if (!is_name(text)) return false;
    advance();
    return true;
  }
  void expect(TokenKind kind, const char* what) {
    if (current().kind != kind)
      wrong(fmt::format("found {}, expected {}", describe(current()), what));
    advance();
  }
  void expect_operator(const char* text) {
    if (!is_operator(text)) wrong(fmt::format("found {}, expected {}", describe(current()), text));
    advance();
  }
  void expect_name(const char* text) {
    if (!is_name(text)) wrong(fmt::format("found {}, expected {}", describe(current()), text));
    advance();
  }
  std::string take_name() {
    std::string name = current().text;
    expect(TokenKind::kName, "a name");
    return name;
  }

  // Guards the recursion of the parser itself.
  struct Nested {
    explicit Nested(Parser* p) : parser(p) {
      if (++parser->nesting_ > kMaxNesting)
        parser->wrong(fmt::format("nested deeper than {} levels", kMaxNesting));
    }
    ~Nested() { --parser->nesting_; }
    Parser* parser;
  };

  // A node above `args`: guards the recursion of whoever walks the tree.
  ExprPtr node(Kind kind, std::vector<ExprPtr> args, std::string name = {}) {
    auto out = std::make_unique<Expr>();
    out->kind = kind;
    out->line = current().line;
    out->name = std::move(name);
    for (const ExprPtr& arg : args)
      if (arg) out->depth = std::max(out->depth, arg->depth + 1);
    out->args = std::move(args);
    check_depth(*out);
    return out;
  }
  void check_depth(const Expr& expr) const {
    if (expr.depth > kMaxNesting)
      wrong(fmt::format("an expression nested deeper than {} levels", kMaxNesting));
  }
  template <class... Args>
  static std::vector<ExprPtr> list(Args... args) {
    std::vector<ExprPtr> out;
    (out.push_back(std::move(args)), ...);
    return out;
  }
  ExprPtr constant(Value value) {
    ExprPtr out = node(Kind::kConst, {});
    out->constant = std::move(value);
    return out;
  }

  // --- statements ---

  Block statements(std::initializer_list<std::string_view> ends) {
    const Nested nested(this);
    Block block;
    while (current().kind != TokenKind::kEnd) {
      if (current().kind == TokenKind::kData) {
        Stmt stmt;
        stmt.line = current().line;
        stmt.text = current().text;
        block.push_back(std::move(stmt));
        advance();
      } else if (current().kind == TokenKind::kVariableBegin) {
        advance();
        Stmt stmt = statement(Stmt::Kind::kOutput);
        stmt.exprs.push_back(tuple(true, {}));
        block.push_back(std::move(stmt));
        expect(TokenKind::kVariableEnd, "}}");
      } else {
        const Token& name = next_token();
        if (name.kind == TokenKind::kName &&
            std::find(ends.begin(), ends.end(), name.text) != ends.end()) {
          advance();
          return block;
        }
        expect(TokenKind::kBlockBegin, "a tag");
        block.push_back(block_statement());
      }
    }
    if (ends.size() > 0)
      wrong(fmt::format("the template ends where {} is expected", *(ends.end() - 1)));
    return block;
  }

  Stmt statement(Stmt::Kind kind) {
    Stmt stmt;
    stmt.kind = kind;
    stmt.line = current().line;
    return stmt;
  }
  void end_tag() { expect(TokenKind::kBlockEnd, "%}"); }

  // A body up to {% end %}.
  Block body(std::string_view end) {
    end_tag();
    Block block = statements({end});
    advance();
    end_tag();
    return block;
  }

  Stmt block_statement() {
    const std::string tag = take_name();
    if (tag == "if") return if_statement();
    if (tag == "for") return for_statement();
    if (tag == "set") return set_statement();
    if (tag == "macro") return macro_statement();
    if (tag == "with") return with_statement();
    if (tag == "filter") {
      Stmt stmt = statement(Stmt::Kind::kFilterBlock);
      stmt.exprs.push_back(filter(nullptr, true));
      stmt.bodies.push_back(body("endfilter"));
      return stmt;
    }
    if (tag == "generation") {
      Stmt stmt = statement(Stmt::Kind::kPlain);
      stmt.bodies.push_back(body("endgeneration"));
      return stmt;
    }
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) wrong(fmt::format("{} outside of a loop", tag));
      Stmt stmt = statement(tag == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue);
      end_tag();
      return stmt;
    }
    wrong(fmt::format("the tag {} is not supported", printable(tag, 40)));
  }

  Stmt if_statement() {
    Stmt stmt = statement(Stmt::Kind::kIf);
    while (true) {
      stmt.exprs.push_back(tuple(false, {}));
      end_tag();
      stmt.bodies.push_back(statements({"elif", "else", "endif"}));
      const std::string tag = take_name();
      if (tag == "elif") continue;
      if (tag == "else") {
        end_tag();
        stmt.bodies.push_back(statements({"endif"}));
        advance();
      }
      end_tag();
      return stmt;
    }
  }

  Stmt for_statement() {
    Stmt stmt = statement(Stmt::Kind::kFor);
    stmt.target = target(true, "in");
    expect_name("in");
    stmt.exprs.push_back(tuple(false, "recursive"));
    stmt.exprs.push_back(skip_name("if") ? expression() : nullptr);
    if (is_name("recursive")) wrong("recursive loops are not supported");
    end_tag();
    ++loops_;
    stmt.bodies.push_back(statements({"else", "endfor"}));
    --loops_;
    stmt.bodies.emplace_back();
    if (take_name() == "else") {
      end_tag();
      stmt.bodies.back() = statements({"endfor"});
      advance();
    }
    end_tag();
    return stmt;
  }

  Stmt set_statement() {
    Stmt stmt = statement(Stmt::Kind::kSet);
    stmt.target = target(true, {});
    if (skip_operator("=")) {
      stmt.exprs.push_back(tuple(true, {}));
      end_tag();
      return stmt;
    }
    stmt.kind = Stmt::Kind::kSetBlock;
    stmt.exprs.push_back(is_operator("|") ? filter(nullptr, false) : nullptr);
    stmt.bodies.push_back(body("endset"));
    return stmt;
  }

  Stmt macro_statement() {
    Stmt stmt = statement(Stmt::Kind::kMacro);
    stmt.text = take_name();
    expect_operator("(");
    while (!is_operator(")")) {
      if (!stmt.names.empty()) expect_operator(",");
      stmt.names.push_back(take_name());
      if (skip_operator("=")) {
        stmt.exprs.push_back(expression());
      } else if (!stmt.exprs.empty()) {
        wrong("a parameter without a default follows one with a default");
      }
    }
    advance();
    const int loops = std::exchange(loops_, 0);
    stmt.bodies.push_back(body("endmacro"));
    loops_ = loops;
    return stmt;
  }

  Stmt with_statement() {
    Stmt stmt = statement(Stmt::Kind::kWith);
    while (current().kind != TokenKind::kBlockEnd) {
      if (!stmt.names.empty()) expect_operator(",");
      stmt.names.push_back(take_name());
      expect_operator("=");
      stmt.exprs.push_back(expression());
    }
    stmt.bodies.push_back(body("endwith"));
    return stmt;
  }

  // What may be assigned to: a name, names, or an attribute of a namespace.
  ExprPtr target(bool many, std::string_view end) {
    std::vector<ExprPtr> names;
    bool is_tuple = false;
    while (true) {
      if (skip_operator("(")) {
        names.push_back(target(true, {}));
        expect_operator(")");
      } else {
        const std::string name = take_name();
        if (name == "true" || name == "false" || name == "none" || name == "True" ||
            name == "False" || name == "None") {
          wrong(fmt::format("cannot assign to {}", name));
        }
        ExprPtr item = node(Kind::kName, {}, name);
        if (skip_operator(".")) item = node(Kind::kAttribute, list(std::move(item)), take_name());
        names.push_back(std::move(item));
      }
      if (!many || !is_operator(",")) break;
      advance();
      is_tuple = true;
      if (is_operator("=") || is_operator(")") || (!end.empty() && is_name(end))) break;
    }
    return is_tuple ? node(Kind::kTuple, std::move(names)) : std::move(names[0]);
  }

  // --- expressions ---

  bool tuple_ends(std::string_view end) const {
    return current().kind == TokenKind::kVariableEnd || current().kind == TokenKind::kBlockEnd ||
           is_operator(")") || (!end.empty() && is_name(end));
  }

  ExprPtr tuple(bool conditional, std::string_view end, bool parentheses = false) {
    const Nested nested(this);
    std::vector<ExprPtr> items;
    bool is_tuple = false;
    while (true) {
      if (!items.empty()) expect_operator(",");
      if (tuple_ends(end)) break;
      items.push_back(conditional ? expression() : or_expression());
      if (!is_operator(",")) break;
      is_tuple = true;
    }
    if (!is_tuple && !items.empty()) return std::move(items[0]);
    if (!is_tuple && !parentheses) unexpected();
    return node(Kind::kTuple, std::move(items));
  }

  ExprPtr expression() {
    const Nested nested(this);
    ExprPtr left = or_expression();
    while (skip_name("if")) {
      ExprPtr condition = or_expression();
      ExprPtr otherwise = skip_name("else") ? expression() : nullptr;
      left = node(Kind::kConditional,
                  list(std::move(condition), std::move(left), std::move(otherwise)));
    }
    return left;
  }

  ExprPtr or_expression() {
    const Nested nested(this);
    ExprPtr left = and_expression();
    while (skip_name("or")) {
      ExprPtr right = and_expression();
      left = node(Kind::kOr, list(std::move(left), std::move(right)));
    }
    return left;
  }

  ExprPtr and_expression() {
    ExprPtr left = not_expression();
    while (skip_name("and")) {
      ExprPtr right = not_expression();
      left = node(Kind::kAnd, list(std::move(left), std::move(right)));
    }
    return left;
  }

  ExprPtr not_expression() {
    const Nested nested(this);
    if (skip_name("not")) return node(Kind::kNot, list(not_expression()));
    return comparison();
  }

  ExprPtr comparison() {
    ExprPtr first = sum();
    std::vector<ExprPtr> args;
    std::vector<std::string> operators;
    while (true) {
      std::string name;
      for (const char* op : {"==", "!=", "<", "<=", ">", ">="})
        if (is_operator(op)) name = op;
      if (is_name("in")) name = "in";
      if (is_name("not") && next_token().kind == TokenKind::kName && next_token().text == "in") {
        name = "not in";
        advance();
      }
      if (name.empty()) break;
      advance();
      if (operators.empty()) args.push_back(std::move(first));
      args.push_back(sum());
      operators.push_back(name);
    }
    if (operators.empty()) return first;
    ExprPtr out = node(Kind::kCompare, std::move(args));
    out->names = std::move(operators);
    return out;
  }

  template <class Operand>
  ExprPtr binary(std::initializer_list<const char*> operators, Operand operand) {
    ExprPtr left = operand();
    while (true) {
      const auto op = std::find_if(operators.begin(), operators.end(),
                                   [&](const char* name) { return is_operator(name); });
      if (op == operators.end()) return left;
      advance();
      ExprPtr right = operand();
      left = node(Kind::kBinary, list(std::move(left), std::move(right)), *op);
    }
  }

  ExprPtr sum() {
    return binary({"+", "-"}, [&] { return concatenation(); });
  }
  ExprPtr concatenation() {
    std::vector<ExprPtr> args;
    args.push_back(product());
    while (skip_operator("~")) args.push_back(product());
    return args.size() == 1 ? std::move(args[0]) : node(Kind::kConcat, std::move(args));
  }
  ExprPtr product() {
    return binary({"*", "/", "//", "%"}, [&] { return power(); });
  }
  ExprPtr power() {
    return binary({"**"}, [&] { return unary(true); });
  }

  ExprPtr unary(bool with_filter) {
    const Nested nested(this);
    ExprPtr out;
    if (skip_operator("-")) {
      out = node(Kind::kNegative, list(unary(false)));
    } else if (skip_operator("+")) {
      out = node(Kind::kPositive, list(unary(false)));
    } else {
      out = primary();
    }
    out = postfix(std::move(out));
    return with_filter ? filters(std::move(out)) : std::move(out);
  }

  ExprPtr primary() {
    const Token token = current();
    switch (token.kind) {
      case TokenKind::kName: {
        advance();
        if (token.text == "true" || token.text == "True") return constant({true});
        if (token.text == "false" || token.text == "False") return constant({false});
        if (token.text == "none" || token.text == "None") return constant({None{}});
        return node(Kind::kName, {}, token.text);
      }
      case TokenKind::kString: {
        std::string text;
        for (; current().kind == TokenKind::kString; advance()) text += current().text;
        return constant(text_value(text));
      }
      case TokenKind::kInteger: {
        int64_t value = 0;
        const char* end = token.text.data() + token.text.size();
        if (std::from_chars(token.text.data(), end, value).ec != std::errc())
          wrong(fmt::format("the integer {} is too large", printable(token.text, 40)));
        advance();
        return constant({value});
      }
      case TokenKind::kFloat: {
        double value = 0;
        std::from_chars(token.text.data(), token.text.data() + token.text.size(), value);
        advance();
        return constant({value});
      }
      default:
        break;
    }
    if (skip_operator("(")) {
      ExprPtr out = tuple(true, {}, true);
      expect_operator(")");
      return out;
    }
    if (skip_operator("[")) return node(Kind::kList, items("]"));
    if (skip_operator("{")) return dict();
    unexpected();
  }

  std::vector<ExprPtr> items(const char* end) {
    std::vector<ExprPtr> out;
    while (!is_operator(end)) {
      if (!out.empty()) expect_operator(",");
      if (is_operator(end)) break;
      out.push_back(expression());
    }
    advance();
    return out;
  }

  ExprPtr dict() {
    std::vector<ExprPtr> args;
    while (!is_operator("}")) {
      if (!args.empty()) expect_operator(",");
      if (is_operator("}")) break;
      args.push_back(expression());
      expect_operator(":");
      args.push_back(expression());
    }
    advance();
    return node(Kind::kDict, std::move(args));
  }

  ExprPtr postfix(ExprPtr left) {
    while (true) {
      if (skip_operator(".")) {
        if (current().kind == TokenKind::kInteger) {
          ExprPtr index = primary();
          left = node(Kind::kItem, list(std::move(left), std::move(index)));
        } else {
          left = node(Kind::kAttribute, list(std::move(left)), take_name());
        }
      } else if (skip_operator("[")) {
        left = node(Kind::kItem, list(std::move(left), subscript()));
        expect_operator("]");
      } else if (is_operator("(")) {
        left = call(Kind::kCall, std::move(left), {});
      } else {
        return left;
      }
    }
  }

  ExprPtr subscript() {
    const auto bound = [&]() -> ExprPtr {
      return is_operator(":") || is_operator("]") ? nullptr : expression();
    };
    ExprPtr from = bound();
    if (!skip_operator(":")) {
      if (!from) unexpected();
      return from;
    }
    ExprPtr to = bound();
    ExprPtr step = skip_operator(":") ? bound() : nullptr;
    return node(Kind::kSlice, list(std::move(from), std::move(to), std::move(step)));
  }

  ExprPtr filters(ExprPtr left) {
    while (true) {
      if (is_operator("|")) {
        left = filter(std::move(left), false);
      } else if (is_name("is")) {
        left = test(std::move(left));
      } else if (is_operator("(")) {
        left = call(Kind::kCall, std::move(left), {});
      } else {
        return left;
      }
    }
  }

  ExprPtr filter(ExprPtr left, bool begun) {
    while (begun || is_operator("|")) {
      if (!begun) advance();
      begun = false;
      const std::string name = take_name();
      left = is_operator("(") ? call(Kind::kFilter, std::move(left), name)
                              : node(Kind::kFilter, list(std::move(left)), name);
    }
    return left;
  }

  ExprPtr test(ExprPtr left) {
    advance();
    const bool negated = skip_name("not");
    const std::string name = take_name();
    ExprPtr out;
    const TokenKind kind = current().kind;
    const bool argument = kind == TokenKind::kName || kind == TokenKind::kString ||
                          kind == TokenKind::kInteger || kind == TokenKind::kFloat ||
                          is_operator("[") || is_operator("{");
    if (is_operator("(")) {
      out = call(Kind::kTest, std::move(left), name);
    } else if (argument && !is_name("else") && !is_name("or") && !is_name("and")) {
      if (is_name("is")) wrong("tests cannot be chained with is");
      ExprPtr value = postfix(primary());
      out = node(Kind::kTest, list(std::move(left), std::move(value)), name);
    } else {
      out = node(Kind::kTest, list(std::move(left)), name);
    }
    return negated ? node(Kind::kNot, list(std::move(out))) : std::move(out);
  }

  ExprPtr call(Kind kind, ExprPtr left, const std::string& name) {
    expect_operator("(");
    std::vector<ExprPtr> args;
    args.push_back(std::move(left));
    std::vector<std::pair<std::string, ExprPtr>> keywords;
    for (bool first = true; !is_operator(")"); first = false) {
      if (!first) expect_operator(",");
      if (is_operator(")")) break;
      if (is_operator("*") || is_operator("**")) wrong("* in a call is not supported");
      if (current().kind == TokenKind::kName && next_token().kind == TokenKind::kOperator &&
          next_token().text == "=") {
        std::string key = take_name();
        advance();
        keywords.emplace_back(std::move(key), expression());
      } else {
        if (!keywords.empty()) wrong("a positional argument follows a keyword argument");
        args.push_back(expression());
      }
    }
    advance();
    ExprPtr out = node(kind, std::move(args), name);
    for (const auto& [key, value] : keywords) out->depth = std::max(out->depth, value->depth + 1);
    check_depth(*out);
    out->keywords = std::move(keywords);
    return out;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  int loops_ = 0;
};

}  // namespace

Block parse_template(std::string_view source) { return Parser(lex(source)).run(); }

}  // namespace indexcache::jinja
