// Random chat templates. The input is a template, optionally a zero byte and a JSON array of
// messages. Whatever parses is run; it ends, and its text has a mark for each byte or none.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "text/jinja_run.h"

using namespace indexcache;

namespace {

void run(std::string_view source, std::string_view messages) {
  Json input = Json::parse(R"([{"role": "user", "content": "a<|user|>\n"}])");
  if (!messages.empty()) input = parse_json(messages, "messages");
  const jinja::Block block = jinja::parse_template(source);
  // Few steps: what matters is that they are counted.
  const jinja::Text text = jinja::run(block,
                                      {{"messages", jinja::input_value(input, "role")},
                                       {"bos_token", jinja::text_value("<s>")},
                                       {"tools", {jinja::None{}}}},
                                      {100'000, 1 << 20}, 0);
  if (text.marked() && text.marks.size() != text.bytes.size()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  try {
    run(input.substr(0, zero), zero == input.npos ? "" : input.substr(zero + 1));
  } catch (const Error&) {
  }
  return 0;
}
