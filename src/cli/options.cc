#include "cli/options.h"

#include <filesystem>

#include "base/json.h"
#include "device/gpus.h"

namespace indexcache {

namespace {

// What is wrong with an "op=implementation"; empty when nothing is. The op itself checks the
// implementation's name, because which there are depends on the arguments.
std::string check_forced(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos)
    return fmt::format("{}: expected op=implementation", printable(text));
  std::string names;
  for (const char* name : kOpNames) {
    if (text.substr(0, equals) == name) return "";
    names += fmt::format("{}{}", names.empty() ? "" : ", ", name);
  }
  return fmt::format("{}: unknown op, expected one of {}", printable(text), names);
}

}  // namespace

void add_model_flag(CLI::App* command, CommonFlags* flags, bool required) {
  auto* model =
      command->add_option("-m,--model", flags->model, "Folder of a checkpoint in the hub's layout");
  if (required) model->required();
}

void add_run_flags(CLI::App* command, CommonFlags* flags) {
  command->add_option("-c,--ctx", flags->run.context,
                      "Tokens the cache can hold (0: the model's, at most 4096)");
  command
      ->add_option("-t,--threads", flags->run.num_threads,
                   "Threads (0: all CPUs this process may use)")
      ->check(CLI::Range(0, 1024));
  command
      ->add_option("-b,--batch", flags->run.batch_tokens, "Tokens of one forward pass of a prefill")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command->add_option(
      "--plan", flags->run.plan,
      "Index plan: FSSF..., 1/4, freq=4,offset=3, or a plan file (default: the checkpoint's)");
  command->add_flag("--force-plan", flags->run.force_plan,
                    "Take a plan file or indexers that were made for another model");
  command->add_option("--indexers", flags->run.indexers,
                      "Trained indexers (indexers.safetensors) in place of the checkpoint's, with "
                      "the plan they were trained under unless --plan says another");
  command->add_option("--device", flags->device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command
      ->add_option("--dtype", flags->dtype,
                   "Products and cache: f32, bf16, fp8 (the same as bf16, but products with fp8 "
                   "weights round their input to fp8 too, on a GPU), or auto (f32 for an f32 "
                   "checkpoint, else bf16)")
      ->check(CLI::IsMember({"auto", "f32", "float32", "bf16", "bfloat16", "fp8"}))
      ->capture_default_str();
  command
      ->add_option(
          "--indexer-keys", flags->indexer_keys,
          "Indexer keys in the cache: cache (the cache's type), i8 (half of bf16, faster to "
          "score on CPUs with VNNI), fp8 (the same size, for Hopper's tensor cores; slow on a "
          "CPU), "
          "or auto (fp8 for bf16 models on Hopper, else cache); selections differ a little")
      ->check(CLI::IsMember({"auto", "cache", "i8", "fp8"}))
      ->capture_default_str();
  command
      ->add_option("--kv-cache", flags->kv_cache,
                   "Latent KV in the cache: auto (the type of --dtype) or fp8 (e4m3 with a scale "
                   "for each 128, 57% of bf16; for GPUs, slow on a CPU); answers differ a little")
      ->check(CLI::IsMember({"auto", "fp8"}))
      ->capture_default_str();
  command
      ->add_option("--force", flags->forced,
                   "Force an implementation, as matmul=ref (for bisection)")
      ->check(check_forced);
  command->add_flag("--check-tensors", flags->run.check_tensors,
                    "Refuse a checkpoint that holds NaN or infinity");
}

RunOptions run_options(const CommonFlags& flags) {
  RunOptions options = flags.run;
  if (flags.device == "cuda") {
    if (const std::string why = cuda_unavailable_reason(); !why.empty())
      fail("--device cuda: {}", why);
    options.device = Device::kCuda;
  }
  if (flags.dtype == "f32" || flags.dtype == "float32") {
    options.compute = ComputeChoice::kF32;
  } else if (flags.dtype == "bf16" || flags.dtype == "bfloat16") {
    options.compute = ComputeChoice::kBF16;
  } else if (flags.dtype == "fp8") {
    options.compute = ComputeChoice::kFP8;
  }
  if (flags.indexer_keys == "i8") options.indexer_keys = IndexerKeys::kI8;
  if (flags.indexer_keys == "fp8") options.indexer_keys = IndexerKeys::kFp8;
  if (flags.indexer_keys == "cache") options.indexer_keys = IndexerKeys::kCacheType;
  if (flags.kv_cache == "fp8") options.kv_cache = KvCacheType::kFp8;
  for (const std::string& text : flags.forced) {
    const size_t equals = text.find('=');
    options.forced_ops[text.substr(0, equals)] = text.substr(equals + 1);
  }
  return options;
}

std::vector<int32_t> load_token_ids(const std::string& path) {
  const Json json = load_json(path);
  if (!json.is_array())
    fail("{}: found {}, expected a JSON array of token ids", printable(path), json_excerpt(json));
  std::vector<int32_t> ids;
  for (const Json& item : json) {
    const bool good = item.is_number_integer() && item >= 0 && item <= INT32_MAX;
    if (!good)
      fail("{}: item {} is {}, expected a token id", printable(path), ids.size(),
           json_excerpt(item));
    ids.push_back(item.get<int32_t>());
  }
  if (ids.empty()) fail("{}: the array is empty, expected at least one token id", printable(path));
  return ids;
}

Tokenizer load_tokenizer(const std::string& model) {
  const std::string path = model + "/tokenizer.json";
  if (!std::filesystem::exists(path)) {
    fail("{}: not found; text needs a tokenizer, token ids can be given with --tokens",
         printable(path));
  }
  return Tokenizer::load(path);
}

}  // namespace indexcache
