// What a client may ask for before it is refused. Sizes in bytes, times in seconds.
#pragma once

#include <cstdint>

namespace indexcache {

struct ServerLimits {
  uint32_t header_bytes = 16 << 10;  // more: 431
  uint64_t body_bytes = 8 << 20;     // more: 413
  uint64_t bodies_bytes =
      128 << 20;  // of all over 64 KiB that are being read and parsed; more: 503
  int json_depth = 64;
  double header_seconds = 10;  // from the first byte of a request to the end of its header
  double body_seconds = 30;
  double idle_seconds = 60;        // between requests of one connection
  double write_seconds = 30;       // for a client to take what it is sent
  int64_t connections = 1024;      // more: the longest idle one is closed; if none is, 503
  int64_t num_choices = 128;       // prompts times n of one request
  int64_t num_logprobs = 1 << 20;  // held for one request: tokens times (logprobs + 1)
  int64_t num_stops = 16;
  uint64_t stop_bytes = 1024;
  int64_t num_messages = 4096;
};

}  // namespace indexcache
