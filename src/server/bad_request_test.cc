// Bodies that are wrong in every way we know: refused with 4xx and the field's name, over a real
// socket, and after each the same good request gets the same bytes.
#include <gtest/gtest.h>

#include <tuple>

#include "server/server_test_kit.h"

namespace indexcache {
namespace {

const std::string kCompletions = "/v1/completions", kChat = "/v1/chat/completions",
                  kTokenize = "/tokenize", kDetokenize = "/detokenize";
const std::string kGood = post(kCompletions, R"({"prompt": "hello", "temperature": 0})");

// Which is all that reaches the engine: good requests.
class BadRequest : public ::testing::Test {
 protected:
  void SetUp() override { good_ = good(); }
  void TearDown() override { EXPECT_EQ(server_.generator.stats().accepted, num_good_); }

  std::string good() {
    ++num_good_;
    const std::string answer = server_.ask(kGood);
    EXPECT_EQ(status_of(answer), 200) << answer;
    return without_ids(body_of(answer));
  }

  // `said` is in the message.
  void expect_refused(const std::string& path, const std::string& body, int status,
                      const std::string& param, const std::string& said = "") {
    const std::string shown = body.substr(0, 200);
    const std::string answer = server_.ask(post(path, body));
    ASSERT_EQ(status_of(answer), status) << shown << "\n" << answer;
    const Json error = parse_json(body_of(answer), "answer").at("error");
    EXPECT_EQ(error.at("param"), param.empty() ? Json() : Json(param)) << shown << answer;
    EXPECT_EQ(error.at("type"), status == 404 ? "not_found_error" : "invalid_request_error");
    EXPECT_TRUE(error.contains("code"));
    const auto message = error.at("message").get<std::string>();
    EXPECT_FALSE(message.empty());
    EXPECT_NE(message.find(said), std::string::npos) << message << ", expected " << said;
    EXPECT_LT(message.size(), 1000u);
    EXPECT_EQ(good(), good_) << "after " << shown;
  }

  TestServer server_;
  std::string good_;
  int64_t num_good_ = 0;
};

TEST_F(BadRequest, Bodies) {
  for (const std::string& body :
       {std::string(""), std::string("nothing"), std::string("{\"prompt\": 1"), std::string("{} x"),
        std::string("{\"prompt\": NaN}"), std::string("{\"prompt\": 1e999}"),
        std::string("{\"prompt\": \"a\", \"prompt\": \"b\"}"), std::string("[1, 2]"),
        std::string("\"text\""), std::string("{\"prompt\": \"\xff\"}"),
        std::string("{\"prompt\": \"\\ud800\"}"),
        "{\"x\": " + std::string(3000, '[') + std::string(3000, ']') + "}",
        "{\"x\": " + std::string(60000, '['), std::string("{}\0", 3),
        std::string("\xEF\xBB\xBF{}")}) {
    expect_refused(kCompletions, body, 400, "");
    for (const std::string& path : {kChat, kTokenize, kDetokenize})
      expect_refused(path, body, 400, "");
  }
  const std::string deep = server_.ask(post(kChat, std::string(65, '[') + std::string(65, ']')));
  EXPECT_NE(deep.find("64"), std::string::npos) << "the limit is stated: " << deep;
}

TEST_F(BadRequest, FieldsAreNamed) {
  const auto with = [](const std::string& field) { return "{\"prompt\": \"ab\", " + field + "}"; };
  const std::pair<const char*, const char*> cases[] = {
      {"\"temperature\": -1", "temperature"},
      {"\"temperature\": 2.1", "temperature"},
      {"\"temperature\": \"hot\"", "temperature"},
      {"\"top_p\": 0", "top_p"},
      {"\"top_p\": 1.1", "top_p"},
      {"\"min_p\": -0.1", "min_p"},
      {"\"top_k\": -2", "top_k"},
      {"\"n\": 0", "n"},
      {"\"n\": 129", "n"},
      {"\"n\": 2147483648", "n"},
      {"\"n\": 1.5", "n"},
      {"\"max_tokens\": -1", "max_tokens"},
      {"\"max_tokens\": 0", "max_tokens"},
      {"\"max_tokens\": 9223372036854775808", "max_tokens"},
      {"\"max_tokens\": \"5\"", "max_tokens"},
      {"\"seed\": 9223372036854775808", "seed"},
      {"\"seed\": 0.5", "seed"},
      {"\"logprobs\": 21", "logprobs"},
      {"\"logprobs\": -1", "logprobs"},
      {"\"logprobs\": true", "logprobs"},
      {"\"stop\": \"\"", "stop"},
      {"\"stop\": [\"a\", 1]", "stop"},
      {"\"stop\": 5", "stop"},
      {"\"echo\": 1", "echo"},
      {"\"stream\": \"yes\"", "stream"},
      {"\"stream_options\": {\"include_usage\": true}", "stream_options"},
      {"\"stream\": true, \"stream_options\": {\"x\": 1}", "x"},
      {"\"best_of\": 3", "best_of"},
      {"\"suffix\": \"x\"", "suffix"},
      {"\"logit_bias\": {\"5\": 1}", "logit_bias"},
      {"\"logit_bias\": {\"999999\": 1e38}", "logit_bias"},
      {"\"logit_bias\": [1]", "logit_bias"},
      {"\"frequency_penalty\": 0.5", "frequency_penalty"},
      {"\"presence_penalty\": -2", "presence_penalty"},
      {"\"stop_token_ids\": [260]", "stop_token_ids"},
      {"\"min_tokens\": 17", "min_tokens"},
      {"\"n\": 128, \"max_tokens\": 4000, \"logprobs\": 20", "logprobs"},
      {"\"stream\": true, \"stream_options\": {\"continuous_usage_stats\": true}",
       "continuous_usage_stats"},
      {"\"presence_penalty\": \"much\"", "presence_penalty"},
      {"\"n_discard\": -5", "n_discard"},
      {"\"n_keep\": -1", "n_keep"},
      {"\"id_slot\": -1", "id_slot"},
      {"\"stpo\": \"x\"", "stpo"},
  };
  for (const auto& [field, param] : cases) expect_refused(kCompletions, with(field), 400, param);
  expect_refused(kCompletions, with("\"model\": \"other\""), 404, "model");
  std::string stops = "\"stop\": [";
  for (int i = 0; i < 17; ++i) stops += std::string(i ? "," : "") + "\"a\"";
  expect_refused(kCompletions, with(stops + "]"), 400, "stop");
  expect_refused(kCompletions, with("\"stop\": \"" + std::string(1 << 20, 'x') + "\""), 400,
                 "stop");
  for (const char* prompt : {"[]", "5", "{}", "\"\"", "[-1]", "[260]", "[4294967296]", "[1.0]",
                             "[[]]", "[1, \"a\"]", "[\"a\", 1]", "[[1], [true]]", "null"})
    expect_refused(kCompletions, std::string("{\"prompt\": ") + prompt + "}", 400, "prompt");
  expect_refused(kCompletions, "{}", 400, "prompt");
}

TEST_F(BadRequest, LimitsAreNamed) {
  const auto with = [](const std::string& field) { return "{\"prompt\": \"ab\", " + field + "}"; };
  const std::tuple<const char*, const char*, const char*> cases[] = {
      {"\"n\": 0", "n", "\"n\" is 0, expected an integer from 1 to 128"},
      {"\"n\": 129", "n", "\"n\" is 129, expected an integer from 1 to 128"},
      {"\"temperature\": -1", "temperature", "is -1, expected a number from 0 to 2"},
      {"\"temperature\": 3", "temperature", "is 3, expected a number from 0 to 2"},
      {"\"logprobs\": 21", "logprobs", "is 21, expected an integer from 0 to 20"},
      {"\"max_tokens\": -1", "max_tokens", "is -1, expected an integer from 0 to 2147483647"},
      {"\"max_tokens\": 2147483648", "max_tokens",
       "is 2147483648, expected an integer from 0 to 2147483647"},
      {"\"stop\": \"\"", "stop", "a stop string has 0 bytes, expected 1 to 1024"},
  };
  for (const auto& [field, param, said] : cases)
    expect_refused(kCompletions, with(field), 400, param, said);
  expect_refused(kCompletions, with("\"stop\": \"" + std::string(1025, 'x') + "\""), 400, "stop",
                 "a stop string has 1025 bytes, expected 1 to 1024");
  const Json stops = std::vector<std::string>(17, "a");
  expect_refused(kCompletions, with("\"stop\": " + stops.dump()), 400, "stop",
                 "found 17 stop strings, expected at most 16");
  expect_refused(kCompletions, R"({"prompt": [[1], [2], [3]], "n": 50})", 400, "n",
                 "3 prompts with n = 50 make 150 answers, expected at most 128");
  expect_refused(
      kChat,
      R"({"messages": [{"role": "user", "content": "a"}], "logprobs": true, "top_logprobs": 21})",
      400, "top_logprobs", "is 21, expected an integer from 0 to 20");
}

TEST_F(BadRequest, TextsAndTokens) {
  const std::tuple<std::string, const char*, int, const char*> cases[] = {
      {kTokenize, "{}", 400, "prompt"},
      {kTokenize, R"({"prompt": null})", 400, "prompt"},
      {kTokenize, R"({"prompt": 5})", 400, "prompt"},
      {kTokenize, R"({"prompt": ["a"]})", 400, "prompt"},
      {kTokenize, R"({"prompt": "a", "messages": []})", 400, "messages"},
      {kTokenize, R"({"prompt": "a", "add_special_tokens": 1})", 400, "add_special_tokens"},
      {kTokenize, R"({"prompt": "a", "return_token_strs": "yes"})", 400, "return_token_strs"},
      {kTokenize, R"({"prompt": "a", "tokens": [1]})", 400, "tokens"},
      {kTokenize, R"({"prompt": "a", "model": "other"})", 404, "model"},
      {kTokenize, R"({"messages": []})", 400, "messages"},
      {kTokenize, R"({"messages": "a"})", 400, "messages"},
      {kTokenize, R"({"messages": [{"role": "king", "content": "a"}]})", 400, "messages[0].role"},
      {kDetokenize, "{}", 400, "tokens"},
      {kDetokenize, R"({"tokens": null})", 400, "tokens"},
      {kDetokenize, R"({"tokens": 5})", 400, "tokens"},
      {kDetokenize, R"({"tokens": "a"})", 400, "tokens"},
      {kDetokenize, R"({"tokens": {"a": 1}})", 400, "tokens"},
      {kDetokenize, R"({"tokens": [-1]})", 400, "tokens"},
      {kDetokenize, R"({"tokens": [260]})", 400, "tokens"},
      {kDetokenize, R"({"tokens": [4294967296]})", 400, "tokens"},
      {kDetokenize, R"({"tokens": [1.0]})", 400, "tokens"},
      {kDetokenize, R"({"tokens": ["a"]})", 400, "tokens"},
      {kDetokenize, R"({"tokens": [[1]]})", 400, "tokens"},
      {kDetokenize, R"({"tokens": [1], "prompt": "a"})", 400, "prompt"},
      {kDetokenize, R"({"tokens": [1], "model": "other"})", 404, "model"},
  };
  for (const auto& [path, body, status, param] : cases) expect_refused(path, body, status, param);
  const size_t too_long = 4097 * byte_model(nullptr)->longest_token;
  expect_refused(kTokenize, R"({"prompt": ")" + std::string(too_long, 'a') + "\"}", 400, "prompt",
                 fmt::format("holds 4096 tokens, but the prompt has {} bytes", too_long));
  expect_refused(kDetokenize, Json{{"tokens", std::vector<int>(4097, 97)}}.dump(), 400, "tokens",
                 "holds 4096 tokens, but \"tokens\" has 4097");
}

TEST_F(BadRequest, MessagesAreNamedByPlace) {
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "messages"},
      {"5", "messages"},
      {"[5]", "messages[0]"},
      {R"([{"content": "a"}])", "messages[0].role"},
      {R"([{"role": "king", "content": "a"}])", "messages[0].role"},
      {R"([{"role": "user\n", "content": "a"}])", "messages[0].role"},
      {R"([{"role": "user"}])", "messages[0].content"},
      {R"([{"role": "user", "content": null}])", "messages[0].content"},
      {R"([{"role": "user", "content": 5}])", "messages[0].content"},
      {R"([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}])",
       "messages[1].content"},
      {R"([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}])",
       "messages[0].content"},
      {R"([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http:\\169.254.169.254\\x"}}]}])",
       "messages[0].content"},
      {R"([{"role": "user", "content": [{"type": "text", "text": 5}]}])", "messages[0].content"},
      {R"([{"role": "user", "content": []}])", "messages[0].content"},
      {R"([{"role": "user", "content": "a", "name": "b\nc"}])", "messages[0].name"},
      {R"([{"role": "user", "content": "a", "name": 5}])", "messages[0].name"},
      {R"([{"role": "assistant", "content": "", "tool_calls": [{}]}])", "messages[0].tool_calls"},
  };
  for (const auto& [messages, param] : cases)
    expect_refused(kChat, std::string("{\"messages\": ") + messages + "}", 400, param);
  const std::string good = R"("messages": [{"role": "user", "content": "abc"}])";
  const std::pair<const char*, const char*> fields[] = {
      {"\"response_format\": {\"type\": \"json_object\"}", "response_format"},
      {"\"response_format\": {\"type\": \"json_schema\", \"json_schema\": {\"$ref\": \"#\"}}",
       "response_format"},
      {"\"tools\": [{}]", "tools"},
      {"\"tool_choice\": \"auto\"", "tool_choice"},
      {"\"top_logprobs\": 2", "top_logprobs"},
      {"\"logprobs\": true, \"top_logprobs\": 21", "top_logprobs"},
      {"\"max_completion_tokens\": 0", "max_completion_tokens"},
      {"\"min_tokens\": 4096", "min_tokens"},
      {"\"logprobs\": true, \"top_logprobs\": 20, \"n\": 128", "top_logprobs"},
      {"\"reasoning_effort\": 5", "reasoning_effort"},
      {"\"verbosity\": \"low\"", "verbosity"},
      {"\"prompt\": \"x\"", "prompt"},
  };
  for (const auto& [field, param] : fields)
    expect_refused(kChat, "{" + good + ", " + field + "}", 400, param);
  std::string many = "\"tools\": [{}";
  for (int i = 1; i < 10000; ++i) many += ", {}";
  expect_refused(kChat, "{" + good + ", " + many + "]}", 400, "tools");
  expect_refused(kChat, "{\"messages\": " + std::string(3000, '[') + std::string(3000, ']') + "}",
                 400, "");
  std::string nobody = "[";
  for (int i = 0; i < 4097; ++i)
    nobody += std::string(i ? "," : "") + R"({"role": "user", "content": ""})";
  expect_refused(kChat, "{\"messages\": " + nobody + "]}", 400, "messages");
}

// Nobody compiles or fetches a schema, so none can take time or memory.
TEST_F(BadRequest, Schemas) {
  const auto with = [](const std::string& schema) {
    return R"({"messages": [{"role": "user", "content": "abc"}], "response_format": {"type":)"
           R"( "json_schema", "json_schema": {"name": "x", "schema": )" +
           schema + "}}}";
  };
  for (const char* schema : {R"({"$ref": "#"})", R"({"$ref": "http://169.254.169.254/"})",
                             R"({"type": "string", "pattern": "(a+)+$"})", R"({"pattern": "((("})",
                             R"({"pattern": "a{1,1000000}"})", R"({"pattern": "(?<=a)b"})"})
    expect_refused(kChat, with(schema), 400, "response_format");
  expect_refused(kChat, with("{\"enum\": [\"" + std::string(1 << 20, 'x') + "\"]}"), 400,
                 "response_format");
  std::string deep = "{}";
  for (int i = 0; i < 3000; ++i) deep = R"({"items": )" + deep + "}";
  expect_refused(kChat, with(deep), 400, "");
}

}  // namespace
}  // namespace indexcache
