#include "train/train_log.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <sstream>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mapped_file.h"

namespace indexcache {

namespace {

constexpr const char* kHeader =
    "step,tokens,row_tokens,lr,loss,indexer_loss,gradient_norm,tokens_per_second,held_out,"
    "held_out_loss,held_out_indexer_loss\n";
constexpr size_t kColumns = 11;

std::vector<std::string> split(const std::string& line) {
  std::vector<std::string> fields;
  std::istringstream stream(line + ",");
  for (std::string field; std::getline(stream, field, ',');) fields.push_back(field);
  return fields;
}

}  // namespace

void TrainLog::open(const std::string& path, int64_t step) {
  path_ = path;
  std::string kept = kHeader;
  if (step > 0 && std::filesystem::exists(path)) {
    std::istringstream stream(read_text_file(path));
    std::string line;
    std::getline(stream, line);
    while (std::getline(stream, line)) {
      const auto fields = split(line);
      if (fields.size() == kColumns && std::strtoll(fields[0].c_str(), nullptr, 10) <= step)
        kept += line + "\n";
    }
  }
  write_text_file(path, kept);
}

void TrainLog::append(const std::string& line) {
  std::FILE* file = std::fopen(path_.c_str(), "a");
  if (file == nullptr) fail("{}: cannot append: {}", path_, std::strerror(errno));
  const bool written = std::fputs(line.c_str(), file) >= 0;
  if (std::fclose(file) != 0 || !written)
    fail("{}: cannot append: {}", path_, std::strerror(errno));
}

void TrainLog::add(const TrainRow& row) {
  append(fmt::format("{},{},{},{:.6g},{:.6g},{:.6g},{:.4g},{:.0f},,,\n", row.step, row.tokens,
                     row.row_tokens, row.lr, row.loss, row.indexer_loss, row.gradient_norm,
                     row.tokens_per_second));
}

void TrainLog::add_held_out(const HeldOutRow& row) {
  append(
      fmt::format("{},,,,,,,,{},{:.6g},{:.6g}\n", row.step, row.name, row.loss, row.indexer_loss));
}

TrainHistory read_train_log(const std::string& path) {
  TrainHistory history;
  std::istringstream stream(read_text_file(path));
  std::string line;
  std::getline(stream, line);
  while (std::getline(stream, line)) {
    const auto fields = split(line);
    if (fields.size() != kColumns) continue;  // the last line of a killed run
    const auto integer = [&](size_t i) { return std::strtoll(fields[i].c_str(), nullptr, 10); };
    const auto number = [&](size_t i) { return std::strtod(fields[i].c_str(), nullptr); };
    if (fields[8].empty()) {
      history.steps.push_back({integer(0), integer(1), integer(2), number(3), number(4), number(5),
                               number(6), number(7)});
    } else {
      history.held_out.push_back({integer(0), fields[8], number(9), number(10)});
    }
  }
  return history;
}

}  // namespace indexcache
