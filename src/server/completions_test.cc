// What fields of good requests do, over a real socket: the stand-in answers with the prompt itself,
// over and over.
#include <gtest/gtest.h>

#include "server/server_test_kit.h"

namespace indexcache {
namespace {

const std::string kCompletions = "/v1/completions", kChat = "/v1/chat/completions";

class Completions : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_TRUE(server_.generator.wait_until_idle()); }

  Json ask(const std::string& path, const Json& body) {
    const std::string answer = server_.ask(post(path, body.dump()));
    EXPECT_EQ(status_of(answer), 200) << answer;
    return parse_json(body_of(answer), "answer");
  }

  // The events of a stream, which ends well.
  std::vector<Json> events_of(const std::string& path, Json body) {
    body["stream"] = true;
    const std::string answer = server_.ask(post(path, body.dump()));
    EXPECT_EQ(status_of(answer), 200) << answer;
    const std::string text = unchunked(body_of(answer));
    EXPECT_TRUE(text.ends_with("data: [DONE]\n\n")) << text;
    std::vector<Json> events;
    for (size_t at = 0; (at = text.find("data: {", at)) != std::string::npos;) {
      const size_t end = text.find("\n\n", at);
      events.push_back(parse_json(text.substr(at + 6, end - at - 6), "event"));
      at = end;
    }
    return events;
  }

  static Json chat(Json more) {
    more["messages"] = Json::array({{{"role", "user"}, {"content", "abc"}}});
    more["temperature"] = 0;
    return more;
  }
  static Json completion(const std::string& prompt, Json more) {
    more["prompt"] = prompt;
    more["temperature"] = 0;
    return more;
  }

  TestServer server_;
};

TEST_F(Completions, EchoWithoutLogprobs) {
  const Json body = ask(kCompletions, completion("abc", {{"max_tokens", 2}, {"echo", true}}));
  EXPECT_EQ(body["choices"][0]["text"], "abcab");
  EXPECT_TRUE(body["choices"][0]["logprobs"].is_null());
  EXPECT_EQ(body["usage"]["completion_tokens"], 2);
}

TEST_F(Completions, EchoInAStream) {
  for (const bool with_logprobs : {false, true}) {
    Json request = completion("abc", {{"max_tokens", 2}, {"echo", true}});
    if (with_logprobs) request["logprobs"] = 1;
    std::string text;
    Json tokens = Json::array(), logprobs = Json::array();
    const std::vector<Json> events = events_of(kCompletions, request);
    EXPECT_EQ(events.at(0)["choices"][0]["text"], "abc");
    for (const Json& event : events) {
      const Json& choice = event["choices"][0];
      text += choice["text"].get<std::string>();
      if (choice["logprobs"].is_null()) continue;
      for (const Json& token : choice["logprobs"]["tokens"]) tokens.push_back(token);
      for (const Json& one : choice["logprobs"]["token_logprobs"]) logprobs.push_back(one);
    }
    EXPECT_EQ(text, "abcab");
    EXPECT_EQ(events.back()["choices"][0]["finish_reason"], "length");
    if (!with_logprobs) {
      EXPECT_TRUE(tokens.empty());
      continue;
    }
    EXPECT_EQ(tokens, Json({"a", "b", "c", "a", "b"}));
    ASSERT_EQ(logprobs.size(), 5u);
    for (size_t i = 0; i < 5; ++i) EXPECT_EQ(logprobs[i].is_null(), i == 0) << i;
  }
}

TEST_F(Completions, NothingButTheEchoedPrompt) {
  const Json request = completion("abc", {{"max_tokens", 0}, {"echo", true}, {"logprobs", 0}});
  const Json body = ask(kCompletions, request);
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "abc");
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["logprobs"]["tokens"], Json({"a", "b", "c"}));
  EXPECT_TRUE(choice["logprobs"]["token_logprobs"][0].is_null());
  EXPECT_TRUE(choice["logprobs"]["token_logprobs"][2].is_number());
  EXPECT_EQ(body["usage"]["completion_tokens"], 0);
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3);
  std::string text;
  for (const Json& event : events_of(kCompletions, request))
    text += event["choices"][0]["text"].get<std::string>();
  EXPECT_EQ(text, "abc");
}

TEST_F(Completions, LogprobsInAChatStream) {
  std::string text;
  Json tokens = Json::array();
  for (const Json& event :
       events_of(kChat, chat({{"max_tokens", 4}, {"logprobs", true}, {"top_logprobs", 2}}))) {
    const Json& choice = event["choices"][0];
    text += choice["delta"].value("content", "");
    if (choice["logprobs"].is_null()) continue;
    for (const Json& token : choice["logprobs"]["content"]) {
      tokens.push_back(token["token"]);
      EXPECT_EQ(token["bytes"].size(), 1u) << token;
      ASSERT_EQ(token["top_logprobs"].size(), 2u) << token;
      EXPECT_EQ(token["top_logprobs"][0]["logprob"], token["logprob"]);
    }
  }
  EXPECT_EQ(text, "abca");
  EXPECT_EQ(tokens, Json({"a", "b", "c", "a"}));
}

TEST_F(Completions, SeveralAnswersInAChat) {
  const Json request = chat({{"max_tokens", 4}, {"n", 3}});
  const Json body = ask(kChat, request);
  ASSERT_EQ(body["choices"].size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(body["choices"][i]["index"], i);
    EXPECT_EQ(body["choices"][i]["message"]["content"], "abca");
  }
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3) << "a prompt counts once";
  EXPECT_EQ(body["usage"]["completion_tokens"], 12);
  std::string texts[3], roles[3], reasons[3];
  for (const Json& event : events_of(kChat, request)) {
    ASSERT_EQ(event["choices"].size(), 1u);
    const Json& choice = event["choices"][0];
    const auto i = choice["index"].get<size_t>();
    ASSERT_LT(i, 3u);
    texts[i] += choice["delta"].value("content", "");
    roles[i] += choice["delta"].value("role", "");
    if (choice["finish_reason"].is_string()) reasons[i] += choice["finish_reason"];
  }
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(texts[i], "abca");
    EXPECT_EQ(roles[i], "assistant");
    EXPECT_EQ(reasons[i], "length");
  }
}

TEST_F(Completions, StopTokensAndTheLeastNumberBeforeThem) {
  Json request = completion("abcd", {{"max_tokens", 9}, {"stop_token_ids", {99}}});
  const Json stopped = ask(kCompletions, request)["choices"][0];
  EXPECT_EQ(stopped["text"], "ab");
  EXPECT_EQ(stopped["finish_reason"], "stop");
  request["min_tokens"] = 3;  // now the first c is none
  EXPECT_EQ(ask(kCompletions, request)["choices"][0]["text"], "abcdab");
  request["min_tokens"] = 9;
  const Json full = ask(kCompletions, request)["choices"][0];
  EXPECT_EQ(full["text"], "abcdabcda");
  EXPECT_EQ(full["finish_reason"], "length");
}

// What changes nothing is taken.
TEST_F(Completions, FreeTextAndNoTools) {
  const Json plain = ask(kChat, chat({{"max_tokens", 4}}));
  EXPECT_EQ(plain["choices"][0]["message"]["content"], "abca");
  for (const auto& [field, value] :
       std::vector<std::pair<std::string, Json>>{{"response_format", {{"type", "text"}}},
                                                 {"tools", Json::array()},
                                                 {"tool_choice", "none"}})
    EXPECT_EQ(ask(kChat, chat({{"max_tokens", 4}, {field, value}}))["choices"], plain["choices"])
        << field;
}

// A token is a byte here: a stop string is found across them, and one of its bytes alone, in
// another character, is none.
TEST_F(Completions, StopStringsOfSeveralBytesToACharacter) {
  const std::pair<std::string, std::string> cases[] = {
      {"a\xC3\xA9\xE2\x82\xAC"
       "b",
       "a\xC3\xA9"},                                                         // aé€b
      {"\xE2\x82\xAD\xE2\x82\xAE\xE2\x82\xAC", "\xE2\x82\xAD\xE2\x82\xAE"},  // ₭₮€
      {"\xF0\x9F\x98\x80\xE2\x82\xAC", "\xF0\x9F\x98\x80"},                  // an emoji before it
  };
  for (const auto& [prompt, expected] : cases) {
    const Json request = completion(prompt, {{"max_tokens", 40}, {"stop", "\xE2\x82\xAC"}});
    const Json choice = ask(kCompletions, request)["choices"][0];
    EXPECT_EQ(choice["text"], expected);
    EXPECT_EQ(choice["finish_reason"], "stop");
    std::string text;
    for (const Json& event : events_of(kCompletions, request)) {
      const auto part = event["choices"][0]["text"].get<std::string>();
      EXPECT_EQ(part.find("\xEF\xBF\xBD"), part.npos) << "half a character";
      text += part;
    }
    EXPECT_EQ(text, expected);
  }
}

}  // namespace
}  // namespace indexcache
