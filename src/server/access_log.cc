#include "server/access_log.h"

#include <ctime>

#include "base/error.h"
#include "base/json.h"

namespace indexcache {

namespace {

std::string timestamp() {
  timespec now = {};
  clock_gettime(CLOCK_REALTIME, &now);
  tm utc = {};
  gmtime_r(&now.tv_sec, &utc);
  char buffer[32];
  strftime(buffer, sizeof buffer, "%Y-%m-%dT%H:%M:%S", &utc);
  return fmt::format("{}.{:03}Z", buffer, now.tv_nsec / 1'000'000);
}

std::string line_of(const Json& json) {
  return json.dump(-1, ' ', true, Json::error_handler_t::replace);
}

}  // namespace

std::string access_line(const LogOptions& options, const HttpRequest& request, int status,
                        double seconds, const AnswerNote& note, const std::string& peer) {
  const bool generated = note.prompt_tokens >= 0;
  if (options.json) {
    Json line = {{"time", timestamp()},
                 {"event", "request"},
                 {"id", request.id},
                 {"peer", peer},
                 {"method", printable(request.method, 20)},
                 {"path", printable(request.path, 200)},
                 {"status", status},
                 {"seconds", seconds}};
    if (generated) {
      line["prompt_tokens"] = note.prompt_tokens;
      line["generated_tokens"] = note.generated_tokens;
      line["finish"] = note.finish;
      if (options.prompts) line["prompt"] = note.prompt;
    }
    return line_of(line);
  }
  std::string line =
      fmt::format("{} {} {} {} {} {:.3f} s", timestamp(), request.id, printable(request.method, 20),
                  printable(request.path, 200), status, seconds);
  if (generated) {
    line +=
        fmt::format(", {} + {} tokens, {}", note.prompt_tokens, note.generated_tokens, note.finish);
    if (options.prompts) line += fmt::format(", prompt: {}", printable(note.prompt, 4000));
  }
  return line;
}

std::string event_line(const LogOptions& options, const std::string& event,
                       const std::string& text) {
  if (!options.json) return fmt::format("{} {}", timestamp(), text);
  return line_of({{"time", timestamp()}, {"event", event}, {"text", text}});
}

}  // namespace indexcache
