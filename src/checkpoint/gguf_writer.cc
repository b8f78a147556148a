#include "checkpoint/gguf_writer.h"

#include <bit>
#include <filesystem>
#include <set>

#include "base/atomic_file.h"
#include "base/error.h"

namespace indexcache {

namespace {

static_assert(std::endian::native == std::endian::little, "rows are written as they lie in memory");

constexpr uint32_t kVersion = 3;
constexpr size_t kMaxNameBytes = 63, kMaxRank = 4;  // what ggml's structures hold

// Numbers of the value types.
constexpr uint32_t kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9;

template <class Number>
void put(std::string* out, Number value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void put_string(std::string* out, const std::string& text) {
  put<uint64_t>(out, text.size());
  *out += text;
}

struct ValueWriter {
  std::string* out;

  void operator()(uint32_t value) const { tagged(kU32, value); }
  void operator()(int32_t value) const { tagged(kI32, value); }
  void operator()(float value) const { tagged(kF32, value); }
  void operator()(bool value) const { tagged(kBool, static_cast<uint8_t>(value)); }
  void operator()(const std::string& text) const {
    put<uint32_t>(out, kString);
    put_string(out, text);
  }
  void operator()(const std::vector<int32_t>& values) const { numbers(kI32, values); }
  void operator()(const std::vector<float>& values) const { numbers(kF32, values); }
  void operator()(const std::vector<bool>& values) const {
    begin_array(kBool, values.size());
    for (const bool value : values) put<uint8_t>(out, value ? 1 : 0);
  }
  void operator()(const std::vector<std::string>& values) const {
    begin_array(kString, values.size());
    for (const std::string& value : values) put_string(out, value);
  }

 private:
  template <class Number>
  void tagged(uint32_t type, Number value) const {
    put<uint32_t>(out, type);
    put(out, value);
  }
  void begin_array(uint32_t type, size_t size) const {
    put<uint32_t>(out, kArray);
    put<uint32_t>(out, type);
    put<uint64_t>(out, size);
  }
  template <class Number>
  void numbers(uint32_t type, const std::vector<Number>& values) const {
    begin_array(type, values.size());
    for (const Number value : values) put(out, value);
  }
};

uint64_t aligned(uint64_t bytes) {
  return (bytes + kGgufAlignment - 1) / kGgufAlignment * kGgufAlignment;
}

}  // namespace

uint64_t GgufTensor::num_bytes() const {
  CHECK(!shape.empty());
  return static_cast<uint64_t>(num_elements(shape) / row_elements()) *
         ggml_row_bytes(type, row_elements());
}

std::string gguf_header(const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors) {
  std::string out = "GGUF";
  put<uint32_t>(&out, kVersion);
  put<uint64_t>(&out, tensors.size());
  put<uint64_t>(&out, metadata.size());
  std::set<std::string> names;
  for (const auto& [key, value] : metadata) {
    CHECK(names.insert(key).second);
    put_string(&out, key);
    std::visit(ValueWriter{&out}, value);
  }
  names.clear();
  uint64_t offset = 0;
  for (const GgufTensor& tensor : tensors) {
    CHECK(names.insert(tensor.name).second);
    CHECK_LE(tensor.name.size(), kMaxNameBytes);
    CHECK(!tensor.shape.empty() && tensor.shape.size() <= kMaxRank);
    put_string(&out, tensor.name);
    put(&out, static_cast<uint32_t>(tensor.shape.size()));
    for (size_t i = tensor.shape.size(); i-- > 0;) {
      CHECK_GT(tensor.shape[i], 0);
      put(&out, static_cast<uint64_t>(tensor.shape[i]));
    }
    put(&out, static_cast<uint32_t>(tensor.type));
    put(&out, offset);
    offset += aligned(tensor.num_bytes());
  }
  out.resize(aligned(out.size()), '\0');
  return out;
}

uint64_t gguf_file_bytes(const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors) {
  uint64_t bytes = gguf_header(metadata, tensors).size();
  for (const GgufTensor& tensor : tensors) bytes += aligned(tensor.num_bytes());
  return bytes;
}

void write_gguf(const std::string& path, const GgufMetadata& metadata,
                const std::vector<GgufTensor>& tensors, const RowSource& source) {
  const auto refuse_existing = [&] {
    std::error_code ignored;
    if (std::filesystem::exists(std::filesystem::symlink_status(path, ignored))) {
      fail("{}: already there; expected a path at which there is nothing yet",
           printable(path, 400));
    }
  };
  refuse_existing();
  const std::string header = gguf_header(metadata, tensors);
  AtomicFile file(path);
  file.write(header);
  std::vector<uint8_t> encoded;
  for (const GgufTensor& tensor : tensors) {
    const int64_t num_rows = num_elements(tensor.shape) / tensor.row_elements();
    encoded.resize(ggml_row_bytes(tensor.type, tensor.row_elements()));
    int64_t row = 0;
    source(tensor, [&](std::span<const float> values) {
      CHECK_EQ(static_cast<int64_t>(values.size()), tensor.row_elements());
      CHECK_LT(row, num_rows);
      if (!encode_ggml_row(tensor.type, values, encoded.data())) {
        fail("{}: row {} of {} holds NaN, infinity or a value too large for {}",
             printable(path, 400), row, tensor.name, ggml_type_name(tensor.type));
      }
      file.write(encoded.data(), encoded.size());
      ++row;
    });
    CHECK_EQ(row, num_rows);
    const uint64_t bytes = tensor.num_bytes();
    file.write(std::string(aligned(bytes) - bytes, '\0'));
  }
  refuse_existing();  // made by someone else in the meantime
  file.commit();
}

}  // namespace indexcache
