// What goes wrong on a GPU while it serves. Most of it needs a real one.
#include <gtest/gtest.h>

#include "ops/kit/test_device.h"
#include "ops/silu_mul/silu_mul.h"
#include "tests/scheduler_test_kit.h"

namespace indexcache {
namespace {

RunOptions gpu_options() {
  RunOptions options = scheduler_engine_options();
  options.device = Device::kCuda;
  return options;
}

// All of the GPU's memory but less than 1 MiB, as another program would take it.
std::vector<CudaMemory> take_memory() {
  std::vector<CudaMemory> taken;
  for (size_t num_bytes = size_t{1} << 40; num_bytes >= size_t{1} << 20;) {
    try {
      taken.emplace_back(num_bytes);
    } catch (const Error&) {
      num_bytes /= 2;
    }
  }
  return taken;
}

#define SKIP_WITHOUT_GPU() \
  if (kCudaIsEmulated || !can_run(Device::kCuda)) GTEST_SKIP() << "needs a GPU"

TEST(GpuFaults, DeterministicIsRefused) {
  if (!can_run(Device::kCuda)) GTEST_SKIP() << "needs a GPU, or its emulation";
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, gpu_options());
  try {
    const Scheduler scheduler(engine, {.deterministic = true});
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("--device cpu"), std::string::npos) << error.what();
  }
}

TEST(GpuFaults, MemoryTakenBeforeTheStartIsSaid) {
  SKIP_WITHOUT_GPU();
  const ModelSource source = small_model("FFSFS");
  {
    const std::vector<CudaMemory> taken = take_memory();
    try {
      const Engine engine(source, gpu_options());
      ADD_FAILURE() << "there was memory";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("GPU"), std::string::npos) << message;
      EXPECT_NE(message.find("iB"), std::string::npos) << "needed and free: " << message;
    }
  }
  Engine engine(source, gpu_options());
  Scheduler scheduler(engine, {});
  EXPECT_EQ(answer_of(scheduler, request_of(small_tokens(1, 100), 5)).tokens.size(), 5u);
}

// What a step takes beyond what was planned may not be there: the requests hear of it, and the
// program lives.
TEST(GpuFaults, MemoryTakenWhileItServesEndsNoProgram) {
  SKIP_WITHOUT_GPU();
  const ModelSource source = small_model("FFSFS");
  const GenerationRequest request = request_of(small_tokens(1, 300), 40);
  Engine engine(source, gpu_options());
  const std::vector<int32_t> expected = [&] {
    Scheduler scheduler(engine, {});
    return answer_of(scheduler, request).tokens;
  }();
  for (const bool is_new : {false, true}) {
    SCOPED_TRACE(is_new ? "a new engine" : "an engine that has served");
    Engine fresh(source, gpu_options());
    Scheduler scheduler(is_new ? fresh : engine, {});
    const std::vector<CudaMemory> taken = take_memory();
    const std::vector<ClientAnswer> answers =
        answers_of(scheduler, {request, request_of(small_tokens(2, 700), 3)});
    const std::string fault = scheduler.stats().fault;
    for (const ClientAnswer& answer : answers) {
      EXPECT_EQ(answer.num_finished, 1);
      EXPECT_TRUE(answer.reason == FinishReason::kLength || !fault.empty());
    }
    if (answers[0].reason == FinishReason::kLength) {
      EXPECT_EQ(answers[0].tokens, expected);
    }
    if (!fault.empty()) {
      EXPECT_NE(fault.find("memory"), std::string::npos) << fault;
    }
    EXPECT_EQ(scheduler.stats().free_pages, scheduler.stats().pages);
  }
}

// A GPU is of no use to its process after an illegal access, so this is a process of its own.
int serve_until_the_gpu_fails() {
  const ModelSource source = small_model("FFSFS");
  Engine engine(source, gpu_options());
  Scheduler scheduler(engine, {});
  Client first, second, late;
  Refusal refusal;
  scheduler.submit(request_of(small_tokens(1, 100), 900), first.on_event(), &refusal);
  scheduler.submit(request_of(small_tokens(2, 200), 800), second.on_event(), &refusal);
  first.wait_for_tokens(10);
  second.wait_for_tokens(10);
  {
    Exec exec(1, Device::kCuda);
    float* const nowhere = reinterpret_cast<float*>(uintptr_t{1} << 46);
    silu_mul(exec, {nowhere, nowhere, 4, 64, nowhere});
  }
  for (Client* client : {&first, &second}) {
    const ClientAnswer answer = client->wait();
    if (answer.num_finished != 1 || answer.reason != FinishReason::kEngineFault ||
        answer.message.find("illegal") == std::string::npos)
      return 1;
  }
  if (scheduler.stats().fault.find("illegal") == std::string::npos) return 2;
  if (scheduler.submit(request_of({1}, 5), late.on_event(), &refusal) != 0) return 3;
  if (refusal.kind != Refusal::Kind::kFaulted) return 4;
  return scheduler.drain(60) ? 0 : 5;
}

TEST(GpuFaultsDeathTest, AnIllegalAccessEndsAllRequestsAndIsSaid) {
  SKIP_WITHOUT_GPU();
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::exit(serve_until_the_gpu_fails()), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace indexcache
