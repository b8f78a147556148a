// Added tokens: texts such as <|user|> that are one token wherever they stand, found before
// anything else looks at the text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace indexcache {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;      // left out of decoded text on request
  bool normalized = false;   // found only after the tokens that are not
  bool lstrip = false;       // swallows the white space before it
  bool rstrip = false;       // swallows the white space after it
  bool single_word = false;  // not found inside a word
};

inline constexpr size_t kMaxAddedTokenBytes = 1024;

class AddedTokenFinder {
 public:
  // A stretch of the text: ordinary if id < 0.
  struct Section {
    std::string_view text;
    int32_t id;
  };

  // Contents are not empty, of at most kMaxAddedTokenBytes bytes, and all different.
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  // Time: the text's length times the longest beginning of a token that occurs. No token is found
  // over a byte that is not 0 in `barred`, which is as long as the text, or empty.
  std::vector<Section> split(std::string_view text, std::string_view barred = {}) const;

 private:
  // A tree of bytes. The children of a node are a linked list.
  struct Node {
    uint8_t byte;
    int32_t first_child;
    int32_t next_sibling;
    int32_t token;  // index into tokens_, or -1
  };

  struct Tree {
    std::vector<Node> nodes = {{0, -1, -1, -1}};
    void add(std::string_view content, int32_t token);
    int32_t child(int32_t node, uint8_t byte) const;
  };

  void split(const Tree& tree, std::string_view text, std::string_view barred,
             std::vector<Section>& out) const;
  int32_t longest_match(const Tree& tree, std::string_view text, std::string_view barred,
                        size_t at) const;

  std::vector<AddedToken> tokens_;
  Tree plain_;
  Tree normalized_;
};

}  // namespace indexcache
