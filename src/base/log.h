// Lines for people, on stderr; stdout is for results. warn() is for what a user should know and may
// ignore.
#pragma once

#include <fmt/format.h>

#include <string>

namespace indexcache {

void log_line(const char* prefix, const std::string& text);

// What makes a line of its prefix ("" or "warning: ") and text, for who reads them by program; null
// puts them together. To be set before there are other threads.
using LogFormat = std::string (*)(const std::string& prefix, const std::string& text);
void set_log_format(LogFormat format);

// Off in tests and fuzzers, which provoke warnings by the thousand.
void set_log_enabled(bool enabled);

template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  log_line("", fmt::format(format, std::forward<Args>(args)...));
}

template <class... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  log_line("warning: ", fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace indexcache
