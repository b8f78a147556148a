// indexcache overlap: how much the selections of the layers have in common.

#include <cstdio>
#include <memory>

#include "analysis/overlap.h"
#include "base/atomic_file.h"
#include "base/progress.h"
#include "cli/data_flags.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/report_page.h"

namespace indexcache {

namespace {

struct OverlapFlags {
  CommonFlags common;
  DataFlags data;
  bool json = false, csv = false;
  std::string output, html;
};

int overlap(const OverlapFlags& flags) {
  check_can_write({flags.output, flags.html}, flags.data.files);
  const ModelSource source = open_model(flags.common.model);
  check_sequence_length(flags.data.request.sequence_tokens, source.config, false);
  const TextData text = load_text(flags.data, flags.common.model, source.config);
  RunOptions options = run_options(flags.common);
  if (options.plan.empty()) options.plan = to_string(widest_plan(source, options));
  options.context = text.tokens.sequence_tokens();
  Engine engine(source, options);
  print_engine(engine);
  Progress progress("overlap", text.tokens.total_tokens(), "tokens");
  const Overlap result =
      measure_overlap(engine, text.tokens.sequences, [&](int64_t done) { progress.update(done); });
  progress.clear();
  Json json = overlap_json(result);
  json["model"] = flags.common.model;
  json["plan"] = to_string(engine.model.plan);
  if (engine.adapter) json["indexers"] = options.indexers;
  json["data"] = data_json(flags.data, text.tokens);
  json["command"] = command_line();
  if (!flags.html.empty()) {
    write_report(flags.html, "Overlap of selections: " + flags.common.model, {{"overlap", json}});
  }
  std::string out;
  if (flags.json) {
    out = json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  } else {
    out = flags.csv ? overlap_csv(result) : overlap_text(result);
  }
  if (!flags.output.empty()) {
    write_text_file(flags.output, out);
  } else {
    std::fwrite(out.data(), 1, out.size(), stdout);
  }
  return 0;
}

}  // namespace

void add_overlap_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<OverlapFlags>();
  CLI::App* command = program->add_subcommand(
      "overlap", "Measure how much the selections of different layers have in common");
  command->footer(
      "Example: indexcache overlap -m models/demo -f text.jsonl --tokens 32768 --seq 4096\n"
      "Overlap: positions that two layers both select, as a share of index_topk, over the queries\n"
      "that see more than index_topk tokens. Groups: neighbours joined while the mean overlap\n"
      "between them is at least that of neighbouring layers.");
  add_model_flag(command, &flags->common, true);
  add_run_flags(command, &flags->common);
  add_data_flags(command, &flags->data);
  auto* json = command->add_flag("--json", flags->json, "One JSON object");
  command->add_flag("--csv", flags->csv, "One row a pair of layers")->excludes(json);
  command->add_option("-o,--output", flags->output, "Write there in place of the standard output");
  command->add_option("--html", flags->html, "Also write a page with the heat map");
  command->callback([flags, exit_code] { *exit_code = overlap(*flags); });
}

}  // namespace indexcache
