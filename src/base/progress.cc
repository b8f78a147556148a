#include "base/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "base/log.h"
#include "base/units.h"

namespace indexcache {

namespace {
constexpr double kTerminalSeconds = 0.1, kLineSeconds = 10;
constexpr int kBarWidth = 30;
}  // namespace

Progress::Progress(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(std::max<int64_t>(total, 1)),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(monotonic_seconds()),
      last_draw_(start_) {}

Progress::~Progress() { clear(); }

void Progress::clear() {
  if (terminal_ && drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

void Progress::set_total(int64_t total) { total_ = std::max<int64_t>(total, 1); }

void Progress::update(int64_t done, const std::string& note) {
  const double now = monotonic_seconds();
  if (now - last_draw_ < (terminal_ ? kTerminalSeconds : kLineSeconds)) return;
  last_draw_ = now;
  const double rate = static_cast<double>(done) / (now - start_);
  const double left = rate > 0 ? static_cast<double>(total_ - done) / rate : 0;
  const std::string numbers =
      fmt::format("{}/{} {}, {:.{}f} {}/s, {} left{}{}", done, total_, unit_, rate,
                  rate < 10 ? 1 : 0, unit_, format_seconds(left), note.empty() ? "" : ", ", note);
  if (!terminal_) {
    info("{}: {}", label_, numbers);
    return;
  }
  const int filled = static_cast<int>(std::min<int64_t>(kBarWidth * done / total_, kBarWidth));
  fmt::print(stderr, "\r\033[K{} [{:#<{}}{:.<{}}] {}", label_, "", filled, "", kBarWidth - filled,
             numbers);
  std::fflush(stderr);
  drawn_ = true;
}

}  // namespace indexcache
