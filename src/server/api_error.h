// A request that is refused, as the OpenAI API says it: {"error": {"message", "type", "param",
// "code"}}.
#pragma once

#include <string>

#include "base/error.h"
#include "base/json.h"
#include "server/http_types.h"

namespace indexcache {

struct ApiError : Error {
  ApiError(int status_, const std::string& message, std::string param_ = {}, std::string code_ = {})
      : Error(message), status(status_), param(std::move(param_)), code(std::move(code_)) {}

  int status;
  std::string param, code;         // empty: null
  double retry_after_seconds = 0;  // 0: not said
  std::string allow;               // of a 405
};

template <class... Args>
[[noreturn]] void refuse(const std::string& param, fmt::format_string<Args...> format,
                         Args&&... args) {
  throw ApiError(400, fmt::format(format, std::forward<Args>(args)...), param);
}

const char* error_type(int status);  // "invalid_request_error"
Json error_json(const ApiError& error);
HttpResponse error_response(const ApiError& error);
std::string dump(const Json& json);  // what is not UTF-8 is replaced

}  // namespace indexcache
