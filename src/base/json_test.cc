#include "base/json.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace indexcache {
namespace {

// The message of the Error, or "" where the text is accepted.
std::string parse_error(const std::string& text, int max_depth = 64) {
  try {
    parse_json(text, "x.json", max_depth);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Json, ReadsWhatIsValid) {
  const std::string text =
      R"( {"a": [1, -2, 2.5, true, null, "é\n\u00e9\ud83d\ude00"], "b": {}, "c": 18446744073709551615} )";
  const Json json = parse_json(text, "x.json");
  EXPECT_EQ(json.at("a").at(5), "é\né😀");
  EXPECT_EQ(json.at("c").get<uint64_t>(), UINT64_MAX);
  EXPECT_EQ(json.begin().key(), "a");
  EXPECT_EQ(parse_json("7", "x.json"), 7);
  EXPECT_EQ(parse_json(json.dump(), "x.json"), json);
}

TEST(Json, RefusesWhatIsNot) {
  const std::string nul(1, '\0');
  const std::string cases[] = {
      "",
      " ",
      "{",
      "[1,]",
      "{\"a\":1,}",
      "{a:1}",
      "'a'",
      "// x\n1",
      "/* x */ 1",
      "NaN",
      "Infinity",
      "-",
      "01",
      "+1",
      "1.",
      ".5",
      "0x10",
      "1 2",
      "{} {}",
      "[1]x",
      "tru",
      "\"\t\"",
      "\"\\x\"",
      "\"\\ud800\"",
      "\"a",
      "\"\xFF\"",
      "\"\xC0\xAF\"",
      "\"\xED\xA0\x80\"",
      nul,
      "1" + nul,
      "1 " + nul + "2",
      "\"a" + nul + "b\"",
      "[1," + nul + "2]",
  };
  for (const std::string& text : cases) {
    const std::string message = parse_error(text);
    EXPECT_TRUE(message.starts_with("x.json: not valid JSON at byte ")) << text << ": " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
    EXPECT_LT(message.size(), 400u);
  }
  EXPECT_EQ(parse_error("\xEF\xBB\xBF{}"), "x.json: begins with a byte order mark, expected JSON");
  EXPECT_EQ(parse_error("{} " + nul), "x.json: not valid JSON at byte 4: found a NUL byte");
}

TEST(Json, RefusesDuplicateKeysAtAnyDepth) {
  EXPECT_EQ(parse_error(R"({"a":1,"b":2,"a":1})"), "x.json: duplicate key \"a\"");
  EXPECT_EQ(parse_error(R"([{"b":{"a":1,"\u0061":2}}])"), "x.json: duplicate key \"a\"");
  EXPECT_EQ(parse_error(R"([{"a":1},{"a":{"a":1}}])"), "");
}

TEST(Json, BoundsDepth) {
  const auto nested = [](size_t depth) {
    return std::string(depth, '[') + std::string(depth, ']');
  };
  EXPECT_EQ(parse_error(nested(64)), "");
  EXPECT_EQ(parse_error(nested(65)), "x.json: JSON nested deeper than 64 levels");
  EXPECT_EQ(parse_error(R"({"a":{"a":1}})", 1), "x.json: JSON nested deeper than 1 levels");
  EXPECT_EQ(parse_error(std::string(1 << 20, '[')), "x.json: JSON nested deeper than 64 levels");
}

TEST(Json, BoundsNumbers) {
  EXPECT_NE(parse_error("1e999"), "");
  EXPECT_NE(parse_error("[-1e309]"), "");
  EXPECT_EQ(parse_error("[1e-999, 1e308, 123456789012345678901234567890]"), "");
}

TEST(Json, ManyKeysTakeLinearTime) {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) text += fmt::format("{}\"{}\":{}", i > 0 ? "," : "", i, i);
  EXPECT_EQ(parse_json(text + "}", "x.json").size(), 200000u);
}

// The message of a getter.
template <class Call>
std::string getter_error(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(JsonObject, GettersNameKeyFoundAndExpected) {
  const Json json = parse_json(
      R"({"i": 5, "d": 2.5, "s": "x", "b": true, "n": null, "o": {"k": "v"}, "a": [1],
          "u": 18446744073709551615, "f": 5.0})",
      "x.json");
  const JsonObject o(json, "x.json");
  EXPECT_EQ(o.integer("i", 0, 9), 5);
  EXPECT_EQ(o.number("i"), 5);
  EXPECT_EQ(o.number("d"), 2.5);
  EXPECT_EQ(o.string("s"), "x");
  EXPECT_TRUE(o.boolean_or("b", false));
  EXPECT_TRUE(o.has("i"));
  EXPECT_FALSE(o.has("n"));
  EXPECT_FALSE(o.has("zz"));
  // null is as good as missing.
  for (const char* key : {"n", "zz"}) {
    EXPECT_EQ(o.integer_or(key, 3, 0, 9), 3);
    EXPECT_EQ(o.number_or(key, 0.5), 0.5);
    EXPECT_EQ(o.string_or(key, "y"), "y");
    EXPECT_TRUE(o.boolean_or(key, true));
  }
  struct Case {
    std::string message, expected;
  };
  const Case cases[] = {
      {getter_error([&] { o.integer("i", 6, 9); }),
       "x.json: \"i\" is 5, expected an integer from 6 to 9"},
      {getter_error([&] { o.integer("i", 0, 4); }),
       "x.json: \"i\" is 5, expected an integer from 0 to 4"},
      {getter_error([&] { o.integer("d", 0, 9); }),
       "x.json: \"d\" is 2.5, expected an integer from 0 to 9"},
      {getter_error([&] { o.integer("f", 0, 9); }),
       "x.json: \"f\" is 5.0, expected an integer from 0 to 9"},
      {getter_error([&] { o.integer("u", INT64_MIN, INT64_MAX); }),
       "x.json: \"u\" is 18446744073709551615, expected an integer from -9223372036854775808 to "
       "9223372036854775807"},
      {getter_error([&] { o.integer("b", 0, 9); }),
       "x.json: \"b\" is true, expected an integer from 0 to 9"},
      {getter_error([&] { o.integer("zz", 0, 9); }), "x.json: key \"zz\" is missing"},
      {getter_error([&] { o.integer_or("s", 1, 0, 9); }),
       "x.json: \"s\" is \"x\", expected an integer from 0 to 9"},
      {getter_error([&] { o.number("s"); }), "x.json: \"s\" is \"x\", expected a number"},
      {getter_error([&] { o.boolean_or("i", true); }),
       "x.json: \"i\" is 5, expected true or false"},
      {getter_error([&] { o.string("a"); }), "x.json: \"a\" is [1], expected a string"},
      {getter_error([&] { o.object("a"); }), "x.json: \"a\": found [1], expected a JSON object"},
      {getter_error([&] { o.object("o").integer("k", 0, 1); }),
       "x.json: \"o\": \"k\" is \"v\", expected an integer from 0 to 1"},
      {getter_error([&] { JsonObject(json.at("s"), "y"); }),
       "y: found \"x\", expected a JSON object"},
  };
  for (const Case& c : cases) EXPECT_EQ(c.message, c.expected);
}

TEST(Json, ExcerptsAreShortAndPrintable) {
  EXPECT_EQ(json_excerpt(Json::array({1, "a"})), "[1,\"a\"]");
  EXPECT_EQ(json_excerpt(Json(std::vector<int>(17))), "an array of 17 items");
  EXPECT_LT(json_excerpt(Json(std::string(100000, 'x'))).size(), 200u);
  EXPECT_EQ(json_excerpt(Json("\x1b[31m")).find('\x1b'), std::string::npos);
}

}  // namespace
}  // namespace indexcache
