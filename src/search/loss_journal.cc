#include "search/loss_journal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mapped_file.h"

namespace indexcache {

namespace {

constexpr int64_t kJournalVersion = 1;

std::string header_line(const Json& settings) {
  return Json{{"version", kJournalVersion}, {"settings", settings}}.dump(
             -1, ' ', false, Json::error_handler_t::replace) +
         "\n";
}

std::string shown(const Json& object, const std::string& key) {
  return object.contains(key) ? json_excerpt(object.at(key)) : "nothing";
}

void compare_settings(const Json& found, const Json& expected, const std::string& where) {
  std::string differences;
  const auto compare = [&](const std::string& key) {
    differences += fmt::format("\n  {}: the journal has {}, this search {}", printable(key),
                               shown(found, key), shown(expected, key));
  };
  for (const auto& [key, value] : expected.items()) {
    if (!found.contains(key) || found.at(key) != value) compare(key);
  }
  for (const auto& [key, value] : found.items()) {
    if (!expected.contains(key)) compare(key);
  }
  if (!differences.empty()) {
    fail("{}: made by another search, found settings that differ:{}", where, differences);
  }
}

}  // namespace

LossJournal::LossJournal(const std::string& path, const Json& settings, size_t num_sequences,
                         bool resume)
    : path_(path), num_sequences_(num_sequences) {
  if (path.empty()) return;
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) {
    write_text_file(path, header_line(settings));
  } else if (!resume) {
    fail("{}: found the journal of an earlier search; --resume goes on with it, or delete it",
         printable(path, 400));
  }
  file_.fd = open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  if (file_.fd < 0) fail("{}: cannot write: {}", printable(path, 400), strerror(errno));
  if (flock(file_.fd, LOCK_EX | LOCK_NB) != 0)
    fail("{}: in use by another search", printable(path, 400));
  const std::string text = [&] {
    const MappedFile file(path);
    return std::string(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  }();
  const size_t whole = text.rfind('\n') + 1;
  read(text.substr(0, whole), Json::parse(header_line(settings)).at("settings"));
  if (whole < text.size() && ftruncate(file_.fd, static_cast<off_t>(whole)) != 0)
    fail("{}: cannot drop its unfinished last line: {}", printable(path, 400), strerror(errno));
}

LossJournal::Descriptor::~Descriptor() {
  if (fd >= 0) close(fd);
}

void LossJournal::read(const std::string& text, const Json& settings) {
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size(); ++number) {
    const size_t end = text.find('\n', begin);
    const std::string where = fmt::format("{} line {}", printable(path_, 400), number + 1);
    const Json json = parse_json(std::string_view(text).substr(begin, end - begin), where);
    const JsonObject line(json, where);
    begin = end + 1;
    if (number == 0) {
      line.integer("version", kJournalVersion, kJournalVersion);
      compare_settings(line.object("settings").raw(), settings, printable(path_, 400));
      continue;
    }
    const int64_t sequence = line.integer("sequence", 0, static_cast<int64_t>(num_sequences_) - 1);
    auto& row = losses_[line.string("plan")];
    row.resize(num_sequences_);
    row[static_cast<size_t>(sequence)] = line.number("nll");
    ++num_read_;
  }
  if (number == 0) fail("{}: is empty, expected the journal of a search", printable(path_, 400));
}

std::optional<double> LossJournal::find(const std::string& plan, size_t sequence) const {
  const auto found = losses_.find(plan);
  return found == losses_.end() ? std::nullopt : found->second[sequence];
}

void LossJournal::add(const std::string& plan, size_t sequence, double nll) {
  auto& row = losses_[plan];
  row.resize(num_sequences_);
  row[sequence] = nll;
  if (file_.fd < 0) return;
  const std::string line = Json{{"plan", plan}, {"sequence", sequence}, {"nll", nll}}.dump() + "\n";
  ssize_t n;
  do {
    n = ::write(file_.fd, line.data(), line.size());
  } while (n < 0 && errno == EINTR);
  if (n != static_cast<ssize_t>(line.size())) {
    fail("{}: cannot write: {}; the search can go on from it with --resume", printable(path_, 400),
         n < 0 ? strerror(errno) : "no room");
  }
}

}  // namespace indexcache
