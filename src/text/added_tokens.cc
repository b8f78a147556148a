#include "text/added_tokens.h"

#include <algorithm>

#include "base/error.h"
#include "text/code_points.h"
#include "text/utf8.h"

namespace indexcache {

namespace {

// The code point that ends right before `at`, which is a boundary and not 0.
size_t step_back(std::string_view text, size_t at) {
  do --at;
  while ((static_cast<uint8_t>(text[at]) & 0xC0) == 0x80);
  return at;
}

bool word_ends_at(std::string_view text, size_t at) {
  return at > 0 && is_word(utf8_step(text, step_back(text, at)).code_point);
}

bool word_begins_at(std::string_view text, size_t at) {
  return at < text.size() && is_word(utf8_step(text, at).code_point);
}

size_t skip_space_back(std::string_view text, size_t at, size_t limit) {
  while (at > limit) {
    const size_t before = step_back(text, at);
    if (!is_white_space(utf8_step(text, before).code_point)) break;
    at = before;
  }
  return at;
}

size_t skip_space(std::string_view text, size_t at) {
  while (at < text.size()) {
    const Utf8Step step = utf8_step(text, at);
    if (!is_white_space(step.code_point)) break;
    at += step.length;
  }
  return at;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    CHECK(!tokens_[i].content.empty() && tokens_[i].content.size() <= kMaxAddedTokenBytes);
    (tokens_[i].normalized ? normalized_ : plain_).add(tokens_[i].content, static_cast<int32_t>(i));
  }
}

int32_t AddedTokenFinder::Tree::child(int32_t node, uint8_t byte) const {
  int32_t at = nodes[static_cast<size_t>(node)].first_child;
  while (at >= 0 && nodes[static_cast<size_t>(at)].byte != byte) {
    at = nodes[static_cast<size_t>(at)].next_sibling;
  }
  return at;
}

void AddedTokenFinder::Tree::add(std::string_view content, int32_t token) {
  int32_t node = 0;
  for (const char c : content) {
    const uint8_t byte = static_cast<uint8_t>(c);
    int32_t found = child(node, byte);
    if (found < 0) {
      found = static_cast<int32_t>(nodes.size());
      nodes.push_back({byte, -1, nodes[static_cast<size_t>(node)].first_child, -1});
      nodes[static_cast<size_t>(node)].first_child = found;
    }
    node = found;
  }
  nodes[static_cast<size_t>(node)].token = token;
}

int32_t AddedTokenFinder::longest_match(const Tree& tree, std::string_view text,
                                        std::string_view barred, size_t at) const {
  int32_t best = -1;
  int32_t node = 0;
  for (; at < text.size() && (barred.empty() || barred[at] == 0); ++at) {
    node = tree.child(node, static_cast<uint8_t>(text[at]));
    if (node < 0) break;
    const int32_t token = tree.nodes[static_cast<size_t>(node)].token;
    if (token >= 0) best = token;
  }
  return best;
}

void AddedTokenFinder::split(const Tree& tree, std::string_view text, std::string_view barred,
                             std::vector<Section>& out) const {
  size_t done = 0;  // the text before this is in `out`
  for (size_t at = 0; at < text.size();) {
    const int32_t found = longest_match(tree, text, barred, at);
    if (found < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(found)];
    size_t begin = at;
    at += token.content.size();
    if (token.single_word && (word_ends_at(text, begin) || word_begins_at(text, at))) continue;
    if (token.lstrip) begin = skip_space_back(text, begin, done);
    // White space that a token swallowed is gone: no other token is looked for in it.
    if (token.rstrip) at = skip_space(text, at);
    if (done < begin) out.push_back({text.substr(done, begin - done), -1});
    out.push_back({text.substr(begin, at - begin), token.id});
    done = at;
  }
  if (done < text.size()) out.push_back({text.substr(done), -1});
}

std::vector<AddedTokenFinder::Section> AddedTokenFinder::split(std::string_view text,
                                                               std::string_view barred) const {
  std::vector<Section> first;
  split(plain_, text, barred, first);
  std::vector<Section> out;
  for (const Section& section : first) {
    if (section.id >= 0) {
      out.push_back(section);
    } else {
      const auto begin = static_cast<size_t>(section.text.data() - text.data());
      split(normalized_, section.text,
            barred.empty() ? barred : barred.substr(begin, section.text.size()), out);
    }
  }
  return out;
}

}  // namespace indexcache
