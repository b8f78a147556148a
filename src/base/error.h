// The two verbs for things that go wrong (docs/architecture.md, "Errors").
//
//   fail("...{}", x)  throws Error: the outside world is wrong (a file, a config, a request). The
//   message says what
//                     was found, what was expected, and where.
//   CHECK(cond)       our own bug: prints the expression, the values and the place, then aborts. On
//   in every build.
//
// An expected outcome is neither: it is an ordinary return value.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace indexcache {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

[[noreturn]] void check_failed(const char* file, int line, const char* expression,
                               const std::string& values);

// Text from outside as it may be printed: control bytes, invisible marks and invalid UTF-8 are
// escaped; cut at `max_bytes`.
std::string printable(std::string_view untrusted, size_t max_bytes = 120);

}  // namespace indexcache

#define CHECK(cond)                                                         \
  do {                                                                      \
    if (!(cond)) [[unlikely]]                                               \
      ::indexcache::check_failed(__FILE__, __LINE__, #cond, std::string()); \
  } while (0)

#define INDEXCACHE_CHECK_OP(a, op, b)                                        \
  do {                                                                       \
    const auto& check_a = (a);                                               \
    const auto& check_b = (b);                                               \
    if (!(check_a op check_b)) [[unlikely]]                                  \
      ::indexcache::check_failed(__FILE__, __LINE__, #a " " #op " " #b,      \
                                 fmt::format("{} vs {}", check_a, check_b)); \
  } while (0)

#define CHECK_EQ(a, b) INDEXCACHE_CHECK_OP(a, ==, b)
#define CHECK_NE(a, b) INDEXCACHE_CHECK_OP(a, !=, b)
#define CHECK_LT(a, b) INDEXCACHE_CHECK_OP(a, <, b)
#define CHECK_LE(a, b) INDEXCACHE_CHECK_OP(a, <=, b)
#define CHECK_GT(a, b) INDEXCACHE_CHECK_OP(a, >, b)
#define CHECK_GE(a, b) INDEXCACHE_CHECK_OP(a, >=, b)
