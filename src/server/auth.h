// The API key. A path is public only if it is spelled exactly as one of the public paths, so no
// other spelling of any path gets past the key.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace indexcache {

// In time that depends on the length of `given` alone.
bool equal_in_constant_time(std::string_view given, std::string_view secret);

bool is_public_path(std::string_view path);

// Which of `keys` the header's value "Bearer KEY" gives (the scheme in any case), by number; -1:
// none of them.
int64_t key_number(std::string_view authorization, const std::vector<std::string>& keys);

// No keys: everyone may.
bool is_authorized(std::string_view path, std::string_view authorization,
                   const std::vector<std::string>& keys);

// A name of this machine as it stands in a Host header: localhost, 127.x.x.x, [::1], with or
// without a port. Keeps foreign pages from reaching a loopback server by rebinding their name.
bool is_loopback_host(std::string_view host);

// One of `allowed`, in any case: a name, which may come with any port, or a name with its port.
bool is_allowed_host(std::string_view host, const std::vector<std::string>& allowed);

}  // namespace indexcache
