#include "checkpoint/safetensors.h"

#include <algorithm>
#include <tuple>

#include "base/checked.h"
#include "base/error.h"
#include "checkpoint/foreign_file.h"
#include "checkpoint/json_reader.h"

namespace indexcache {

namespace {

constexpr uint64_t kLengthBytes = 8;

struct Extent {
  uint64_t begin;
  uint64_t end;
  TensorMap::iterator tensor;
};

class HeaderParser {
 public:
  HeaderParser(std::string_view header, const std::string& where)
      : where_(where),
        reader_(header, fmt::format("{}: InvalidHeaderDeserialization", where), kLengthBytes) {}

  void parse() {
    std::string key;
    reader_.begin_object();
    while (reader_.next_key(&key)) {
      if (key == "__metadata__") {
        parse_metadata();
      } else {
        parse_tensor(key);
      }
    }
    reader_.end();
  }

  SafetensorsFile file;
  std::vector<Extent> extents;

 private:
  void parse_metadata() {
    if (seen_metadata_) reader_.fail_here("duplicate key \"__metadata__\"");
    seen_metadata_ = true;
    std::string key, value;
    reader_.begin_object();
    while (reader_.next_key(&key)) {
      reader_.string(&value, "a string as metadata value");
      if (!file.metadata.emplace(key, value).second) {
        reader_.fail_here(fmt::format("duplicate metadata key \"{}\"", printable(key)));
      }
      if (file.metadata.size() > kMaxMetadataEntries) {
        fail("{}: __metadata__ has more than {} entries", where_, kMaxMetadataEntries);
      }
    }
  }

  void parse_tensor(const std::string& name) {
    if (file.tensors.size() >= kMaxTensors) {
      fail("{}: the header has more than {} tensors", where_, kMaxTensors);
    }
    const size_t count = file.tensors.size();
    const auto it = file.tensors.emplace_hint(file.tensors.end(), name, TensorView{});
    if (file.tensors.size() == count) {
      reader_.fail_here(fmt::format("duplicate tensor \"{}\"", printable(name)));
    }
    Extent extent{0, 0, it};
    bool has_dtype = false, has_shape = false, has_offsets = false;
    const auto once = [&](bool* seen) {
      if (*seen) fail_tensor(name, fmt::format("duplicate key \"{}\"", printable(field_)));
      *seen = true;
    };
    reader_.set_context(&name);
    reader_.begin_object();
    while (reader_.next_key(&field_)) {
      if (field_ == "dtype") {
        once(&has_dtype);
        it->second.dtype = parse_dtype_field(name);
      } else if (field_ == "shape") {
        once(&has_shape);
        parse_shape(name, &it->second.shape);
      } else if (field_ == "data_offsets") {
        once(&has_offsets);
        parse_offsets(name, &extent);
      } else {
        fail_tensor(name, fmt::format("unknown key \"{}\", expected dtype, shape and data_offsets",
                                      printable(field_)));
      }
    }
    for (const auto& [seen, field] : {std::pair(has_dtype, "dtype"), std::pair(has_shape, "shape"),
                                      std::pair(has_offsets, "data_offsets")}) {
      if (!seen) fail_tensor(name, fmt::format("key \"{}\" is missing", field));
    }
    reader_.set_context(nullptr);
    extents.push_back(extent);
  }

  DType parse_dtype_field(const std::string& name) {
    reader_.string(&text_, "a dtype name");
    const std::optional<DType> dtype = parse_dtype(text_);
    if (!dtype) {
      fail_tensor(name, fmt::format("dtype \"{}\" is not supported, expected one of {}",
                                    printable(text_), supported_dtypes()));
    }
    return *dtype;
  }

  void parse_shape(const std::string& name, Shape* shape) {
    reader_.begin_array();
    while (reader_.next_element()) {
      const std::optional<uint64_t> dim = reader_.unsigned_integer();
      if (!dim || *dim > INT64_MAX) {
        fail("{}: tensor \"{}\": {}: shape has {}, expected whole numbers from 0 to 2^63-1", where_,
             printable(name), dim ? "ValidationOverflow" : "TensorInvalidInfo",
             dim ? fmt::to_string(*dim) : reader_.excerpt());
      }
      if (shape->size() == kMaxRank) {
        fail_tensor(name, fmt::format("shape has more than {} dimensions", kMaxRank));
      }
      shape->push_back(static_cast<int64_t>(*dim));
    }
  }

  void parse_offsets(const std::string& name, Extent* extent) {
    reader_.begin_array();
    size_t count = 0;
    while (reader_.next_element()) {
      const std::optional<uint64_t> offset = reader_.unsigned_integer();
      if (!offset || count == 2) {
        fail(
            "{}: tensor \"{}\": InvalidOffset: data_offsets has {} as item {}, expected two whole "
            "numbers",
            where_, printable(name), offset ? fmt::to_string(*offset) : reader_.excerpt(), count);
      }
      (count == 0 ? extent->begin : extent->end) = *offset;
      ++count;
    }
    if (count != 2) {
      fail("{}: tensor \"{}\": InvalidOffset: data_offsets has {} items, expected two", where_,
           printable(name), count);
    }
  }

  [[noreturn]] void fail_tensor(const std::string& name, const std::string& problem) {
    fail("{}: tensor \"{}\": InvalidHeaderDeserialization: {}", where_, printable(name), problem);
  }

  const std::string& where_;
  JsonReader reader_;
  std::string field_, text_;
  bool seen_metadata_ = false;
};

// The size that dtype and shape ask for. Prefixes are held below 2^63 too, so that later int64
// products are safe.
std::optional<uint64_t> tensor_bytes(const TensorView& view) {
  std::optional<uint64_t> size = 1;
  for (const int64_t dim : view.shape) {
    size = checked_mul(*size, static_cast<uint64_t>(dim));
    if (!size || *size > INT64_MAX) return std::nullopt;
  }
  size = checked_mul(*size, static_cast<uint64_t>(dtype_bytes(view.dtype)));
  if (!size || *size > INT64_MAX) return std::nullopt;
  return size;
}

// Offsets must run from 0 without hole or overlap, each as long as its dtype and shape say. Returns
// the end of the last.
uint64_t check_extents(std::vector<Extent>* extents, const std::string& where) {
  const auto before = [](const Extent& a, const Extent& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  };
  if (!std::is_sorted(extents->begin(), extents->end(), before)) {
    std::sort(extents->begin(), extents->end(), before);
  }
  uint64_t previous_end = 0;
  for (const Extent& extent : *extents) {
    const auto& [name, view] = *extent.tensor;
    if (extent.begin != previous_end || extent.end < extent.begin) {
      fail(
          "{}: tensor \"{}\": InvalidOffset: data_offsets are [{}, {}], expected to begin at {}, "
          "where the tensor before ends, and not to end before that",
          where, printable(name), extent.begin, extent.end, previous_end);
    }
    const std::optional<uint64_t> size = tensor_bytes(view);
    if (!size) {
      fail("{}: tensor \"{}\": ValidationOverflow: shape {} of {} has more than 2^63-1 bytes",
           where, printable(name), shape_string(view.shape), dtype_name(view.dtype));
    }
    if (extent.end - extent.begin != *size) {
      fail(
          "{}: tensor \"{}\": TensorInvalidInfo: data_offsets hold {} bytes, expected {} for {} {}",
          where, printable(name), extent.end - extent.begin, *size, dtype_name(view.dtype),
          shape_string(view.shape));
    }
    previous_end = extent.end;
  }
  return previous_end;
}

[[noreturn]] void fail_header(std::span<const uint8_t> bytes, const std::string& where,
                              const std::string& problem) {
  if (const auto kind = foreign_file_kind(bytes)) {
    fail("{}: expected a safetensors file, found {} ({})", where, *kind, problem);
  }
  fail("{}: {}", where, problem);
}

}  // namespace

std::string supported_dtypes() {
  std::string list;
  for (int i = 0; i <= static_cast<int>(DType::kF64); ++i) {
    list += fmt::format("{}{}", i ? ", " : "", dtype_name(static_cast<DType>(i)));
  }
  return list;
}

SafetensorsFile parse_safetensors(std::span<const uint8_t> bytes, const std::string& where_in) {
  const std::string where = printable(where_in, 400);
  if (bytes.size() < kLengthBytes) {
    fail_header(bytes, where,
                fmt::format("HeaderTooSmall: found {} bytes, expected at least 8", bytes.size()));
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes) {
    fail_header(bytes, where,
                fmt::format("HeaderTooLarge: header length {}, expected at most {}", header_bytes,
                            kMaxHeaderBytes));
  }
  if (header_bytes > bytes.size() - kLengthBytes) {
    fail_header(bytes, where,
                fmt::format("InvalidHeaderLength: header length {}, but only {} bytes follow",
                            header_bytes, bytes.size() - kLengthBytes));
  }
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                                header_bytes);
  const size_t first = header.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos || header[first] != '{') {
    const size_t at = std::min(first, header.size());
    fail_header(
        bytes, where,
        fmt::format(
            "InvalidHeaderDeserialization at byte {}: found {}, expected '{{'", kLengthBytes + at,
            at == header.size() ? "the end of the header" : printable(header.substr(at, 8))));
  }

  HeaderParser parser(header, where);
  parser.parse();
  const uint64_t data_end = check_extents(&parser.extents, where);
  const uint64_t data_bytes = bytes.size() - kLengthBytes - header_bytes;
  if (data_end != data_bytes) {
    fail("{}: MetadataIncompleteBuffer: found {} bytes of tensor data, expected {} ({})", where,
         data_bytes, data_end,
         data_end > data_bytes ? "the file is cut short"
                               : "the file has bytes that belong to no tensor");
  }
  const uint8_t* data = bytes.data() + kLengthBytes + header_bytes;
  for (const Extent& extent : parser.extents) extent.tensor->second.data = data + extent.begin;
  parser.file.data_bytes = data_bytes;
  return std::move(parser.file);
}

}  // namespace indexcache
