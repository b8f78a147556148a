// Where the server sends requests: the scheduler, or a stand-in of the tests. The calls mean what
// they mean in engine/scheduler.h.
#pragma once

#include "engine/scheduler.h"

namespace indexcache {

class Generator {
 public:
  virtual ~Generator() = default;
  virtual uint64_t submit(GenerationRequest request, Scheduler::OnEvent on_event,
                          Refusal* refusal) = 0;
  virtual void cancel(uint64_t id) = 0;
  virtual bool drain(double timeout_seconds) = 0;
  virtual SchedulerStats stats() const = 0;
};

class SchedulerGenerator : public Generator {
 public:
  explicit SchedulerGenerator(Scheduler& scheduler) : scheduler_(scheduler) {}
  uint64_t submit(GenerationRequest request, Scheduler::OnEvent on_event,
                  Refusal* refusal) override {
    return scheduler_.submit(std::move(request), std::move(on_event), refusal);
  }
  void cancel(uint64_t id) override { scheduler_.cancel(id); }
  bool drain(double timeout_seconds) override { return scheduler_.drain(timeout_seconds); }
  SchedulerStats stats() const override { return scheduler_.stats(); }

 private:
  Scheduler& scheduler_;
};

}  // namespace indexcache
