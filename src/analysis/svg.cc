#include "analysis/svg.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace indexcache {

namespace {

constexpr double kWidth = 560, kHeight = 320;
constexpr double kLeft = 64, kRight = 16, kTop = 32, kBottom = 52;
// Labels of 13 to 19 px need this much room along the x axis.
constexpr double kLabelWidth = 66;

// Round steps of 1, 2 or 5 times a power of ten, about `count` of them.
std::vector<double> ticks(double low, double high, int count) {
  const double raw = (high - low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  const double step = raw / power < 1.5   ? power
                      : raw / power < 3.5 ? 2 * power
                      : raw / power < 7.5 ? 5 * power
                                          : 10 * power;
  std::vector<double> out;
  for (double value = std::ceil(low / step) * step; value <= high + step * 1e-9; value += step)
    out.push_back(std::abs(value) < step * 1e-9 ? 0 : value);
  return out;
}

// Where measurements were made: a fraction of a layer would mean nothing. Of labels that would
// touch the one to the left gives way.
std::vector<double> x_ticks(const LineChart& chart, double low, double high) {
  std::vector<double> measured;
  for (const Series& series : chart.series)
    for (const auto& [x, y] : series.points)
      if (std::isfinite(x)) measured.push_back(x);
  std::sort(measured.begin(), measured.end());
  const double apart = kLabelWidth / (kWidth - kLeft - kRight) * (high - low);
  std::vector<double> out;
  for (size_t i = measured.size(); i-- > 0;)
    if (out.empty() || out.back() - measured[i] >= apart) out.push_back(measured[i]);
  return out;
}

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  void widen(double share) {
    const double extra = high > low ? (high - low) * share : std::max(std::abs(high) * 0.1, 1e-3);
    low -= extra;
    high += extra;
  }
};

std::string tooltip(const std::string& text) {
  return text.empty() ? "" : "<title>" + html_escape(text) + "</title>";
}

}  // namespace

std::string html_escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string line_chart(const LineChart& chart) {
  Range xs, ys;
  for (const Series& series : chart.series) {
    for (const auto& [x, y] : series.points) {
      if (!std::isfinite(x) || !std::isfinite(y)) continue;
      xs.add(x);
      ys.add(y);
    }
  }
  if (!(xs.low <= xs.high)) return "";
  xs.widen(0.03);
  ys.widen(0.06);
  if (chart.y_range) std::tie(ys.low, ys.high) = *chart.y_range;
  const auto place_x = [&](double x) {
    const double share = (x - xs.low) / (xs.high - xs.low);
    return kLeft + (chart.x_falls ? 1 - share : share) * (kWidth - kLeft - kRight);
  };
  const auto place_y = [&](double y) {
    return kTop + (ys.high - y) / (ys.high - ys.low) * (kHeight - kTop - kBottom);
  };

  std::string out =
      fmt::format("<svg class=\"chart\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n",
                  kWidth, kHeight, html_escape(chart.y_label + " against " + chart.x_label));
  for (const double y : ticks(ys.low, ys.high, 5)) {
    out += fmt::format(
        "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/><text x=\"{}\" "
        "y=\"{:.1f}\" text-anchor=\"end\">{:.6g}</text>\n",
        kLeft, kWidth - kRight, place_y(y), place_y(y), kLeft - 6, place_y(y) + 4, y);
  }
  for (const double x : x_ticks(chart, xs.low, xs.high)) {
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{:.6g}</text>\n",
                       place_x(x), kHeight - kBottom + 20, x);
  }
  out += fmt::format("<text class=\"label\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
                     (kLeft + kWidth - kRight) / 2, kHeight - 8, html_escape(chart.x_label));
  out +=
      fmt::format("<text class=\"label\" x=\"4\" y=\"16\">{}</text>\n", html_escape(chart.y_label));

  std::string legend;
  for (size_t s = 0; s < chart.series.size(); ++s) {
    const Series& series = chart.series[s];
    // Six colours; the second six are dashed and hollow.
    const std::string colour = fmt::format("c{}{}", s % 6, s / 6 % 2 == 1 ? " again" : "");
    if (series.line) {
      std::string path;
      for (const auto& [x, y] : series.points)
        path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : " L", place_x(x), place_y(y));
      out += fmt::format("<path class=\"line {}\" d=\"{}\"/>\n", colour, path);
    }
    for (size_t i = 0; i < series.points.size(); ++i) {
      const auto& [x, y] = series.points[i];
      out +=
          fmt::format("<circle class=\"dot {}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\">{}</circle>\n",
                      colour, place_x(x), place_y(y), series.line ? 3 : 5,
                      tooltip(i < series.notes.size() ? series.notes[i] : ""));
    }
    legend += fmt::format("<span><i class=\"{}\"></i>{}</span>", colour, html_escape(series.name));
  }
  return out + "</svg>\n<p class=\"legend\">" + legend + "</p>\n";
}

std::string heat_map(const HeatMap& map) {
  const size_t n = map.labels.size();
  if (n == 0) return "";
  constexpr double kMargin = 30;
  const double cell = (kWidth - kMargin) / static_cast<double>(n);
  const double low = *std::min_element(map.values.begin(), map.values.end());
  const double span = std::max(1 - low, 1e-9);
  std::string out = fmt::format("<svg class=\"chart heat\" viewBox=\"0 0 {} {}\" role=\"img\">\n",
                                kWidth, kWidth);
  const size_t every = (n + 11) / 12;
  for (size_t i = 0; i < n; ++i) {
    const double middle = kMargin + (static_cast<double>(i) + 0.5) * cell;
    if (i % every == 0) {
      out += fmt::format(
          "<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text><text x=\"{}\" "
          "y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n",
          middle, kMargin - 8, html_escape(map.labels[i]), kMargin - 6, middle + 4,
          html_escape(map.labels[i]));
    }
    for (size_t j = 0; j < n; ++j) {
      const double value = map.values[i * n + j];
      out += fmt::format(
          "<rect class=\"heat-cell\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" "
          "height=\"{:.2f}\" fill-opacity=\"{:.3f}\">{}</rect>",
          kMargin + static_cast<double>(j) * cell, kMargin + static_cast<double>(i) * cell,
          cell + 0.1, cell + 0.1, 0.04 + 0.96 * (value - low) / span,
          tooltip(
              fmt::format("layers {} and {}: {:.1f}%", map.labels[i], map.labels[j], 100 * value)));
    }
    out += "\n";
  }
  for (const auto& [first, last] : map.groups) {
    const double at = kMargin + static_cast<double>(first) * cell,
                 size = static_cast<double>(last - first + 1) * cell;
    out += fmt::format(
        "<rect class=\"group\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\"/>\n",
        at, at, size, size);
  }
  return out + fmt::format("</svg>\n<p class=\"legend\">{:.0f}%<i class=\"ramp\"></i>100%</p>\n",
                           100 * low);
}

std::string plan_strip(const std::vector<std::pair<std::string, std::string>>& plans) {
  std::string out = "<div class=\"plans\">\n";
  for (const auto& [name, letters] : plans) {
    out += fmt::format("<div class=\"plan-name\">{}</div><div class=\"plan\">", html_escape(name));
    for (size_t layer = 0; layer < letters.size(); ++layer) {
      out += fmt::format("<b class=\"{}\" title=\"layer {}: {}\"></b>",
                         letters[layer] == 'F' ? "full" : "shared", layer,
                         letters[layer] == 'F' ? "full" : "shared");
    }
    out += "</div>\n";
  }
  return out +
         "</div>\n<p class=\"legend\"><span><b class=\"full\"></b>full: runs its indexer</span>"
         "<span><b class=\"shared\"></b>shared: reuses the selection before it</span></p>\n";
}

}  // namespace indexcache
