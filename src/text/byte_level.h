// Byte-level spelling: how a tokenizer.json writes tokens that are any bytes. Each byte is one
// printable character: itself if it is printable and not a space in Latin-1, otherwise U+0100 and
// up in order of the bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace indexcache {

uint32_t byte_level_character(uint8_t byte);

std::string to_byte_level(std::string_view bytes);

// nullopt if any character does not stand for a byte.
std::optional<std::string> from_byte_level(std::string_view spelled);

// The tokenizer.json of a tokenizer without merges: ids 0-255 are the bytes, 256-259 are
// <|endoftext|>, <|system|>,
// <|user|> and <|assistant|>, the rest up to `vocab_size` (at least 260) are reserved special
// tokens.
std::string byte_level_tokenizer_json(int vocab_size);

}  // namespace indexcache
