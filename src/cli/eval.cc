// indexcache eval: what index plans cost, all of them in one run on the same text and tasks.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>

#include "analysis/eval_tasks.h"
#include "analysis/eval_text.h"
#include "base/atomic_file.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/data_flags.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/report_page.h"

namespace indexcache {

namespace {

struct EvalFlags {
  CommonFlags common;
  DataFlags data;
  std::vector<std::string> plans, variants, tasks, filler_files;
  std::vector<int64_t> contexts;
  int64_t samples = 20;
  bool json = false, csv = false;
  std::string output, html;
};

// A plan that is none: all layers full, and every query selects all that it sees.
constexpr const char* kDense = "dense";

// The engines of the variants, one for each file of indexers ("": the checkpoint's own), dense or
// not: plans share one, which has the weights for all of them.
class Engines {
 public:
  // `options` are what every engine has but its plan and indexers; the source must outlive it.
  Engines(const ModelSource& source, RunOptions options) : source_(source), options_(options) {}

  Engine* with_indexers(const std::string& file, bool dense) {
    std::unique_ptr<Engine>& engine = engines_[{file, dense}];
    if (engine == nullptr) {
      RunOptions options = options_;
      options.indexers = file;
      options.dense = dense;
      options.plan = to_string(widest_plan(source_, options));
      engine = std::make_unique<Engine>(source_, options);
      print_engine(*engine);
    }
    return engine.get();
  }

 private:
  const ModelSource& source_;
  RunOptions options_;
  std::map<std::pair<std::string, bool>, std::unique_ptr<Engine>> engines_;
};

// NAME=PLAN, NAME=PLAN,indexers=FILE or NAME=indexers=FILE; a plan may hold '=' and ','.
struct VariantText {
  std::string name, plan, indexers;
};

VariantText parse_variant(const std::string& text) {
  const std::string key = "indexers=";
  const size_t equals = text.find('=');
  VariantText variant;
  if (equals != std::string::npos) {
    variant.name = text.substr(0, equals);
    const std::string rest = text.substr(equals + 1);
    const size_t found = rest.starts_with(key) ? 0 : rest.find("," + key);
    variant.plan = rest.substr(0, found);
    if (found != std::string::npos)
      variant.indexers = rest.substr(found + key.size() + (found > 0 ? 1 : 0));
    const bool complete =
        found == std::string::npos ? !variant.plan.empty() : !variant.indexers.empty();
    if (!variant.name.empty() && complete) return variant;
  }
  fail("--variant {}: expected NAME=PLAN, NAME=PLAN,indexers=FILE or NAME=indexers=FILE",
       printable(text));
}

struct Evaluation {
  std::string model;
  std::vector<Variant> variants;
  std::vector<TextScore> text;
  std::vector<TaskScore> tasks;
  int64_t samples = 0;
  Json data;
};

std::vector<Variant> variants_of(const EvalFlags& flags, Engines* engines) {
  const std::string& base = flags.common.run.indexers;
  std::vector<VariantText> texts;
  for (const std::string& text : flags.plans) {
    if (text != "all") texts.push_back({text, text, base});
  }
  for (const std::string& text : flags.variants) {
    texts.push_back(parse_variant(text));
    if (texts.back().indexers.empty()) texts.back().indexers = base;
  }
  // The reference: all layers full, or all that can be.
  Engine* reference = engines->with_indexers(base, false);
  std::vector<Variant> variants = {{"all", reference->model.plan, reference}};
  for (const VariantText& text : texts) {
    const bool dense = text.plan == kDense;
    Engine* engine = engines->with_indexers(text.indexers, dense);
    const IndexPlan& widest = engine->model.plan;
    if (dense) {
      variants.push_back({text.name, widest, engine});
      continue;
    }
    std::vector<bool> can_be_full;
    for (int layer = 0; layer < widest.num_layers(); ++layer)
      can_be_full.push_back(widest.is_full(layer));
    RunOptions options = engine->options;
    options.plan = text.plan == "default" ? "" : text.plan;
    const std::string& where = text.indexers.empty() ? flags.common.model : text.indexers;
    variants.push_back(
        {text.name, plan_in_force(engine->model.config, can_be_full, options, where), engine});
  }
  return variants;
}

int64_t target_bytes(const TextData& text) {
  int64_t bytes = 0;
  for (const std::vector<int32_t>& tokens : text.tokens.sequences) {
    for (size_t i = 1; i < tokens.size(); ++i)
      bytes += static_cast<int64_t>(text.tokenizer.token_bytes(tokens[i]).size());
  }
  return bytes;
}

std::vector<TaskKind> task_kinds(const std::vector<std::string>& names) {
  std::vector<TaskKind> kinds;
  for (const std::string& name : names) {
    const std::optional<TaskKind> kind = task_from_name(name);
    if (!kind) {
      std::string known;
      for (const TaskKind each : kTaskKinds)
        known += fmt::format("{}{}", known.empty() ? "" : ", ", task_name(each));
      fail("--tasks {}: expected some of {}", printable(name), known);
    }
    kinds.push_back(*kind);
  }
  if (kinds.empty()) kinds.assign(std::begin(kTaskKinds), std::end(kTaskKinds));
  return kinds;
}

// Right answers of a variant at a context, over all kinds of tasks.
double accuracy(const Evaluation& eval, size_t variant, int64_t context) {
  double right = 0, asked = 0;
  for (const TaskScore& score : eval.tasks) {
    if (score.context != context) continue;
    right += static_cast<double>(score.right[variant]);
    asked += static_cast<double>(eval.samples);
  }
  return right / asked;
}

std::vector<int64_t> contexts_of(const Evaluation& eval) {
  std::vector<int64_t> contexts;
  for (const TaskScore& score : eval.tasks) contexts.push_back(score.context);
  std::sort(contexts.begin(), contexts.end());
  contexts.erase(std::unique(contexts.begin(), contexts.end()), contexts.end());
  return contexts;
}

Json estimate_json(const Estimate& estimate) {
  return {{"mean", estimate.mean}, {"standard_error", estimate.error}};
}

// The file; empty where they are the checkpoint's own.
const std::string& indexers_of(const Variant& variant) { return variant.engine->options.indexers; }

Json evaluation_json(const Evaluation& eval) {
  Json rows = Json::array();
  for (size_t v = 0; v < eval.variants.size(); ++v) {
    const TextScore& score = eval.text[v];
    Json row = {{"name", eval.variants[v].name},
                {"plan", to_string(eval.variants[v].plan)},
                {"num_full", eval.variants[v].plan.num_full()},
                {"index_topk", eval.variants[v].engine->model.config.indexer.index_topk},
                {"indexers", indexers_of(eval.variants[v])},
                {"nll", estimate_json(score.nll)},
                {"perplexity", score.perplexity()},
                {"bits_per_byte", score.bits_per_byte},
                {"nll_increase", estimate_json(score.nll_increase)},
                {"kl", estimate_json(score.kl)},
                {"top1_agreement", estimate_json(score.top1_agreement)}};
    Json tasks = Json::array();
    for (const TaskScore& task : eval.tasks) {
      tasks.push_back({{"task", task_name(task.kind)},
                       {"context", task.context},
                       {"right", task.right[v]},
                       {"asked", eval.samples}});
    }
    row["tasks"] = tasks;
    rows.push_back(row);
  }
  return {
      {"model", eval.model}, {"data", eval.data}, {"command", command_line()}, {"variants", rows}};
}

std::string quoted(const std::string& text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string evaluation_csv(const Evaluation& eval) {
  std::string out =
      "name,plan,num_full,indexers,nll,nll_error,perplexity,bits_per_byte,nll_increase,nll_"
      "increase_error,"
      "kl,kl_error,top1_agreement,top1_agreement_error";
  for (const TaskScore& task : eval.tasks)
    out += fmt::format(",{}_{}", task_name(task.kind), task.context);
  out += "\n";
  for (size_t v = 0; v < eval.variants.size(); ++v) {
    const TextScore& s = eval.text[v];
    out += fmt::format("{},{},{},{},{},{},{},{},{},{},{},{},{},{}", quoted(eval.variants[v].name),
                       to_string(eval.variants[v].plan), eval.variants[v].plan.num_full(),
                       quoted(indexers_of(eval.variants[v])), s.nll.mean, s.nll.error,
                       s.perplexity(), s.bits_per_byte, s.nll_increase.mean, s.nll_increase.error,
                       s.kl.mean, s.kl.error, s.top1_agreement.mean, s.top1_agreement.error);
    for (const TaskScore& task : eval.tasks)
      out += fmt::format(",{}",
                         static_cast<double>(task.right[v]) / static_cast<double>(eval.samples));
    out += "\n";
  }
  return out;
}

std::string evaluation_text(const Evaluation& eval) {
  const std::vector<int64_t> contexts = contexts_of(eval);
  size_t width = 8;
  bool any_indexers = false;
  for (const Variant& variant : eval.variants) {
    width = std::max(width, variant.name.size());
    any_indexers |= !indexers_of(variant).empty();
  }
  std::string out =
      fmt::format("{:<{}} {:>5} {:>19} {:>10} {:>9} {:>19} {:>10} {:>8}", "", width, "full",
                  "loss +- error", "perplexity", "bits/byte", "to all F +- error", "KL", "top-1");
  for (const int64_t context : contexts) out += fmt::format(" {:>9}", fmt::format("@{}", context));
  if (any_indexers) out += "  indexers";
  out += fmt::format("\n{:<{}} {:>5} {:>19} {:>10} {:>9} {:>19} {:>10} {:>8}", "", width, "layers",
                     "nats/token", "", "", "nats/token", "nats", "%");
  for (size_t i = 0; i < contexts.size(); ++i) out += fmt::format(" {:>9}", "% right");
  out += "\n";
  for (size_t v = 0; v < eval.variants.size(); ++v) {
    const TextScore& s = eval.text[v];
    out += fmt::format("{:<{}} {:>5} {:>19} {:>10.4f} {:>9.4f} {:>19} {:>10.6f} {:>8.2f}",
                       eval.variants[v].name, width, eval.variants[v].plan.num_full(),
                       fmt::format("{:.5f} +- {:.5f}", s.nll.mean, s.nll.error), s.perplexity(),
                       s.bits_per_byte,
                       fmt::format("{:+.5f} +- {:.5f}", s.nll_increase.mean, s.nll_increase.error),
                       s.kl.mean, 100 * s.top1_agreement.mean);
    for (const int64_t context : contexts)
      out += fmt::format(" {:>9.1f}", 100 * accuracy(eval, v, context));
    if (any_indexers) {
      const std::string& indexers = indexers_of(eval.variants[v]);
      out += "  " + (indexers.empty() ? "the model's" : printable(indexers, 400));
    }
    out += "\n";
  }
  for (const TaskScore& task : eval.tasks) {
    out += fmt::format("{:>12} @{:<8}", task_name(task.kind), task.context);
    for (size_t v = 0; v < eval.variants.size(); ++v) {
      out += fmt::format("  {} {}/{}", eval.variants[v].name, task.right[v], eval.samples);
    }
    out += "\n";
  }
  return out;
}

int eval(const EvalFlags& flags) {
  check_can_write({flags.output, flags.html}, flags.data.files);
  const ModelSource source = open_model(flags.common.model);
  check_sequence_length(flags.data.request.sequence_tokens, source.config, true);
  const std::vector<TaskKind> kinds = task_kinds(flags.tasks);
  const TextData text = load_text(flags.data, flags.common.model, source.config);
  RunOptions options = run_options(flags.common);
  if (!options.plan.empty())
    fail("--plan {}: eval compares plans, expected --plans", printable(options.plan));
  options.context = text.tokens.sequence_tokens();
  for (const int64_t context : flags.contexts)
    options.context =
        std::max({options.context, context,
                  std::min(context + kMaxAnswerTokens, source.config.max_position_embeddings)});
  Engines engines(source, options);

  Evaluation eval;
  eval.model = flags.common.model;
  eval.variants = variants_of(flags, &engines);
  eval.samples = flags.samples;
  eval.data = data_json(flags.data, text.tokens);
  const int64_t num_variants = static_cast<int64_t>(eval.variants.size());
  {
    Progress progress("text", text.tokens.total_tokens() * num_variants, "tokens");
    eval.text = score_text(eval.variants, text.tokens.sequences, target_bytes(text),
                           [&](int64_t done) { progress.update(done); });
  }
  if (!flags.contexts.empty()) {
    info("tasks: {} samples a kind and context, seeds {} to {}, held-out keys", flags.samples,
         flags.data.request.seed,
         flags.data.request.seed + static_cast<uint64_t>(flags.samples) - 1);
    const TaskFiller filler(
        flags.filler_files.empty() ? text.documents : load_documents(flags.filler_files),
        [&](std::string_view piece) {
          return static_cast<int64_t>(text.tokenizer.encode(piece, false, false).size());
        },
        eval.variants[0].engine->exec.pool.num_threads());
    const TaskPlan plan{kinds, flags.contexts, flags.samples, flags.data.request.seed};
    Progress progress(
        "tasks",
        flags.samples * num_variants * static_cast<int64_t>(kinds.size() * flags.contexts.size()),
        "answers");
    eval.tasks = score_tasks(eval.variants, plan, filler, text.tokenizer,
                             [&](int64_t done) { progress.update(done); });
  }

  if (!flags.html.empty())
    write_report(flags.html, "Index plans of " + eval.model, {{"eval", evaluation_json(eval)}});
  const std::string out =
      flags.json  ? evaluation_json(eval).dump(2, ' ', false, Json::error_handler_t::replace) + "\n"
      : flags.csv ? evaluation_csv(eval)
                  : evaluation_text(eval);
  if (!flags.output.empty()) {
    write_text_file(flags.output, out);
  } else {
    std::fwrite(out.data(), 1, out.size(), stdout);
  }
  return 0;
}

}  // namespace

void add_eval_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = program->add_subcommand(
      "eval", "Perplexity and long-context tasks under index plans, side by side");
  command->footer(
      "Example: indexcache eval -m models/demo -f heldout.txt --plans 1/2,1/4,plan.json --contexts "
      "2048,8192\n"
      "         indexcache eval -m models/demo -f heldout.txt --variant "
      "trained=1/4,indexers=indexers.safetensors\n"
      "All plans see the same tokens and prompts. The first row is the reference, all layers "
      "full;\n"
      "\"dense\" is the model without sparse attention: every query selects all that it sees.\n"
      "Errors are standard errors over sequences.");
  add_model_flag(command, &flags->common, true);
  add_run_flags(command, &flags->common);
  add_data_flags(command, &flags->data);
  command
      ->add_option("--plans", flags->plans,
                   "Index plans: default, 1/4, FSSF..., a plan file; dense")
      ->delimiter(',');
  command->add_option("--variant", flags->variants,
                      "NAME=PLAN, NAME=PLAN,indexers=FILE or NAME=indexers=FILE: a plan, trained "
                      "indexers, or both under a name of your own; may be given again");
  command->add_option("--contexts", flags->contexts, "Context lengths of the tasks, tokens")
      ->delimiter(',')
      ->check(CLI::Range(64, 1 << 24));
  command
      ->add_option("--tasks", flags->tasks,
                   "single, multikey, multivalue, variables, copy (default: all)")
      ->delimiter(',');
  command->add_option("--samples", flags->samples, "Tasks of each kind at each context")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--filler", flags->filler_files,
                      "Text that the tasks hide facts in (default: the text of -f)");
  auto* json = command->add_flag("--json", flags->json, "One JSON object");
  command->add_flag("--csv", flags->csv, "One row a plan")->excludes(json);
  command->add_option("-o,--output", flags->output, "Write there in place of the standard output");
  command->add_option("--html", flags->html, "Also write a page with tables and charts");
  command->callback([flags, exit_code] { *exit_code = eval(*flags); });
}

}  // namespace indexcache
