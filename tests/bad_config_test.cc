// The same for tokenizers, configs, plans and token ids.
#include "tests/spoil.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

std::vector<Case> tokenizer_cases() {
  const std::string t = "tokenizer.json";
  const Use run = Use::kRun;
  return {
      {"26 missing", [=](const Model& m) { m.remove(t); }, {t}, run},
      {"26 empty", file(t, ""), {t}, run},
      {"26 cut", cut(t, 20000), {t}, run},
      {"26 1 GB",
       [=](const Model& m) {
         m.write(t, "{");
         fs::resize_file(m / t, 1u << 30);
       },
       {t, "1073741824"},
       run},
      {"27 duplicate id", json_set(t, "/model/vocab/a", 5), {t, "5"}, run},
      {"27 id beyond the model's", json_set(t, "/model/vocab/a", 100000), {t}, run},
      {"27 negative id", json_set(t, "/model/vocab/a", -1), {t, "-1"}, run},
      {"27 hole in the ids", json_set(t, "/added_tokens/3/id", 1000), {t, "1000"}, run},
      {"28 merge of unknown tokens", json_set(t, "/model/merges", {"qqqq zzzz"}), {t, "qqqq"}, run},
      {"28 10 M merges",
       [=](const Model& m) {
         std::string merges = "\"a a\"";
         for (int i = 1; i < 10'000'000; ++i) merges += ",\"a a\"";
         m.change_json(t, [](Json& json) { json["model"]["merges"] = Json::array(); });
         std::string text = m.read(t);
         m.write(t, text.insert(text.find("\"merges\":[") + 10, merges));
       },
       {t, "merges", "10000000", "at most 2097152"},
       run},
      {"30 empty added token",
       json_set(t, "/added_tokens/0/content", ""),
       {t, "added_tokens"},
       run},
      {"30 added token of 1 MB",
       json_set(t, "/added_tokens/0/content", std::string(1 << 20, 'x')),
       {t, "1024 bytes"},
       run},
      {"30 added id clash", json_set(t, "/added_tokens/0/id", 3), {t}, run},
      {"31 bad regex",
       [=](const Model& m) {
         m.change_json(t, [](Json& json) {
           json["pre_tokenizer"] = {{"type", "Split"},
                                    {"pattern", {{"Regex", "(a"}}},
                                    {"behavior", "Isolated"},
                                    {"invert", false}};
         });
       },
       {t, "(a"},
       run},
      {"31 catastrophic regex",
       [=](const Model& m) {
         m.change_json(t, [](Json& json) {
           json["pre_tokenizer"] = {
               {"type", "Sequence"},
               {"pretokenizers",
                {{{"type", "Split"},
                  {"pattern", {{"Regex", "(x|xx)+y"}}},
                  {"behavior", "Isolated"},
                  {"invert", false}},
                 {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
         });
       },
       {"steps"},
       run,
       Base::kPlain,
       {"-p", std::string(20000, 'x')}},
      {"32 eos out of range", config("eos_token_id", 512), {"eos_token_id", "512"}},
      {"32 bos negative", config("bos_token_id", -2), {"bos_token_id"}},
      {"34 10 MB of one letter",
       file("prompt", std::string(10'000'000, 'a')),
       {"10000000 tokens", "context"},
       run,
       Base::kPlain,
       {"-f", "prompt"}},
      {"34 overlong UTF-8", [](const Model&) {}, {"UTF-8"}, run, Base::kPlain, {"-p", "\xC0\xAF"}},
      {"34 invalid UTF-8", [](const Model&) {}, {"UTF-8"}, run, Base::kPlain, {"-p", "a\xFF\xFE"}},
      {"34 surrogate", [](const Model&) {}, {"UTF-8"}, run, Base::kPlain, {"-p", "\xED\xA0\x80"}},
  };
}

std::vector<Case> config_cases() {
  const auto ids = [](const std::string& text) { return file("ids.json", text); };
  return {
      {"37 short pattern", config("index_topk_pattern", "F"), {"index_topk_pattern", "1", "2"}},
      {"37 long pattern", config("index_topk_pattern", "FSS"), {"index_topk_pattern", "3", "2"}},
      {"38 first layer shared",
       config("index_topk_pattern", "SF"),
       {"index_topk_pattern", "layer 0"}},
      {"39 lower case", config("index_topk_pattern", "Fs"), {"index_topk_pattern", "position 1"}},
      {"39 space", config("index_topk_pattern", "F "), {"index_topk_pattern", "position 1"}},
      {"39 byte order mark",
       config("index_topk_pattern",
              "\xEF\xBB\xBF"
              "FS"),
       {"index_topk_pattern", "\\xef\\xbb...", "position 0"}},
      {"39 other type", config("indexer_types", {"full", "none"}), {"indexer_types", "none"}},
      {"40 freq 0", config("index_topk_freq", 0), {"index_topk_freq", "0"}},
      {"40 freq -1", config("index_topk_freq", -1), {"index_topk_freq", "-1"}},
      {"40 freq 2.5", config("index_topk_freq", 2.5), {"index_topk_freq", "2.5"}},
      {"40 freq text", config("index_topk_freq", "4"), {"index_topk_freq", "\"4\""}},
      {"40 freq 10^18", config("index_topk_freq", 1000000000000000000), {"index_topk_freq"}},
      {"41 two fields disagree",
       [](const Model& m) {
         m.change_json("config.json", [](Json& c) {
           c["index_topk_pattern"] = "FF";
           c["index_topk_freq"] = 2;
           c["index_skip_topk_offset"] = 1;
         });
       },
       {"FF", "FS"}},
      {"41 full layer without indexer",
       [](const Model& m) {
         m.change_header([](Json& h) {
           Json renamed = Json::object();
           for (const auto& [name, value] : h.items())
             renamed[name.starts_with("model.layers.1.self_attn.indexer") ? "x" + name : name] =
                 value;
           h = renamed;
         });
       },
       {"indexer", "1"}},
      {"43 plan of another model",
       [](const Model& m) {
         m.write("plan.json", R"({"version": 1, "plan": "FS", "model_fingerprint": ")" +
                                  std::string(64, 'a') + R"(", "steps": [], "settings": {}})");
       },
       {"plan.json", "fingerprint"},
       Use::kInspect,
       Base::kPlain,
       {"--plan", "plan.json"}},
      {"43 plan file cut",
       file("plan.json", R"({"version": 1, "pl)"),
       {"plan.json"},
       Use::kInspect,
       Base::kPlain,
       {"--plan", "plan.json"}},
      {"43 plan file of a later version",
       file(
           "plan.json",
           R"({"version": 99, "plan": "FS", "model_fingerprint": "", "steps": [], "settings": {}})"),
       {"plan.json", "version", "99"},
       Use::kInspect,
       Base::kPlain,
       {"--plan", "plan.json"}},
      {"44 no config", [](const Model& m) { m.remove("config.json"); }, {"config.json"}},
      {"44 unknown architecture",
       config("model_type", "llama"),
       {"model_type", "llama", "glm_moe_dsa"}},
      {"44 key missing",
       [](const Model& m) { m.change_json("config.json", [](Json& c) { c.erase("index_topk"); }); },
       {"index_topk", "missing"}},
      {"44 wrong type", config("hidden_size", "256"), {"hidden_size", "integer"}},
      {"44 duplicate key",
       replaced("config.json", "{", "{\"vocab_size\": 512,"),
       {"duplicate", "vocab_size"}},
      {"44 comment", replaced("config.json", "{", "{ // hello\n"), {"config.json", "byte"}},
      {"44 NaN", replaced("config.json", "1e-05", "NaN"), {"config.json", "byte"}},
      {"44 1e999", replaced("config.json", "1e-05", "1e999"), {"config.json"}},
      {"44 NUL after the end",
       [](const Model& m) {
         m.write("config.json", m.read("config.json") + std::string(1, '\0') + "junk");
       },
       {"config.json", "byte"}},
      {"44 deep", file("config.json", std::string(1 << 20, '[')), {"config.json", "deep"}},
      {"44 unknown index key", config("index_topk_frequency", 2), {"index_topk_frequency"}},
      {"45 fp8 latents without whole blocks",
       config("kv_lora_rank", 96),
       {"kv_lora_rank is 96", "128"},
       Use::kInspect,
       Base::kPlain,
       {"--kv-cache", "fp8"}},
      {"46 plan word",
       [](const Model&) {},
       {"FSX"},
       Use::kInspect,
       Base::kPlain,
       {"--plan", "FSX"}},
      {"46 plan too long",
       [](const Model&) {},
       {"FSF", "2"},
       Use::kInspect,
       Base::kPlain,
       {"--plan", "FSF"}},
      {"46 plan ratio",
       [](const Model&) {},
       {"1/0"},
       Use::kInspect,
       Base::kPlain,
       {"--plan", "1/0"}},
      {"ids: empty", ids("[]"), {"ids.json", "empty"}, Use::kLogits},
      {"ids: beyond the vocabulary", ids("[1, 512]"), {"512"}, Use::kLogits},
      {"ids: negative", ids("[1, -1]"), {"ids.json", "-1"}, Use::kLogits},
      {"ids: text", ids("[\"1\"]"), {"ids.json"}, Use::kLogits},
      {"ids: object", ids("{\"a\": 1}"), {"ids.json", "array"}, Use::kLogits},
      {"ids: trailing", ids("[1] 2"), {"ids.json"}, Use::kLogits},
  };
}

TEST_F(BadInput, Tokenizers) { run_cases(tokenizer_cases()); }
TEST_F(BadInput, ConfigsPlansAndTokenIds) { run_cases(config_cases()); }

}  // namespace
}  // namespace indexcache
