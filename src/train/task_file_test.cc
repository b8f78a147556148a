#include "train/task_file.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/json.h"
#include "base/mapped_file.h"

namespace indexcache {
namespace {

std::string scratch(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("indexcache-task-file-" + name)).string();
}

std::vector<std::string> filler_documents() {
  std::vector<std::string> documents;
  for (int d = 0; d < 30; ++d) {
    documents.emplace_back();
    for (int i = 0; i < 200; ++i)
      documents.back() += fmt::format("Paragraph {} of document {} says something of use.\n", i, d);
  }
  return documents;
}

std::vector<Json> make(int num_threads, double chat_share) {
  TaskFileOptions options;
  options.total_tokens = 300'000;
  options.min_tokens = 500;
  options.max_tokens = 8000;
  options.chat_share = chat_share;
  options.num_threads = num_threads;
  const TaskFiller filler(filler_documents(), count_bytes(1));
  const std::string path = scratch("made.jsonl");
  const uint64_t count = make_tasks_jsonl(filler, options, path);
  const std::string text = read_text_file(path);
  std::filesystem::remove(path);
  std::vector<Json> records;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    records.push_back(parse_json(text.substr(begin, end - begin), "record"));
    begin = end + 1;
  }
  EXPECT_EQ(records.size(), count);
  return records;
}

TEST(TaskFile, TotalAndLengthsAreAsAsked) {
  size_t total = 0, shorter = 0, longer = 0;
  for (const Json& record : make(1, 0)) {
    size_t length = 0;
    for (const Json& segment : record.at("segments"))
      length += segment.at("text").get_ref<const std::string&>().size();
    total += length;
    (length < 2000 ? shorter : longer) += 1;
    EXPECT_LE(length, 8000u);
  }
  EXPECT_NEAR(static_cast<double>(total), 300'000.0, 60'000.0);
  // Two of the four doublings lie below 2000.
  EXPECT_GT(shorter, 25u);
  EXPECT_GT(longer, 25u);
}

TEST(TaskFile, ThreadsDoNotMatter) { EXPECT_EQ(make(1, 0.5), make(4, 0.5)); }

TEST(TaskFile, ChatsEndWithWholeAnswers) {
  for (const Json& record : make(2, 1)) {
    const Json& messages = record.at("messages");
    ASSERT_EQ(messages.size() % 2, 0u);
    for (size_t i = 0; i < messages.size(); ++i) {
      const auto& content = messages[i].at("content").get_ref<const std::string&>();
      EXPECT_EQ(messages[i].at("role"), i % 2 ? "assistant" : "user");
      EXPECT_FALSE(content.ends_with('\n'));
      EXPECT_EQ(content.find("Answer: "), std::string::npos);
      EXPECT_EQ(content.find("Question: ") != std::string::npos, i % 2 == 0);
    }
  }
}

TEST(TaskFile, TextsAreChosenEvenly) {
  const std::string path = scratch("texts.jsonl");
  std::string lines;
  for (int i = 0; i < 1000; ++i) lines += Json{{"text", fmt::format("{:0100}", i)}}.dump() + "\n";
  lines += R"({"segments":[{"text":"a"},{"text":"b","answer":true}]})";
  write_text_file(path, lines);
  const auto all = load_texts({path}, 1 << 30);
  EXPECT_EQ(all.size(), 1001u);
  EXPECT_EQ(all.back(), "ab");
  const auto some = load_texts({path}, lines.size() / 4);
  EXPECT_NEAR(static_cast<double>(some.size()), 250, 2);
  EXPECT_GT(std::stoi(some.back()), 990);
  std::filesystem::remove(path);
}

TEST(TaskFile, WrongOptionsAreErrors) {
  const TaskFiller filler(filler_documents(), count_bytes(1));
  TaskFileOptions options;
  options.min_tokens = 10;
  options.max_tokens = 9;
  EXPECT_THROW(make_tasks_jsonl(filler, options, scratch("never")), Error);
  options.max_tokens = 10;
  options.total_tokens = 0;
  EXPECT_THROW(make_tasks_jsonl(filler, options, scratch("never")), Error);
  EXPECT_THROW(load_texts({scratch("absent")}, 1), Error);
}

}  // namespace
}  // namespace indexcache
