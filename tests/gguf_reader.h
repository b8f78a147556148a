// A second, independent reading of GGUF, for tests alone: the whole file is walked, every size is
// checked, values come back as JSON and tensors as float32.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"
#include "tensor/dtype.h"

namespace indexcache {

struct ReadTensor {
  std::vector<uint64_t> dims;  // as in the file: fastest first
  uint32_t type = 0;
  uint64_t offset = 0;
  std::vector<float> values;
};

struct ReadGguf {
  uint32_t version = 0;
  Json metadata = Json::object();
  std::vector<std::string> order;
  std::map<std::string, ReadTensor> tensors;
  uint64_t data_start = 0;
};

class GgufReader {
 public:
  explicit GgufReader(const std::string& bytes) : bytes_(bytes) {}

  ReadGguf read() {
    ReadGguf file;
    if (take(4) != "GGUF") throw std::runtime_error("no magic");
    file.version = number<uint32_t>();
    const auto num_tensors = number<uint64_t>(), num_entries = number<uint64_t>();
    for (uint64_t i = 0; i < num_entries; ++i) {
      const std::string key = text();
      if (file.metadata.contains(key)) throw std::runtime_error("repeated " + key);
      file.metadata[key] = value(number<uint32_t>());
    }
    for (uint64_t i = 0; i < num_tensors; ++i) {
      file.order.push_back(text());
      ReadTensor& tensor = file.tensors[file.order.back()];
      tensor.dims.resize(number<uint32_t>());
      for (uint64_t& dim : tensor.dims) dim = number<uint64_t>();
      tensor.type = number<uint32_t>();
      tensor.offset = number<uint64_t>();
    }
    file.data_start = (at_ + 31) / 32 * 32;
    uint64_t end = 0;
    for (const std::string& name : file.order) {
      ReadTensor& tensor = file.tensors.at(name);
      EXPECT_EQ(tensor.offset, (end + 31) / 32 * 32) << name;
      at_ = file.data_start + tensor.offset;
      read_values(&tensor);
      end = at_ - file.data_start;
    }
    EXPECT_EQ(bytes_.size(), file.data_start + (end + 31) / 32 * 32);
    return file;
  }

 private:
  std::string take(uint64_t count) {
    if (count > bytes_.size() - at_) throw std::runtime_error("the file ends too soon");
    at_ += count;
    return bytes_.substr(at_ - count, count);
  }
  template <class Number>
  Number number() {
    Number value;
    std::memcpy(&value, take(sizeof(value)).data(), sizeof(value));
    return value;
  }
  std::string text() { return take(number<uint64_t>()); }

  Json value(uint32_t type) {
    switch (type) {
      case 4:
        return number<uint32_t>();
      case 5:
        return number<int32_t>();
      case 6:
        return number<float>();
      case 7:
        return number<uint8_t>() != 0;
      case 8:
        return text();
      case 9: {
        const auto item = number<uint32_t>();
        Json list = Json::array();
        for (auto left = number<uint64_t>(); left > 0; --left) list.push_back(value(item));
        return list;
      }
      default:
        throw std::runtime_error("unknown value type");
    }
  }

  void read_values(ReadTensor* tensor) {
    uint64_t count = 1;
    for (const uint64_t dim : tensor->dims) count *= dim;
    tensor->values.reserve(count);
    while (tensor->values.size() < count) {
      switch (tensor->type) {
        case 0:
          tensor->values.push_back(number<float>());
          break;
        case 1:
          tensor->values.push_back(f16_to_f32(number<uint16_t>()));
          break;
        case 30:
          tensor->values.push_back(bf16_to_f32(number<uint16_t>()));
          break;
        case 8: {
          const float scale = f16_to_f32(number<uint16_t>());
          for (int i = 0; i < 32; ++i)
            tensor->values.push_back(scale * static_cast<float>(number<int8_t>()));
          break;
        }
        default:
          throw std::runtime_error("unknown tensor type");
      }
    }
    EXPECT_EQ(tensor->values.size(), count);
  }

  const std::string& bytes_;
  uint64_t at_ = 0;
};

}  // namespace indexcache
