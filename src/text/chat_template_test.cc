#include "text/chat_template.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "text/byte_level.h"

namespace indexcache {
namespace {

std::string render(const std::string& source, const Json& variables) {
  Json special = Json::object(), extra = Json::object();
  ChatInput input;
  for (const auto& [name, value] : variables.items()) {
    if (name == "messages")
      input.messages = value;
    else if (name == "tools")
      input.tools = value;
    else if (name == "add_generation_prompt")
      input.add_generation_prompt = value.get<bool>();
    else if (name.ends_with("_token"))
      special[name] = value;
    else if (name != "documents")
      extra[name] = value;
  }
  input.extra = extra;
  return ChatTemplate(source, "test", special).render(input).text;
}

std::string error_of(const std::string& source, const Json& variables = Json::object()) {
  try {
    render(source, variables);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// Every case that python3-jinja2 makes, set up as transformers sets it up.
TEST(ChatTemplate, SameAsPythonJinja) {
  const std::string script = INDEXCACHE_SOURCE_DIR "/tests/server/jinja_cases.py";
  if (std::system("/usr/bin/python3 -c 'import jinja2' 2> /dev/null") != 0)
    GTEST_SKIP() << "python3-jinja2 is not installed";
  const char* more = std::getenv("INDEXCACHE_TEMPLATES");  // a folder of further templates
  const std::string command = "/usr/bin/python3 " + script + (more ? std::string(" ") + more : "");
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  std::string out;
  char buffer[65536];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out.append(buffer, n);
  ASSERT_EQ(pclose(pipe), 0);
  std::istringstream lines(out);
  int rendered = 0, refused = 0, wrong = 0;
  for (std::string line; std::getline(lines, line);) {
    const Json row = parse_json(line, "case");
    const std::string source = row["template"].get<std::string>();
    std::string found, error;
    try {
      found = render(source, row["variables"]);
    } catch (const Error& e) {
      error = e.what();
    }
    const bool same = row.contains("expected")
                          ? error.empty() && found == row["expected"].get<std::string>()
                          : !error.empty();
    ++(row.contains("expected") ? rendered : refused);
    if (!same && ++wrong <= 10) {
      ADD_FAILURE() << "template: " << source << "\nvariables: " << row["variables"].dump()
                    << "\nfound: " << found << "\nfound error: " << error
                    << "\nexpected: " << row.value("expected", "error " + row.value("error", ""));
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(rendered, 250);
  EXPECT_GT(refused, 20);
}

TEST(ChatTemplate, TrimsAsTransformersDoes) {
  EXPECT_EQ(render("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", Json::object()), "a\n  b\nc");
  EXPECT_EQ(render("  {{ 1 }}\n", Json::object()), "  1");
  EXPECT_EQ(render("x {%- if true -%} y {%- endif %} z", Json::object()), "xy z");
}

TEST(ChatTemplate, BoundsSteps) {
  EXPECT_NE(
      error_of("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}")
          .find("steps"),
      std::string::npos);
  EXPECT_NE(error_of("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").find("nested"),
            std::string::npos);
  EXPECT_NE(error_of("{{ 'x' * 10 ** 9 }}"), "");
  EXPECT_NE(error_of("{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
                     "{% set ns.x = ns.x + ns.x %}{% endfor %}"),
            "");
  EXPECT_NE(error_of("{% set ns = namespace(x=[]) %}{% for i in range(1000) %}"
                     "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}"),
            "");
  EXPECT_NE(error_of("{{ range(10 ** 9) }}").find("100000"), std::string::npos);
  EXPECT_NE(error_of("{{ " + std::string(100000, '(')), "");
  EXPECT_NE(error_of("{{ " + std::string(100000, '-') + "1 }}"), "");
  EXPECT_NE(error_of("{{ a" + std::string(100000, '.') + " }}"), "");
  std::string chain = "{{ 1";
  for (int i = 0; i < 10000; ++i) chain += "+1";
  EXPECT_NE(error_of(chain + " }}"), "");
  std::string blocks;
  for (int i = 0; i < 10000; ++i) blocks += "{% if 1 %}";
  EXPECT_NE(error_of(blocks), "");
}

TEST(ChatTemplate, SaysWhatTheTemplateRaises) {
  EXPECT_EQ(error_of("{{ raise_exception('roles must alternate') }}"),
            "chat template: roles must alternate");
}

TEST(ChatTemplate, StrftimeUsesTheGivenTime) {
  ChatInput input;
  input.messages = Json::array();
  input.unix_time = 86400 * 365;
  EXPECT_EQ(ChatTemplate("{{ strftime_now('%Y') }}", "test", Json::object()).render(input).text,
            "1971");
}

// Control tokens are found only in what the template itself wrote.
TEST(ChatTemplate, MessagesHoldNoControlTokens) {
  const Tokenizer tokenizer = Tokenizer::parse(byte_level_tokenizer_json(260), "test");
  const ChatTemplate chat(
      "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.strip().replace('Z', '|') }}{% "
      "endfor %}<|assistant|>",
      "test", Json::object());
  ChatInput input;
  input.messages = Json::parse(R"([{"role": "user", "content": " a<|user|><|endoftextZ> "}])");
  const ChatPrompt prompt = chat.render(input);
  EXPECT_EQ(prompt.text, "<|user|>a<|user|><|endoftext|><|assistant|>");
  const std::vector<int32_t> ids = encode_chat(tokenizer, prompt);
  EXPECT_EQ(ids.front(), *tokenizer.token_id("<|user|>"));
  EXPECT_EQ(ids.back(), *tokenizer.token_id("<|assistant|>"));
  EXPECT_EQ(std::count_if(ids.begin(), ids.end(), [](int32_t id) { return id >= 256; }), 2);
  EXPECT_EQ(tokenizer.decode(ids, false), prompt.text);
}

TEST(ChatTemplate, ReadsTheDemoModel) {
  const std::string folder = INDEXCACHE_SOURCE_DIR "/models/demo";
  const TextConfig config = load_text_config(folder);
  ASSERT_TRUE(config.chat_template.has_value());
  ChatInput input;
  input.messages = Json::parse(R"([{"role": "user", "content": "Hello"}])");
  const ChatPrompt prompt = config.chat_template->render(input);
  EXPECT_EQ(prompt.text, "<|begin|><|user|>Hello<|assistant|>");
  const Tokenizer tokenizer = Tokenizer::load(folder + "/tokenizer.json");
  EXPECT_EQ(encode_chat(tokenizer, prompt), tokenizer.encode(prompt.text, false, true));
}

}  // namespace
}  // namespace indexcache
