#include "analysis/report.h"

#include <algorithm>
#include <cmath>

#include "analysis/svg.h"
#include "base/error.h"
#include "plan/plan_file.h"

namespace indexcache {

namespace {

// Light and dark by the reader's own setting; one column, readable from 400 px up.
constexpr const char* kStyle = R"css(
:root { --ground: #fff; --ink: #1c2128; --soft: #59636e; --rule: #d6dbe1; --panel: #f6f8fa;
  --c0: #0b62c4; --c1: #b35900; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ground: #10151b; --ink: #e6ebf0; --soft: #9aa6b2;
  --rule: #313a44; --panel: #182029; --c0: #5aa9ff; --c1: #f0a04b; --c2: #56d364; --c3: #bc8cff;
  --c4: #ff8fc7; --c5: #9aa6b2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 64px; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 40px 0 8px; }
p { margin: 6px 0; } .soft { color: var(--soft); }
code { font: 0.88em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: 10px;
  overflow-x: auto; font: 0.85em/1.5 ui-monospace, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; } th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.chart { display: block; width: 100%; max-width: 760px; height: auto; } .heat { max-width: 620px; }
.chart text { font: 13px system-ui, sans-serif; fill: var(--soft); }
.chart .label { fill: var(--ink); } .grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke: currentColor; } .dot { fill: currentColor; }
.line.again { stroke-dasharray: 7 5; } .dot.again { fill: var(--ground); stroke: currentColor; stroke-width: 2; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 0.9rem;
  align-items: center; } .legend i { display: inline-block; width: 12px; height: 12px;
  border-radius: 50%; background: currentColor; margin-right: 6px; vertical-align: -1px; }
.legend i.again { background: none; box-sizing: border-box; border: 3px solid; }
.legend .ramp { width: 120px; border-radius: 3px; margin: 0 -8px;
  background: linear-gradient(90deg, transparent, var(--c0)); border: 1px solid var(--rule); }
.heat-cell { fill: var(--c0); } .group { fill: none; stroke: var(--c1); stroke-width: 2.5; }
.plans { display: grid; grid-template-columns: max-content 1fr; gap: 6px 12px; align-items: center;
  max-width: 900px; } .plan { display: flex; gap: 1px; }
.plan-name { font-size: 0.9rem; max-width: 40vw; overflow-wrap: anywhere; }
.plan b { flex: 1 1 0; height: 18px; min-width: 2px; } .legend b { display: inline-block;
  width: 12px; height: 12px; margin-right: 6px; vertical-align: -1px; }
@media (max-width: 600px) { .chart text { font-size: 19px; } }
b.full { background: var(--c0); } b.shared { background: var(--rule); }
)css";

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::string out = "<div class=\"scroll\"><table>\n";
  for (size_t r = 0; r < rows.size(); ++r) {
    out += "<tr>";
    for (const std::string& cell : rows[r])
      out += fmt::format("<{0}>{1}</{0}>", r == 0 ? "th" : "td", html_escape(cell));
    out += "</tr>\n";
  }
  return out + "</table></div>\n";
}

int count_full(const std::string& letters) {
  return static_cast<int>(std::count(letters.begin(), letters.end(), 'F'));
}

std::string signed_percent(double share) { return fmt::format("{:+.3f}%", 100 * share); }

std::string command_of(const Json& json) {
  if (!json.is_object() || !json.contains("command") || !json.at("command").is_string()) return "";
  return "<pre>" + html_escape(json.at("command").get<std::string>()) + "</pre>\n";
}

// Made again from the settings: a plan file is the same whether its search was cut off or not, so
// it does not hold the command.
std::string search_command(const Json& settings) {
  const Json data = settings.value("data", Json::object());
  if (!data.is_object() || !data.contains("files") || !data.at("files").is_array()) return "";
  std::string out = "indexcache search -m MODEL";
  for (const Json& file : data.at("files"))
    out += " -f " + (file.is_string() ? file.get<std::string>() : file.dump());
  const auto flag = [&](const char* name, const Json& from, const char* key) {
    if (from.contains(key) && from.at(key).is_number())
      out += fmt::format(" {} {}", name, from.at(key).dump());
  };
  flag("--seq", data, "sequence_tokens");
  flag("--tokens", data, "tokens");
  flag("--seed", data, "seed");
  flag("--keep", settings, "keep");
  if (settings.contains("budget") && settings.at("budget").is_number())
    out += fmt::format(" --budget {:g}%", 100 * settings.at("budget").get<double>());
  if (settings.contains("confidence")) out += " --fast";
  flag("--confidence", settings, "confidence");
  if (settings.value("refine", Json()) == true) out += " --refine";
  return "<pre>" + html_escape(out + " -o PLAN") + "</pre>\n";
}

struct Path {
  PlanFile file;
  std::string where;
  double all_full = 0;
};

Path read_path(const ReportPart& part) {
  Path path{parse_plan_file(part.json, part.where), part.where, 0};
  path.all_full =
      JsonObject(path.file.settings, part.where + ": \"settings\"").number("all_full_loss");
  if (!(path.all_full > 0))
    fail("{}: \"all_full_loss\" is {}, expected more than 0", part.where, path.all_full);
  return path;
}

std::string search_section(const Path& path) {
  const JsonObject settings(path.file.settings, path.where + ": \"settings\"");
  LineChart chart;
  chart.x_label = "full layers (indexers that are left)";
  chart.y_label = "loss against all full, %";
  chart.x_falls = true;
  Series found{"greedy search", {{static_cast<double>(path.file.plan.size()), 0}}, {"all full"}};
  found.points[0].first = path.file.steps.empty()
                              ? static_cast<double>(count_full(path.file.plan))
                              : static_cast<double>(count_full(path.file.steps[0].plan) + 1);
  std::vector<std::vector<std::string>> rows = {
      {"full layers", "layer shared", "loss, nats/token", "against all full", "plan"}};
  for (const PlanStep& step : path.file.steps) {
    const double over = step.loss / path.all_full - 1;
    found.points.push_back({count_full(step.plan), 100 * over});
    found.notes.push_back(
        fmt::format("{} full: {:.6f} nats/token, {}", count_full(step.plan), step.loss, step.plan));
    rows.push_back({std::to_string(count_full(step.plan)), std::to_string(step.layer),
                    fmt::format("{:.6f}", step.loss), signed_percent(over), step.plan});
  }
  chart.series.push_back(std::move(found));

  std::vector<std::pair<std::string, std::string>> plans = {{"found", path.file.plan}};
  std::vector<std::vector<std::string>> compared = {
      {"plan", "full layers", "loss, nats/token", "standard error", "against all full"}};
  if (settings.has("compared") && settings.get("compared").is_array()) {
    for (const Json& item : settings.get("compared")) {
      const JsonObject row(item, settings.where() + ": \"compared\"");
      const std::string name = row.string("name"), plan = row.string("plan");
      const double over = row.number("loss") / path.all_full - 1;
      compared.push_back(
          {name, std::to_string(count_full(plan)), fmt::format("{:.6f}", row.number("loss")),
           fmt::format("{:.6f}", row.number("standard_error")), signed_percent(over)});
      if (name == "all full" || name == "searched") continue;
      plans.push_back({name, plan});
      chart.series.push_back(
          {name, {{count_full(plan), 100 * over}}, {fmt::format("{}: {}", name, plan)}, false});
    }
  }
  std::string out = fmt::format(
      "<h2>The search</h2>\n<p>Plan <code>{}</code>: {} full layers of {}, loss {} against the "
      "all-full model's {:.6f} nats/token.</p>\n",
      path.file.plan, count_full(path.file.plan), path.file.plan.size(),
      signed_percent(settings.number("loss") / path.all_full - 1), path.all_full);
  out += plan_strip(plans) + line_chart(chart);
  if (compared.size() > 1) out += table(compared);
  out += "<details><summary>Every step</summary>\n" + table(rows) + "</details>\n";
  out += "<details><summary>Settings</summary><pre>" +
         html_escape(path.file.settings.dump(2, ' ', false, Json::error_handler_t::replace)) +
         "</pre></details>\n";
  return out + search_command(path.file.settings);
}

// The groups that a plan makes of the layers that were measured: a full layer and the shared ones
// after it.
std::vector<std::pair<size_t, size_t>> plan_groups(const std::string& plan,
                                                   const std::vector<int>& layers) {
  std::vector<std::pair<size_t, size_t>> groups;
  for (size_t i = 0; i < layers.size(); ++i) {
    const size_t layer = static_cast<size_t>(layers[i]);
    if (layer >= plan.size()) return {};
    if (plan[layer] == 'F' || groups.empty()) groups.push_back({i, i});
    groups.back().second = i;
  }
  return groups;
}

std::string overlap_section(const ReportPart& part, const std::string& plan) {
  const JsonObject json(part.json, part.where);
  HeatMap map;
  std::vector<int> layers;
  for (const Json& layer : json.get("layers")) {
    if (!layer.is_number_integer() || layer < 0 || layer >= kMaxPlanLayers)
      json.wrong("layers", "layer numbers");
    layers.push_back(layer.get<int>());
    map.labels.push_back(std::to_string(layers.back()));
  }
  const Json& rows = json.get("overlap");
  bool square = rows.is_array() && rows.size() == layers.size();
  for (size_t i = 0; square && i < rows.size(); ++i) {
    square = rows[i].is_array() && rows[i].size() == layers.size();
    for (size_t j = 0; square && j < rows.size(); ++j) {
      square = rows[i][j].is_number() && rows[i][j] >= 0 && rows[i][j] <= 1;
      if (square) map.values.push_back(rows[i][j].get<double>());
    }
  }
  if (!square) json.wrong("overlap", "a square of numbers from 0 to 1");
  map.groups = plan_groups(plan, layers);
  std::string out = fmt::format(
      "<h2>Overlap of selections</h2>\n<p>What two layers both select, as a share of index_topk "
      "{}: "
      "neighbouring layers {:.1f}% on average, independent random selections {:.1f}%.{}</p>\n",
      json.integer("index_topk", 1, INT64_MAX), 100 * json.number("adjacent_mean"),
      100 * json.number("chance"),
      map.groups.empty() ? "" : " Squares: the groups that share a selection under the plan.");
  return out + heat_map(map) + command_of(part.json);
}

std::string estimate_text(const JsonObject& row, const char* key, double scale,
                          const char* format) {
  const JsonObject estimate = row.object(key);
  return fmt::format(fmt::runtime(format), scale * estimate.number("mean"),
                     scale * estimate.number("standard_error"));
}

// "searched 1/4" belongs to the family "searched"; a name that is only a fraction or a count is a
// plan by rule.
std::string family_of(const std::string& name) {
  const size_t end = name.find_last_not_of("0123456789/");
  if (end == std::string::npos) return "uniform";
  return name[end] == ' ' && end > 0 ? name.substr(0, end) : name;
}

// Loss against retained indexers, a line for each family of plans, all of them from the all-full
// model.
class FamilyChart {
 public:
  void add(const std::string& name, const std::string& plan, double increase) {
    const double full = count_full(plan);
    if (plan.find('S') == std::string::npos) {
      if (!start_) start_ = {full, increase};  // the reference; dense attention may come after it
      return;
    }
    const std::string family = family_of(name);
    auto at = std::find_if(series_.begin(), series_.end(),
                           [&](const Series& series) { return series.name == family; });
    if (at == series_.end()) at = series_.insert(at, Series{family, {}, {}});
    at->points.push_back({full, increase});
  }

  // Empty where no plan shares a layer.
  std::string draw() && {
    for (Series& series : series_) {
      if (start_) series.points.push_back(*start_);
      std::sort(series.points.rbegin(), series.points.rend());
      for (const auto& [full, increase] : series.points)
        series.notes.push_back(
            fmt::format("{}, {} full: {:+.5f} nats/token", series.name, full, increase));
    }
    return line_chart({"full layers (indexers that are left)", "loss above all full, nats/token",
                       std::move(series_), true});
  }

 private:
  std::optional<std::pair<double, double>> start_;
  std::vector<Series> series_;
};

std::string eval_section(const ReportPart& part) {
  const JsonObject json(part.json, part.where);
  const Json& variants = json.get("variants");
  if (!variants.is_array() || variants.empty()) json.wrong("variants", "a list of plans");
  std::vector<std::vector<std::string>> text = {{"plan", "full layers", "loss, nats/token",
                                                 "perplexity", "bits/byte", "to all full",
                                                 "KL, nats", "top-1 agrees"}};
  const bool any_indexers = std::any_of(variants.begin(), variants.end(), [&](const Json& item) {
    return JsonObject(item, part.where + ": \"variants\"").string_or("indexers", "") != "";
  });
  if (any_indexers) text[0].push_back("indexers");
  std::vector<std::vector<std::string>> tasks = {{"tasks, % right"}};
  std::vector<std::pair<std::string, std::string>> plans;
  std::vector<Series> curves;
  FamilyChart families;
  for (const Json& item : variants) {
    const JsonObject row(item, part.where + ": \"variants\"");
    const std::string name = row.string("name");
    plans.push_back({name, row.string("plan")});
    if (row.number("perplexity") > 1) {
      families.add(name, row.string("plan"), row.object("nll_increase").number("mean"));
    }
    text.push_back({name, std::to_string(row.integer("num_full", 1, kMaxPlanLayers)),
                    estimate_text(row, "nll", 1, "{:.5f} ± {:.5f}"),
                    fmt::format("{:.4f}", row.number("perplexity")),
                    fmt::format("{:.4f}", row.number("bits_per_byte")),
                    estimate_text(row, "nll_increase", 1, "{:+.5f} ± {:.5f}"),
                    estimate_text(row, "kl", 1, "{:.6f} ± {:.6f}"),
                    estimate_text(row, "top1_agreement", 100, "{:.2f}% ± {:.2f}%")});
    if (any_indexers) {
      const std::string indexers = row.string_or("indexers", "");
      text.back().push_back(indexers.empty() ? "the model's" : indexers);
    }
    std::vector<std::string> cells = {name};
    std::map<int64_t, std::pair<double, double>> by_context;  // right, asked
    for (const Json& entry : row.get("tasks")) {
      const JsonObject task(entry, row.where() + ": \"tasks\"");
      const int64_t context = task.integer("context", 1, INT64_MAX);
      const double right = task.number("right"), asked = task.number("asked");
      if (tasks.size() == 1)
        tasks[0].push_back(fmt::format("{} @{}", task.string("task"), context));
      cells.push_back(fmt::format("{:.0f}", 100 * right / asked));
      by_context[context].first += right;
      by_context[context].second += asked;
    }
    if (by_context.empty()) continue;
    tasks.push_back(cells);
    Series curve{name, {}, {}};
    for (const auto& [context, score] : by_context) {
      const double right = 100 * score.first / score.second;
      curve.points.push_back({static_cast<double>(context), right});
      curve.notes.push_back(fmt::format("{} @{}: {:.0f}%", name, context, right));
    }
    curves.push_back(std::move(curve));
  }
  std::string out = "<h2>What the plans cost</h2>\n" + plan_strip(plans) +
                    std::move(families).draw() + table(text) +
                    "<p class=\"soft\">± standard error over sequences. All plans saw the same "
                    "tokens.</p>\n";
  if (tasks[0].size() > 1) {
    out +=
        "<h2>Long-context tasks</h2>\n" +
        line_chart({"context, tokens", "right answers, %", curves, false, std::pair(-2.0, 102.0)}) +
        table(tasks);
  }
  return out + command_of(part.json);
}

std::string bench_section(const ReportPart& part) {
  std::vector<std::vector<std::string>> rows = {
      {"plan", "full layers", "context", "prefill, s", "decode, tokens/s", "indexer's share"}};
  std::map<std::string, Series> prefill;
  for (const Json& item : part.json) {
    const JsonObject row(item, part.where);
    const std::string plan = row.string("plan");
    const int64_t context = row.integer("context", 1, INT64_MAX);
    rows.push_back({plan, std::to_string(row.integer("num_full", 1, kMaxPlanLayers)),
                    std::to_string(context), fmt::format("{:.3f}", row.number("prefill_s")),
                    fmt::format("{:.1f}", row.number("decode_tok_s")),
                    fmt::format("{:.1f}%", 100 * row.number("indexer_share"))});
    Series& series = prefill[plan];
    series.name = plan;
    series.points.push_back({static_cast<double>(context), row.number("prefill_s")});
    series.notes.push_back(fmt::format("{} @{}: {:.3f} s", plan, context, row.number("prefill_s")));
  }
  LineChart chart{"context, tokens", "prefill, s", {}};
  for (auto& [plan, series] : prefill) chart.series.push_back(series);
  return "<h2>Speed</h2>\n" + line_chart(chart) + table(rows) +
         (part.json.empty() ? "" : command_of(part.json[0]));
}

bool has(const Json& json, const char* key) { return json.is_object() && json.contains(key); }

}  // namespace

std::string report_html(const std::string& title, const std::vector<ReportPart>& parts) {
  std::string plan;
  for (const ReportPart& part : parts) {
    if (has(part.json, "steps") && plan.empty()) plan = read_path(part).file.plan;
  }
  std::string body;
  for (const ReportPart& part : parts) {
    if (has(part.json, "steps")) {
      body += search_section(read_path(part));
    } else if (has(part.json, "overlap")) {
      body += overlap_section(part, plan);
    } else if (has(part.json, "variants")) {
      body += eval_section(part);
    } else if (part.json.is_array() && !part.json.empty() && has(part.json[0], "prefill_s")) {
      body += bench_section(part);
    } else {
      fail("{}: expected a plan file, or the JSON of overlap, eval or bench", part.where);
    }
  }
  return fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n"
      "<title>{0}</title>\n<style>{1}</style>\n</head>\n<body>\n<h1>{0}</h1>\n{2}</body>\n</"
      "html>\n",
      html_escape(title), kStyle, body);
}

}  // namespace indexcache
