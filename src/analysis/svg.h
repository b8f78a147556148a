// Drawings for reports, as SVG text inside an HTML page. Colours are the page's CSS variables, so
// that they follow its light or dark theme. Text from outside is escaped.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace indexcache {

std::string html_escape(std::string_view text);

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;
  std::vector<std::string> notes;  // what a point says when pointed at; empty or one a point
  bool line = true;                // joined; else points alone
};

struct LineChart {
  std::string x_label, y_label;
  std::vector<Series> series;
  bool x_falls = false;  // from the largest x at the left to the smallest
  std::optional<std::pair<double, double>> y_range = {};  // else what the points span
};

// Nothing to draw is an empty string.
std::string line_chart(const LineChart& chart);

struct HeatMap {
  std::vector<std::string> labels;                // of rows and columns
  std::vector<double> values;                     // row-major, 0 to 1
  std::vector<std::pair<size_t, size_t>> groups;  // outlined squares, [first, last]
};
std::string heat_map(const HeatMap& map);

// One row of cells for each plan, a letter a layer: F filled, S not.
std::string plan_strip(const std::vector<std::pair<std::string, std::string>>& plans);

}  // namespace indexcache
