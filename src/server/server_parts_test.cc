// The parts that need no network: keys, stop strings, answers in the making, requests.
#include <gtest/gtest.h>

#include <cstring>

#include "base/rng.h"
#include "server/auth.h"
#include "server/server_test_kit.h"

namespace indexcache {
namespace {

TEST(Auth, ComparesWholeKeys) {
  EXPECT_TRUE(equal_in_constant_time("secret", "secret"));
  for (const char* wrong : {"", "s", "secre", "secrets", "Secret", "secretsecret"})
    EXPECT_FALSE(equal_in_constant_time(wrong, "secret")) << wrong;
  EXPECT_FALSE(equal_in_constant_time("x", ""));
}

TEST(Auth, OnlyExactPublicPathsAreOpen) {
  const std::vector<std::string> keys = {"one", "two"};
  for (const char* path : {"/health", "/"}) EXPECT_TRUE(is_authorized(path, "", keys)) << path;
  for (const char* path :
       {"/metrics", "/v1/models", "/health/", "//health", "/HEALTH", "/health/../metrics",
        "/%68ealth", "health", "", "/v1/../health", "*", "http://localhost/health", "/health;x"}) {
    EXPECT_FALSE(is_authorized(path, "", keys)) << path;
    EXPECT_FALSE(is_authorized(path, "Bearer on", keys)) << path;
    EXPECT_FALSE(is_authorized(path, "Bearer onee", keys)) << path;
    EXPECT_FALSE(is_authorized(path, "Basic one", keys)) << path;
    EXPECT_FALSE(is_authorized(path, "Bearer", keys)) << path;
    EXPECT_TRUE(is_authorized(path, "Bearer two", keys)) << path;
    EXPECT_TRUE(is_authorized(path, "bEARER one", keys)) << path;
  }
  EXPECT_TRUE(is_authorized("/metrics", "", {}));
}

TEST(Auth, LoopbackHosts) {
  for (const char* host :
       {"localhost", "localhost:8080", "127.0.0.1:1", "127.1.2.3", "[::1]", "[::1]:80"})
    EXPECT_TRUE(is_loopback_host(host)) << host;
  for (const char* host : {"", "example.com", "localhost.example.com", "127.0.0.1.example.com:80",
                           "[::2]", "[::1", "0.0.0.0"})
    EXPECT_FALSE(is_loopback_host(host)) << host;
}

// However a text is cut into pieces, what comes out is the text up to the first stop string, and
// nothing of the stop string comes out early.
TEST(StopStrings, SameForEveryCut) {
  const uint64_t seed = 7;
  Rng rng(seed);
  for (int round = 0; round < 3000; ++round) {
    const auto random_text = [&](size_t max) {
      std::string text(1 + rng.below(max), 'a');
      for (char& c : text) c = static_cast<char>('a' + rng.below(2));
      return text;
    };
    std::vector<std::string> stops;
    for (uint64_t n = 1 + rng.below(3); n > 0; --n) stops.push_back(random_text(4) + "b");
    const std::string text = random_text(40);
    // A stop is seen when its last byte comes; of those seen together the first to begin wins.
    std::string expected = text;
    bool stopped = false;
    for (size_t end = 1; end <= text.size() && !stopped; ++end) {
      size_t begin = text.size();
      for (const std::string& stop : stops)
        if (const size_t at = text.substr(0, end).find(stop); at != text.npos) {
          begin = std::min(begin, at);
          stopped = true;
        }
      if (stopped) expected = text.substr(0, begin);
    }
    StopStrings one_by_one(stops);
    std::string out;
    for (const char c : text) {
      out += one_by_one.push(std::string(1, c));
      ASSERT_TRUE(expected.starts_with(out)) << text << " seed " << seed;
    }
    EXPECT_EQ(one_by_one.stopped(), stopped);
    out += one_by_one.finish();
    EXPECT_EQ(out, expected) << text << " seed " << seed;
  }
}

CompletionRequest completion(const std::string& body) {
  static const auto model = byte_model(nullptr);
  return parse_completion(parse_body(body, {}), *model, {});
}

TEST(ApiRequest, ContextErrorsGiveBothNumbers) {
  try {
    completion("{\"prompt\": \"" + std::string(4090, 'a') + "\", \"max_tokens\": 10}");
    ADD_FAILURE();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.code, "context_length_exceeded");
    for (const char* number : {"4096", "4090", "4100"})
      EXPECT_NE(std::string(error.what()).find(number), std::string::npos) << error.what();
  }
  EXPECT_EQ(completion("{\"prompt\": \"" + std::string(4090, 'a') + "\", \"max_tokens\": 6}")
                .prompts[0]
                .size(),
            4090u);
}

// Before it is cut into tokens, which takes long.
TEST(ApiRequest, TextsThatCannotFitAreNotTokenized) {
  const auto model = byte_model(nullptr);
  const std::string text((model->longest_token + 1) * 4096, 'a');
  const auto expect_refused = [&](const auto& parse, const char* param) {
    try {
      parse();
      ADD_FAILURE() << param;
    } catch (const ApiError& error) {
      EXPECT_EQ(error.code, "context_length_exceeded");
      EXPECT_EQ(error.param, param);
      for (const std::string& part :
           {std::to_string(text.size()), std::string("bytes"), std::string("4096")})
        EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  expect_refused([&] { completion("{\"prompt\": \"" + text + "\"}"); }, "prompt");
  expect_refused(
      [&] {
        parse_chat({{"messages", {{{"role", "user"}, {"content", text}}}}}, *model, {}, 0);
      },
      "messages");
  expect_refused([&] { tokenize_answer({{"prompt", text}}, *model, {}, 0); }, "prompt");
  expect_refused(
      [&] {
        tokenize_answer({{"messages", {{{"role", "user"}, {"content", text}}}}}, *model, {}, 0);
      },
      "messages");
}

TEST(ApiRequest, NoMoreTokensBecomeTextThanTheContextHolds) {
  const auto model = byte_model(nullptr);
  const std::vector<int32_t> most(4096, 'a');
  EXPECT_EQ(detokenize_answer({{"tokens", most}}, *model)["prompt"], std::string(4096, 'a'));
  try {
    detokenize_answer({{"tokens", std::vector<int32_t>(5000, 'a')}}, *model);
    ADD_FAILURE();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.code, "context_length_exceeded");
    EXPECT_EQ(error.param, "tokens");
    for (const char* number : {"4096", "5000"})
      EXPECT_NE(std::string(error.what()).find(number), std::string::npos) << error.what();
  }
}

TEST(ApiRequest, TemplatesReadTheEffort) {
  const auto model = byte_model(nullptr);
  model->text.chat_template.emplace("{{ reasoning_effort or 'none' }}:{{ messages[0].content }}",
                                    "test", Json::object());
  const auto prompt = [&](const std::string& more) {
    const CompletionRequest request = parse_chat(
        parse_body(R"({"messages": [{"role": "user", "content": "a"}])" + more + "}", {}), *model,
        {}, 0);
    return model->tokenizer->decode(request.prompts[0], false);
  };
  EXPECT_EQ(prompt(""), "none:a");
  EXPECT_EQ(prompt(R"(, "reasoning_effort": "high")"), "high:a");
  EXPECT_EQ(prompt(R"(, "chat_template_kwargs": {"reasoning_effort": "low", "messages": []})"),
            "low:a");
}

TEST(Choice, NeverSplitsACharacterAndKeepsLogprobsInStep) {
  const auto model = byte_model(nullptr);
  CompletionRequest request = completion(R"({"prompt": "x", "logprobs": 1, "stop": ["END"]})");
  Choice choice(*model, request, request.prompts[0]);
  const std::string text = "a\xC3\xA9\xF0\x9F\x98\x80 E EN\xE4\xBD\xA0 END more";
  std::string out;
  size_t logprobs = 0;
  const auto take = [&](const Choice::Piece& piece) {
    EXPECT_FALSE(find_invalid_utf8(piece.text));
    out += piece.text;
    if (!piece.logprobs.is_null()) logprobs += piece.logprobs["tokens"].size();
  };
  for (const char c : text) {
    const auto token = static_cast<int32_t>(static_cast<uint8_t>(c));
    take(choice.token(token, TokenLogprob{token, -1, 0, {{token, -1}}}));
    if (choice.stopped()) break;
  }
  take(choice.finish());
  EXPECT_TRUE(choice.stopped());
  EXPECT_EQ(out, text.substr(0, text.find("END")));
  EXPECT_EQ(logprobs, out.size());  // a token is a byte here
}

TEST(Metrics, CountsInBuckets) {
  Metrics metrics;
  metrics.add_response(200);
  metrics.add_finished({"stop", 0.015, 0.5, 10, 3, {0.02, 0.2}, 0.005, 0.4});
  metrics.add_request(2, 16);
  const std::string text = metrics.text({}, "a\"b\\c\nd", "FFSS");
  for (const char* line :
       {"vllm:time_to_first_token_seconds_bucket{model_name=\"a\\\"b\\\\c\\nd\",le=\"0.01\"} 0\n",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"a\\\"b\\\\c\\nd\",le=\"0.02\"} 1\n",
        "vllm:request_queue_time_seconds_sum{model_name=\"a\\\"b\\\\c\\nd\"} 0.005\n",
        "vllm:request_inference_time_seconds_bucket{model_name=\"a\\\"b\\\\c\\nd\",le=\"0.5\"} 1\n",
        "vllm:inter_token_latency_seconds_count{model_name=\"a\\\"b\\\\c\\nd\"} 2\n",
        "vllm:request_params_n_bucket{model_name=\"a\\\"b\\\\c\\nd\",le=\"2\"} 1\n",
        "vllm:request_params_max_tokens_sum{model_name=\"a\\\"b\\\\c\\nd\"} 16\n",
        "vllm:request_success_total{model_name=\"a\\\"b\\\\c\\nd\",finished_reason=\"stop\"} 1\n",
        "indexcache_num_full_layers{model_name=\"a\\\"b\\\\c\\nd\"} 2\n", "plan=\"FFSS\"} 1\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << text;
  }
}

}  // namespace
}  // namespace indexcache
