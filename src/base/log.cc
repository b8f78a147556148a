#include "base/log.h"

#include <atomic>
#include <cstdio>

namespace indexcache {

namespace {
std::atomic<bool> log_enabled{true};
LogFormat log_format = nullptr;
}  // namespace

void set_log_enabled(bool enabled) { log_enabled = enabled; }
void set_log_format(LogFormat format) { log_format = format; }

void log_line(const char* prefix, const std::string& text) {
  if (!log_enabled) return;
  // One write per line, so that lines of several threads do not mix.
  const std::string line = (log_format ? log_format(prefix, text) : prefix + text) + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace indexcache
