// The parts of the search that need no model: data, journal, store, race.

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "base/rng.h"
#include "checkpoint/test_files.h"
#include "search/loss_journal.h"
#include "search/race.h"
#include "search/state_store.h"
#include "search/text_data.h"
#include "text/byte_level.h"

namespace indexcache {
namespace {

Tokenizer bytes_tokenizer() { return Tokenizer::parse(byte_level_tokenizer_json(260), "test"); }

TEST(TextData, WindowsAreDisjointAndNamedByTheirTokens) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>('a' + i * i % 26);
  const Tokenizer tokenizer = bytes_tokenizer();
  const auto cut = [&](SequenceRequest request) {
    return cut_sequences({text, "second"}, tokenizer, 256, request);
  };
  const TokenSequences all = cut({.total_tokens = 1000, .sequence_tokens = 100});
  EXPECT_EQ(all.sequences.size(), 10u);
  EXPECT_EQ(all.num_targets(), 990);
  std::set<std::vector<int32_t>> windows;
  for (size_t begin = 0; begin + 100 <= 1000; begin += 100) {
    windows.emplace(text.begin() + static_cast<std::ptrdiff_t>(begin),
                    text.begin() + static_cast<std::ptrdiff_t>(begin) + 100);
  }
  EXPECT_EQ(std::set(all.sequences.begin(), all.sequences.end()), windows);

  const TokenSequences first = cut({.total_tokens = 401, .sequence_tokens = 100});
  const TokenSequences rest =
      cut({.total_tokens = 500, .sequence_tokens = 100, .skip_tokens = 500});
  EXPECT_EQ(first.sequences.size(), 5u);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(first.sequences[i], all.sequences[i]);
    EXPECT_EQ(rest.sequences[i], all.sequences[i + 5]);
  }
  EXPECT_NE(first.hash, rest.hash);
  EXPECT_EQ(first.hash, cut({.total_tokens = 500, .sequence_tokens = 100}).hash);
  EXPECT_NE(cut({.total_tokens = 500, .sequence_tokens = 100, .seed = 2}).sequences,
            first.sequences);

  // Documents follow one another, the end-of-text token between them.
  const TokenSequences joined = cut({.total_tokens = 1007, .sequence_tokens = 1007});
  EXPECT_EQ(joined.sequences[0][1000], 256);
  EXPECT_EQ(joined.sequences[0][1001], 's');
  expect_contains(error_of([&] { cut({.total_tokens = 1100, .sequence_tokens = 100}); }),
                  {"1007 tokens", "10 sequences", "11 sequences"});
}

TEST(StateStore, KeepsBytesWithinItsLimit) {
  const TempFolder folder;
  for (const std::string& place : {std::string(), folder.path()}) {
    StateStore store(100, place);
    std::optional<StoredBytes> a = store.take(60);
    ASSERT_TRUE(a);
    EXPECT_FALSE(store.take(41));
    std::optional<StoredBytes> b = store.take(40);
    ASSERT_TRUE(b);
    const std::string text = "0123456789012345678901234567890123456789";
    b->write(0, text.data(), 40);
    a->write(20, "abc", 3);
    std::string back(10, ' ');
    b->read(15, back.data(), 10);
    EXPECT_EQ(back, text.substr(15, 10));
    a.reset();
    EXPECT_EQ(store.used_bytes(), 40u);
    std::optional<StoredBytes> c = store.take(60);
    ASSERT_TRUE(c);
    c->write(0, text.data(), 40);
    b->read(0, back.data(), 10);
    EXPECT_EQ(back, text.substr(0, 10));
    std::optional<StoredBytes> over = store.take(1000, true);
    EXPECT_TRUE(over);
    EXPECT_EQ(store.used_bytes(), 1100u);
    StoredBytes moved = std::move(*over);
    over.reset();
    EXPECT_EQ(store.used_bytes(), 1100u);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path())) << "the file has no name";
  EXPECT_THROW(StateStore(1, "/no/such/folder"), Error);
}

TEST(LossJournal, RemembersEveryBit) {
  const TempFolder folder;
  const std::string path = folder / "journal";
  const Json settings = {{"model", "a"}, {"tokens", 5}};
  Rng rng(7);
  std::vector<double> losses;
  {
    LossJournal journal(path, settings, 50, false);
    for (size_t i = 0; i < 50; ++i) {
      losses.push_back(std::exp(10 * rng.uniform()));
      journal.add("FS", i, losses.back());
    }
    expect_contains(error_of([&] { LossJournal(path, settings, 50, true); }), {"in use"});
  }
  const std::string whole = read_file(path);
  {
    LossJournal journal(path, settings, 50, true);
    EXPECT_EQ(journal.num_read(), 50);
    for (size_t i = 0; i < 50; ++i) EXPECT_EQ(journal.find("FS", i), losses[i]);
    EXPECT_FALSE(journal.find("FF", 0));
  }
  // Cut at any byte after the first line, it loses the torn measurement alone.
  const size_t header = whole.find('\n') + 1;
  for (size_t size = header; size < header + 200; size += 7) {
    folder.write("cut", whole.substr(0, size));
    const auto lines =
        std::count(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size), '\n');
    LossJournal journal(folder / "cut", settings, 50, true);
    EXPECT_EQ(journal.num_read(), lines - 1);
    journal.add("FF", 0, 1.5);
    EXPECT_TRUE(read_file(folder / "cut").ends_with("\"nll\":1.5}\n"));
  }
}

TEST(LossJournal, RefusesWhatIsNotItsOwn) {
  const TempFolder folder;
  const std::string path = folder / "journal";
  { LossJournal journal(path, {{"model", "a"}, {"tokens", 5}}, 3, false); }
  expect_contains(error_of([&] {
                    LossJournal(path, {{"model", "a"}, {"tokens", 5}}, 3, false);
                  }),
                  {"--resume"});
  const std::string message = error_of([&] {
    LossJournal(path, {{"model", "b"}, {"tokens", 5}, {"new", 1}}, 3, true);
  });
  expect_contains(message, {"model: the journal has \"a\", this search \"b\"", "new"});
  EXPECT_EQ(message.find("tokens"), std::string::npos) << message;
  const std::string header = read_file(path);
  for (const char* line :
       {"nonsense\n", "{\"plan\": \"F\"}\n", "{\"plan\":\"F\",\"sequence\":3,\"nll\":1}\n",
        "{\"plan\":\"F\",\"sequence\":0,\"nll\":\"x\"}\n"}) {
    folder.write("journal", header + std::string(line));
    expect_contains(error_of([&] {
                      LossJournal(path, {{"model", "a"}, {"tokens", 5}}, 3, true);
                    }),
                    {"journal line 2"});
  }
  folder.write("journal", "");
  EXPECT_THROW(LossJournal(path, {}, 3, true), Error);
}

TEST(Race, QuantilesAreThoseOfTheTables) {
  EXPECT_NEAR(student_t_quantile(0.95, 1), 6.3138, 1e-4);
  EXPECT_NEAR(student_t_quantile(0.975, 2), 4.3027, 1e-4);
  EXPECT_NEAR(student_t_quantile(0.95, 3), 2.3534, 1e-4);
  EXPECT_NEAR(student_t_quantile(0.99, 10), 2.7638, 1e-4);
  EXPECT_NEAR(student_t_quantile(0.95, 31), 1.6955, 1e-4);
  EXPECT_NEAR(student_t_quantile(0.5, 4), 0, 1e-12);
}

// Over many draws of two equal candidates, each is dropped no more often than it may be.
TEST(Race, DropsTheBetterOneAsRarelyAsItSays) {
  Rng rng(11);
  int dropped = 0;
  constexpr int kDraws = 4000;
  for (int draw = 0; draw < kDraws; ++draw) {
    std::vector<double> a(6), b(6);
    for (size_t i = 0; i < 6; ++i) {
      const double common = 100 * rng.normal();
      a[i] = common + rng.normal();
      b[i] = common + rng.normal();
    }
    dropped += not_better(a, b, 0.95, 0);
  }
  // 5% of the draws, within four standard deviations.
  EXPECT_NEAR(dropped, 0.05 * kDraws, 4 * std::sqrt(0.05 * 0.95 * kDraws));
  EXPECT_TRUE(not_better(std::vector<double>{2, 2.1}, std::vector<double>{1, 1.1}, 0.99, 0));
  EXPECT_FALSE(not_better(std::vector<double>{2, 1}, std::vector<double>{1, 2}, 0.6, 0));
  EXPECT_FALSE(not_better(std::vector<double>{1, 1}, std::vector<double>{1, 1}, 0.6, 0));
  EXPECT_TRUE(not_better(std::vector<double>{1, 1}, std::vector<double>{1, 1}, 0.6, 1e-9));
}

}  // namespace
}  // namespace indexcache
