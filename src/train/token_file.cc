#include "train/token_file.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/checked.h"
#include "base/error.h"

namespace indexcache {
namespace {

static_assert(std::endian::native == std::endian::little, "the file is little-endian");

constexpr char kMagic[8] = {'I', 'C', 'T', 'O', 'K', 'E', 'N', 'S'};
constexpr uint32_t kVersion = 1;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t token_bytes;
};
struct Footer {
  uint64_t num_tokens, num_documents, settings_bytes, vocab_size;
};

uint32_t token_bytes_for(uint64_t vocab_size) { return vocab_size <= 65536 ? 2 : 4; }

// Takes the parts of a mapped file from its beginning, each count checked against what is there.
class Parts {
 public:
  Parts(const std::string& path, std::span<const uint8_t> bytes) : path_(path), bytes_(bytes) {}

  template <class T>
  std::span<const T> take(uint64_t count, const char* what) {
    const auto size = checked_mul(count, sizeof(T));
    const uint64_t left = bytes_.size() - at_;
    if (!size || *size > left)
      fail("{}: {} {} do not fit in the {} bytes that are left of the file", path_, count, what,
           left);
    const auto* data = reinterpret_cast<const T*>(bytes_.data() + at_);
    const uint64_t padded = (*size + 7) / 8 * 8;
    if (padded > left) fail("{}: the file ends inside the {}", path_, what);
    at_ += padded;
    return {data, count};
  }
  uint64_t left() const { return bytes_.size() - at_; }

 private:
  const std::string& path_;
  std::span<const uint8_t> bytes_;
  uint64_t at_ = 0;
};

template <class T>
void check_ids(const std::string& path, std::span<const T> tokens, uint64_t vocab_size) {
  const auto bad = std::ranges::find_if(tokens, [&](T id) { return id >= vocab_size; });
  if (bad != tokens.end())
    fail("{}: token {} has id {}, expected less than the vocabulary's {}", path,
         bad - tokens.begin(), *bad, vocab_size);
}

}  // namespace

TokenFile TokenFile::open(const std::string& path) {
  TokenFile result;
  result.file_ = MappedFile(path);
  const std::span<const uint8_t> bytes = result.file_.bytes();
  if (bytes.size() < sizeof(Header) + sizeof(Footer))
    fail("{}: not a token file: found {} bytes", path, bytes.size());
  Parts parts(path, bytes.first(bytes.size() - sizeof(Footer)));
  const Header header = parts.take<Header>(1, "header")[0];
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    fail("{}: not a token file: it does not begin with ICTOKENS", path);
  if (header.version != kVersion)
    fail("{}: token file version {}, expected {}", path, header.version, kVersion);
  Footer footer;
  std::memcpy(&footer, bytes.data() + bytes.size() - sizeof(footer), sizeof(footer));
  if (footer.vocab_size < 1 || footer.vocab_size > uint64_t{1} << 31 ||
      header.token_bytes != token_bytes_for(footer.vocab_size))
    fail(
        "{}: its end gives a vocabulary of {}, expected 1 to 2^31 ids in the {} bytes a token of "
        "its beginning: the file is cut off or damaged",
        path, footer.vocab_size, header.token_bytes);
  if (footer.num_tokens == 0 || footer.num_documents == 0)
    fail("{}: the file holds no documents", path);
  if (footer.num_documents > footer.num_tokens)
    fail("{}: {} documents of {} tokens in all", path, footer.num_documents, footer.num_tokens);

  if (header.token_bytes == 2)
    result.tokens16_ = parts.take<uint16_t>(footer.num_tokens, "tokens");
  else
    result.tokens32_ = parts.take<uint32_t>(footer.num_tokens, "tokens");
  result.weights_ = parts.take<uint8_t>(footer.num_tokens, "weights");
  result.documents_ = parts.take<uint64_t>(footer.num_documents + 1, "documents");
  const auto settings = parts.take<char>(footer.settings_bytes, "bytes of settings");
  result.settings_ = {settings.data(), settings.size()};
  if (parts.left() != 0) fail("{}: {} bytes too many", path, parts.left());
  result.vocab_size_ = footer.vocab_size;

  const auto& starts = result.documents_;
  if (starts.front() != 0 || starts.back() != footer.num_tokens)
    fail("{}: documents go from token {} to {}, expected 0 to {}", path, starts.front(),
         starts.back(), footer.num_tokens);
  for (size_t d = 0; d + 1 < starts.size(); ++d)
    if (starts[d] >= starts[d + 1])
      fail("{}: document {} begins at token {} and ends at {}", path, d, starts[d], starts[d + 1]);
  check_ids(path, result.tokens16_, footer.vocab_size);
  check_ids(path, result.tokens32_, footer.vocab_size);
  return result;
}

TokenFileWriter::TokenFileWriter(const std::string& path, uint64_t vocab_size)
    : file_(path), vocab_size_(vocab_size) {
  CHECK(vocab_size >= 1 && vocab_size <= uint64_t{1} << 31);
  Header header = {{}, kVersion, token_bytes_for(vocab_size)};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  file_.write(&header, sizeof(header));
}

void TokenFileWriter::add(std::span<const int32_t> tokens, std::span<const uint8_t> weights) {
  CHECK_EQ(tokens.size(), weights.size());
  CHECK(!tokens.empty());
  for (const int32_t id : tokens) CHECK(id >= 0 && static_cast<uint64_t>(id) < vocab_size_);
  documents_.push_back(num_tokens_);
  num_tokens_ += tokens.size();
  if (token_bytes_for(vocab_size_) == 2) {
    std::vector<uint16_t> narrow(tokens.size());
    std::ranges::transform(tokens, narrow.begin(),
                           [](int32_t id) { return static_cast<uint16_t>(id); });
    file_.write(narrow.data(), narrow.size() * sizeof(uint16_t));
  } else {
    file_.write(tokens.data(), tokens.size_bytes());
  }
  for (const uint8_t weight : weights) {
    if (runs_.empty() || runs_.back().weight != weight) runs_.push_back({0, weight});
    ++runs_.back().length;
  }
}

void TokenFileWriter::pad(uint64_t bytes_written) {
  const char zeros[8] = {};
  file_.write(zeros, (8 - bytes_written % 8) % 8);
}

void TokenFileWriter::finish(std::string_view settings) {
  if (num_tokens_ == 0) fail("a token file needs at least one document");
  pad(num_tokens_ * token_bytes_for(vocab_size_));
  std::vector<uint8_t> weights;
  for (const Run& run : runs_) {
    weights.assign(run.length, run.weight);
    file_.write(weights.data(), weights.size());
  }
  pad(num_tokens_);
  const Footer footer = {num_tokens_, documents_.size(), settings.size(), vocab_size_};
  documents_.push_back(num_tokens_);
  file_.write(documents_.data(), documents_.size() * sizeof(uint64_t));
  file_.write(settings);
  pad(settings.size());
  file_.write(&footer, sizeof(footer));
  file_.commit();
}

}  // namespace indexcache
