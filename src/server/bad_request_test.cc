// Bodies that are wrong in every way we know: refused with 4xx and the field's name, over a real
// socket, and after each the same good request gets the same bytes.
#include <gtest/gtest.h>

#include "server/server_test_kit.h"

namespace indexcache {
namespace {

const std::string kCompletions = "/v1/completions", kChat = "/v1/chat/completions";
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

  void expect_refused(const std::string& path, const std::string& body, int status,
                      const std::string& param) {
    const std::string shown = body.substr(0, 200);
    const std::string answer = server_.ask(post(path, body));
    ASSERT_EQ(status_of(answer), status) << shown << "\n" << answer;
    const Json error = parse_json(body_of(answer), "answer").at("error");
    EXPECT_EQ(error.at("param"), param.empty() ? Json() : Json(param)) << shown << answer;
    EXPECT_EQ(error.at("type"), status == 404 ? "not_found_error" : "invalid_request_error");
    EXPECT_TRUE(error.contains("code"));
    const auto message = error.at("message").get<std::string>();
    EXPECT_FALSE(message.empty());
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
    expect_refused(kChat, body, 400, "");
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
