#include "train/loss_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "base/atomic_file.h"
#include "train/train_log.h"

namespace indexcache {

namespace {

struct Curve {
  std::string name;
  std::vector<std::pair<double, double>> points;
  bool dots = false;
};

constexpr double kWidth = 860, kHeight = 260, kLeft = 64, kRight = 12, kTop = 28, kBottom = 34;
constexpr const char* kColours[] = {"#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280"};

// A step of 1, 2 or 5 times a power of ten that cuts `range` into about five parts.
double tick_step(double range) {
  const double raw = std::max(range, 1e-12) / 5;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (raw <= factor * power) return factor * power;
  return 10 * power;
}

std::string chart(const std::string& title, const std::vector<Curve>& curves) {
  double x_max = 1, y_min = INFINITY, y_max = -INFINITY;
  for (const Curve& curve : curves) {
    for (const auto& [x, y] : curve.points) {
      x_max = std::max(x_max, x);
      y_min = std::min(y_min, y);
      y_max = std::max(y_max, y);
    }
  }
  if (!(y_min <= y_max)) return "";
  // The first steps of a new model would flatten everything after them.
  std::vector<double> ys;
  for (const Curve& curve : curves)
    for (const auto& point : curve.points) ys.push_back(point.second);
  std::sort(ys.begin(), ys.end());
  const double usual = ys[ys.size() * 95 / 100];
  y_max = std::min(y_max, usual + 0.6 * (usual - y_min) + 1e-9);
  if (y_max - y_min < 1e-9) y_max = y_min + std::max(1e-9, std::abs(y_min) * 0.1);

  const auto px = [&](double x) { return kLeft + x / x_max * (kWidth - kLeft - kRight); };
  const auto py = [&](double y) {
    return kHeight - kBottom -
           (std::min(y, y_max) - y_min) / (y_max - y_min) * (kHeight - kTop - kBottom);
  };
  std::string svg = fmt::format(
      "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\"><text x=\"{}\" y=\"16\" "
      "class=\"t\">{}</text>",
      kWidth, kHeight, title, kLeft, title);
  const double step_y = tick_step(y_max - y_min), step_x = tick_step(x_max);
  for (double y = std::ceil(y_min / step_y) * step_y; y <= y_max; y += step_y) {
    svg += fmt::format(
        "<line x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\" class=\"g\"/><text x=\"{3}\" "
        "y=\"{4:.1f}\" class=\"y\">{5:.4g}</text>",
        kLeft, kWidth - kRight, py(y), kLeft - 6, py(y) + 4, y);
  }
  for (double x = 0; x <= x_max; x += step_x) {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" class=\"x\">{:.0f}</text>", px(x), kHeight - 14,
                       x);
  }
  double legend = kWidth - kRight;
  for (size_t i = 0; i < curves.size(); ++i) {
    const char* colour = kColours[i % std::size(kColours)];
    std::string path;
    for (const auto& [x, y] : curves[i].points) {
      path += fmt::format("{}{:.1f},{:.1f}", path.empty() ? "" : " ", px(x), py(y));
      if (curves[i].dots)
        svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"/>", px(x),
                           py(y), colour);
    }
    svg += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.4\"/>",
                       path, colour);
    svg += fmt::format("<text x=\"{}\" y=\"16\" class=\"l\" fill=\"{}\">{}</text>", legend, colour,
                       curves[i].name);
    legend -= 9.0 * static_cast<double>(curves[i].name.size()) + 16;
  }
  return svg + "</svg>\n";
}

std::string escape(const std::string& text) {
  std::string out;
  for (const char c : text) c == '<' ? out += "&lt;" : c == '&' ? out += "&amp;" : out += c;
  return out;
}

}  // namespace

void write_loss_plot(const std::string& log_path, const std::string& html_path,
                     const std::string& title) {
  const TrainHistory history = read_train_log(log_path);
  Curve loss{"training", {}}, indexer{"training", {}}, rate{"lr", {}};
  for (const TrainRow& row : history.steps) {
    const auto x = static_cast<double>(row.step);
    if (row.loss != 0) loss.points.emplace_back(x, row.loss);
    if (row.indexer_loss != 0) indexer.points.emplace_back(x, row.indexer_loss);
    rate.points.emplace_back(x, row.lr);
  }
  std::map<std::string, Curve> held_loss, held_indexer;
  for (const HeldOutRow& row : history.held_out) {
    const auto x = static_cast<double>(row.step);
    held_loss[row.name].points.emplace_back(x, row.loss);
    if (row.indexer_loss != 0) held_indexer[row.name].points.emplace_back(x, row.indexer_loss);
  }
  std::vector<Curve> losses = {loss}, indexers = {indexer};
  for (auto& [name, curve] : held_loss) losses.push_back({escape(name), curve.points, true});
  for (auto& [name, curve] : held_indexer) indexers.push_back({escape(name), curve.points, true});
  const std::string page =
      "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width\"><title>" +
      escape(title) +
      "</title><style>body{font:15px system-ui,sans-serif;max-width:900px;margin:2em "
      "auto;padding:0 "
      "1em;color:#1a202c}svg{width:100%;margin:1em 0}text{font-size:12px;fill:#4a5568}.t{font-"
      "weight:600;font-size:13px;fill:#1a202c}.y,.l{text-anchor:end}.x{text-anchor:middle}.g{"
      "stroke:#e2e8f0}</style><h1>" +
      escape(title) + "</h1>" + chart("Language loss, nats/token, over steps", losses) +
      chart("Indexer loss, KL in nats/token, over steps", indexers) +
      chart("Learning rate, over steps", {rate}) + "</html>\n";
  write_text_file(html_path, page);
}

}  // namespace indexcache
