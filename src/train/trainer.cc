#include "train/trainer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/atomic_file.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/units.h"
#include "checkpoint/indexer_adapter.h"
#include "plan/plan_file.h"
#include "train/batch_sampler.h"
#include "train/loss_plot.h"
#include "train/train_log.h"

namespace indexcache {

namespace {

namespace fs = std::filesystem;

const char* stage_name(Stage stage) {
  return stage == Stage::kPretrain ? "pretrain" : stage == Stage::kWarmup ? "warmup" : "sparse";
}

// What a resumed run must share with the run that it continues. Paths, devices and how often
// something is printed may change.
Json settings_json(const TrainOptions& options, const Network& network) {
  Json data = Json::array();
  for (const auto& [path, share] : options.data) {
    const TokenFile file = TokenFile::open(path);
    data.push_back(
        {{"tokens", file.num_tokens()}, {"share", share}, {"made", Json::parse(file.settings())}});
  }
  Json sequence = Json::array();
  for (const SequencePhase& phase : options.sequence)
    sequence.push_back({phase.row_tokens, phase.steps});
  return {{"stage", stage_name(options.stage)},
          {"model_fingerprint", network.config.fingerprint},
          {"plan", to_string(network.plan)},
          {"multi_layer", options.multi_layer},
          {"freeze_backbone", options.freeze_backbone},
          {"steps", options.steps},
          {"sequence", sequence},
          {"batch_tokens", options.batch_tokens},
          {"micro_tokens", options.micro_tokens},
          {"lr", options.lr},
          {"indexer_lr", options.indexer_lr},
          {"lr_warmup_steps", options.lr_warmup_steps},
          {"lr_final", options.lr_final},
          {"weight_decay", options.weight_decay},
          {"beta2", options.beta2},
          {"clip", options.clip},
          {"expert_balance_rate", options.expert_balance_rate},
          {"seed", options.seed},
          {"bf16", options.bf16},
          {"data", data}};
}

// The first field in which two settings differ, as "lr: found 0.001, expected 0.002".
std::string first_difference(const Json& found, const Json& expected) {
  for (const auto& [key, value] : expected.items()) {
    if (!found.contains(key)) return fmt::format("{} is missing", key);
    if (found[key] != value) {
      return fmt::format("{}: the run was started with {}, now it is {}", key,
                         json_excerpt(found[key]), json_excerpt(value));
    }
  }
  return "";
}

// A folder that appears under its name whole or not at all.
template <class Fill>
void write_folder(const fs::path& path, Fill&& fill) {
  const fs::path temporary = path.string() + ".tmp";
  fs::remove_all(temporary);
  fs::create_directories(temporary);
  try {
    fill(temporary);
    fs::remove_all(path);
    fs::rename(temporary, path);
  } catch (const c10::Error& error) {
    fs::remove_all(temporary);
    fail("{}: cannot write: {}", path.string(), error.what_without_backtrace());
  } catch (...) {
    fs::remove_all(temporary);
    throw;
  }
}

std::vector<int64_t> saved_steps(const fs::path& folder) {
  std::vector<int64_t> steps;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.empty() && name.find_first_not_of("0123456789") == std::string::npos &&
        fs::exists(entry.path() / "state.json"))
      steps.push_back(std::stoll(name));
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

std::atomic<bool> interrupted = false;

class Run {
 public:
  explicit Run(const TrainOptions& options);
  TrainResult go();

 private:
  ForwardOptions forward_options(bool training) const;
  double step(Progress& progress);
  double update(double factor);
  void hold_out();
  void save_step();
  void resume();
  void finish();
  [[noreturn]] void stop_at_nan(const std::string& what);
  bool trains_language_model() const {
    return options_.stage != Stage::kWarmup && !options_.freeze_backbone;
  }

  const TrainOptions& options_;
  fs::path out_;
  Network network_;
  Json settings_;
  std::unique_ptr<BatchSampler> sampler_;
  std::vector<std::pair<std::string, TokenFile>> held_out_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
  TrainLog log_;
  int64_t step_ = 0;
  int64_t tokens_ = 0;
  int64_t tokens_here_ = 0;  // of this process
  double started_ = monotonic_seconds();
};

ModelConfig starting_config(const TrainOptions& options) {
  if (options.model.empty() == options.config.empty())
    fail("give either a model to start from or the config.json of a new one");
  if (options.model.empty() && options.stage != Stage::kPretrain)
    fail("stage {} starts from a trained model; found none", stage_name(options.stage));
  return load_config(options.model.empty() ? options.config : options.model);
}

torch::Device open_device(const std::string& name) {
  try {
    const torch::Device device(name);
    if (device.is_cuda() && !torch::cuda::is_available())
      fail("--device {}: this libtorch finds no CUDA device", name);
    return device;
  } catch (const c10::Error&) {
    fail("--device {}: expected cpu, cuda or cuda:N", printable(name));
  }
}

Network starting_network(const TrainOptions& options) {
  const ModelConfig config = starting_config(options);
  const IndexPlan plan =
      options.plan.empty() ? config.index_plan
                           : resolve_plan(options.plan, static_cast<int>(config.num_hidden_layers),
                                          config.fingerprint);
  const torch::Device device = open_device(options.device);
  const bool indexers = options.stage != Stage::kPretrain;
  const bool backbone = options.stage == Stage::kPretrain ||
                        (options.stage == Stage::kSparse && !options.freeze_backbone);
  for (const SequencePhase& phase : options.sequence) {
    if (phase.row_tokens > config.max_position_embeddings)
      fail("sequences of {} tokens are longer than the model's max_position_embeddings {}",
           phase.row_tokens, config.max_position_embeddings);
    if (indexers && phase.row_tokens <= config.indexer.index_topk)
      fail(
          "sequences of {} tokens are not longer than index_topk {}: every token would be "
          "selected, and an indexer has nothing to learn",
          phase.row_tokens, config.indexer.index_topk);
  }
  Network network = make_network(
      config, plan, device, options.bf16 ? torch::kBFloat16 : torch::kFloat, {backbone, indexers});
  if (options.model.empty()) {
    network.parameters.initialise(options.seed);
  } else {
    load_network(network, Checkpoint::open(options.model));
  }
  return network;
}

Run::Run(const TrainOptions& options)
    : options_(options), out_(options.out), network_(starting_network(options)) {
  std::vector<DataShare> data;
  for (const auto& [path, share] : options.data) {
    data.push_back({TokenFile::open(path), share});
    if (static_cast<int64_t>(data.back().file.vocab_size()) > network_.config.vocab_size)
      fail("{}: made with a vocabulary of {}, but the model's is {}", path,
           data.back().file.vocab_size(), network_.config.vocab_size);
  }
  sampler_ = std::make_unique<BatchSampler>(std::move(data), options.seed);
  for (const auto& [name, path] : options.held_out)
    held_out_.emplace_back(name, TokenFile::open(path));
  settings_ = settings_json(options, network_);

  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (int g = 0; g < kNumGroups; ++g) {
    const auto group = static_cast<ParameterGroup>(g);
    if (!network_.parameters.trainable(group)) continue;
    torch::Tensor master = network_.parameters.master(group);
    master.mutable_grad() = network_.parameters.gradient(group);
    const bool indexer = group == kIndexerMatrices || group == kIndexerVectors;
    const bool matrix = group == kMatrices || group == kIndexerMatrices;
    groups.emplace_back(std::vector<torch::Tensor>{master},
                        std::make_unique<torch::optim::AdamWOptions>(
                            torch::optim::AdamWOptions(indexer ? options.indexer_lr : options.lr)
                                .betas({0.9, options.beta2})
                                .weight_decay(matrix ? options.weight_decay : 0)));
  }
  optimizer_ = std::make_unique<torch::optim::AdamW>(groups);

  fs::create_directories(out_ / "steps");
  const std::vector<int64_t> saved = saved_steps(out_ / "steps");
  if (options.resume) {
    resume();
  } else if (!saved.empty()) {
    fail("{}: holds a run at step {}; --resume continues it, another folder starts a new one",
         options.out, saved.back());
  }
  log_.open((out_ / "log.csv").string(), step_);
}

void Run::resume() {
  const std::vector<int64_t> saved = saved_steps(out_ / "steps");
  if (saved.empty()) {
    info("{}: nothing saved yet, starting at step 0", options_.out);
    return;
  }
  const fs::path folder = out_ / "steps" / std::to_string(saved.back());
  const Json state = load_json((folder / "state.json").string());
  const JsonObject object(state, (folder / "state.json").string());
  if (const std::string difference = first_difference(object.get("settings"), settings_);
      !difference.empty())
    fail("{}: cannot resume: {}", options_.out, difference);
  load_network(network_, Checkpoint::open(folder.string()));
  try {
    torch::load(*optimizer_, (folder / "optimizer.pt").string());
  } catch (const c10::Error& error) {
    fail("{}: cannot read: {}", (folder / "optimizer.pt").string(), error.what_without_backtrace());
  }
  step_ = object.integer("step", 0, INT64_MAX);
  tokens_ = object.integer("tokens", 0, INT64_MAX);
  info("{}: resumed at step {} of {}", options_.out, step_, options_.steps);
}

void Run::save_step() {
  const fs::path folder = out_ / "steps" / std::to_string(step_);
  write_folder(folder, [&](const fs::path& temporary) {
    save_network(network_, temporary.string(), DType::kF32, UINT64_MAX);
    torch::save(*optimizer_, (temporary / "optimizer.pt").string());
    const Json state = {{"step", step_}, {"tokens", tokens_}, {"settings", settings_}};
    write_text_file((temporary / "state.json").string(), state.dump(2) + "\n");
  });
  std::vector<int64_t> saved = saved_steps(out_ / "steps");
  // The one before stays: the newest may be of a run that had just gone wrong.
  for (size_t i = 0; i + 2 < saved.size(); ++i)
    fs::remove_all(out_ / "steps" / std::to_string(saved[i]));
  write_loss_plot((out_ / "log.csv").string(), (out_ / "loss.html").string(),
                  fmt::format("{}: {}", options_.out, stage_name(options_.stage)));
}

ForwardOptions Run::forward_options(bool training) const {
  ForwardOptions f;
  f.attention = options_.stage == Stage::kSparse ? AttentionKind::kSparse : AttentionKind::kDense;
  f.training = training;
  f.checkpoint_activations = options_.checkpoint_activations;
  if (options_.stage == Stage::kPretrain) return f;
  f.indexer_loss = options_.multi_layer ? IndexerLoss::kMultiLayer : IndexerLoss::kPerLayer;
  return f;
}

void Run::stop_at_nan(const std::string& what) {
  // Which tensor it came from, where that can be told: a value makes every gradient NaN, so values
  // come first.
  std::string tensor = "no parameter";
  const auto look = [&](const char* kind, const auto& part) {
    for (const Parameter& parameter : network_.parameters.all()) {
      if (tensor != "no parameter") return;
      const torch::Tensor values = part(parameter);
      if (!values.defined() || torch::isfinite(values).all().item<bool>()) continue;
      tensor = fmt::format("{} of {}", kind, parameter.names[0]);
    }
  };
  look("the value", [](const Parameter& parameter) { return parameter.value; });
  look("the gradient", [&](const Parameter& parameter) {
    const torch::Tensor flat = network_.parameters.gradient(parameter.group);
    return flat.defined() ? flat.narrow(0, parameter.offset, parameter.value.numel()) : flat;
  });
  const auto saved = saved_steps(out_ / "steps");
  fail("step {}: {} is not finite; first seen in {}; the last good checkpoint is {}", step_, what,
       tensor, saved.empty() ? "none" : (out_ / "steps" / std::to_string(saved.back())).string());
}

// Returns the norm of the gradient before clipping.
double Run::update(double factor) {
  double squared = 0;
  for (const bool indexers : {false, true}) {
    std::vector<torch::Tensor> gradients;
    for (const ParameterGroup group :
         indexers ? std::array{kIndexerMatrices, kIndexerVectors} : std::array{kMatrices, kVectors})
      if (network_.parameters.trainable(group))
        gradients.push_back(network_.parameters.gradient(group));
    if (gradients.empty()) continue;
    torch::Tensor sum = torch::zeros({}, gradients[0].options());
    for (const torch::Tensor& g : gradients) sum += g.square().sum();
    const double norm = std::sqrt(sum.item<double>());
    if (!std::isfinite(norm)) stop_at_nan("the norm of the gradient");
    squared += norm * norm;
    if (norm > options_.clip)
      for (torch::Tensor& g : gradients) g.mul_(options_.clip / norm);
  }
  for (auto& group : optimizer_->param_groups()) {
    const bool indexer = group.params()[0].is_same(network_.parameters.master(kIndexerMatrices)) ||
                         group.params()[0].is_same(network_.parameters.master(kIndexerVectors));
    static_cast<torch::optim::AdamWOptions&>(group.options())
        .lr((indexer ? options_.indexer_lr : options_.lr) * factor);
  }
  optimizer_->step();
  network_.parameters.cast_masters();
  network_.parameters.clear_gradients();
  return std::sqrt(squared);
}

double Run::step(Progress& progress) {
  const double factor = learning_rate_factor(options_, step_);
  const int64_t row_tokens = row_tokens_of(options_, step_);
  const auto micro_batches =
      sampler_->step(step_, row_tokens, options_.batch_tokens, options_.micro_tokens);
  const auto f64 = torch::TensorOptions().device(network_.device).dtype(torch::kDouble);
  torch::Tensor nll = torch::zeros({}, f64), targets = torch::zeros({}, f64),
                indexer = torch::zeros({}, f64);
  const double share = 1.0 / static_cast<double>(micro_batches.size());
  int64_t step_tokens = 0;
  for (const auto& documents : micro_batches) {
    const Batch batch = make_batch(documents, network_.device);
    step_tokens += batch.num_tokens;
    ForwardOptions f = forward_options(true);
    f.indexer_loss_weight = f.indexer_loss == IndexerLoss::kNone ? 0 : share;
    torch::AutoGradMode grad_mode(trains_language_model());
    const ForwardResult result = forward(network_, batch, f);
    indexer += result.indexer_loss * share;
    // In warm-up the language loss cannot change: not worth the head's products.
    if (options_.stage != Stage::kWarmup) {
      const LanguageLoss loss = language_loss(network_, result.hidden, batch);
      nll += loss.nll;
      targets += loss.num_targets;
      if (trains_language_model()) (loss.loss * share).backward();
    }
    network_.parameters.collect_gradients();
  }
  const double loss = nll.item<double>() / std::max(1.0, targets.item<double>());
  const double indexer_loss = indexer.item<double>();
  if (!std::isfinite(loss)) stop_at_nan("the language loss");
  if (!std::isfinite(indexer_loss)) stop_at_nan("the indexer loss");
  const double gradient_norm = update(factor);
  if (trains_language_model()) balance_experts(network_, options_.expert_balance_rate);

  ++step_;
  tokens_ += step_tokens;
  tokens_here_ += step_tokens;
  const double rate = static_cast<double>(tokens_here_) / (monotonic_seconds() - started_);
  if (step_ % options_.log_every == 0 || step_ == options_.steps) {
    const double lr = trains_language_model() ? options_.lr : options_.indexer_lr;
    log_.add({step_, tokens_, row_tokens, lr * factor, loss, indexer_loss, gradient_norm, rate});
  }
  std::string losses = trains_language_model() ? fmt::format("loss {:.4f}, ", loss) : "";
  if (options_.stage != Stage::kPretrain)
    losses += fmt::format("indexer loss {:.4f}, ", indexer_loss);
  progress.update(step_, fmt::format("{}{:.0f} tokens/s", losses, rate));
  return loss;
}

void Run::hold_out() {
  torch::NoGradGuard no_grad;
  for (const auto& [name, file] : held_out_) {
    double nll = 0, targets = 0, indexer = 0;
    int64_t num_batches = 0;
    for (const auto& documents :
         leading_documents(file, options_.held_out_tokens, row_tokens_of(options_, step_),
                           options_.micro_tokens)) {
      const Batch batch = make_batch(documents, network_.device);
      ForwardOptions f = forward_options(false);
      // A warm-up is judged by what attention over its selections costs.
      if (options_.stage == Stage::kWarmup) f.attention = AttentionKind::kSparse;
      const ForwardResult result = forward(network_, batch, f);
      const LanguageLoss loss = language_loss(network_, result.hidden, batch);
      nll += loss.nll.item<double>();
      targets += loss.num_targets.item<double>();
      indexer += result.indexer_loss.item<double>();
      ++num_batches;
    }
    const double mean = nll / std::max(1.0, targets);
    log_.add_held_out({step_, name, mean, indexer / static_cast<double>(num_batches)});
    info("step {}: held out {}: {:.4f} nats/token, indexer loss {:.4f}", step_, name, mean,
         indexer / static_cast<double>(num_batches));
  }
}

void Run::finish() {
  if (options_.freeze_backbone || (options_.stage == Stage::kWarmup && !options_.plan.empty())) {
    IndexerAdapter adapter;
    adapter.plan = to_string(network_.plan);
    adapter.model_fingerprint = network_.config.fingerprint;
    adapter.how = settings_.dump();
    const std::string path = (out_ / "indexers.safetensors").string();
    write_indexer_adapter(path, adapter, network_.parameters.specs(options_.save_dtype, true),
                          network_.parameters.source(options_.save_dtype));
    info("{}: the trained indexers", path);
    return;
  }
  const fs::path folder = out_ / "model";
  write_folder(folder, [&](const fs::path& temporary) {
    save_network(network_, temporary.string(), options_.save_dtype, options_.max_shard_bytes);
    const std::string from = options_.tokenizer.empty() ? options_.model : options_.tokenizer;
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
                             "chat_template.jinja"}) {
      if (!from.empty() && fs::exists(fs::path(from) / name))
        fs::copy_file(fs::path(from) / name, temporary / name);
    }
  });
  info("{}: the trained model", folder.string());
}

TrainResult Run::go() {
  info("{}: {} parameters, plan {}, seed {}, {} steps of {} tokens", stage_name(options_.stage),
       network_.parameters.num_elements(), to_string(network_.plan), options_.seed, options_.steps,
       options_.batch_tokens);
  Progress progress(stage_name(options_.stage), options_.steps, "steps");
  int64_t last_saved = step_;
  while (step_ < options_.steps) {
    step(progress);
    const bool out_of_time = options_.stop_after_seconds > 0 &&
                             monotonic_seconds() - started_ > options_.stop_after_seconds;
    const bool stop = out_of_time || interrupted;
    if (step_ % options_.held_out_every == 0 || step_ == options_.steps) hold_out();
    if (step_ % options_.save_every == 0 || stop || step_ == options_.steps) {
      save_step();
      last_saved = step_;
    }
    if (stop && step_ < options_.steps) {
      info("stopped after step {} of {}; --resume continues from {}", step_, options_.steps,
           (out_ / "steps" / std::to_string(last_saved)).string());
      return TrainResult::kStopped;
    }
  }
  finish();
  return TrainResult::kDone;
}

}  // namespace

double learning_rate_factor(const TrainOptions& o, int64_t step) {
  if (step < o.lr_warmup_steps)
    return static_cast<double>(step + 1) / static_cast<double>(o.lr_warmup_steps);
  const double done = static_cast<double>(step - o.lr_warmup_steps) /
                      static_cast<double>(std::max<int64_t>(1, o.steps - o.lr_warmup_steps));
  return o.lr_final + (1 - o.lr_final) * 0.5 * (1 + std::cos(done * 3.14159265358979));
}

int64_t row_tokens_of(const TrainOptions& options, int64_t step) {
  int64_t begin = 0;
  for (size_t i = 0; i + 1 < options.sequence.size(); ++i) {
    begin += options.sequence[i].steps;
    if (step < begin) return options.sequence[i].row_tokens;
  }
  return options.sequence.back().row_tokens;
}

TrainResult train(const TrainOptions& options) {
  struct sigaction action = {};
  action.sa_handler = [](int) { interrupted = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // a second Ctrl-C ends the process
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  Run run(options);
  return run.go();
}

}  // namespace indexcache
