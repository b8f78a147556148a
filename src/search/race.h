// When a candidate may be dropped before all data is seen: paired differences. Two plans measured
// on the same sequences share almost all of their noise, so a few sequences tell them apart.
#pragma once

#include <span>

namespace indexcache {

// t such that Student's t with `degrees` >= 1 degrees of freedom is below it with probability p,
// 0.5 <= p < 1.
double student_t_quantile(double p, int degrees);

// True when the mean of a - b lies above -tolerance with this one-sided confidence, that is, when a
// cannot be better than b by more than `tolerance` a sequence. Needs two sequences at least.
bool not_better(std::span<const double> a, std::span<const double> b, double confidence,
                double tolerance);

}  // namespace indexcache
