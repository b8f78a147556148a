// What commands say about an engine and about a generation, on stderr, so that stdout holds the
// result alone.
#pragma once

#include "base/json.h"
#include "engine/engine.h"

namespace indexcache {

// Model, plan, type, threads, memory.
void print_engine(const Engine& engine);

// Speeds, the indexer's share, peak memory by what it is for; the cache holds `cached_tokens`.
void print_generation(const Engine& engine, const GenerateResult& result, int64_t cached_tokens);
Json generation_json(const Engine& engine, const GenerateResult& result);

const char* cached_name(DType dtype);  // or "i8", "fp8"

}  // namespace indexcache
