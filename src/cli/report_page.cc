#include "cli/report_page.h"

#include <fstream>
#include <iterator>
#include <memory>

#include "base/atomic_file.h"
#include "base/log.h"
#include "cli/options.h"

namespace indexcache {

namespace {

struct ReportFlags {
  std::vector<std::string> files;
  std::string output, title = "Index plans";
};

int report(const ReportFlags& flags) {
  check_can_write({flags.output}, flags.files);
  std::vector<ReportPart> parts;
  for (const std::string& path : flags.files)
    parts.push_back({printable(path, 400), load_json(path)});
  write_report(flags.output, flags.title, parts);
  return 0;
}

}  // namespace

std::string command_line() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./,:=+@%";
  std::string out;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t end = std::min(bytes.find('\0', begin), bytes.size());
    const std::string word = bytes.substr(begin, end - begin);
    if (!out.empty()) out += ' ';
    if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) {
      out += out.empty() ? "indexcache" : word;
    } else {
      out += '\'';
      for (const char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
      out += '\'';
    }
    begin = end + 1;
  }
  return out;
}

void write_report(const std::string& path, const std::string& title,
                  const std::vector<ReportPart>& parts) {
  write_text_file(path, report_html(title, parts));
  info("{}: the report", path);
}

void add_report_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<ReportFlags>();
  CLI::App* command = program->add_subcommand(
      "report", "One HTML page from plan files and the JSON of overlap, eval and bench");
  command->footer(
      "Example: indexcache report plan.json overlap.json eval.json bench.json -o report.html\n"
      "The page is complete in itself: no network, no scripts. Heat maps show the groups of the\n"
      "first plan file.");
  command->add_option("files", flags->files, "What the page shows, in this order")->required();
  command->add_option("-o,--output", flags->output, "The page to write")->required();
  command->add_option("--title", flags->title, "Its title")->capture_default_str();
  command->callback([flags, exit_code] { *exit_code = report(*flags); });
}

}  // namespace indexcache
