#include "text/jinja_run.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "text/jinja_strings.h"

namespace indexcache::jinja {

namespace {

using Kind = Expr::Kind;

constexpr int kMaxDepth = 400;  // of expressions, blocks and macros within each other

// What ends a block early.
enum class Flow { kNext, kBreak, kContinue };

int64_t integer_of(const Value& value) {
  return value.boolean() ? int64_t{*value.boolean()} : *value.integer();
}
bool is_integer(const Value& value) { return value.boolean() || value.integer(); }

int64_t size_of(const Value& value) {
  if (const Text* text = value.text()) return static_cast<int64_t>(text->bytes.size());
  if (const Sequence* s = value.sequence()) return static_cast<int64_t>(s->items.size());
  return 0;
}

class Interpreter : public Runtime {
 public:
  Interpreter(const Limits& limits, int64_t now)
      : limits_(limits), steps_(limits.steps), now_(now) {}

  Text run(const Block& block, const Variables& variables) {
    Scope root;
    root.variables = variables;
    Scope top;
    top.parent = &root;
    scope_ = &top;
    Text out;
    out_ = &out;
    execute(block);
    return out;
  }

  void spend(int64_t steps) override {
    steps_ -= steps;
    if (steps_ < 0) fail("it takes more than {} steps", limits_.steps);
  }

  int64_t unix_time() const override { return now_; }
  Namespace* new_namespace() override { return &namespaces_.emplace_back(); }

  Value get_attribute(const Value& value, const std::string& name) override {
    if (value.is_undefined()) fail_undefined(value);
    if (const auto* space = value.get<Namespace*>()) return attribute_of(**space, name);
    if (has_method(value, name)) return method(value, name);
    if (const auto* loop = value.get<Loop*>()) return attribute_of(**loop, name);
    if (const Dict* dict = value.dict()) {
      spend(static_cast<int64_t>(dict->items.size() / 8));
      if (const Value* found = dict->find(text_value(name))) return *found;
    }
    return missing(value, name);
  }

  Value get_item(const Value& value, const Value& key) override {
    if (value.is_undefined()) fail_undefined(value);
    if (const Dict* dict = value.dict()) {
      spend(static_cast<int64_t>(dict->items.size() / 8));
      if (const Value* found = dict->find(key)) return *found;
    }
    if (is_integer(key)) {
      int64_t index = integer_of(key);
      if (const Sequence* s = value.sequence()) {
        const int64_t size = static_cast<int64_t>(s->items.size());
        if (index < 0) index += size;
        if (index >= 0 && index < size) return s->items[static_cast<size_t>(index)];
      } else if (const Text* text = value.text()) {
        spend(size_of(value) / 8);
        const int64_t size = code_points(text->bytes);
        if (index < 0) index += size;
        if (index >= 0 && index < size) {
          const size_t begin = byte_offset(text->bytes, index);
          return text_value(
              text->slice(begin, begin + byte_offset(text->bytes.substr(begin, 4), 1)));
        }
      }
    }
    if (const Text* name = key.text(); name && !value.dict())
      return get_attribute(value, name->bytes);
    if (const Text* name = key.text(); name && has_method(value, name->bytes))
      return method(value, name->bytes);
    return missing(value, to_text(key).bytes);
  }

  Value call_filter(const std::string& name, const Value& value, const Arguments& args) override {
    spend(1 + size_of(value) / 8);
    return apply_filter(*this, name, value, args);
  }
  bool call_test(const std::string& name, const Value& value, const Arguments& args) override {
    spend(1);
    return apply_test(*this, name, value, args);
  }

 private:
  // Adds the line to an error that has none yet.
  template <class Body>
  auto at_line(int line, Body body) {
    if (++depth_ > kMaxDepth) fail("line {}: nested deeper than {} levels", line, kMaxDepth);
    struct Leave {
      int* depth;
      ~Leave() { --*depth; }
    } leave{&depth_};
    spend(1);
    return body();
  }

  static Value method(const Value& self, const std::string& name) {
    return {Method{std::make_shared<const Value>(self), name}};
  }

  static Value missing(const Value& value, const std::string& name) {
    return undefined(
        fmt::format("'{} object' has no attribute '{}'", type_name(value), printable(name, 60)));
  }

  static Value attribute_of(const Namespace& space, const std::string& name) {
    for (const auto& [key, value] : space.attributes)
      if (key == name) return value;
    return undefined(fmt::format("the namespace has no attribute '{}'", printable(name, 60)));
  }

  static Value attribute_of(const Loop& loop, const std::string& name) {
    const auto index = static_cast<int64_t>(loop.index);
    const auto size = static_cast<int64_t>(loop.items.size());
    if (name == "index") return {index + 1};
    if (name == "index0") return {index};
    if (name == "revindex") return {size - index};
    if (name == "revindex0") return {size - index - 1};
    if (name == "first") return {index == 0};
    if (name == "last") return {index + 1 == size};
    if (name == "length") return {size};
    if (name == "depth") return {int64_t{loop.depth}};
    if (name == "depth0") return {int64_t{loop.depth - 1}};
    if (name == "previtem")
      return index > 0 ? loop.items[loop.index - 1] : undefined("there is no previous item");
    if (name == "nextitem")
      return index + 1 < size ? loop.items[loop.index + 1] : undefined("there is no next item");
    return undefined(fmt::format("the loop has no attribute '{}'", printable(name, 60)));
  }

  // --- statements ---

  // A scope inside the current one. It lives on only if a macro was defined in it.
  class Inside {
   public:
    explicit Inside(Interpreter* run, Scope* parent) : run_(run), outer_(run->scope_) {
      scope_ = std::make_unique<Scope>();
      scope_->parent = parent;
      run_->scope_ = scope_.get();
    }
    ~Inside() {
      run_->scope_ = outer_;
      if (scope_->captured) run_->kept_scopes_.push_back(std::move(scope_));
    }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;

   private:
    Interpreter* run_;
    Scope* outer_;
    std::unique_ptr<Scope> scope_;
  };

  // Text that a body writes, in place of writing it out.
  template <class Body>
  Text capture(Body body) {
    Text text;
    Text* outer = std::exchange(out_, &text);
    struct Restore {
      Text** out;
      Text* outer;
      ~Restore() { *out = outer; }
    } restore{&out_, outer};
    body();
    return text;
  }

  void write(const Text& text) {
    spend(static_cast<int64_t>(text.bytes.size()) / 8);
    written_ += text.bytes.size();
    if (written_ > limits_.output_bytes) fail("it writes more than {} bytes", limits_.output_bytes);
    out_->append(text);
  }

  Flow execute(const Block& block) {
    for (const Stmt& stmt : block) {
      const Flow flow = at_line(stmt.line, [&] { return execute(stmt); });
      if (flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  Flow execute(const Stmt& stmt) {
    switch (stmt.kind) {
      case Stmt::Kind::kData:
        write(own_text(stmt.text));
        return Flow::kNext;
      case Stmt::Kind::kOutput:
        write(to_text(evaluate(*stmt.exprs[0])));
        return Flow::kNext;
      case Stmt::Kind::kIf:
        for (size_t i = 0; i < stmt.exprs.size(); ++i) {
          if (truthy(evaluate(*stmt.exprs[i]))) return execute(stmt.bodies[i]);
        }
        return stmt.bodies.size() > stmt.exprs.size() ? execute(stmt.bodies.back()) : Flow::kNext;
      case Stmt::Kind::kFor:
        execute_for(stmt);
        return Flow::kNext;
      case Stmt::Kind::kSet:
        assign(*stmt.target, evaluate(*stmt.exprs[0]));
        return Flow::kNext;
      case Stmt::Kind::kSetBlock: {
        Value text = text_value(captured(stmt.bodies[0]));
        if (stmt.exprs[0]) text = evaluate_filter(*stmt.exprs[0], &text);
        assign(*stmt.target, text);
        return Flow::kNext;
      }
      case Stmt::Kind::kMacro:
        for (Scope* scope = scope_; scope != nullptr; scope = scope->parent) scope->captured = true;
        set(stmt.text, {&macros_.emplace_back(Macro{&stmt, scope_})});
        return Flow::kNext;
      case Stmt::Kind::kFilterBlock: {
        const Value text = text_value(captured(stmt.bodies[0]));
        write(to_text(evaluate_filter(*stmt.exprs[0], &text)));
        return Flow::kNext;
      }
      case Stmt::Kind::kWith: {
        std::vector<Value> values;
        for (const ExprPtr& expr : stmt.exprs) values.push_back(evaluate(*expr));
        const Inside inside(this, scope_);
        for (size_t i = 0; i < values.size(); ++i) set(stmt.names[i], values[i]);
        return execute(stmt.bodies[0]);
      }
      case Stmt::Kind::kBreak:
        return Flow::kBreak;
      case Stmt::Kind::kContinue:
        return Flow::kContinue;
      case Stmt::Kind::kPlain:
        return execute(stmt.bodies[0]);
    }
    CHECK(false);
  }

  Text captured(const Block& block) {
    return capture([&] {
      const Inside inside(this, scope_);
      execute(block);
    });
  }

  void execute_for(const Stmt& stmt) {
    std::vector<Value> items = iterate(evaluate(*stmt.exprs[0]));
    if (stmt.exprs[1]) {
      std::vector<Value> kept;
      for (const Value& item : items) {
        const Inside inside(this, scope_);
        assign(*stmt.target, item);
        if (truthy(evaluate(*stmt.exprs[1]))) kept.push_back(item);
      }
      items = std::move(kept);
    }
    if (items.empty()) {
      const Inside inside(this, scope_);
      execute(stmt.bodies[1]);
      return;
    }
    Loop& loop = loops_.emplace_back();
    loop.items = std::move(items);
    loop.depth = 1;
    for (; loop.index < loop.items.size(); ++loop.index) {
      const Inside inside(this, scope_);
      set("loop", {&loop});
      assign(*stmt.target, loop.items[loop.index]);
      if (execute(stmt.bodies[0]) == Flow::kBreak) break;
    }
  }

  void set(const std::string& name, Value value) {
    for (auto& [key, old] : scope_->variables) {
      if (key == name) {
        old = std::move(value);
        return;
      }
    }
    scope_->variables.emplace_back(name, std::move(value));
  }

  void assign(const Expr& target, const Value& value) {
    if (target.kind == Kind::kTuple) {
      const std::vector<Value> parts = iterate(value);
      if (parts.size() != target.args.size())
        fail("line {}: found {} values, expected {}", target.line, parts.size(),
             target.args.size());
      for (size_t i = 0; i < parts.size(); ++i) assign(*target.args[i], parts[i]);
    } else if (target.kind == Kind::kAttribute) {
      const Value object = lookup(target.args[0]->name);
      const auto* space = object.get<Namespace*>();
      if (space == nullptr)
        fail("line {}: {} is no namespace", target.line, printable(target.args[0]->name, 60));
      auto& attributes = (*space)->attributes;
      const auto it =
          std::ranges::find(attributes, target.name, &std::pair<std::string, Value>::first);
      if (it == attributes.end()) {
        attributes.emplace_back(target.name, value);
      } else {
        it->second = value;
      }
    } else {
      set(target.name, value);
    }
  }

  // --- expressions ---

  Value lookup(const std::string& name) const {
    for (const Scope* scope = scope_; scope != nullptr; scope = scope->parent) {
      for (const auto& [key, value] : scope->variables)
        if (key == name) return value;
    }
    if (is_function(name)) return {std::make_shared<const Function>(Function{name})};
    return undefined(fmt::format("'{}' is undefined", printable(name, 60)));
  }

  Value evaluate(const Expr& expr) {
    return at_line(expr.line, [&] { return evaluate_now(expr); });
  }

  Value evaluate_now(const Expr& expr) {
    switch (expr.kind) {
      case Kind::kConst:
        return expr.constant;
      case Kind::kName:
        return lookup(expr.name);
      case Kind::kList:
      case Kind::kTuple: {
        std::vector<Value> items;
        for (const ExprPtr& arg : expr.args) items.push_back(evaluate(*arg));
        return sequence_value(std::move(items), expr.kind == Kind::kTuple);
      }
      case Kind::kDict:
        return evaluate_dict(expr);
      case Kind::kNot:
        return {!truthy(evaluate(*expr.args[0]))};
      case Kind::kNegative:
      case Kind::kPositive:
        return evaluate_sign(expr);
      case Kind::kAnd:
      case Kind::kOr: {
        Value left = evaluate(*expr.args[0]);
        return truthy(left) == (expr.kind == Kind::kOr) ? left : evaluate(*expr.args[1]);
      }
      case Kind::kConditional:
        if (truthy(evaluate(*expr.args[0]))) return evaluate(*expr.args[1]);
        return expr.args[2] ? evaluate(*expr.args[2])
                            : undefined("the inline if without else was false");
      case Kind::kBinary:
        return evaluate_binary(expr.name, evaluate(*expr.args[0]), evaluate(*expr.args[1]));
      case Kind::kCompare: {
        Value left = evaluate(*expr.args[0]);
        for (size_t i = 0; i < expr.names.size(); ++i) {
          Value right = evaluate(*expr.args[i + 1]);
          spend((size_of(left) + size_of(right)) / 8);
          if (!holds(*this, expr.names[i], left, right)) return {false};
          left = std::move(right);
        }
        return {true};
      }
      case Kind::kConcat: {
        Text out;
        for (const ExprPtr& arg : expr.args) out.append(to_text(evaluate(*arg)));
        return made(std::move(out));
      }
      case Kind::kAttribute:
        return get_attribute(evaluate(*expr.args[0]), expr.name);
      case Kind::kItem: {
        const Value object = evaluate(*expr.args[0]);
        if (expr.args[1]->kind == Kind::kSlice) return evaluate_slice(object, *expr.args[1]);
        return get_item(object, evaluate(*expr.args[1]));
      }
      case Kind::kSlice:
        fail("line {}: a slice stands alone", expr.line);
      case Kind::kCall:
        return evaluate_call(expr);
      case Kind::kFilter:
        return evaluate_filter(expr, nullptr);
      case Kind::kTest:
        return {call_test(expr.name, evaluate(*expr.args[0]), arguments(expr, expr.name))};
    }
    CHECK(false);
  }

  Value made(Text text) {
    spend(static_cast<int64_t>(text.bytes.size()) / 8);
    if (text.bytes.size() > limits_.output_bytes)
      fail("a text of more than {} bytes", limits_.output_bytes);
    return text_value(std::move(text));
  }

  Value evaluate_dict(const Expr& expr) {
    std::vector<std::pair<Value, Value>> items;
    for (size_t i = 0; i < expr.args.size(); i += 2) {
      Value key = evaluate(*expr.args[i]);
      if (key.dict() || (key.sequence() && !key.sequence()->tuple))
        fail("line {}: a {} cannot be a key", expr.line, type_name(key));
      Value value = evaluate(*expr.args[i + 1]);
      spend(static_cast<int64_t>(items.size()));
      const auto it =
          std::ranges::find_if(items, [&](const auto& item) { return equal(item.first, key); });
      if (it == items.end()) {
        items.emplace_back(std::move(key), std::move(value));
      } else {
        it->second = std::move(value);
      }
    }
    return dict_value(std::move(items));
  }

  Value evaluate_sign(const Expr& expr) {
    const Value value = evaluate(*expr.args[0]);
    if (!value.is_number()) {
      if (value.is_undefined()) fail_undefined(value);
      fail("line {}: a {} has no sign", expr.line, type_name(value));
    }
    const bool negative = expr.kind == Kind::kNegative;
    if (const double* f = value.floating()) return {negative ? -*f : *f};
    const int64_t i = integer_of(value);
    if (negative && i == INT64_MIN) overflow();
    return {negative ? -i : i};
  }

  [[noreturn]] static void overflow() { fail("an integer does not fit in 64 bits"); }

  Value evaluate_binary(const std::string& op, const Value& a, const Value& b) {
    if (a.is_undefined()) fail_undefined(a);
    if (b.is_undefined()) fail_undefined(b);
    if (a.is_number() && b.is_number()) return arithmetic(op, a, b);
    if (op == "+" && a.text() && b.text()) {
      Text out = *a.text();
      out.append(*b.text());
      return made(std::move(out));
    }
    const Sequence *s = a.sequence(), *t = b.sequence();
    if (op == "+" && s && t && s->tuple == t->tuple) {
      std::vector<Value> items = s->items;
      items.insert(items.end(), t->items.begin(), t->items.end());
      spend(static_cast<int64_t>(items.size()));
      return sequence_value(std::move(items), s->tuple);
    }
    if (op == "*" && (is_integer(a) || is_integer(b))) {
      const Value& many = is_integer(a) ? b : a;
      if (many.text() || many.sequence()) return repeated(many, integer_of(is_integer(a) ? a : b));
    }
    if (op == "%" && a.text()) fail("formatting with % is not supported");
    fail("unsupported operand types for {}: '{}' and '{}'", op, type_name(a), type_name(b));
  }

  Value repeated(const Value& value, int64_t count) {
    count = std::max<int64_t>(count, 0);
    int64_t size = 0;
    if (__builtin_mul_overflow(size_of(value), count, &size) ||
        size > static_cast<int64_t>(limits_.output_bytes)) {
      fail("a {} of more than {} items", type_name(value), limits_.output_bytes);
    }
    spend(value.text() ? size / 8 : size);
    if (size == 0) count = 0;
    if (const Text* text = value.text()) {
      Text out;
      for (int64_t i = 0; i < count; ++i) out.append(*text);
      return text_value(std::move(out));
    }
    std::vector<Value> items;
    for (int64_t i = 0; i < count; ++i) {
      const auto& more = value.sequence()->items;
      items.insert(items.end(), more.begin(), more.end());
    }
    return sequence_value(std::move(items), value.sequence()->tuple);
  }

  static Value arithmetic(const std::string& op, const Value& a, const Value& b) {
    const bool division = op == "/" || op == "//" || op == "%";
    if (division && as_double(b) == 0) fail("division by zero");
    const bool integers = !a.floating() && !b.floating();
    if (!integers || op == "/") {
      const double x = as_double(a), y = as_double(b);
      if (op == "+") return {x + y};
      if (op == "-") return {x - y};
      if (op == "*") return {x * y};
      if (op == "/") return {x / y};
      if (op == "//") return {std::floor(x / y)};
      if (op == "**") return {std::pow(x, y)};
      const double rest = std::fmod(x, y);
      return {rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest};
    }
    const int64_t x = integer_of(a), y = integer_of(b);
    int64_t out = 0;
    if (op == "+"   ? __builtin_add_overflow(x, y, &out)
        : op == "-" ? __builtin_sub_overflow(x, y, &out)
                    : op == "*" && __builtin_mul_overflow(x, y, &out)) {
      overflow();
    }
    if (op == "**") return power(x, y);
    if (!division) return {out};
    if (y == -1) {
      if (x == INT64_MIN && op == "//") overflow();
      return {op == "//" ? -x : int64_t{0}};
    }
    const int64_t quotient = x / y, rest = x % y;
    const bool down = rest != 0 && (rest < 0) != (y < 0);
    if (op == "//") return {quotient - (down ? 1 : 0)};
    return {down ? rest + y : rest};
  }

  static Value power(int64_t x, int64_t y) {
    if (y < 0) return {std::pow(static_cast<double>(x), static_cast<double>(y))};
    int64_t out = 1;
    for (int64_t i = 0; i < y && !(x == 0 || x == 1); ++i) {
      if (x == -1) return {y % 2 == 0 ? int64_t{1} : int64_t{-1}};
      if (__builtin_mul_overflow(out, x, &out)) overflow();
    }
    return {x == 0 && y > 0 ? int64_t{0} : out};
  }

  Value evaluate_slice(const Value& object, const Expr& slice) {
    const auto bound = [&](size_t i, int64_t fallback) {
      if (!slice.args[i]) return fallback;
      const Value value = evaluate(*slice.args[i]);
      if (value.is_none()) return fallback;
      if (!is_integer(value)) fail("line {}: a slice by a {}", slice.line, type_name(value));
      return integer_of(value);
    };
    if (object.is_undefined()) fail_undefined(object);
    const Text* text = object.text();
    const Sequence* sequence = object.sequence();
    if (!text && !sequence) return missing(object, "slice");
    std::vector<Text> characters_of;
    if (text) characters_of = characters(*text);
    const int64_t size = text ? static_cast<int64_t>(characters_of.size()) : size_of(object);
    spend(size);
    const int64_t step = bound(2, 1);
    if (step == 0) fail("line {}: a slice by 0", slice.line);
    const int64_t low = step > 0 ? 0 : -1, high = step > 0 ? size : size - 1;
    const auto place = [&](int64_t at) {
      return std::clamp(at < 0 ? (at < -size ? low : at + size) : at, low, high);
    };
    constexpr int64_t kNone = INT64_MIN;
    const int64_t from = bound(0, kNone), to = bound(1, kNone);
    const int64_t first = from == kNone ? (step > 0 ? low : high) : place(from);
    const int64_t last = to == kNone ? (step > 0 ? high : low) : place(to);
    Text out;
    std::vector<Value> items;
    for (int64_t i = first; step > 0 ? i < last : i > last;) {
      if (text) {
        out.append(characters_of[static_cast<size_t>(i)]);
      } else {
        items.push_back(sequence->items[static_cast<size_t>(i)]);
      }
      if (__builtin_add_overflow(i, step, &i)) break;
    }
    return text ? text_value(std::move(out)) : sequence_value(std::move(items), sequence->tuple);
  }

  Arguments arguments(const Expr& expr, const std::string& callee) {
    Arguments args;
    args.callee = callee;
    for (size_t i = 1; i < expr.args.size(); ++i)
      args.positional.push_back(evaluate(*expr.args[i]));
    for (const auto& [key, value] : expr.keywords)
      args.keywords.emplace_back(key, evaluate(*value));
    return args;
  }

  Value evaluate_filter(const Expr& expr, const Value* block_text) {
    const Value value = !expr.args[0] ? *block_text
                        : expr.args[0]->kind == Kind::kFilter
                            ? evaluate_filter(*expr.args[0], block_text)
                            : evaluate(*expr.args[0]);
    return call_filter(expr.name, value, arguments(expr, expr.name));
  }

  Value evaluate_call(const Expr& expr) {
    const Value callee = evaluate(*expr.args[0]);
    if (callee.is_undefined()) fail_undefined(callee);
    if (const auto* macro = callee.get<const Macro*>())
      return call_macro(**macro, arguments(expr, (*macro)->definition->text));
    if (const auto* function = callee.get<std::shared_ptr<const Function>>())
      return call_function(*this, (*function)->name, arguments(expr, (*function)->name));
    if (const auto* method = callee.get<Method>()) {
      spend(size_of(*method->self) / 8);
      return call_method(*this, *method->self, method->name, arguments(expr, method->name));
    }
    fail("line {}: a {} cannot be called", expr.line, type_name(callee));
  }

  Value call_macro(const Macro& macro, const Arguments& args) {
    const Stmt& definition = *macro.definition;
    const size_t count = definition.names.size();
    args.at_most(count);
    for (const auto& [key, value] : args.keywords) {
      if (std::ranges::find(definition.names, key) == definition.names.end())
        fail("macro {} takes no argument '{}'", printable(definition.text, 60), printable(key, 60));
    }
    return made(capture([&] {
      const Inside inside(this, macro.scope);
      for (size_t i = 0; i < count; ++i) {
        const std::string& name = definition.names[i];
        const size_t first_default = count - definition.exprs.size();
        if (const Value* given = args.find(i, name.c_str())) {
          set(name, *given);
        } else if (i >= first_default) {
          set(name, evaluate(*definition.exprs[i - first_default]));
        } else {
          set(name, undefined(fmt::format("parameter '{}' was not provided", printable(name, 60))));
        }
      }
      execute(definition.bodies[0]);
    }));
  }

  Limits limits_;
  int64_t steps_;
  int64_t now_;
  int depth_ = 0;
  size_t written_ = 0;
  Scope* scope_ = nullptr;
  Text* out_ = nullptr;
  std::deque<Namespace> namespaces_;
  std::deque<Macro> macros_;
  std::deque<Loop> loops_;
  std::vector<std::unique_ptr<Scope>> kept_scopes_;
};

}  // namespace

const Value* Arguments::find(size_t position, const char* name) const {
  if (position < positional.size()) return &positional[position];
  for (const auto& [key, value] : keywords)
    if (key == name) return &value;
  return nullptr;
}

const Value& Arguments::required(size_t position, const char* name) const {
  const Value* value = find(position, name);
  if (value == nullptr) fail("{} needs the argument '{}'", printable(callee, 60), name);
  return *value;
}

int64_t Arguments::integer_or(size_t position, const char* name, int64_t fallback) const {
  const Value* value = find(position, name);
  if (value == nullptr || value->is_none()) return fallback;
  if (!is_integer(*value))
    fail("{}: '{}' is a {}, expected an integer", printable(callee, 60), name, type_name(*value));
  return integer_of(*value);
}

bool Arguments::truthy_or(size_t position, const char* name, bool fallback) const {
  const Value* value = find(position, name);
  return value == nullptr ? fallback : truthy(*value);
}

void Arguments::at_most(size_t count) const {
  if (positional.size() + keywords.size() > count) {
    fail("{} was given {} arguments, expected at most {}", printable(callee, 60),
         positional.size() + keywords.size(), count);
  }
}

bool is_iterable(const Value& value) {
  return value.is_undefined() || value.text() || value.sequence() || value.dict() ||
         value.get<Loop*>();
}

void fail_undefined(const Value& value) {
  fail("{}", (*value.get<std::shared_ptr<const Undefined>>())->what);
}

std::vector<Value> Runtime::iterate(const Value& value) {
  std::vector<Value> out;
  if (const Sequence* s = value.sequence()) {
    out = s->items;
  } else if (const Dict* d = value.dict()) {
    for (const auto& [key, item] : d->items) out.push_back(key);
  } else if (const Text* text = value.text()) {
    for (Text& character : characters(*text)) out.push_back(text_value(std::move(character)));
  } else if (!value.is_undefined()) {
    fail("a {} cannot be iterated over", type_name(value));
  }
  spend(1 + static_cast<int64_t>(out.size()));
  return out;
}

Text run(const Block& block, const Variables& variables, const Limits& limits, int64_t unix_time) {
  return Interpreter(limits, unix_time).run(block, variables);
}

}  // namespace indexcache::jinja
