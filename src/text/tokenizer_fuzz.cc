// Random tokenizer files and texts. The input is a tokenizer.json, a zero byte and a text; without
// a zero byte it is a text for the smallest tokenizer. Whatever loads must take the text and give
// it back.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "text/byte_level.h"
#include "text/tokenizer.h"

using indexcache::Error;
using indexcache::StreamDecoder;
using indexcache::Tokenizer;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void check_decoding(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  for (const int32_t id : ids) require(id >= 0 && id < tokenizer.vocab_size());
  for (const bool skip_special : {false, true}) {
    const std::string whole = tokenizer.decode(ids, skip_special);
    require(!indexcache::find_invalid_utf8(whole));
    StreamDecoder stream(tokenizer, skip_special);
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string piece = stream.push(id);
      require(!indexcache::find_invalid_utf8(piece));
      streamed += piece;
    }
    require(streamed + stream.finish() == whole);
  }
}

void run(std::string_view json, std::string_view text, bool plain_file) {
  const Tokenizer tokenizer = Tokenizer::parse(json, "tokenizer.json");
  const std::string valid = indexcache::replace_invalid_utf8(text);
  check_decoding(tokenizer, tokenizer.encode(valid, true, true));
  const std::vector<int32_t> ids = tokenizer.encode(valid, false, false);
  check_decoding(tokenizer, ids);
  if (plain_file) require(tokenizer.decode(ids, false) == valid);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  static const std::string smallest = indexcache::byte_level_tokenizer_json(260);
  try {
    if (zero == std::string_view::npos) {
      run(smallest, input, true);
    } else {
      run(input.substr(0, zero), input.substr(zero + 1), false);
    }
  } catch (const Error&) {
  }
  return 0;
}
