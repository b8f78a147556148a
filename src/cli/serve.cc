// indexcache serve: a model behind an OpenAI-compatible HTTP interface.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <memory>
#include <new>
#include <semaphore>
#include <stdexcept>
#include <thread>

#include "base/json.h"
#include "base/log.h"
#include "cli/layered_flags.h"
#include "cli/options.h"
#include "cli/report.h"
#include "server/http_server.h"

namespace indexcache {

namespace {

struct ServeFlags {
  CommonFlags common;
  std::string config, served_model_name, log_format = "text";
  AppOptions app;
  HttpServerOptions http;
  SchedulerOptions scheduler;
  double drain_timeout = 30;
  bool no_prefix_cache = false, no_access_log = false, exit_on_fault = false;
};

std::string name_of(const std::string& model_folder) {
  const std::filesystem::path path = std::filesystem::weakly_canonical(model_folder);
  const std::string name = path.filename().string();
  return name.empty() ? "model" : printable(name);
}

// SIGTERM and SIGINT, waited for by a thread of their own: they must not interrupt the others.
sigset_t stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

int wait_for_stop_signal() {
  const sigset_t signals = stop_signals();
  int signal = 0;
  sigwait(&signals, &signal);
  return signal;
}

// What the main thread waits for once the model is served.
struct StopWait {
  std::atomic<bool> loaded{false}, signalled{false};
  std::counting_semaphore<> semaphore{0};
};

// The first signal is told, if there is anything to wait for; the second ends the program at once,
// and so does one while the model is loaded.
void heed_stop_signals(std::shared_ptr<StopWait> wait) {
  std::thread([wait = std::move(wait)] {
    const int first = wait_for_stop_signal();
    if (!wait->loaded) _exit(128 + first);
    wait->signalled = true;
    wait->semaphore.release();
    _exit(128 + wait_for_stop_signal());
  }).detach();
}

// What the server writes itself is an object already.
std::string json_line(const std::string& prefix, const std::string& text) {
  if (prefix.empty() && text.starts_with('{') && Json::accept(text)) return text;
  return event_line({.json = true}, prefix.empty() ? "info" : "warning", text);
}

void say_error(const ServeFlags& flags, const std::string& text) {
  const bool json = flags.log_format == "json";
  fmt::print(stderr, "{}\n", json ? event_line({.json = true}, "error", text) : "error: " + text);
}

int serve(CLI::App* command, ServeFlags& flags) {
  if (const char* file = std::getenv("INDEXCACHE_CONFIG"); file && flags.config.empty())
    flags.config = file;
  fill_from_environment_and_file(command, flags.config);
  flags.http.log.json = flags.log_format == "json";
  if (flags.http.log.json) set_log_format(json_line);
  if (flags.common.model.empty()) {
    say_error(flags, "--model is missing (flag, INDEXCACHE_MODEL or \"model\" in --config)");
    return 2;
  }
  // An empty key would let everyone in while it looks as if it did not.
  for (const std::string& key : flags.app.api_keys)
    if (key.empty()) fail("--api-key is empty, expected at least one character");
  // More answers than the batch and the queue hold could never be taken together.
  int64_t& num_choices = flags.app.limits.num_choices;
  num_choices = std::min(num_choices, flags.scheduler.max_running + flags.scheduler.max_waiting);
  flags.http.access_log = !flags.no_access_log;
  const auto say = [&](const std::string& event, const std::string& text) {
    info("{}", event_line(flags.http.log, event, text));
  };
  const sigset_t signals = stop_signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  App app(flags.app);
  HttpServer server(app, flags.http);
  if (!server.is_loopback() && flags.app.api_keys.empty())
    warn("--host {} without --api-key: everyone who reaches this address may use the server",
         printable(flags.http.host));
  server.start();
  say("listening", fmt::format("listening on http://{}:{}", flags.http.host, server.port()));

  const RunOptions options = run_options(flags.common);
  const auto wait = std::make_shared<StopWait>();
  heed_stop_signals(wait);
  const ModelSource source = open_model(flags.common.model);
  Engine engine(source, options);
  print_engine(engine);
  flags.scheduler.prefix_cache = !flags.no_prefix_cache;
  flags.scheduler.chunk_tokens = std::min(flags.scheduler.chunk_tokens, options.batch_tokens);
  flags.scheduler.on_fault = [wait] { wait->semaphore.release(); };
  Scheduler scheduler(engine, flags.scheduler);
  SchedulerGenerator generator(scheduler);

  auto model = std::make_shared<ServedModel>();
  model->name =
      flags.served_model_name.empty() ? name_of(flags.common.model) : flags.served_model_name;
  model->generator = &generator;
  if (std::filesystem::exists(flags.common.model + "/tokenizer.json")) {
    model->tokenizer = load_tokenizer(flags.common.model);
    model->longest_token = longest_token_bytes(*model->tokenizer);
    model->text = load_text_config(flags.common.model);
  } else {
    warn("{}: no tokenizer.json: only token ids are taken", printable(flags.common.model, 400));
  }
  model->context = max_request_tokens(engine);
  model->vocab_size = engine.model.config.vocab_size;
  model->eos_tokens = engine.model.config.eos_token_id;
  model->plan = to_string(engine.model.plan);
  model->started = time(nullptr);
  const std::string name = model->name;
  app.set_model(std::move(model));
  wait->loaded = true;
  say("ready", fmt::format("serving {} with plan {}", name, to_string(engine.model.plan)));

  for (wait->semaphore.acquire(); !wait->signalled; wait->semaphore.acquire()) {
    try {
      say("fault", "the engine failed: " + scheduler.stats().fault);
    } catch (const std::bad_alloc&) {  // which may be the fault: /health says it as well
    }
    if (flags.exit_on_fault) break;
  }
  app.set_draining();
  say("draining",
      fmt::format("no new requests; up to {} s for {} running and {} waiting", flags.drain_timeout,
                  scheduler.stats().running, scheduler.stats().waiting));
  const bool done = scheduler.drain(flags.drain_timeout);
  // Clients have to hear how their answers ended before their connections do.
  scheduler.stop();
  server.stop(done ? 5 : 1);
  say("stopped", done ? "all requests were answered" : "some requests were cut off");
  // Who supervises this must hear of a fault, however it was stopped.
  return scheduler.stats().fault.empty() ? 0 : 1;
}

}  // namespace

void add_serve_command(CLI::App* program, int* exit_code) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* command =
      program->add_subcommand("serve", "OpenAI-compatible HTTP server with a small web page");
  command->footer(
      "Example: indexcache serve -m models/demo --port 8080\n"
      "Every flag can also be set by an environment variable (--max-running is\n"
      "INDEXCACHE_MAX_RUNNING) or in the JSON object of --config (\"max-running\": 8). The "
      "command\n"
      "line wins over the environment, the environment over the file, the file over the default.\n"
      "SIGTERM lets requests finish for up to --drain-timeout; a second one ends at once.");
  add_model_flag(command, &flags->common, false);
  add_run_flags(command, &flags->common);
  command
      ->add_option("--cache-tokens", flags->common.run.cache_tokens,
                   "Tokens that all requests together may keep (0: as many as --ctx)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 36))
      ->capture_default_str();
  command->add_option("--config", flags->config, "A JSON file with flags");
  command->add_option("--host", flags->http.host, "Address to listen on")->capture_default_str();
  command->add_option("--port", flags->http.port, "Port to listen on; 0: any free one")
      ->capture_default_str();
  command->add_option("--api-key", flags->app.api_keys,
                      "A key that clients must give; may be repeated. Better in INDEXCACHE_API_KEY "
                      "or --config, where other users do not see it");
  command->add_option("--served-model-name", flags->served_model_name,
                      "Name of the model in the API (default: its folder's name)");
  command->add_option("--cors", flags->app.cors_origins,
                      "An origin whose pages may use this server, or *; may be repeated");
  command->add_option("--allowed-host", flags->http.allowed_hosts,
                      "A Host header to take beside this machine's own names; may be repeated");
  command->add_option("--max-running", flags->scheduler.max_running, "Requests in the batch")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      ->add_option("--max-waiting", flags->scheduler.max_waiting,
                   "Requests in the queue; more are refused with 429")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_option("--chunk", flags->scheduler.chunk_tokens, "Tokens of one forward pass")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command
      ->add_option("--mixed-chunk", flags->scheduler.mixed_chunk_tokens,
                   "Of these, tokens of prompts in a pass in which others decode: fewer make their "
                   "pauses shorter")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command->add_flag("--no-prefix-cache", flags->no_prefix_cache,
                    "Compute every prompt from its first token");
  command->add_flag("--deterministic", flags->scheduler.deterministic,
                    "The same request gives the same bytes whatever else is in the batch: those of "
                    "this machine's CPU implementations, which differ from another's");
  command
      ->add_option("--drain-timeout", flags->drain_timeout,
                   "Seconds that running requests get after SIGTERM")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  command->add_flag("--exit-on-fault", flags->exit_on_fault,
                    "End with status 1 after a fault of the engine, for a supervisor to start "
                    "again; else /health says why until the server is stopped");
  ServerLimits& limits = flags->app.limits;
  command->add_option("--max-body-bytes", limits.body_bytes, "Bytes of a request's body")
      ->check(CLI::Range(1024, 1 << 30))
      ->capture_default_str();
  command->add_option("--max-header-bytes", limits.header_bytes, "Bytes of a request's header")
      ->check(CLI::Range(1024, 1 << 20))
      ->capture_default_str();
  command->add_option("--max-connections", limits.connections, "Open connections")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--max-choices", limits.num_choices,
                   "Answers of one request: its prompts times n")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--header-timeout", limits.header_seconds, "Seconds for a header to arrive")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  command->add_option("--body-timeout", limits.body_seconds, "Seconds for a body to arrive")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  command
      ->add_option("--idle-timeout", limits.idle_seconds,
                   "Seconds between two requests of a connection")
      ->check(CLI::Range(0.1, 86400.0))
      ->capture_default_str();
  command
      ->add_option("--write-timeout", limits.write_seconds,
                   "Seconds for a client to take what it is sent")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  command->add_option("--log-format", flags->log_format, "text, or json: one object a line")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  command->add_flag("--log-prompts", flags->http.log.prompts, "Prompts in the log");
  command->add_flag("--no-access-log", flags->no_access_log, "No line for each request");
  command->callback([command, flags, exit_code] {
    try {
      *exit_code = serve(command, *flags);
    } catch (const std::runtime_error& error) {
      say_error(*flags, error.what());
      *exit_code = 1;
    }
  });
}

}  // namespace indexcache
