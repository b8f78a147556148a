// What commands say about an engine and about a generation, on stderr, so that stdout holds the
// result alone.
#pragma once

#include "base/json.h"
#include "engine/engine.h"

namespace indexcache {

// Model, plan, type, threads, memory.
void print_engine(const Engine& engine);

// Speeds, the indexer's share, peak memory by what it is for.
void print_generation(const Engine& engine, const GenerateResult& result);
Json generation_json(const Engine& engine, const GenerateResult& result);

// "peak RSS 1.20 GiB = 900 MiB weights + 100 MiB cache + 200 MiB other". The weights' part is what
// of the mapped files is in memory now, or all of them if they were made in memory; the cache's
// what `num_tokens` tokens take.
std::string memory_line(const Engine& engine, int64_t num_tokens);

const char* compute_name(Compute compute);  // "f32", "bf16"
const char* cached_name(DType dtype);       // or "i8", "fp8"

}  // namespace indexcache
