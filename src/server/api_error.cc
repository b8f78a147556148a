#include "server/api_error.h"

#include <cmath>

namespace indexcache {

const char* error_type(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 403:
      return "permission_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 503:
      return "unavailable_error";
    default:
      return status >= 500 ? "server_error" : "invalid_request_error";
  }
}

Json error_json(const ApiError& error) {
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
  return {{"error",
           {{"message", error.what()},
            {"type", error_type(error.status)},
            {"param", or_null(error.param)},
            {"code", or_null(error.code)}}}};
}

HttpResponse error_response(const ApiError& error) {
  HttpResponse response;
  response.status = error.status;
  response.body = dump(error_json(error));
  if (error.retry_after_seconds > 0) {
    response.headers.emplace_back("Retry-After",
                                  fmt::format("{:.0f}", std::ceil(error.retry_after_seconds)));
    response.headers.emplace_back(
        "Retry-After-Ms", fmt::format("{:.0f}", std::ceil(error.retry_after_seconds * 1e3)));
  }
  if (error.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (!error.allow.empty()) response.headers.emplace_back("Allow", error.allow);
  return response;
}

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace indexcache
