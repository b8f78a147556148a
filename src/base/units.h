// Numbers as people read them. Every printed number carries its unit.
#pragma once

#include <cstdint>
#include <string>

namespace indexcache {

std::string format_bytes(uint64_t bytes);    // "1.50 GiB"
std::string format_seconds(double seconds);  // "12.3 ms", "1.20 s", "2m 05s"
uint64_t peak_rss_bytes();                   // VmHWM of this process
uint64_t file_rss_bytes();                   // resident pages that belong to mapped files (RssFile)
// MemAvailable of this machine, or what the process's control groups leave of it.
uint64_t available_memory_bytes();
double monotonic_seconds();

}  // namespace indexcache
