#include "checkpoint/manifest.h"

#include <sys/stat.h>

#include <cctype>
#include <functional>

#include "checkpoint/test_files.h"

namespace indexcache {
namespace {

namespace fs = std::filesystem;

constexpr const char* kAbc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
constexpr const char* kNothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

std::string line(const std::string& sum, const std::string& name) {
  return sum + "  " + name + "\n";
}

// Files "a", "b" and "sub/c", and what a download tool leaves beside them.
struct Files : TempFolder {
  Files() {
    for (const char* name : {"a", "sub/c", ".gitattributes", ".cache/huggingface/a.lock"})
      write(name, "abc");
    write("b", "");
  }
};
const std::string kSums = line(kAbc, "a") + line(kNothing, "b") + line(kAbc, "sub/c");

TEST(Manifest, SumsEveryFileByName) {
  const Files files;
  for (const int num_threads : {1, 3}) EXPECT_EQ(sha256_manifest(files.path(), num_threads), kSums);
  EXPECT_EQ(sha256_manifest(files.path() + "/", 1), kSums);
  EXPECT_EQ(sha256_manifest(files / "sub/../", 1), kSums);
}

TEST(Manifest, AcceptsWhatSha256sumWrites) {
  const Files files, elsewhere;
  EXPECT_EQ(verify_manifest(files.path(), elsewhere.write("sums", kSums), 2), 3u);
  std::string upper = kAbc;
  for (char& c : upper) c = static_cast<char>(std::toupper(c));
  const std::string other = upper + " *./a\n" + line(kAbc, ".gitattributes") +
                            line(kAbc, "./sub/../sub/c") + kNothing + "  b";
  EXPECT_EQ(verify_manifest(files.path(), elsewhere.write("other", other), 2), 4u);
  // In the folder itself, and made there by `sha256sum * > sums`, which sums its empty beginning.
  EXPECT_EQ(verify_manifest(files.path(), files.write("sums", kSums + line(kNothing, "sums")), 2),
            3u);
}

TEST(Manifest, ListsAllThatDiffers) {
  const Files files, elsewhere;
  const std::string sums = elsewhere.write("sums", kSums);
  files.write("a", "abb");
  files.write("sub/new", "");
  fs::remove(files / "b");
  expect_contains(
      error_of([&] { verify_manifest(files.path(), sums, 2); }),
      {files.path(), sums, "1 of 2 differ, 1 missing, 1 surplus", std::string("expected ") + kAbc,
       "\"a\": found ", "\"b\": missing", "\"sub/new\": surplus"});
}

TEST(Manifest, RefusesBadManifestsByLine) {
  const Files files, elsewhere;
  const std::string sum = kAbc;
  const std::pair<std::string, const char*> cases[] = {
      {"", "is empty"},
      {"\n", "line 1: found \"\", expected 64 hexadecimal digits"},
      {line(sum, "a") + line(sum.substr(1), "b"), "line 2"},
      {line("g" + sum.substr(1), "a"), "line 1"},
      {line(sum, ""), "line 1"},
      {sum + " a\n", "line 1"},
      {"\\" + line(sum, "a\\nb"), "line 1"},
      {"SHA256 (a) = " + sum + "\n", "line 1: found \"SHA256 (a)"},
      {line(sum, "a") + line(sum, "./a"), "line 2: \"a\" was in a line before"},
      {line(sum, "/etc/passwd"), "\"/etc/passwd\", expected a path inside"},
      {line(sum, "sub/../../x"), "\"../x\", expected a path inside"},
      {line(sum, "sub"), "a directory"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string sums = elsewhere.write("sums", text);
    expect_contains(error_of([&] { verify_manifest(files.path(), sums, 1); }), {expected});
  }
}

TEST(Manifest, RefusesWhatIsNoFileOfTheModel) {
  const Files outside;
  const auto error_with = [](const std::function<void(const Files&)>& change) {
    const Files files;
    change(files);
    return error_of([&] { sha256_manifest(files.path(), 1); });
  };
  const auto link_to = [](const std::string& target) {
    return [=](const Files& files) { fs::create_symlink(target, files / "link"); };
  };
  expect_contains(error_with(link_to(outside / "a")), {"link", "outside the model's folder"});
  expect_contains(error_with(link_to("sub")), {"link", "a directory"});
  expect_contains(error_with([](const Files& files) { mkfifo((files / "fifo").c_str(), 0600); }),
                  {"fifo", "not a regular file"});
  expect_contains(error_with([](const Files& files) { files.write("a\nb", ""); }),
                  {"\"a\\x0ab\" cannot stand in a line"});
  expect_contains(error_of([&] { sha256_manifest(outside / "none", 1); }), {"none", "listed"});
  expect_contains(error_of([&] { sha256_manifest(outside / "a", 1); }), {"/a: cannot be listed"});
}

}  // namespace
}  // namespace indexcache
