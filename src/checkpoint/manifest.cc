#include "checkpoint/manifest.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <filesystem>
#include <map>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/mapped_file.h"
#include "base/progress.h"
#include "base/sha256.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/problem_list.h"
#include "device/thread_pool.h"

namespace indexcache {

namespace fs = std::filesystem;

namespace {

constexpr size_t kMaxManifestBytes = 16u << 20;
constexpr size_t kSumDigits = 64;

using Sums = std::map<std::string, std::string>;  // by name

std::vector<std::string> list_files(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    const bool is_folder = fs::is_directory(it->symlink_status());
    if (it->path().filename().string().starts_with('.')) {
      if (is_folder) it.disable_recursion_pending();
    } else if (!is_folder) {
      names.push_back(it->path().lexically_relative(folder).string());
    }
  }
  if (error) fail("{}: cannot be listed: {}", printable(folder, 400), error.message());
  return names;
}

Sums sum_files(const std::string& folder, const std::vector<std::string>& names, int num_threads) {
  std::vector<MappedFile> files;
  size_t num_bytes = 0;
  for (const std::string& name : names) {
    const std::string path = (fs::path(folder) / name).string();
    check_stays_inside(folder, path);
    files.emplace_back(path);
    num_bytes += files.back().bytes().size();
  }
  std::vector<std::string> sums(files.size());
  std::atomic<size_t> done = 0;
  Progress progress("sha256", static_cast<int64_t>(num_bytes >> 20), "MiB");
  ThreadPool pool(num_threads);
  pool.parallel_for(std::ssize(files), [&](int64_t item, int thread) {
    const std::span<const uint8_t> bytes = files[static_cast<size_t>(item)].bytes();
    sums[static_cast<size_t>(item)] =
        sha256_hex({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    done += bytes.size();
    if (thread == 0) progress.update(static_cast<int64_t>(done >> 20));
  });
  Sums by_name;
  for (size_t i = 0; i < names.size(); ++i) by_name[names[i]] = sums[i];
  return by_name;
}

// "SUM  NAME", or "SUM *NAME" for a file that was read as binary, which makes no difference here.
std::pair<std::string, std::string> parse_line(std::string_view line, const std::string& where) {
  std::string sum(line.substr(0, kSumDigits));
  for (char& c : sum) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  const bool fits = line.size() > kSumDigits + 2 && line[kSumDigits] == ' ' &&
                    (line[kSumDigits + 1] == ' ' || line[kSumDigits + 1] == '*') &&
                    sum.find_first_not_of("0123456789abcdef") == sum.npos;
  if (!fits) {
    fail(
        "{}: found \"{}\", expected {} hexadecimal digits, two spaces and a name, as sha256sum "
        "writes them",
        where, printable(line), kSumDigits);
  }
  const fs::path name = fs::path(line.substr(kSumDigits + 2)).lexically_normal();
  if (name.is_absolute() || *name.begin() == "..")
    fail("{}: found \"{}\", expected a path inside the model's folder", where,
         printable(name.string()));
  return {name.string(), sum};
}

Sums read_manifest(const std::string& path) {
  const std::string text = read_text_file(path, kMaxManifestBytes);
  Sums sums;
  size_t number = 0;
  for (size_t begin = 0; begin < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string where = fmt::format("{}: line {}", printable(path, 400), number + 1);
    auto [name, sum] = parse_line(std::string_view(text).substr(begin, end - begin), where);
    if (!sums.emplace(name, sum).second)
      fail("{}: \"{}\" was in a line before", where, printable(name));
    begin = end + 1;
  }
  if (sums.empty()) fail("{}: is empty, expected sums as sha256sum writes", printable(path, 400));
  return sums;
}

}  // namespace

std::string sha256_manifest(const std::string& folder, int num_threads) {
  const std::vector<std::string> names = list_files(folder);
  for (const std::string& name : names) {
    if (printable(name, name.size()) != name || name.find('\\') != name.npos)
      fail("{}: the name \"{}\" cannot stand in a line of sums", printable(folder, 400),
           printable(name));
  }
  std::string text;
  for (const auto& [name, sum] : sum_files(folder, names, num_threads))
    text += fmt::format("{}  {}\n", sum, name);
  return text;
}

size_t verify_manifest(const std::string& folder, const std::string& manifest_path,
                       int num_threads) {
  Sums expected = read_manifest(manifest_path);
  const auto is_manifest = [&](const std::string& name) {
    std::error_code ignored;
    return fs::equivalent(fs::path(folder) / name, manifest_path, ignored);
  };
  std::erase_if(expected, [&](const auto& entry) { return is_manifest(entry.first); });

  ProblemList differing, missing, surplus;
  std::vector<std::string> present;
  for (const auto& [name, sum] : expected) {
    std::error_code ignored;
    if (fs::exists(fs::path(folder) / name, ignored)) {
      present.push_back(name);
    } else {
      missing.add([&] { return fmt::format("\"{}\": missing", printable(name)); });
    }
  }
  for (const std::string& name : list_files(folder)) {
    if (!expected.contains(name) && !is_manifest(name))
      surplus.add([&] { return fmt::format("\"{}\": surplus", printable(name)); });
  }
  for (const auto& [name, found] : sum_files(folder, present, num_threads)) {
    if (found == expected[name]) continue;
    differing.add([&] {
      return fmt::format("\"{}\": found {}, expected {}", printable(name), found, expected[name]);
    });
  }
  if (differing.count() + missing.count() + surplus.count() > 0) {
    fail("{}: the files are not those of {}: {} of {} differ, {} missing, {} surplus:{}{}{}",
         printable(folder, 400), printable(manifest_path, 400), differing.count(), present.size(),
         missing.count(), surplus.count(), differing.text(), missing.text(), surplus.text());
  }
  return present.size();
}

}  // namespace indexcache
