// What a real server says of its engine and asks of it.
#include <gtest/gtest.h>

#include "tests/server_requests.h"

namespace indexcache {
namespace {

// A request ends where the cache does, if that is before the context: clients hear of it, and
// nobody takes what was cut there for a whole answer.
TEST(ServeEngine, ACacheBelowTheContextBoundsEachRequest) {
  Server server(with({"-c", "512", "--cache-tokens", "200"}));  // 4 pages of 64 tokens
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  const std::string models = server.ask(get("/v1/models"));
  EXPECT_NE(models.find("\"max_model_len\":256"), std::string::npos) << models;
  const std::string too_long = server.ask(request_of(tokens_of(2, 200), 57));
  EXPECT_EQ(status_of(too_long), 400) << too_long;
  for (const char* part : {"context_length_exceeded", "256", "257"})
    EXPECT_NE(too_long.find(part), std::string::npos) << too_long;
  const Json whole = parse_json(body_of(server.ask(request_of(tokens_of(2, 200), 56))), "answer");
  EXPECT_EQ(whole["usage"]["completion_tokens"], 56) << whole;
  expect_recovered(server, before);
}

// Operators see the plan in force and what its indexers cost.
TEST(ServeEngine, MetricsOfThePlan) {
  Server server(with({"--plan", "FSFS"}));
  ASSERT_TRUE(server.ready()) << server.log();
  EXPECT_EQ(metric(server, "indexcache_indexer_seconds_total"), 0);
  const std::string before = good(server);
  const std::string metrics = server.ask(get("/metrics"));
  EXPECT_NE(metrics.find("\nindexcache_plan_info{model_name=\"tiny\",plan=\"FSFS\"} 1\n"),
            std::string::npos)
      << metrics;
  EXPECT_EQ(metric(server, "indexcache_num_full_layers"), 2);
  for (const char* part : {"indexer", "attention", "ffn", "head"})
    EXPECT_GT(metric(server, fmt::format("indexcache_{}_seconds_total", part)), 0) << part;
  expect_recovered(server, before);
}

std::vector<double> prompt_logprobs(Server& server, std::vector<int32_t> prompt) {
  const std::string answer = server.ask(post("/v1/completions", Json{{"prompt", prompt},
                                                                     {"max_tokens", 1},
                                                                     {"temperature", 0},
                                                                     {"echo", true},
                                                                     {"logprobs", 0}}
                                                                    .dump()));
  EXPECT_EQ(status_of(answer), 200) << answer.substr(0, 1000);
  const Json logprobs =
      parse_json(body_of(answer), "answer")["choices"][0]["logprobs"]["token_logprobs"];
  EXPECT_EQ(logprobs.size(), prompt.size() + 1);
  EXPECT_TRUE(logprobs[0].is_null());
  std::vector<double> values;
  for (size_t i = 1; i < prompt.size(); ++i) values.push_back(logprobs.at(i).get<double>());
  return values;
}

// The logprobs of a prompt that fills the context begin with those of its beginning.
TEST(ServeEngine, EchoOfAWholeContext) {
  Server server(with({"--deterministic", "-c", "4096"}));
  ASSERT_TRUE(server.ready()) << server.log();
  const std::string before = good(server);
  std::vector<int32_t> prompt = tokens_of(7, 4095);
  const std::vector<double> whole = prompt_logprobs(server, prompt);
  prompt.resize(1000);
  const std::vector<double> beginning = prompt_logprobs(server, prompt);
  ASSERT_EQ(whole.size(), 4094u);
  ASSERT_EQ(beginning.size(), 999u);
  for (const double value : whole) EXPECT_LT(value, 0);
  EXPECT_TRUE(std::equal(beginning.begin(), beginning.end(), whole.begin()));
  expect_recovered(server, before);
}

}  // namespace
}  // namespace indexcache
