#include "server/auth.h"

#include <algorithm>

namespace indexcache {

bool equal_in_constant_time(std::string_view given, std::string_view secret) {
  unsigned difference = given.size() == secret.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    const char other = secret.empty() ? '\0' : secret[i % secret.size()];
    difference |= static_cast<unsigned>(static_cast<unsigned char>(given[i] ^ other));
  }
  // Keeps the compiler from leaving the loop once the answer is known.
  volatile unsigned result = difference;
  return result == 0;
}

bool is_public_path(std::string_view path) { return path == "/health" || path == "/"; }

int64_t key_number(std::string_view authorization, const std::vector<std::string>& keys) {
  constexpr std::string_view kScheme = "bearer ";
  const bool bearer =
      authorization.size() > kScheme.size() &&
      std::equal(kScheme.begin(), kScheme.end(), authorization.begin(),
                 [](char a, char b) { return a == (b >= 'A' && b <= 'Z' ? b + 32 : b); });
  if (!bearer) return -1;
  int64_t found = -1;
  for (size_t i = 0; i < keys.size(); ++i) {
    const bool equal = equal_in_constant_time(authorization.substr(kScheme.size()), keys[i]);
    found = equal ? static_cast<int64_t>(i) : found;
  }
  return found;
}

bool is_authorized(std::string_view path, std::string_view authorization,
                   const std::vector<std::string>& keys) {
  return keys.empty() || is_public_path(path) || key_number(authorization, keys) >= 0;
}

namespace {

bool equal_names(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  return std::ranges::equal(a, b, {}, lower, lower);
}

// A Host header without its port, which in brackets may hold colons of its own.
std::string_view host_name(std::string_view host) {
  const size_t colon = host.rfind(':'), bracket = host.rfind(']');
  const bool has_port = colon != host.npos && (bracket == host.npos || bracket < colon);
  return has_port ? host.substr(0, colon) : host;
}

}  // namespace

bool is_loopback_host(std::string_view host) {
  const std::string_view name = host_name(host);
  if (equal_names(name, "localhost") || name == "[::1]") return true;
  return name.starts_with("127.") && name.find_first_not_of("0123456789.") == name.npos;
}

bool is_allowed_host(std::string_view host, const std::vector<std::string>& allowed) {
  return std::ranges::any_of(allowed, [&](const std::string& one) {
    return equal_names(host, one) || equal_names(host_name(host), one);
  });
}

}  // namespace indexcache
