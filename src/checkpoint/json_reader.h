// Reads JSON front to back without building a document: the header of a safetensors file (up to 100
// MB) and the weight map of a sharded checkpoint (118,629 entries for GLM-5) go straight into their
// own tables, in linear time and with memory only for what the caller keeps.
//
// Rules: RFC 8259, UTF-8, no byte order mark, no NUL padding, nesting bounded. Whether a key
// repeats is for the caller to notice, who keeps the keys anyway. Errors: "<where> at byte
// <position>: found ..., expected ...", the position counted in the file.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace indexcache {

class JsonReader {
 public:
  // `offset` is the position of text[0] in the file. `text` must outlive the reader.
  JsonReader(std::string_view text, std::string where, uint64_t offset = 0);

  // Named in errors until replaced, for example the tensor whose entry is being read; null for
  // none.
  void set_context(const std::string* context) { context_ = context; }

  void begin_object();
  bool next_key(std::string* key);  // false once the object has ended
  void begin_array();
  bool next_element();  // false once the array has ended
  void string(std::string* value, const char* expected = "a string");

  // A number without sign, fraction or exponent that fits; anything else is nullopt and not
  // consumed, so that the caller can say which field it was (see excerpt).
  std::optional<uint64_t> unsigned_integer();

  void skip_value();  // checks it all the same
  void end();         // nothing but whitespace may follow

  std::string excerpt();  // what stands here, cut short, for a message
  [[noreturn]] void wrong(std::string_view expected);
  [[noreturn]] void fail_here(std::string_view problem);

 private:
  void skip_space();
  char peek();  // the next byte that is not whitespace, or 0 at the end
  void open(char bracket, const char* expected);
  bool next_member(char close);
  void read_escape(std::string* value);
  uint32_t read_hex4();
  void skip_number();
  void skip_literal(std::string_view literal);

  std::string_view text_;
  std::string where_;
  const std::string* context_ = nullptr;
  uint64_t offset_;
  size_t position_ = 0;
  std::vector<bool> first_member_;  // one entry for each open object or array
};

}  // namespace indexcache
