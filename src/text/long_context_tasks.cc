#include "text/long_context_tasks.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <set>
#include <utility>

#include "base/error.h"

namespace indexcache {
namespace {

constexpr std::array kAdjectives = {
    "amber",   "ancient", "azure",  "bashful", "bitter",  "black",  "blue",   "bold",    "brave",
    "brief",   "bright",  "brisk",  "bronze",  "brown",   "busy",   "calm",   "careful", "cheap",
    "clean",   "clever",  "cloudy", "cold",    "copper",  "coral",  "cosmic", "crimson", "crisp",
    "curious", "dark",    "dense",  "distant", "dusty",   "eager",  "early",  "easy",    "empty",
    "exact",   "faint",   "famous", "fancy",   "fast",    "fierce", "final",  "fresh",   "frozen",
    "gentle",  "giant",   "golden", "grand",   "gray",    "great",  "green",  "happy",   "heavy",
    "hidden",  "hollow",  "honest", "huge",    "humble",  "icy",    "idle",   "indigo",  "ivory",
    "jolly",   "keen",    "kind",   "large",   "late",    "lazy",   "light",  "little",  "lively",
    "lonely",  "loud",    "lucky",  "magic",   "mellow",  "mighty", "misty",  "modern",  "modest",
    "narrow",  "neat",    "nimble", "noble",   "noisy",   "olive",  "orange", "pale",    "patient",
    "perfect", "pink",    "plain",  "polite",  "proud",   "purple", "quick",  "quiet",   "rapid",
    "rare",    "red",     "royal",  "rusty",   "scarlet", "secret", "sharp",  "shiny",   "silent",
    "silver",  "simple",  "sleepy", "slow",    "small",   "smooth", "soft",   "solar",   "solid",
    "spicy",   "steady",  "stormy", "sunny",   "sweet",   "swift",  "tiny",   "violet",  "warm",
    "white",   "yellow"};
constexpr std::array kNouns = {
    "anchor",   "apple",  "arrow",  "badger", "banana", "basket", "beach",  "beaver", "bell",
    "bird",     "boat",   "bottle", "box",    "bridge", "brush",  "bucket", "butter", "button",
    "cabin",    "cactus", "camel",  "candle", "canyon", "carpet", "castle", "cat",    "cherry",
    "circle",   "clock",  "cloud",  "coat",   "coffee", "comet",  "cookie", "corner", "cow",
    "crane",    "desert", "dog",    "dragon", "drum",   "eagle",  "engine", "falcon", "farm",
    "feather",  "field",  "fish",   "flag",   "flower", "forest", "fox",    "garden", "gate",
    "glass",    "goose",  "guitar", "hammer", "harbor", "hat",    "hill",   "horse",  "house",
    "island",   "jacket", "kettle", "kitten", "ladder", "lake",   "lamp",   "leaf",   "lemon",
    "lion",     "lizard", "maple",  "market", "meadow", "mirror", "monkey", "moon",   "moth",
    "mountain", "mouse",  "needle", "ocean",  "otter",  "owl",    "panda",  "paper",  "pencil",
    "pepper",   "piano",  "pillow", "planet", "pony",   "potato", "rabbit", "radio",  "raven",
    "ribbon",   "river",  "road",   "robin",  "rocket", "sailor", "salmon", "shadow", "sheep",
    "shell",    "ship",   "shovel", "spider", "spoon",  "stone",  "sugar",  "table",  "tiger",
    "tower",    "train",  "tree",   "tulip",  "turtle", "valley", "violin", "wagon",  "whale",
    "window",   "wolf"};
static_assert(kAdjectives.size() == 128 && kNouns.size() == 128);

constexpr std::string_view kHeader =
    "Facts are hidden in the text below. Remember them for the questions at its end.\n";

// --- keys and values ----------------------------------------------------------------------------

TaskSplit split_of_pair(uint64_t pair) {
  // Any fixed rule does; a hash keeps every word in both splits.
  return splitmix64(pair) % 8 == 0 ? TaskSplit::kHeldOut : TaskSplit::kTraining;
}

// Draws keys of one split and values, none twice.
class Names {
 public:
  Names(Rng& rng, TaskSplit split) : rng_(rng), split_(split) {}

  std::string key() {
    for (;;) {
      const uint64_t pair = rng_.below(kAdjectives.size() * kNouns.size());
      if (split_of_pair(pair) != split_ || !keys_.insert(pair).second) continue;
      return fmt::format("{}-{}", kAdjectives[pair / kNouns.size()], kNouns[pair % kNouns.size()]);
    }
  }

  std::string value() {
    for (;;) {
      const uint64_t value = 10000 + rng_.below(90000);
      if (values_.insert(value).second) return std::to_string(value);
    }
  }

 private:
  Rng& rng_;
  TaskSplit split_;
  std::set<uint64_t> keys_, values_;
};

// --- one task's facts and questions -------------------------------------------------------------

struct Question {
  std::string text;
  std::string answer;
};

// Facts are in groups: within one, order in the text is the order here.
struct Exercise {
  std::vector<std::vector<std::string>> facts;
  std::vector<Question> questions;
};

Question ask(const std::string& question, const std::string& lead, const std::string& answer) {
  return {fmt::format("Question: {}\nAnswer: {}", question, lead), fmt::format(" {}\n", answer)};
}

Exercise needles(int keys, Names& names) {
  Exercise exercise;
  for (int i = 0; i < keys; ++i) {
    const std::string key = names.key(), value = names.value();
    exercise.facts.push_back({fmt::format("The special number for {} is {}.\n", key, value)});
    exercise.questions.push_back(ask(fmt::format("What is the special number for {}?", key),
                                     fmt::format("The special number for {} is", key),
                                     value + "."));
  }
  return exercise;
}

Exercise multi_value(int values, Names& names) {
  const std::string key = names.key();
  std::vector<std::string> facts;
  std::string answer;
  for (int i = 0; i < values; ++i) {
    const std::string value = names.value();
    facts.push_back(fmt::format("One special number for {} is {}.\n", key, value));
    answer += (i == 0 ? "" : ", ") + value;
  }
  return {{facts},
          {ask(fmt::format("What are the {} special numbers for {}, in order?", values, key),
               fmt::format("The {} special numbers for {} are", values, key), answer + ".")}};
}

Exercise variable_tracking(int hops, int chains, Names& names) {
  Exercise exercise;
  for (int i = 0; i < chains; ++i) {
    std::string key = names.key();
    std::string trace = names.value() + ".";
    std::vector<std::string> facts = {fmt::format("VAR {} = {}\n", key, trace)};
    for (int hop = 0; hop < hops; ++hop) {
      const std::string next = names.key();
      facts.push_back(fmt::format("VAR {} = VAR {}.\n", next, key));
      trace = fmt::format("VAR {} = {}", key, trace);
      key = next;
    }
    exercise.facts.push_back(std::move(facts));
    exercise.questions.push_back(ask(fmt::format("Trace variable {} to its value.", key),
                                     fmt::format("VAR {} =", key), trace));
  }
  return exercise;
}

Exercise copy(Names& names, Rng& rng, const TaskFiller& filler) {
  const std::string key = names.key(), sentence = filler.sentence(rng);
  return {{{fmt::format("Passage {}: {}\n", key, sentence)}},
          {ask(fmt::format("Repeat passage {}.", key), fmt::format("Passage {}:", key), sentence)}};
}

std::pair<int, int> size_range(TaskKind kind) {
  switch (kind) {
    case TaskKind::kMultiKey:
      return {1, 8};
    case TaskKind::kMultiValue:
      return {2, 4};
    case TaskKind::kVariableTracking:
      return {1, 4};
    default:
      return {1, 1};
  }
}

Exercise make_exercise(TaskKind kind, int size, Names& names, Rng& rng, const TaskFiller& filler) {
  const auto [low, high] = size_range(kind);
  if (size == 0) size = low + static_cast<int>(rng.below(high - low + 1));
  if (size < low || size > high)
    fail("task {}: size is {}, expected {} to {} (0: at random)", task_name(kind), size, low, high);
  switch (kind) {
    case TaskKind::kSingleNeedle:
    case TaskKind::kMultiKey:
      return needles(size, names);
    case TaskKind::kMultiValue:
      return multi_value(size, names);
    case TaskKind::kVariableTracking:
      return variable_tracking(size, 2 + static_cast<int>(rng.below(2)), names);
    case TaskKind::kCopy:
      return copy(names, rng, filler);
  }
  CHECK(false);
  return {};
}

// --- hiding facts in filler ---------------------------------------------------------------------

std::string hide(const std::vector<std::vector<std::string>>& groups, int64_t filler_tokens,
                 Rng& rng, const TaskFiller& filler) {
  std::vector<size_t> fragments;
  int64_t total = 0;
  while (total < filler_tokens) {
    // Several documents in one text, as a reader of long contexts meets them.
    const auto wanted =
        std::min<int64_t>(filler_tokens - total, 1024 + static_cast<int64_t>(rng.below(7168)));
    const TaskFiller::Run run = filler.draw(rng, wanted);
    for (size_t i = run.first; i < run.last; ++i) {
      if (total + filler.tokens(i) > filler_tokens) {
        filler_tokens = total;
        break;
      }
      fragments.push_back(i);
      total += filler.tokens(i);
    }
  }

  struct Place {
    int64_t at;
    size_t number;  // of facts at one place the first stays first
    const std::string* fact;
  };
  std::vector<Place> places;
  for (const auto& facts : groups) {
    std::vector<int64_t> positions;
    for (size_t i = 0; i < facts.size(); ++i)
      positions.push_back(static_cast<int64_t>(rng.below(total + 1)));
    std::ranges::sort(positions);
    for (size_t i = 0; i < facts.size(); ++i)
      places.push_back({positions[i], places.size(), &facts[i]});
  }
  std::ranges::sort(places, {}, [](const Place& p) { return std::pair(p.at, p.number); });

  std::string text(kHeader);
  int64_t passed = 0;
  auto place = places.begin();
  for (const size_t fragment : fragments) {
    // A fact inside a fragment goes to its nearer end.
    const int64_t middle = passed + filler.tokens(fragment) / 2;
    for (; place != places.end() && place->at <= middle; ++place) text += *place->fact;
    text += filler.text(fragment);
    passed += filler.tokens(fragment);
  }
  for (; place != places.end(); ++place) text += *place->fact;
  return text;
}

int64_t count_facts(const std::vector<std::vector<std::string>>& groups, const TaskFiller& filler) {
  int64_t tokens = 0;
  for (const auto& facts : groups)
    for (const std::string& fact : facts) tokens += filler.count(fact);
  return tokens;
}

int64_t count_question(const Question& question, const TaskFiller& filler) {
  return filler.count(question.text + question.answer);
}

uint64_t mix(uint64_t seed, uint64_t salt) {
  uint64_t state = seed;
  return splitmix64(state) ^ salt;
}

}  // namespace

const char* task_name(TaskKind kind) {
  switch (kind) {
    case TaskKind::kSingleNeedle:
      return "single";
    case TaskKind::kMultiKey:
      return "multikey";
    case TaskKind::kMultiValue:
      return "multivalue";
    case TaskKind::kVariableTracking:
      return "variables";
    case TaskKind::kCopy:
      return "copy";
  }
  CHECK(false);
  return "";
}

std::optional<TaskKind> task_from_name(std::string_view name) {
  for (const TaskKind kind : kTaskKinds)
    if (name == task_name(kind)) return kind;
  return std::nullopt;
}

Task make_task(const TaskRequest& request, const TaskFiller& filler) {
  if (request.target_tokens < 1)
    fail("task: target_tokens is {}, expected at least 1", request.target_tokens);
  Rng rng(mix(request.seed, request.split == TaskSplit::kTraining ? 0x7472 : 0x686F));
  Names names(rng, request.split);
  const Exercise exercise = make_exercise(request.kind, request.size, names, rng, filler);
  const Question& question = exercise.questions[rng.below(exercise.questions.size())];
  const int64_t needed = filler.count(kHeader) + count_facts(exercise.facts, filler) +
                         count_question(question, filler);
  std::string prompt = hide(exercise.facts, request.target_tokens - needed, rng, filler);
  return {request.kind, std::move(prompt) + question.text, question.answer};
}

bool answer_matches(std::string_view answer, std::string_view output) {
  const auto first_line = [](std::string_view text) {
    constexpr std::string_view kSpaces = " \t\r\n";
    text.remove_prefix(std::min(text.find_first_not_of(kSpaces), text.size()));
    text = text.substr(0, text.find('\n'));
    return text.substr(0, text.find_last_not_of(kSpaces) + 1);
  };
  return first_line(answer) == first_line(output);
}

std::vector<TaskSegment> make_training_text(uint64_t seed, int64_t target_tokens,
                                            const TaskFiller& filler) {
  if (target_tokens < 1) fail("task: target_tokens is {}, expected at least 1", target_tokens);
  Rng rng(mix(seed, 0x6D78));
  Names names(rng, TaskSplit::kTraining);
  std::vector<std::vector<std::string>> facts;
  std::vector<Question> questions;
  int64_t needed = filler.count(kHeader);
  const auto wanted = 1 + static_cast<int>(rng.below(4));
  for (int i = 0; i < wanted; ++i) {
    const TaskKind kind = kTaskKinds[rng.below(std::size(kTaskKinds))];
    Exercise exercise = make_exercise(kind, 0, names, rng, filler);
    int64_t tokens = count_facts(exercise.facts, filler);
    for (const Question& question : exercise.questions) tokens += count_question(question, filler);
    // Most of a text is filler, or there would be nothing to search.
    if (i > 0 && needed + tokens > target_tokens / 3) break;
    needed += tokens;
    std::ranges::move(exercise.facts, std::back_inserter(facts));
    std::ranges::move(exercise.questions, std::back_inserter(questions));
  }
  for (size_t i = questions.size(); i > 1; --i)
    std::swap(questions[i - 1], questions[rng.below(i)]);

  std::vector<TaskSegment> segments = {{hide(facts, target_tokens - needed, rng, filler), false}};
  for (Question& question : questions) {
    if (segments.back().is_answer)
      segments.push_back({std::move(question.text), false});
    else
      segments.back().text += question.text;
    segments.push_back({std::move(question.answer), true});
  }
  return segments;
}

}  // namespace indexcache
