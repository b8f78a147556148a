#include "analysis/eval_tasks.h"

#include <algorithm>

#include "base/error.h"

namespace indexcache {

namespace {

// The greedy answer up to its first newline.
std::string answer_of(const Variant& variant, const Tokenizer& tokenizer,
                      std::span<const int32_t> prompt, int64_t max_tokens) {
  Engine& engine = *variant.engine;
  engine.model.plan = variant.plan;
  std::string text;
  std::atomic<bool> stop{false};
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.stop_tokens = engine.model.config.eos_token_id;
  options.stop = &stop;
  options.on_token = [&](int32_t token) {
    text += tokenizer.token_bytes(token);
    if (text.find('\n') != std::string::npos) stop = true;
  };
  SequenceCache cache;
  generate(engine, cache, prompt, options);
  engine.cache.release(cache);
  return text;
}

}  // namespace

std::vector<TaskScore> score_tasks(const std::vector<Variant>& variants, const TaskPlan& plan,
                                   const TaskFiller& filler, const Tokenizer& tokenizer,
                                   const std::function<void(int64_t)>& progress) {
  std::vector<TaskScore> scores;
  int64_t done = 0;
  for (const int64_t context : plan.contexts) {
    for (const TaskKind kind : plan.kinds) {
      TaskScore score{kind, context, std::vector<int64_t>(variants.size())};
      for (int64_t sample = 0; sample < plan.samples; ++sample) {
        const Task task = make_task({.kind = kind,
                                     .split = TaskSplit::kHeldOut,
                                     .seed = plan.seed + static_cast<uint64_t>(sample),
                                     .target_tokens = context},
                                    filler);
        const std::vector<int32_t> prompt = tokenizer.encode(task.prompt, true, false);
        const int64_t answer_tokens =
            static_cast<int64_t>(tokenizer.encode(task.answer, false, false).size());
        for (size_t v = 0; v < variants.size(); ++v) {
          // A little more than the answer takes, where the context has room for it: a model may
          // spell it with other tokens.
          const int64_t room =
              variants[v].engine->memory.context - static_cast<int64_t>(prompt.size());
          const std::string answer =
              answer_of(variants[v], tokenizer, prompt,
                        std::min({2 * answer_tokens, kMaxAnswerTokens, room}));
          score.right[v] += answer_matches(task.answer, answer);
          if (progress) progress(++done);
        }
      }
      scores.push_back(std::move(score));
    }
  }
  return scores;
}

}  // namespace indexcache
