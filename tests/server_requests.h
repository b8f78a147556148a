// Requests to a real server on a real engine, what is seen of it, and what it owes after a fault.
#pragma once

#include <cmath>

#include "base/rng.h"
#include "tests/server_process.h"

namespace indexcache {

inline std::string request_of(const std::vector<int32_t>& prompt, int max_tokens,
                              bool stream = false) {
  return post("/v1/completions", Json{{"prompt", prompt},
                                      {"max_tokens", max_tokens},
                                      {"temperature", 0},
                                      {"ignore_eos", true},
                                      {"logprobs", 2},
                                      {"stream", stream}}
                                     .dump());
}

inline std::vector<int32_t> tokens_of(uint64_t seed, int64_t length) {
  Rng rng(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(length));
  for (int32_t& token : tokens) token = static_cast<int32_t>(10 + rng.below(400));
  return tokens;
}

inline const std::string kGood = request_of(tokens_of(1, 40), 12);

inline std::vector<std::string> with(const std::vector<std::string>& flags) {
  std::vector<std::string> all = {"-m", model_folder(), "-t", "1", "--port", "0"};
  all.insert(all.end(), flags.begin(), flags.end());
  return all;
}

inline double metric(Server& server, const std::string& name) {
  const std::string text = server.ask(get("/metrics"));
  const size_t at = text.find("\n" + name + "{");
  if (at == std::string::npos) return NAN;
  return std::stod(text.substr(text.find("} ", at) + 2));
}

// What was answered, without how much of the prompt was in the cache.
inline std::string choices(const std::string& answer) {
  EXPECT_EQ(status_of(answer), 200) << answer;
  return parse_json(body_of(answer), "answer")["choices"].dump();
}

inline std::string good(Server& server) { return choices(server.ask(kGood)); }

// All of it is over: nothing runs, every page is free, and the good request is what it was.
inline void expect_recovered(Server& server, const std::string& before) {
  for (int i = 0; i < 500 && metric(server, "vllm:num_requests_running") +
                                     metric(server, "vllm:num_requests_waiting") >
                                 0;
       ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(metric(server, "vllm:num_requests_running"), 0);
  EXPECT_EQ(metric(server, "vllm:num_requests_waiting"), 0);
  EXPECT_EQ(metric(server, "indexcache_cache_free_pages"),
            metric(server, "indexcache_cache_pages"));
  EXPECT_EQ(good(server), before);
  EXPECT_EQ(status_of(server.ask(get("/health"))), 200);
  server.signal(SIGTERM);
  EXPECT_EQ(server.exit_code(), 0);
}

}  // namespace indexcache
