#include "cli/layered_flags.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace indexcache {

namespace {

std::string environment_name(const std::string& flag) {
  std::string name = "INDEXCACHE_";
  for (const char c : flag) {
    const bool lower = c >= 'a' && c <= 'z';
    name += lower ? static_cast<char>(c - 32) : c == '-' ? '_' : c;
  }
  return name;
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

std::string flag_value(const std::string& where, const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean() || value.is_number()) return value.dump();
  fail("{} is {}, expected a string, a number, true or false", where, json_excerpt(value));
}

void fill(CLI::Option* option, const std::string& where, const std::vector<std::string>& values) {
  try {
    for (const std::string& value : values) option->add_result(value);
    option->run_callback();
  } catch (const CLI::ParseError& error) {
    fail("{}: {}", where, error.what());
  }
}

}  // namespace

void fill_from_environment_and_file(CLI::App* command, const std::string& file) {
  Json config = Json::object();
  if (!file.empty()) {
    config = load_json(file);
    JsonObject(config, printable(file, 400));
  }
  std::vector<std::string> names;
  for (CLI::Option* option : command->get_options()) {
    if (option->get_lnames().empty()) continue;
    const std::string name = option->get_lnames().front();
    if (name == "help" || name == "config") continue;
    names.push_back(name);
    if (option->count() > 0) continue;
    if (const char* value = std::getenv(environment_name(name).c_str())) {
      fill(option, environment_name(name), {value});
    } else if (const auto it = config.find(name); it != config.end() && !it->is_null()) {
      const std::string where = fmt::format("{}: \"{}\"", printable(file, 400), name);
      std::vector<std::string> values;
      if (it->is_array()) {
        for (const Json& item : *it) values.push_back(flag_value(where, item));
      } else {
        values.push_back(flag_value(where, *it));
      }
      fill(option, where, values);
    }
  }
  for (const auto& [key, value] : config.items()) {
    if (std::ranges::find(names, key) != names.end()) continue;
    const auto nearest = std::ranges::min_element(
        names, {}, [&](const std::string& name) { return edit_distance(key, name); });
    fail("{}: \"{}\" is no flag of this command; the nearest is \"{}\"", printable(file, 400),
         printable(key, 60), *nearest);
  }
}

}  // namespace indexcache
