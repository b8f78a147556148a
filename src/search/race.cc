#include "search/race.h"

#include <cmath>
#include <numbers>

#include "base/error.h"

namespace indexcache {

namespace {

// P(|T| < t) for a whole number of degrees (Abramowitz and Stegun 26.7.3 and 26.7.4).
double two_sided_probability(double t, int degrees) {
  const double angle = std::atan(t / std::sqrt(static_cast<double>(degrees)));
  const double cosine = std::cos(angle), sine = std::sin(angle);
  const bool odd = degrees % 2 == 1;
  double term = odd ? cosine : 1.0, sum = degrees == 1 ? 0.0 : term;
  for (int i = odd ? 3 : 2; i <= degrees - 2; i += 2) {
    term *= cosine * cosine * (i - 1) / i;
    sum += term;
  }
  return odd ? 2.0 / std::numbers::pi * (angle + sine * sum) : sine * sum;
}

}  // namespace

double student_t_quantile(double p, int degrees) {
  CHECK_GE(degrees, 1);
  CHECK(p >= 0.5 && p < 1);
  double low = 0, high = 1;
  while (two_sided_probability(high, degrees) < 2 * p - 1 && high < 1e12) high *= 2;
  for (int i = 0; i < 200 && low < high; ++i) {
    const double middle = low + (high - low) / 2;
    (two_sided_probability(middle, degrees) < 2 * p - 1 ? low : high) = middle;
  }
  return high;
}

bool not_better(std::span<const double> a, std::span<const double> b, double confidence,
                double tolerance) {
  CHECK_EQ(a.size(), b.size());
  CHECK_GE(a.size(), 2u);
  const double n = static_cast<double>(a.size());
  double mean = 0, squares = 0;
  for (size_t i = 0; i < a.size(); ++i) mean += (a[i] - b[i]) / n;
  for (size_t i = 0; i < a.size(); ++i) squares += (a[i] - b[i] - mean) * (a[i] - b[i] - mean);
  const double error = std::sqrt(squares / (n - 1) / n);
  return mean + tolerance > student_t_quantile(confidence, static_cast<int>(n) - 1) * error;
}

}  // namespace indexcache
