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

}  // namespace
}  // namespace indexcache
