// indexcache export: a plan for other engines, as lines to paste, as a slim checkpoint, as a GGUF
// file.

#include <signal.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "base/json.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/units.h"
#include "cli/gguf_tokenizer.h"
#include "cli/options.h"
#include "model/gguf_model.h"
#include "model/slim_checkpoint.h"
#include "plan/export_lines.h"

namespace indexcache {

namespace {

struct ExportFlags {
  std::string model, plan, engine, checkpoint, gguf, gguf_type = "f16";
  bool force_plan = false, json = false;
  int pipeline_stages = 1;
};

std::atomic<bool> stop_requested{false};
void on_interrupt(int) { stop_requested = true; }

struct Interrupted {};

// While files are written: Ctrl-C must take back what was begun, and so must a size limit, whose
// signal would end the program on the spot.
class WriteGuard {
 public:
  WriteGuard() {
    for (const int number : {SIGINT, SIGTERM}) {
      struct sigaction action = {};
      action.sa_handler = on_interrupt;
      sigaction(number, &action, nullptr);
    }
    signal(SIGXFSZ, SIG_IGN);
  }
  ~WriteGuard() {
    for (const int number : {SIGINT, SIGTERM, SIGXFSZ}) signal(number, SIG_DFL);
  }
};

CopyProgress progress_on(Progress* progress) {
  return [progress](uint64_t bytes) {
    if (stop_requested) throw Interrupted();
    progress->update(static_cast<int64_t>(bytes >> 20));
  };
}

int64_t mebibytes(uint64_t bytes) { return static_cast<int64_t>(bytes >> 20); }

void check_space(const std::string& path, uint64_t bytes) {
  std::error_code error;
  const auto parent = std::filesystem::absolute(path, error).parent_path();
  const auto space = std::filesystem::space(parent, error);
  if (!error && bytes > space.available) {
    fail("{}: needs {}, found {} free", printable(path, 400), format_bytes(bytes),
         format_bytes(space.available));
  }
}

void print_notes(const std::vector<std::string>& notes) {
  for (const std::string& note : notes) fmt::print("    note: {}\n", note);
}

// What every part of the command works on.
struct Source {
  ModelSource model;
  IndexPlan plan;
  Json config;                          // as the engines will read it
  std::vector<bool> layer_has_indexer;  // of the checkpoint that they will load
};

Json lines_json(const EngineLines& lines) {
  return {{"engine", lines.engine},
          {"place", lines.place},
          {"settings", lines.settings},
          {"lines", lines.lines},
          {"environment", lines.environment},
          {"config_suffices", lines.config_suffices},
          {"refusal", lines.refusal.empty() ? Json(nullptr) : Json(lines.refusal)},
          {"hazards", lines.hazards}};
}

void print_lines(const EngineLines& lines) {
  if (!lines.refusal.empty()) {
    fmt::print("\n{}: cannot run this plan\n    {}\n", lines.engine, lines.refusal);
    return;
  }
  fmt::print("\n{}, {}{}:\n", lines.engine, lines.place,
             lines.config_suffices ? " (config.json says the same, so it may be left out)" : "");
  for (const std::string& line : lines.environment) fmt::print("  {}\n", line);
  for (const std::string& line : lines.lines) fmt::print("  {}\n", line);
  print_notes(lines.hazards);
}

Json export_engine_lines(const ExportFlags& flags, const Source& source) {
  const ExportRequest request = {source.config, source.plan, source.layer_has_indexer,
                                 static_cast<int>(source.model.config.num_nextn_predict_layers),
                                 flags.pipeline_stages};
  const bool all = flags.engine.empty() || flags.engine == "all";
  Json out = Json::array();
  for (const std::string& engine : all ? export_engines() : std::vector{flags.engine}) {
    const EngineLines lines = export_lines(engine, request);
    if (!all && !lines.refusal.empty())
      fail("{} cannot run the plan: {}", lines.engine, lines.refusal);
    if (!flags.json) print_lines(lines);
    out.push_back(lines_json(lines));
  }
  return out;
}

Json export_slim_checkpoint(const ExportFlags& flags, const Source& source) {
  const Checkpoint& checkpoint = source.model.checkpoint;
  const uint64_t bytes = count_slim_checkpoint(checkpoint, source.plan).num_bytes;
  check_space(flags.checkpoint, bytes);
  SlimCheckpoint slim;
  {
    Progress progress("copy", mebibytes(bytes), "MiB");
    slim = write_slim_checkpoint(flags.model, checkpoint, source.model.config, source.plan,
                                 flags.checkpoint, progress_on(&progress));
  }
  const CopiedTensors& tensors = slim.tensors;
  const std::vector<std::string> agree = engines_that_agree(slim.config, source.plan);
  if (!flags.json) {
    fmt::print("\n{}: {} tensors, {}\n", printable(flags.checkpoint, 400), tensors.num_tensors,
               format_bytes(tensors.num_bytes));
    fmt::print(
        "  saved {} ({} B, {:.2f}% of the source): {} tensors of the indexers of {} shared "
        "layers\n",
        format_bytes(tensors.left_out_bytes), tensors.left_out_bytes,
        100.0 * static_cast<double>(tensors.left_out_bytes) /
            static_cast<double>(tensors.num_bytes + tensors.left_out_bytes),
        tensors.left_out_tensors, source.plan.num_layers() - source.plan.num_full());
    std::string names;
    for (const std::string& name : agree)
      names += fmt::format("{}{}", names.empty() ? "" : ", ", name);
    fmt::print("  its config.json gives this plan in {}\n", names);
    for (const std::string& name : slim.left_out)
      fmt::print("    note: {} was not copied\n", printable(name));
  }
  return {{"path", flags.checkpoint},
          {"num_tensors", tensors.num_tensors},
          {"num_bytes", tensors.num_bytes},
          {"left_out_tensors", tensors.left_out_tensors},
          {"saved_bytes", tensors.left_out_bytes},
          {"files", slim.files},
          {"files_left_out", slim.left_out},
          {"engines_without_lines", agree}};
}

Json export_gguf(const ExportFlags& flags, const Source& source) {
  const ModelConfig& config = source.model.config;
  const GgmlType type = *parse_ggml_type(flags.gguf_type);
  std::error_code ignored;
  const std::string name =
      std::filesystem::weakly_canonical(flags.model, ignored).filename().string();
  const GgufModel model =
      gguf_model(source.model.checkpoint, config, source.plan, type, printable(name));
  const GgufTokenizer tokenizer = gguf_tokenizer(flags.model, config);
  GgufMetadata all = model.metadata;
  all.insert(all.end(), tokenizer.metadata.begin(), tokenizer.metadata.end());
  const uint64_t bytes = gguf_file_bytes(all, model.tensors());
  check_space(flags.gguf, bytes);
  {
    Progress progress("gguf", mebibytes(bytes), "MiB");
    write_gguf_model(model, tokenizer.metadata, flags.gguf, progress_on(&progress));
  }
  std::vector<std::string> notes = tokenizer.notes;
  if (model.num_f16_instead > 0) {
    notes.push_back(fmt::format("{} matrices are f16: their rows are no multiple of {}",
                                model.num_f16_instead, kQ8Block));
  }
  const std::vector<std::string> hazards = gguf_hazards(config, source.plan);
  notes.insert(notes.end(), hazards.begin(), hazards.end());
  const char* architecture = gguf_architecture(config.model_type);
  if (!flags.json) {
    fmt::print("\n{}: {}, {}, {} tensors, {}\n", printable(flags.gguf, 400), architecture,
               flags.gguf_type, model.parts.size(), format_bytes(bytes));
    print_notes(notes);
  }
  return {{"path", flags.gguf},      {"architecture", architecture},
          {"type", flags.gguf_type}, {"num_tensors", model.parts.size()},
          {"num_bytes", bytes},      {"notes", notes}};
}

int export_plan(const ExportFlags& flags) {
  if (flags.pipeline_stages != 1 && flags.engine.empty() &&
      !(flags.checkpoint.empty() && flags.gguf.empty()))
    throw CLI::ValidationError("export", "--pp is about engine lines: expected --engine with it");
  Source source;
  source.model = open_model(flags.model);
  const std::vector<TensorSpec> specs = list_tensors(source.model.checkpoint);
  source.layer_has_indexer = layers_with_indexer(specs, source.model.config);
  RunOptions options;
  options.plan = flags.plan;
  options.force_plan = flags.force_plan;
  source.plan = plan_in_force(source.model.config, source.layer_has_indexer, options, flags.model);
  source.config = load_json(flags.model + "/config.json");

  Json out = {{"model", flags.model},
              {"num_hidden_layers", source.plan.num_layers()},
              {"plan", to_string(source.plan)},
              {"num_full", source.plan.num_full()}};
  if (!flags.json)
    fmt::print("plan {} ({} full of {})\n", to_string(source.plan), source.plan.num_full(),
               source.plan.num_layers());
  const bool writes = !flags.checkpoint.empty() || !flags.gguf.empty();
  try {
    const WriteGuard guard;
    if (!flags.checkpoint.empty()) {
      out["checkpoint"] = export_slim_checkpoint(flags, source);
      // The lines below are then for the copy.
      source.config = config_with_plan(source.config, source.plan);
      for (int l = 0; l < source.plan.num_layers(); ++l)
        source.layer_has_indexer[static_cast<size_t>(l)] = source.plan.is_full(l);
    }
    if (!flags.gguf.empty()) out["gguf"] = export_gguf(flags, source);
  } catch (const Interrupted&) {
    info("interrupted; nothing was left behind");
    return 130;
  }
  if (!writes || !flags.engine.empty()) out["engines"] = export_engine_lines(flags, source);
  if (flags.json) fmt::print("{}\n", out.dump(2, ' ', false, Json::error_handler_t::replace));
  return 0;
}

}  // namespace

void add_export_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<ExportFlags>();
  CLI::App* command = program->add_subcommand(
      "export", "Take a plan to other engines: lines, a slim checkpoint, a GGUF file");
  command->footer(
      "Example: indexcache export -m models/demo --plan plan.json --engine vllm\n"
      "         indexcache export -m models/demo --plan 1/4 --pp 2\n"
      "         indexcache export -m models/demo --plan 1/4 --checkpoint /tmp/slim\n"
      "         indexcache export -m models/demo --plan 1/4 --gguf /tmp/demo.gguf --type q8_0\n"
      "Without --checkpoint and --gguf the lines of every engine are printed. See docs/export.md.");
  command->add_option("-m,--model", flags->model, "Folder of a checkpoint in the hub's layout")
      ->required();
  command->add_option(
      "--plan", flags->plan,
      "Index plan: FSSF..., 1/4, freq=4,offset=3, or a plan file (default: the checkpoint's)");
  command->add_flag("--force-plan", flags->force_plan,
                    "Take a plan file that was made for another model");
  std::vector<std::string> engines = export_engines();
  engines.push_back("all");
  command->add_option("--engine", flags->engine, "Print the lines of this engine, or of all")
      ->check(CLI::IsMember(engines));
  command
      ->add_option("--pp", flags->pipeline_stages,
                   "Pipeline stages that the engine will run with; cuts are checked")
      ->check(CLI::Range(1, 4096));
  command->add_option("--checkpoint", flags->checkpoint,
                      "Write a copy without the indexers of shared layers into this new folder");
  command->add_option("--gguf", flags->gguf, "Write the model for llama.cpp into this new file");
  command->add_option("--type", flags->gguf_type, "Type of the matrices in the GGUF file")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "q8_0"}))
      ->capture_default_str();
  command->add_flag("--json", flags->json, "One JSON object");
  command->callback([flags, exit_code] { *exit_code = export_plan(*flags); });
}

}  // namespace indexcache
