// One line for each answer, for people or as JSON. What clients wrote is escaped, and prompts are
// left out unless asked for.
#pragma once

#include <string>

#include "server/http_types.h"

namespace indexcache {

struct LogOptions {
  bool json = false;
  bool prompts = false;
};

std::string access_line(const LogOptions& options, const HttpRequest& request, int status,
                        double seconds, const AnswerNote& note, const std::string& peer);
// An event of the server's own life: "listening", "draining".
std::string event_line(const LogOptions& options, const std::string& event,
                       const std::string& text);

}  // namespace indexcache
