// SHA-256 (FIPS 180-4): names what a plan was made for. Not for secrets.
#pragma once

#include <string>
#include <string_view>

namespace indexcache {

std::string sha256_hex(std::string_view bytes);  // 64 lower-case hex digits

}  // namespace indexcache
