#include "train/token_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "base/rng.h"

namespace indexcache {
namespace {

std::string scratch(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("indexcache-token-file-" + name)).string();
}

struct Removed {
  std::string path;
  ~Removed() { std::filesystem::remove(path); }
};

std::string bytes_of(const std::string& path) { return read_text_file(path); }

void expect_round_trip(uint64_t vocab_size, uint64_t seed) {
  const Removed file{scratch("round")};
  Rng rng(seed);
  std::vector<int32_t> tokens;
  std::vector<uint8_t> weights;
  std::vector<uint64_t> starts;
  TokenFileWriter writer(file.path, vocab_size);
  for (int d = 0; d < 50; ++d) {
    starts.push_back(tokens.size());
    std::vector<int32_t> ids(1 + rng.below(90));
    std::vector<uint8_t> loss(ids.size(), 1);
    for (int32_t& id : ids) id = static_cast<int32_t>(rng.below(vocab_size));
    for (size_t i = rng.below(ids.size()); i < ids.size(); ++i) loss[i] = d % 2 ? 10 : 0;
    writer.add(ids, loss);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    weights.insert(weights.end(), loss.begin(), loss.end());
  }
  starts.push_back(tokens.size());
  writer.finish("{\"a\":1}");

  const TokenFile read = TokenFile::open(file.path);
  ASSERT_EQ(read.num_tokens(), tokens.size());
  EXPECT_EQ(read.num_documents(), 50u);
  EXPECT_EQ(read.vocab_size(), vocab_size);
  EXPECT_EQ(read.settings(), "{\"a\":1}");
  EXPECT_EQ(read.tokens().empty(), vocab_size > 65536);
  EXPECT_EQ(read.tokens32().empty(), vocab_size <= 65536);
  for (size_t i = 0; i < tokens.size(); ++i) ASSERT_EQ(read.token(i), tokens[i]) << i;
  EXPECT_TRUE(std::ranges::equal(read.weights(), weights));
  EXPECT_TRUE(std::ranges::equal(read.documents(), starts));
}

TEST(TokenFile, RoundTrip) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    expect_round_trip(8192, seed);
    expect_round_trip(65536, seed);
    expect_round_trip(65537, seed);
  }
}

std::string small_file() {
  const Removed file{scratch("small")};
  TokenFileWriter writer(file.path, 100);
  writer.add(std::vector<int32_t>{1, 2, 3}, std::vector<uint8_t>{1, 1, 10});
  writer.add(std::vector<int32_t>{4, 99}, std::vector<uint8_t>{0, 1});
  writer.finish("{}");
  return bytes_of(file.path);
}

bool opens(const std::string& bytes) {
  const Removed file{scratch("damaged")};
  write_text_file(file.path, bytes);
  try {
    TokenFile::open(file.path);
    return true;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(file.path), std::string::npos) << error.what();
    return false;
  }
}

TEST(TokenFile, EveryTruncationAndAddedByteIsAnError) {
  const std::string good = small_file();
  EXPECT_TRUE(opens(good));
  for (size_t size = 0; size < good.size(); ++size) EXPECT_FALSE(opens(good.substr(0, size)));
  EXPECT_FALSE(opens(good + std::string(8, '\0')));
}

TEST(TokenFile, WrongCountsAndIdsAreErrors) {
  const std::string good = small_file();
  const auto with = [&](size_t offset, uint64_t value, size_t size) {
    std::string bad = good;
    std::memcpy(bad.data() + offset, &value, size);
    return bad;
  };
  EXPECT_FALSE(opens(with(0, 'X', 1)));
  EXPECT_FALSE(opens(with(8, 2, 4)));     // version
  EXPECT_FALSE(opens(with(12, 4, 4)));    // bytes per token
  EXPECT_FALSE(opens(with(16, 100, 2)));  // an id of vocab_size
  const size_t documents = good.size() - 32 - 8 - 24;
  EXPECT_FALSE(opens(with(documents, 1, 8)));      // the first document begins late
  EXPECT_FALSE(opens(with(documents + 8, 0, 8)));  // an empty document
  EXPECT_FALSE(opens(with(documents + 8, 5, 8)));
  EXPECT_FALSE(opens(with(documents + 16, 4, 8)));  // the last one ends early
  for (const uint64_t value : {uint64_t{0}, uint64_t{9}, uint64_t{1} << 40, ~uint64_t{0}})
    for (size_t field = 0; field < 4; ++field)
      EXPECT_FALSE(opens(with(good.size() - 32 + 8 * field, value, 8))) << field << " " << value;
}

TEST(TokenFile, NothingAppearsWithoutFinish) {
  const Removed file{scratch("unfinished")};
  {
    TokenFileWriter writer(file.path, 10);
    writer.add(std::vector<int32_t>{1}, std::vector<uint8_t>{1});
  }
  EXPECT_FALSE(std::filesystem::exists(file.path));
  TokenFileWriter empty(file.path, 10);
  EXPECT_THROW(empty.finish("{}"), Error);
  EXPECT_THROW(TokenFile::open(file.path), Error);
}

}  // namespace
}  // namespace indexcache
