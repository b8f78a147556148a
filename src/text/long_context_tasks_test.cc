#include "text/long_context_tasks.h"

#include <gtest/gtest.h>

#include <map>
#include <regex>
#include <set>

#include "base/error.h"

namespace indexcache {
namespace {

std::vector<std::string> documents() {
  std::vector<std::string> result;
  for (int d = 0; d < 20; ++d) {
    std::string text = fmt::format("  Chapter {}\n\n", d);
    for (int line = 0; line < 400; ++line) {
      text += fmt::format("Line {} of chapter {} tells the reader something plain and useful.\n",
                          line, d);
      if (line % 7 == 0) text += "\n    indented code = f(x)\n";
    }
    result.push_back(text);
  }
  return result;
}

const TaskFiller& filler() {
  static const TaskFiller shared(documents(), count_bytes(1));
  return shared;
}

TaskRequest request(TaskKind kind, uint64_t seed, int size = 0, int64_t target = 20000) {
  return {kind, TaskSplit::kHeldOut, seed, target, size};
}

size_t occurrences(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST(TaskFiller, FragmentsAreWholeLinesThatDoNotBeginWithASpace) {
  const std::string long_line(5000, 'x');
  const TaskFiller odd({"", " \n ", long_line, "a\xC3\xA9" + std::string(3000, ' ') + "b", "end"},
                       count_bytes(1));
  Rng rng(1);
  for (int i = 0; i < 200; ++i) {
    const TaskFiller::Run run = odd.draw(rng, 2000);
    ASSERT_LT(run.first, run.last);
    for (size_t f = run.first; f < run.last; ++f) {
      EXPECT_EQ(odd.text(f).back(), '\n');
      EXPECT_NE(odd.text(f).front(), ' ');
      EXPECT_LE(odd.text(f).size(), 1700u);
      EXPECT_EQ(odd.tokens(f), static_cast<int64_t>(odd.text(f).size()));
    }
  }
  EXPECT_THROW(TaskFiller({"", "  \n"}, count_bytes(1)), Error);
}

TEST(TaskFiller, CountsDoNotDependOnThreadsAndErrorsComeOut) {
  const TaskFiller many(documents(), count_bytes(3.5), 4);
  const TaskFiller one(documents(), count_bytes(3.5), 1);
  const Task a = make_task(request(TaskKind::kMultiKey, 5), many);
  EXPECT_EQ(a.prompt, make_task(request(TaskKind::kMultiKey, 5), one).prompt);
  const auto broken = [](std::string_view) -> int64_t { fail("no count"); };
  EXPECT_THROW(TaskFiller(documents(), broken, 3), Error);
}

TEST(LongContextTasks, LengthIsTheTargetToWithinAFragment) {
  for (const TaskKind kind : kTaskKinds)
    for (const int64_t target : {2000, 5000, 50000})
      for (uint64_t seed = 0; seed < 10; ++seed) {
        const Task task = make_task(request(kind, seed, 0, target), filler());
        const auto length = static_cast<int64_t>(task.prompt.size() + task.answer.size());
        EXPECT_LE(length, target) << task_name(kind) << " seed " << seed;
        EXPECT_GT(length, target - 1000) << task_name(kind) << " seed " << seed;
      }
  // Too short for the facts: the task is whole nevertheless.
  const Task tiny = make_task(request(TaskKind::kMultiKey, 1, 8, 1), filler());
  EXPECT_EQ(occurrences(tiny.prompt, "The special number for "), 9u);
}

TEST(LongContextTasks, SameRequestSameTaskAndSeedsDiffer) {
  for (const TaskKind kind : kTaskKinds) {
    std::set<std::string> prompts;
    for (uint64_t seed = 0; seed < 50; ++seed) {
      const Task task = make_task(request(kind, seed, 0, 3000), filler());
      const Task again = make_task(request(kind, seed, 0, 3000), filler());
      EXPECT_EQ(task.prompt, again.prompt);
      EXPECT_EQ(task.answer, again.answer);
      prompts.insert(task.prompt);
    }
    EXPECT_EQ(prompts.size(), 50u);
  }
}

TEST(LongContextTasks, PromptEndsWithTheWordsBeforeTheFact) {
  for (uint64_t seed = 0; seed < 100; ++seed)
    for (const TaskKind kind : {TaskKind::kSingleNeedle, TaskKind::kMultiKey, TaskKind::kCopy}) {
      const Task task = make_task(request(kind, seed), filler());
      const std::string lead = task.prompt.substr(task.prompt.rfind("Answer: ") + 8);
      ASSERT_EQ(task.answer.front(), ' ');
      ASSERT_EQ(task.answer.back(), '\n');
      EXPECT_EQ(occurrences(task.prompt, lead + task.answer), 1u) << lead;
      EXPECT_EQ(occurrences(task.prompt, lead), 2u) << lead;
    }
}

TEST(LongContextTasks, MultiValueAnswerListsTheValuesInOrder) {
  for (int size = 2; size <= 4; ++size)
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const Task task = make_task(request(TaskKind::kMultiValue, seed, size), filler());
      const std::regex fact("One special number for [a-z-]+ is ([0-9]{5})\\.\n");
      std::string expected;
      int found = 0;
      for (std::sregex_iterator it(task.prompt.begin(), task.prompt.end(), fact), end; it != end;
           ++it, ++found)
        expected += (found ? ", " : " ") + (*it)[1].str();
      EXPECT_EQ(found, size);
      EXPECT_EQ(task.answer, expected + ".\n");
    }
}

TEST(LongContextTasks, VariableAnswerFollowsTheChain) {
  for (int hops = 1; hops <= 4; ++hops)
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const Task task = make_task(request(TaskKind::kVariableTracking, seed, hops), filler());
      std::map<std::string, std::string> assigned;
      const std::regex fact("VAR ([a-z-]+) = (VAR [a-z-]+|[0-9]{5})\\.\n");
      for (std::sregex_iterator it(task.prompt.begin(), task.prompt.end(), fact), end; it != end;
           ++it) {
        // A chain's facts come in the order of its hops.
        const std::string source = (*it)[2].str();
        EXPECT_TRUE(!source.starts_with("VAR") || assigned.contains(source.substr(4))) << source;
        assigned[(*it)[1].str()] = source;
      }
      EXPECT_GE(assigned.size(), static_cast<size_t>(2 * (hops + 1)));
      const std::string lead = task.prompt.substr(task.prompt.rfind("VAR "));
      std::string name = lead.substr(4, lead.size() - 6), expected;
      int steps = 0;
      for (;; ++steps) {
        const std::string source = assigned.at(name);
        if (!source.starts_with("VAR")) {
          expected += " " + source + ".\n";
          break;
        }
        expected += " " + source + " =";
        name = source.substr(4);
      }
      EXPECT_EQ(steps, hops);
      EXPECT_EQ(task.answer, expected);
    }
}

TEST(LongContextTasks, NeedlesAreUniformOverThePrompt) {
  int tenths[10] = {};
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const Task task = make_task(request(TaskKind::kSingleNeedle, seed), filler());
    const double at = static_cast<double>(task.prompt.find("The special number")) /
                      static_cast<double>(task.prompt.size());
    ++tenths[static_cast<int>(at * 10)];
  }
  // 200 expected in each, standard deviation 13.4; the ends lose or win half a fragment.
  for (const int count : tenths) EXPECT_NEAR(count, 200, 80);
}

std::set<std::string> keys_of(const std::string& text) {
  const std::regex key("(?:for|VAR|Passage) ([a-z]+-[a-z]+)");
  std::set<std::string> keys;
  for (std::sregex_iterator it(text.begin(), text.end(), key), end; it != end; ++it)
    keys.insert((*it)[1].str());
  return keys;
}

TEST(LongContextTasks, TrainingAndHeldOutShareNoKey) {
  std::set<std::string> training, held_out;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    std::string text;
    for (const TaskSegment& segment : make_training_text(seed, 2000, filler()))
      text += segment.text;
    training.merge(keys_of(text));
    for (const TaskKind kind : kTaskKinds) {
      held_out.merge(keys_of(make_task(request(kind, seed, 0, 1000), filler()).prompt));
      TaskRequest own = request(kind, seed, 0, 1000);
      own.split = TaskSplit::kTraining;
      training.merge(keys_of(make_task(own, filler()).prompt));
    }
  }
  EXPECT_GT(training.size(), 4000u);
  EXPECT_GT(held_out.size(), 1200u);
  for (const std::string& key : held_out) EXPECT_FALSE(training.contains(key)) << key;
}

TEST(LongContextTasks, TrainingTextAsksAboutWhatItHides) {
  size_t questions = 0;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const auto segments = make_training_text(seed, 6000, filler());
    ASSERT_GE(segments.size(), 2u);
    std::string text;
    for (size_t i = 0; i < segments.size(); ++i) {
      EXPECT_EQ(segments[i].is_answer, i % 2 == 1);
      text += segments[i].text;
    }
    EXPECT_TRUE(segments.back().is_answer);
    EXPECT_LE(text.size(), 6000u);
    EXPECT_GT(text.size(), 5000u);
    const std::string& context = segments[0].text;
    for (size_t i = 1; i < segments.size(); i += 2) {
      const std::string& ask = segments[i - 1].text;
      const std::string key = ask.substr(ask.rfind("Question: "));
      std::set<std::string> keys = keys_of(key.substr(key.find("Answer: ")));
      ASSERT_EQ(keys.size(), 1u);
      EXPECT_NE(context.find(*keys.begin()), std::string::npos);
      ++questions;
    }
  }
  EXPECT_GT(questions, 300u);
}

TEST(LongContextTasks, AnswersAreComparedUpToTheNewline) {
  EXPECT_TRUE(answer_matches(" 48213.\n", " 48213.\nQuestion: more"));
  EXPECT_TRUE(answer_matches(" 48213.\n", "48213. "));
  EXPECT_TRUE(answer_matches(" 48213.\n", "\n48213."));
  EXPECT_FALSE(answer_matches(" 48213.\n", " 48214.\n"));
  EXPECT_FALSE(answer_matches(" 48213.\n", " 48213. 1"));
  EXPECT_FALSE(answer_matches(" 48213.\n", ""));
  EXPECT_FALSE(answer_matches(" 48213.\n", "\n"));
}

TEST(LongContextTasks, WrongRequestsAreErrors) {
  EXPECT_THROW(make_task(request(TaskKind::kMultiKey, 0, 9), filler()), Error);
  EXPECT_THROW(make_task(request(TaskKind::kMultiValue, 0, 1), filler()), Error);
  EXPECT_THROW(make_task(request(TaskKind::kVariableTracking, 0, -1), filler()), Error);
  EXPECT_THROW(make_task(request(TaskKind::kSingleNeedle, 0, 0, 0), filler()), Error);
  EXPECT_THROW(make_training_text(0, 0, filler()), Error);
  for (const TaskKind kind : kTaskKinds) EXPECT_EQ(task_from_name(task_name(kind)), kind);
  EXPECT_FALSE(task_from_name("needle"));
}

}  // namespace
}  // namespace indexcache
