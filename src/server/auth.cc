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

bool is_authorized(std::string_view path, std::string_view authorization,
                   const std::vector<std::string>& keys) {
  if (keys.empty() || is_public_path(path)) return true;
  constexpr std::string_view kScheme = "bearer ";
  const bool bearer =
      authorization.size() > kScheme.size() &&
      std::equal(kScheme.begin(), kScheme.end(), authorization.begin(),
                 [](char a, char b) { return a == (b >= 'A' && b <= 'Z' ? b + 32 : b); });
  if (!bearer) return false;
  bool found = false;
  for (const std::string& key : keys)
    found |= equal_in_constant_time(authorization.substr(kScheme.size()), key);
  return found;
}

bool is_loopback_host(std::string_view host) {
  if (host.starts_with('[')) {
    const size_t end = host.find(']');
    return end != host.npos && host.substr(0, end + 1) == "[::1]";
  }
  const std::string_view name = host.substr(0, host.rfind(':'));
  if (name == "localhost") return true;
  return name.starts_with("127.") && name.find_first_not_of("0123456789.") == name.npos;
}

}  // namespace indexcache
