// indexcache search: the training-free method. Text in, an index plan and its path out.

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>

#include "base/atomic_file.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/data_flags.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/report_page.h"
#include "plan/pipeline_stages.h"
#include "plan/plan_file.h"
#include "search/greedy.h"
#include "search/loss_settings.h"

namespace indexcache {

namespace {

struct SearchFlags {
  CommonFlags common;
  DataFlags data;
  std::string output, journal, keep, budget, take, cache_folder, html;
  std::vector<std::string> compare;
  uint64_t cache_bytes = 0;
  double confidence = 0.95;
  int blocks = 1;
  bool fast = false, refine = false, resume = false, json = false, accept_short = false;
};

std::atomic<bool> stop_requested{false};

// The first Ctrl-C ends the search after the measurement at hand; a second one, the program.
void on_interrupt(int) {
  if (stop_requested.exchange(true)) _exit(130);
}

// "1/4": a quarter of the layers, rounded up; "12": that many.
int full_layers_of(const std::string& text, int num_layers) {
  int64_t number = 0, divisor = 1;
  char rest = 0;
  const bool fraction = std::sscanf(text.c_str(), "1/%ld%c", &divisor, &rest) == 1;
  if (fraction && divisor >= 1) return static_cast<int>((num_layers + divisor - 1) / divisor);
  if (std::sscanf(text.c_str(), "%ld%c", &number, &rest) == 1 && number >= 1 &&
      number <= num_layers)
    return static_cast<int>(number);
  fail("--keep {}: expected a share as 1/4, or 1 to {} full layers", printable(text), num_layers);
}

// What --keep says; without it a quarter, or as few as a --budget allows.
int least_full_layers(const SearchFlags& flags, int num_layers) {
  if (!flags.keep.empty()) return full_layers_of(flags.keep, num_layers);
  return flags.budget.empty() ? full_layers_of("1/4", num_layers) : 1;
}

// "0.5%" as 0.005.
double budget_of(const std::string& text) {
  double percent = 0;
  char sign = 0, rest = 0;
  if (std::sscanf(text.c_str(), "%lf%c%c", &percent, &sign, &rest) != 2 || sign != '%' ||
      !(percent >= 0 && percent < 1e6))
    fail("--budget {}: expected a share of the loss, as 0.5%", printable(text));
  return percent / 100;
}

std::vector<int> block_starts(int num_layers, int blocks) {
  if (blocks > num_layers) fail("--blocks {}: expected 1 to {} layers", blocks, num_layers);
  std::vector<int> starts;
  int first = 0;
  for (const int size : cut_by_rule(StageRule::kBeforeLast, num_layers, blocks)) {
    starts.push_back(first);
    first += size;
  }
  return starts;
}

Json step_json(const SearchStep& step, double start_loss) {
  Json json = {{"layer", step.layer}};
  if (step.restored >= 0) json["restored"] = step.restored;
  json["loss"] = step.loss;
  json["over_all_full"] = step.loss / start_loss - 1;
  json["plan"] = to_string(step.plan);
  return json;
}

std::string percent(double share) { return fmt::format("{:+.3f}%", 100 * share); }

double ratio(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

void print_event(const Json& event) {
  fmt::print("{}\n", event.dump(-1, ' ', false, Json::error_handler_t::replace));
  std::fflush(stdout);
}

// What a user watches: a table that grows and a bar below it, or one JSON object a line.
struct Watcher {
  bool json;
  double start_loss = 0, last_event = 0;
  Progress bar{"search", 1, "runs"};

  void start(double loss) {
    start_loss = loss;
    if (json) {
      print_event({{"event", "start"}, {"all_full_loss", loss}});
      return;
    }
    bar.clear();
    info("all layers full: {:.6f} nats/token; a run is a candidate on a sequence", loss);
    info("{:>5} {:>7} {:>5} {:>12} {:>10} {:>11} {:>10} {:>13} {:>9}  plan", "full", "shared",
         "back", "loss", "to start", "candidates", "time", "layer-forwards", "of plain");
  }

  void progress(const SearchProgress& p) {
    bar.set_total(p.all_total);
    if (!json) {
      bar.update(p.all_done,
                 fmt::format("{} full, {} of {} candidates{}", p.num_full, p.alive, p.candidates,
                             p.best_layer < 0 ? ""
                                              : fmt::format(", layer {} leads with {:.5f} nats",
                                                            p.best_layer, p.best_loss)));
      return;
    }
    if (monotonic_seconds() - last_event < 1) return;
    last_event = monotonic_seconds();
    Json event = {{"event", "progress"},  {"num_full", p.num_full},     {"done", p.all_done},
                  {"total", p.all_total}, {"candidates", p.candidates}, {"alive", p.alive}};
    if (p.best_layer >= 0) event["best"] = {{"layer", p.best_layer}, {"loss", p.best_loss}};
    print_event(event);
  }

  void step(const SearchStep& step) {
    if (json) {
      Json event = {{"event", "step"}};
      event.update(step_json(step, start_loss));
      event["num_full"] = step.plan.num_full();
      event["candidates"] = step.candidates;
      event["seconds"] = step.seconds;
      event["layer_forwards"] = step.layer_forwards;
      event["plain_layer_forwards"] = step.plain_layer_forwards;
      print_event(event);
      return;
    }
    bar.clear();
    info("{:>5} {:>7} {:>5} {:>12.6f} {:>10} {:>11} {:>10} {:>13} {:>8.1f}%  {}",
         step.plan.num_full(), step.layer,
         step.restored < 0 ? std::string("-") : std::to_string(step.restored), step.loss,
         percent(step.loss / start_loss - 1), step.candidates, format_seconds(step.seconds),
         step.layer_forwards, 100 * ratio(step.layer_forwards, step.plain_layer_forwards),
         to_string(step.plan));
  }
};

// How many steps of a path lead to the plan that is wanted.
size_t steps_to(const PlanFile& file, const SearchFlags& flags) {
  const int num_layers = static_cast<int>(file.plan.size());
  const auto num_full = [&](size_t step) {
    return plan_from_string(file.steps[step].plan, num_layers, flags.take).num_full();
  };
  const int wanted = least_full_layers(flags, num_layers);
  size_t count = 0;
  if (!flags.budget.empty()) {
    const double all_full =
        JsonObject(file.settings, flags.take + ": \"settings\"").number("all_full_loss");
    const double most = all_full * (1 + budget_of(flags.budget));
    while (count < file.steps.size() && file.steps[count].loss <= most && num_full(count) >= wanted)
      ++count;
    if (count == 0) {
      fail("{}: no step is within --budget {}: the first has {:.6f} nats/token, all full {:.6f}",
           printable(flags.take, 400), flags.budget,
           file.steps.empty() ? all_full : file.steps[0].loss, all_full);
    }
    return count;
  }
  while (count < file.steps.size() && num_full(count) != wanted) ++count;
  if (count == file.steps.size()) {
    fail("{}: \"steps\" has no plan with {} full layers of {}", printable(flags.take, 400), wanted,
         num_layers);
  }
  return count + 1;
}

// A plan at another retention, from the path of a search that is done.
int take(const SearchFlags& flags) {
  PlanFile file = load_plan_file(flags.take);
  file.steps.resize(steps_to(file, flags));
  file.plan = file.steps.back().plan;
  const auto num_full = std::count(file.plan.begin(), file.plan.end(), 'F');
  file.settings["taken_at"] = num_full;
  file.settings["loss"] = file.steps.back().loss;
  for (const char* key : {"swaps", "compared", "keep", "budget"}) file.settings.erase(key);
  save_plan_file(file, flags.output);
  fmt::print("{}: plan {} ({} full of {}), {:.6f} nats/token\n", flags.output, file.plan, num_full,
             file.plan.size(), file.steps.back().loss);
  return 0;
}

struct Compared {
  std::string name;
  IndexPlan plan;
  MeanLoss mean;
};

// Other plans on the same text, beside the one found.
std::vector<Compared> compare(PlanLoss& model, LossJournal& journal, const SearchFlags& flags,
                              const SearchResult& result) {
  const int num_layers = model.widest_plan().num_layers();
  std::vector<Compared> out = {{"all full", model.widest_plan(), {}},
                               {"searched", result.plan, {}}};
  if (model.widest_plan() == all_full_plan(num_layers))
    out.push_back({"evenly spaced", even_plan(num_layers, result.plan.num_full()), {}});
  for (const std::string& text : flags.compare) {
    RunOptions options = model.engine().options;
    options.plan = text;
    std::vector<bool> can_be_full;
    for (int layer = 0; layer < num_layers; ++layer)
      can_be_full.push_back(model.widest_plan().is_full(layer));
    const std::string& where = options.indexers.empty() ? flags.common.model : options.indexers;
    out.push_back(
        {text, plan_in_force(model.engine().model.config, can_be_full, options, where), {}});
  }
  for (Compared& row : out) row.mean = mean_loss(model, journal, row.plan);
  return out;
}

PlanFile plan_file(const SearchFlags& flags, const SearchOptions& options,
                   const SearchResult& result, const std::vector<Compared>& compared,
                   const PlanLoss& model, const Json& loss_settings) {
  PlanFile file;
  file.plan = to_string(result.plan);
  file.model_fingerprint = model.engine().model.config.fingerprint;
  for (const SearchStep& step : result.steps)
    file.steps.push_back({step.layer, step.loss, to_string(step.plan)});
  Json& settings = file.settings;
  settings["method"] = options.confidence ? "greedy, fast" : "greedy, exact";
  settings["program"] = INDEXCACHE_VERSION;
  if (options.confidence) settings["confidence"] = *options.confidence;
  if (options.keep_full > 1) settings["keep"] = options.keep_full;
  if (options.budget) settings["budget"] = *options.budget;
  settings["block_starts"] = options.block_starts;
  settings["refine"] = options.refine;
  settings["all_full_loss"] = result.start_loss;
  settings["loss"] = result.loss;
  settings["loss_unit"] = "nats/token";
  if (!result.swaps.empty()) {
    for (const SearchStep& swap : result.swaps)
      settings["swaps"].push_back(step_json(swap, result.start_loss));
  }
  for (const Compared& row : compared) {
    settings["compared"].push_back({{"name", row.name},
                                    {"plan", to_string(row.plan)},
                                    {"loss", row.mean.loss},
                                    {"standard_error", row.mean.standard_error}});
  }
  if (model.engine().adapter) settings["indexers"] = flags.common.run.indexers;
  settings["data"] = data_json(flags.data, model.data());
  settings["measured"] = loss_settings;
  return file;
}

void print_summary(const SearchFlags& flags, const SearchResult& result,
                   const std::vector<Compared>& compared, double seconds) {
  if (flags.json) {
    print_event({{"event", "done"},
                 {"plan", to_string(result.plan)},
                 {"num_full", result.plan.num_full()},
                 {"loss", result.loss},
                 {"all_full_loss", result.start_loss},
                 {"layer_forwards", result.layer_forwards},
                 {"plain_layer_forwards", result.plain_layer_forwards},
                 {"seconds", seconds},
                 {"output", flags.output}});
    return;
  }
  fmt::print("{:<16} {:>5} {:>12} {:>10} {:>10}  plan\n", "", "full", "loss", "+- error",
             "to all F");
  for (const Compared& row : compared) {
    fmt::print("{:<16} {:>5} {:>12.6f} {:>10.6f} {:>10}  {}\n", row.name, row.plan.num_full(),
               row.mean.loss, row.mean.standard_error,
               percent(row.mean.loss / compared[0].mean.loss - 1), to_string(row.plan));
  }
  fmt::print(
      "loss in nats/token; {} layer-forwards in this run, the plain search takes {} ({:.1f}%); "
      "{}\n",
      result.layer_forwards, result.plain_layer_forwards,
      100 * ratio(result.layer_forwards, result.plain_layer_forwards), format_seconds(seconds));
  fmt::print("{}: plan {} ({} full of {})\n", flags.output, to_string(result.plan),
             result.plan.num_full(), result.plan.num_layers());
}

int search(const SearchFlags& flags) {
  if (!flags.take.empty()) return take(flags);
  if (flags.common.model.empty()) fail("no model was given, expected -m FOLDER");
  if (!flags.common.run.plan.empty())
    fail("--plan {}: search starts from all layers full, expected no --plan",
         printable(flags.common.run.plan));
  check_can_write({flags.output, flags.html}, flags.data.files);
  const double start = monotonic_seconds();
  const ModelSource source = open_model(flags.common.model);
  const int num_layers = static_cast<int>(source.config.num_hidden_layers);
  SearchOptions options;
  options.keep_full = least_full_layers(flags, num_layers);
  if (!flags.budget.empty()) options.budget = budget_of(flags.budget);
  if (flags.fast) options.confidence = flags.confidence;
  options.block_starts = block_starts(num_layers, flags.blocks);
  options.refine = flags.refine;
  options.accept_flat = flags.accept_short;
  check_sequence_length(flags.data.request.sequence_tokens, source.config, flags.accept_short);
  TokenSequences data = load_text(flags.data, flags.common.model, source.config).tokens;

  const uint64_t room = flags.cache_bytes > 0 ? flags.cache_bytes : available_memory_bytes() / 4;
  StateStore store(room, flags.cache_folder);
  PlanLoss model(source, run_options(flags.common), std::move(data), &store);
  print_engine(model.engine());
  info("states: {} each, room for {} in {}", format_bytes(model.state_bytes()), format_bytes(room),
       flags.cache_folder.empty() ? "memory" : flags.cache_folder);
  const Json settings = loss_settings(source, model);
  LossJournal journal(flags.journal.empty() ? flags.output + ".journal" : flags.journal, settings,
                      model.num_sequences(), flags.resume);
  if (journal.num_read() > 0) info("resumed: {} runs are known", journal.num_read());

  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  sigaction(SIGINT, &action, nullptr);
  Watcher watcher{.json = flags.json};
  SearchEvents events;
  events.stop = &stop_requested;
  events.start = [&](double loss) { watcher.start(loss); };
  events.progress = [&](const SearchProgress& progress) { watcher.progress(progress); };
  events.step = [&](const SearchStep& step) { watcher.step(step); };
  const SearchResult result = search_plan(model, journal, options, events);
  watcher.bar.clear();
  if (result.interrupted) {
    info("stopped; the same command with --resume goes on from here");
    return 130;
  }
  const std::vector<Compared> compared = compare(model, journal, flags, result);
  const PlanFile file = plan_file(flags, options, result, compared, model, settings);
  save_plan_file(file, flags.output);
  if (!flags.html.empty()) {
    write_report(flags.html, "An index plan for " + flags.common.model,
                 {{flags.output, plan_file_json(file)}});
  }
  print_summary(flags, result, compared, monotonic_seconds() - start);
  return 0;
}

}  // namespace

void add_search_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<SearchFlags>();
  CLI::App* command =
      program->add_subcommand("search", "Find an index plan: greedy search on your own text");
  command->footer(
      "Example: indexcache search -m models/demo -f text.jsonl --keep 1/4 -o plan.json\n"
      "Every measurement is kept in PLAN.journal at once: a search that was killed goes on with\n"
      "--resume to the same plan file, byte for byte. A plan file holds the whole path;\n"
      "search --take plan.json --keep 1/2 -o half.json takes another point of it.");
  add_model_flag(command, &flags->common, false);
  add_run_flags(command, &flags->common);
  add_data_flags(command, &flags->data);
  command->add_option("-o,--output", flags->output, "The plan file to write")->required();
  command->add_option("--keep", flags->keep,
                      "Full layers to keep: 1/4 (the default) or a number as 12");
  command->add_option("--budget", flags->budget,
                      "Share layers as long as the loss grows by no more, as 0.5%");
  auto* fast = command->add_flag("--fast", flags->fast,
                                 "Drop candidates early that are worse by paired differences");
  command->add_option("--confidence", flags->confidence, "One-sided, of each drop of --fast")
      ->check(CLI::Range(0.5, 0.9999))
      ->capture_default_str()
      ->needs(fast);
  command
      ->add_option("--blocks", flags->blocks,
                   "Keep the first layer of each of this many pipeline stages full, and share a "
                   "layer of each in turn")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_flag("--refine", flags->refine,
                    "At the end, swap full and shared layers while that lowers the loss");
  command->add_option("--compare", flags->compare, "Plans to measure beside the one found")
      ->delimiter(';');
  command->add_flag("--resume", flags->resume, "Go on with the journal of an earlier run");
  command->add_option("--journal", flags->journal,
                      "Its path (default: the plan file's + .journal)");
  command
      ->add_option("--cache-bytes", flags->cache_bytes,
                   "Room for states between layers, as 2G: more room, less work, the same plan "
                   "(default: a quarter of the free memory)")
      ->transform(CLI::AsSizeValue(false));
  command->add_option("--cache-folder", flags->cache_folder,
                      "Keep the states in an unnamed file in this folder in place of memory");
  command->add_option("--take", flags->take, "Take --keep from the path of this plan file");
  command->add_flag("--force-short", flags->accept_short,
                    "Search even where sequences do not exceed index_topk");
  command->add_flag("--json", flags->json, "Events as JSON, one a line, on the standard output");
  command->add_option("--html", flags->html, "Also write a page that shows the path");
  command->callback([flags, exit_code] { *exit_code = search(*flags); });
}

}  // namespace indexcache
