#include "text/tokenizer.h"

#include <algorithm>
#include <bit>
#include <unordered_map>

#include "base/error.h"
#include "base/mapped_file.h"
#include "text/byte_level.h"
#include "text/tokenizer_json.h"

namespace indexcache {

namespace {

constexpr size_t kMaxTextBytes = (size_t{1} << 31) - 1;

// The tokens of pieces seen before in the same text, as places in the output. A newer piece
// replaces an older one.
class PieceCache {
 public:
  explicit PieceCache(size_t text_bytes)
      : entries_(std::bit_ceil(std::clamp<size_t>(text_bytes / 8, 16, 1 << 16))) {}

  struct Entry {
    std::string_view piece;
    size_t first_token;
    size_t num_tokens;
  };

  Entry& entry_for(std::string_view piece) {
    return entries_[std::hash<std::string_view>()(piece) & (entries_.size() - 1)];
  }

 private:
  std::vector<Entry> entries_;
};

constexpr size_t kMaxCachedBytes = 64;

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerFile file)
      : byte_ids(file.byte_ids),
        bpe(file.byte_ids, file.merges),
        added(file.added_tokens),
        splitter(std::move(file.splits)),
        late_splitter(std::move(file.late_splits)),
        add_prefix_space(file.add_prefix_space),
        prefix(std::move(file.prefix)),
        suffix(std::move(file.suffix)),
        names(std::move(file.tokens)) {
    special.resize(names.size());
    std::vector<bool> is_added(names.size());
    for (const AddedToken& token : file.added_tokens) {
      special[static_cast<size_t>(token.id)] = token.special;
      is_added[static_cast<size_t>(token.id)] = true;
    }
    bytes.reserve(names.size());
    ids.reserve(names.size());
    for (size_t id = 0; id < names.size(); ++id) {
      // Text that is not in byte-level spelling, as of many added tokens, stands for itself.
      std::optional<std::string> spelled = from_byte_level(names[id]);
      const bool is_piece = spelled.has_value() && file.in_model[id] && !is_added[id];
      bytes.push_back(spelled.has_value() ? std::move(*spelled) : names[id]);
      ids.emplace(names[id], static_cast<int32_t>(id));
      if (file.ignore_merges && is_piece)
        whole_pieces.emplace(bytes.back(), static_cast<int32_t>(id));
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  struct Context {
    explicit Context(size_t text_bytes) : cache(text_bytes) {}
    std::vector<int32_t> out;
    Bpe::Scratch scratch;
    PieceCache cache;
  };

  void encode_section(std::string_view text, Context& context) const {
    if (text.empty()) return;
    for (const std::string_view piece : splitter.split(text)) {
      if (!add_prefix_space) {
        encode_piece(piece, context);
        continue;
      }
      const std::string spaced =
          piece.starts_with(' ') ? std::string(piece) : " " + std::string(piece);
      for (const std::string_view part : late_splitter.split(spaced))
        encode_uncached(part, context);
    }
  }

  // `piece` must stay where it is until the context is gone.
  void encode_piece(std::string_view piece, Context& context) const {
    std::vector<int32_t>& out = context.out;
    if (piece.size() == 1) return out.push_back(encode_byte(piece[0]));
    if (piece.size() > kMaxCachedBytes) return encode_uncached(piece, context);
    PieceCache::Entry& entry = context.cache.entry_for(piece);
    const size_t begin = out.size();
    if (entry.piece != piece) {
      encode_uncached(piece, context);
      entry = {piece, begin, out.size() - begin};
      return;
    }
    out.resize(begin + entry.num_tokens);
    std::copy_n(out.begin() + static_cast<ptrdiff_t>(entry.first_token), entry.num_tokens,
                out.begin() + static_cast<ptrdiff_t>(begin));
  }

  int32_t encode_byte(char c) const { return byte_ids[static_cast<uint8_t>(c)]; }

  void encode_uncached(std::string_view piece, Context& context) const {
    if (!whole_pieces.empty()) {
      const auto whole = whole_pieces.find(piece);
      if (whole != whole_pieces.end()) return context.out.push_back(whole->second);
    }
    bpe.encode(piece, context.scratch, context.out);
  }

  std::array<int32_t, 256> byte_ids;
  Bpe bpe;
  AddedTokenFinder added;
  Splitter splitter;
  Splitter late_splitter;
  bool add_prefix_space;
  std::vector<int32_t> prefix;
  std::vector<int32_t> suffix;
  std::vector<std::string> names;                              // by id, as in the file
  std::vector<std::string> bytes;                              // by id
  std::vector<bool> special;                                   // by id
  std::unordered_map<std::string_view, int32_t> ids;           // by name
  std::unordered_map<std::string_view, int32_t> whole_pieces;  // by bytes; only with ignore_merges
};

Tokenizer Tokenizer::load(const std::string& path) {
  return parse(read_text_file(path, kMaxTokenizerBytes), printable(path, 400));
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& where) {
  return Tokenizer(std::make_shared<const Impl>(parse_tokenizer_file(json, where)));
}

std::vector<int32_t> Tokenizer::encode(std::string_view utf8, bool add_special_tokens,
                                       bool parse_special) const {
  if (utf8.size() > kMaxTextBytes)
    fail("the text has {} bytes, expected at most {}", utf8.size(), kMaxTextBytes);
  if (const auto at = find_invalid_utf8(utf8)) fail("the text is not valid UTF-8 at byte {}", *at);

  Impl::Context context(utf8.size());
  context.out.reserve(utf8.size() / 4 + 16);
  if (add_special_tokens) context.out = impl_->prefix;
  if (parse_special) {
    for (const AddedTokenFinder::Section& section : impl_->added.split(utf8)) {
      if (section.id >= 0) {
        context.out.push_back(section.id);
      } else {
        impl_->encode_section(section.text, context);
      }
    }
  } else {
    impl_->encode_section(utf8, context);
  }
  if (add_special_tokens)
    context.out.insert(context.out.end(), impl_->suffix.begin(), impl_->suffix.end());
  return std::move(context.out);
}

std::vector<int32_t> Tokenizer::encode_marked(std::string_view utf8,
                                              std::string_view from_input) const {
  CHECK(from_input.empty() || from_input.size() == utf8.size());
  if (utf8.size() > kMaxTextBytes)
    fail("the text has {} bytes, expected at most {}", utf8.size(), kMaxTextBytes);
  if (const auto at = find_invalid_utf8(utf8)) fail("the text is not valid UTF-8 at byte {}", *at);
  Impl::Context context(utf8.size());
  for (const AddedTokenFinder::Section& section : impl_->added.split(utf8, from_input)) {
    if (section.id >= 0) {
      context.out.push_back(section.id);
    } else {
      impl_->encode_section(section.text, context);
    }
  }
  return std::move(context.out);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!(skip_special && is_special(id))) bytes += token_bytes(id);
  }
  return replace_invalid_utf8(bytes);
}

int Tokenizer::vocab_size() const { return static_cast<int>(impl_->names.size()); }

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  const auto it = impl_->ids.find(token);
  return it == impl_->ids.end() ? std::nullopt : std::optional(it->second);
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  return id >= 0 && id < vocab_size() ? std::string_view(impl_->bytes[static_cast<size_t>(id)])
                                      : std::string_view();
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->special[static_cast<size_t>(id)];
}

std::string StreamDecoder::push(int32_t id) {
  if (skip_special_ && tokenizer_.is_special(id)) return {};
  return utf8_.push(tokenizer_.token_bytes(id));
}

}  // namespace indexcache
