// Errors, units, random numbers, checked arithmetic, progress.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "base/checked.h"
#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/rng.h"
#include "base/units.h"

namespace indexcache {
namespace {

TEST(Printable, EscapesWhatCouldDriveATerminal) {
  const std::pair<std::string, std::string> cases[] = {
      {"", ""},
      {"plain text", "plain text"},
      {"é€😀", "é€😀"},
      {"a\nb\tc\r", "a\\x0ab\\x09c\\x0d"},
      {"\x1b[2J", "\\x1b[2J"},
      {"\x7f", "\\x7f"},
      {"\xC2\x9B", "\\xc2\\x9b"},           // C1 control sequence introducer
      {"\xFF\xFE", "\\xff\\xfe"},           // in no UTF-8 text
      {"\xC0\xAF", "\\xc0\\xaf"},           // overlong
      {"\xED\xA0\x80", "\\xed\\xa0\\x80"},  // surrogate
      {"\xF4\x90\x80\x80", "\\xf4\\x90\\x80\\x80"},
      {"\xE2\x82", "\\xe2\\x82"},                                      // cut short
      {"\xEF\xBB\xBFx", "\\xef\\xbb\\xbfx"},                           // byte order mark
      {"a\xE2\x80\xAEz", "a\\xe2\\x80\\xaez"},                         // right to left from here
      {"\xE2\x80\x8B\xE2\x81\xA0", "\\xe2\\x80\\x8b\\xe2\\x81\\xa0"},  // no width
      {std::string("a\0b", 3), "a\\x00b"},
  };
  for (const auto& [text, want] : cases) EXPECT_EQ(printable(text), want);
}

TEST(Printable, IsCutAtALimit) {
  EXPECT_EQ(printable("abcdef", 6), "abcdef");
  EXPECT_EQ(printable("abcdefg", 6), "abcdef...");
  EXPECT_LE(printable(std::string(1000000, '\xFF')).size(), 130u);
  EXPECT_EQ(printable("ééé", 3), "éé...");
}

TEST(Error, CarriesTheFormattedText) {
  try {
    fail("{}: found {}, expected {}", "f", 1, 2);
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "f: found 1, expected 2");
  }
}

TEST(CheckDeathTest, PrintsExpressionAndValues) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const int a = 3;
  EXPECT_DEATH(CHECK_EQ(a, 4), "CHECK failed: a == 4 \\(3 vs 4\\)");
  EXPECT_DEATH(CHECK(a > 5), "CHECK failed: a > 5");
  CHECK_LE(a, 3);
}

TEST(Checked, SaysWhereItOverflows) {
  EXPECT_EQ(checked_add(UINT64_MAX - 1, 1), UINT64_MAX);
  EXPECT_EQ(checked_add(UINT64_MAX, 1), std::nullopt);
  EXPECT_EQ(checked_mul(uint64_t{1} << 32, (uint64_t{1} << 32) - 1), 0xFFFFFFFF00000000u);
  EXPECT_EQ(checked_mul(uint64_t{1} << 32, uint64_t{1} << 32), std::nullopt);
  EXPECT_EQ(ceil_div(0, 64), 0);
  EXPECT_EQ(ceil_div(65, 64), 2);
  EXPECT_EQ(round_up(65, 64), 128);
}

TEST(Units, Bytes) {
  const std::pair<uint64_t, const char*> cases[] = {{0, "0 B"},
                                                    {1023, "1023 B"},
                                                    {1024, "1.00 KiB"},
                                                    {1536, "1.50 KiB"},
                                                    {1048576, "1.00 MiB"},
                                                    {uint64_t{3} << 30, "3.00 GiB"},
                                                    {uint64_t{1} << 42, "4.00 TiB"},
                                                    {UINT64_MAX, "16777216.00 TiB"}};
  for (const auto& [bytes, want] : cases) EXPECT_EQ(format_bytes(bytes), want);
}

TEST(Units, Seconds) {
  const std::pair<double, const char*> cases[] = {
      {0, "0.0 us"},       {12.3e-6, "12.3 us"}, {12.3e-3, "12.3 ms"},
      {1.2, "1.20 s"},     {119, "119.00 s"},    {125, "2m 05s"},
      {3599.6, "60m 00s"}, {7200, "2h 00m"},     {86399, "23h 59m"}};
  for (const auto& [seconds, want] : cases) EXPECT_EQ(format_seconds(seconds), want);
}

TEST(Units, ThisProcess) {
  EXPECT_GT(peak_rss_bytes(), 1u << 20);
  EXPECT_LT(file_rss_bytes(), peak_rss_bytes());
  EXPECT_GT(available_memory_bytes(), 1u << 20);
  const double start = monotonic_seconds();
  EXPECT_GE(monotonic_seconds(), start);
}

// Computed from the published algorithms; files and tests depend on these values.
TEST(Rng, FirstValuesAreFixed) {
  uint64_t state = 1234567;  // the example of splitmix64's reference implementation
  EXPECT_EQ(splitmix64(state), 6457827717110365317u);
  EXPECT_EQ(splitmix64(state), 3203168211198807973u);
  Rng rng(0);
  rng.s[0] = 1, rng.s[1] = 2, rng.s[2] = 3, rng.s[3] = 4;
  const uint64_t want[] = {11520, 0, 1509978240, 1215971899390074240};
  for (const uint64_t value : want) EXPECT_EQ(rng.next(), value);
}

TEST(Rng, IsUniform) {
  Rng rng(20261);
  constexpr int kBins = 50, kDraws = 500000;
  std::vector<int> uniform(kBins), below(kBins);
  for (int i = 0; i < kDraws; ++i) {
    const double u = rng.uniform();
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    ++uniform[static_cast<size_t>(u * kBins)];
    ++below[rng.below(kBins)];
  }
  // Chi-squared with 49 degrees of freedom passes 94 once in 10^4 seeds; the seed is fixed.
  for (const std::vector<int>& counts : {uniform, below}) {
    double chi = 0;
    for (const int count : counts) chi += std::pow(count - kDraws / kBins, 2) / (kDraws / kBins);
    EXPECT_LT(chi, 94);
  }
  for (int i = 0; i < 100; ++i) EXPECT_EQ(rng.below(1), 0u);
}

TEST(Rng, NormalHasItsMoments) {
  Rng rng(20262);
  double sum = 0, squares = 0;
  constexpr int kDraws = 200000;
  for (int i = 0; i < kDraws; ++i) {
    const double x = rng.normal();
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / kDraws, 0, 4 / std::sqrt(kDraws));
  EXPECT_NEAR(squares / kDraws, 1, 4 * std::sqrt(2.0 / kDraws));
}

TEST(Log, GoesToStderrUnlessOff) {
  testing::internal::CaptureStderr();
  info("{} layers", 3);
  warn("odd");
  set_log_enabled(false);
  info("hidden");
  set_log_enabled(true);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "3 layers\nwarning: odd\n");
}

TEST(Progress, ShortWorkSaysNothingOutsideATerminal) {
  testing::internal::CaptureStderr();
  {
    Progress progress("work", 0, "tokens");
    for (int i = 0; i <= 1000; ++i) progress.update(i);
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

}  // namespace
}  // namespace indexcache
