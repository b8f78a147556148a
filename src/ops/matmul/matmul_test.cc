// Every implementation of matmul against ref, on shapes that are no multiple of anything.
#include "ops/matmul/matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "base/checked.h"
#include "base/rng.h"
#include "ops/kit/testing.h"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {

static void to_device(DeviceOperands& device, Weight& w) {
  device.elements(w.data, w.rows * w.cols * dtype_bytes(w.dtype));
  device.elements(w.scale_inv, ceil_div(w.rows, kScaleBlock) * ceil_div(w.cols, kScaleBlock));
}

static MatmulArgs to_device(DeviceOperands& device, MatmulArgs args) {
  std::vector<MatmulGroup> groups(args.groups.begin(), args.groups.end());
  for (MatmulGroup& group : groups) {
    device.rows(group.x, group.m, group.w.cols, group.ldx);
    to_device(device, group.w);
    device.rows(group.y, group.m, group.w.rows, group.ldy);
  }
  args.groups = device.keep(std::move(groups));
  return args;
}

static MatmulExpertsArgs to_device(DeviceOperands& device, MatmulExpertsArgs args) {
  std::vector<ExpertProduct> products(args.products.begin(), args.products.end());
  for (ExpertProduct& product : products) {
    std::vector<Weight> weights(product.weights.begin(), product.weights.end());
    for (Weight& w : weights) to_device(device, w);
    device.rows(product.x, args.num_rows, weights[0].cols, product.ldx);
    device.rows(product.y, args.num_rows, weights[0].rows, product.ldy);
    product.device_weights = device.upload(weights);
    product.weights = device.keep(std::move(weights));
  }
  // Also where there are no rows.
  device.elements(args.row_begin, static_cast<int64_t>(products[0].weights.size()) + 1);
  args.products = device.keep(std::move(products));
  return args;
}

namespace {

constexpr uint64_t kSeed = 20251;
constexpr uint32_t kPoison = 0x7FA5A5A5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr DType kWeightTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3};

void store_element(DType dtype, float value, uint8_t* data, int64_t i) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(data + 4 * i, &value, 4);
      return;
    case DType::kF16: {
      const uint16_t bits = f32_to_f16(value);
      std::memcpy(data + 2 * i, &bits, 2);
      return;
    }
    case DType::kBF16: {
      const uint16_t bits = f32_to_bf16(value);
      std::memcpy(data + 2 * i, &bits, 2);
      return;
    }
    default:
      data[i] = f32_to_f8e4m3(value);
  }
}

// A weight that owns its bytes, `offset` bytes off alignment.
struct OwnedWeight {
  size_t offset;
  std::vector<uint8_t> bytes;
  std::vector<float> scale_inv;
  Weight w;

  OwnedWeight(DType dtype, int64_t n, int64_t k, size_t offset_in = 1)
      : offset(offset_in),
        bytes(static_cast<size_t>(n * k * dtype_bytes(dtype)) + offset),
        scale_inv(static_cast<size_t>(ceil_div(n, kScaleBlock) * ceil_div(k, kScaleBlock)), 1.0f) {
    w = {dtype, n, k, bytes.data() + offset, dtype == DType::kF8E4M3 ? scale_inv.data() : nullptr};
  }
  void set(int64_t row, int64_t col, float value) {
    store_element(w.dtype, value, bytes.data() + offset, row * w.cols + col);
  }
};

std::unique_ptr<OwnedWeight> random_weight(Rng& rng, DType dtype, int64_t n, int64_t k,
                                           size_t offset = 1) {
  auto weight = std::make_unique<OwnedWeight>(dtype, n, k, offset);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) weight->set(i, j, rng.normal());
  }
  for (float& scale : weight->scale_inv)
    scale = static_cast<float>(std::exp2(6 * rng.uniform() - 3));
  return weight;
}

std::vector<float> poisoned(int64_t count) {
  return std::vector<float>(static_cast<size_t>(count), std::bit_cast<float>(kPoison));
}

std::vector<float> absolute(std::vector<float> values) {
  for (float& value : values) value = std::fabs(value);
  return values;
}

std::unique_ptr<OwnedWeight> absolute(const OwnedWeight& weight) {
  const Weight& w = weight.w;
  auto result = std::make_unique<OwnedWeight>(w.dtype, w.rows, w.cols, weight.offset);
  const TensorView view = {w.dtype, {w.rows, w.cols}, w.data};
  for (int64_t i = 0; i < w.rows * w.cols; ++i)
    result->set(0, i, std::fabs(element_as_f32(view, i)));
  result->scale_inv = weight.scale_inv;
  if (w.scale_inv != nullptr) result->w.scale_inv = result->scale_inv.data();
  return result;
}

// The implementations that this machine can run with these arguments, without ref.
std::vector<const char*> implementations(const MatmulArgs& args) {
  std::vector<const char*> names;
  for (const OpImpl<MatmulArgs>& impl : matmul_impls()) {
    if (std::string_view(impl.name) != "ref" && can_run(impl.device) && impl.supported(args))
      names.push_back(impl.name);
  }
  return names;
}

void run_as(const char* name, int num_threads, const MatmulArgs& args) {
  Device device = Device::kCpu;
  for (const OpImpl<MatmulArgs>& impl : matmul_impls()) {
    if (std::string_view(impl.name) == name) device = impl.device;
  }
  run_on(device, matmul, "matmul", name, args, num_threads);
}

// Same NaN and infinities, else |y - ref| <= 2 terms 2^-24 sum_of_absolutes.
void expect_close(const std::vector<float>& y, const std::vector<float>& ref,
                  const std::vector<float>& bound, int64_t terms, const std::string& what) {
  double worst = 0;
  size_t worst_at = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    if (std::bit_cast<uint32_t>(ref[i]) == kPoison) {
      ASSERT_EQ(std::bit_cast<uint32_t>(y[i]), kPoison) << what << ": wrote outside at " << i;
      continue;
    }
    ASSERT_EQ(std::isnan(y[i]), std::isnan(ref[i]))
        << what << " at " << i << ": " << y[i] << " vs " << ref[i];
    if (std::isnan(ref[i])) continue;
    if (std::isinf(ref[i]) || std::isinf(y[i])) {
      ASSERT_EQ(y[i], ref[i]) << what << " at " << i;
      continue;
    }
    const double error = std::fabs(static_cast<double>(y[i]) - ref[i]);
    const double allowed = 2.0 * static_cast<double>(terms) * 0x1.0p-24 * bound[i];
    if (error > 0 && !(error / allowed <= worst)) {
      worst = error / allowed;
      worst_at = i;
    }
  }
  ASSERT_LE(worst, 1.0) << what << " worst at " << worst_at << ": " << y[worst_at] << " vs "
                        << ref[worst_at];
}

struct OneProduct {
  const OwnedWeight& weight;
  const OwnedWeight& abs_weight;
  const std::vector<float>& x;  // [m, ldx]
  int64_t m, ldx, ldy;
  Compute compute;
  bool accumulate;
  int num_threads = 2;
};

// Every implementation against ref, on a random y; what lies between the rows of y stays.
// terms_of(name) is how many terms expect_close() allows for.
template <class Terms>
void expect_ref(Rng& rng, const OneProduct& p, const Terms& terms_of) {
  const Weight& w = p.weight.w;
  const std::vector<float> start = random_floats(rng, p.m * p.ldy), abs_x = absolute(p.x);
  std::vector<float> ref = start, bound = absolute(start);
  const MatmulGroup group = {p.x.data(), p.ldx, p.m, w, ref.data(), p.ldy};
  const MatmulGroup abs_group = {abs_x.data(), p.ldx, p.m, p.abs_weight.w, bound.data(), p.ldy};
  run_as("ref", p.num_threads, {{&group, 1}, p.compute, p.accumulate});
  run_as("ref", p.num_threads, {{&abs_group, 1}, p.compute, p.accumulate});
  for (const char* name : implementations({{&group, 1}, p.compute, p.accumulate})) {
    std::vector<float> y = start;
    MatmulGroup own = group;
    own.y = y.data();
    run_as(name, p.num_threads, {{&own, 1}, p.compute, p.accumulate});
    const std::string what =
        fmt::format("{} {} m={} k={} n={} compute={} accumulate={}", name, dtype_name(w.dtype), p.m,
                    w.cols, w.rows, static_cast<int>(p.compute), p.accumulate);
    expect_close(y, ref, bound, terms_of(name), what);
    for (int64_t row = 0; row < p.m; ++row) {
      for (int64_t i = row * p.ldy + w.rows; i < (row + 1) * p.ldy; ++i)
        ASSERT_EQ(y[static_cast<size_t>(i)], start[static_cast<size_t>(i)])
            << what << ": wrote outside at " << i;
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(Matmul, EveryImplementationAgreesWithRefOnOddSizes) {
  Rng rng(kSeed);
  for (const DType dtype : kWeightTypes) {
    for (const int64_t k : {0, 1, 2, 31, 64, 130, 1000}) {
      for (const int64_t n : {1, 5, 12, 13, 64, 100}) {
        const auto weight = random_weight(rng, dtype, n, k, static_cast<size_t>((n + k) % 2));
        const auto abs_weight = absolute(*weight);
        for (const int64_t m : {0, 1, 2, 7, 16, 17, 33, 65, 97, 300}) {
          const int64_t ldx = k + 3, ldy = n + 5;
          const std::vector<float> x = random_floats(rng, m * ldx + 1);
          const std::vector<float> abs_x = absolute(x);
          for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
            std::vector<float> ref = poisoned(m * ldy + 1);
            std::vector<float> bound = ref;
            const MatmulGroup group = {x.data(), ldx, m, weight->w, ref.data(), ldy};
            const MatmulGroup abs_group = {abs_x.data(), ldx, m, abs_weight->w, bound.data(), ldy};
            run_as("ref", 1, {{&group, 1}, compute});
            run_as("ref", 1, {{&abs_group, 1}, compute});
            for (const char* name : implementations({{&group, 1}, compute})) {
              std::vector<float> y = poisoned(m * ldy + 1);
              MatmulGroup own = group;
              own.y = y.data();
              run_as(name, 1, {{&own, 1}, compute});
              expect_close(y, ref, bound, k,
                           fmt::format("{} {} m={} k={} n={} {}", name, dtype_name(dtype), m, k, n,
                                       compute == Compute::kF32 ? "f32" : "bf16"));
              if (HasFatalFailure()) return;
            }
          }
        }
      }
    }
  }
}

// The rate of the tensor cores costs accuracy besides; the largest product of a block is at most
// the sum of its products. The reference rounds x to the same e4m3.
TEST(Matmul, Fp8ProductsRoundTheirInput) {
  Rng rng(printed_seed());
  for (const int64_t k : {1, 16, 100, 128, 272, 1000, 1008}) {
    for (const int64_t n : {1, 8, 72, 130, 392}) {
      const auto weight = random_weight(rng, DType::kF8E4M3, n, k, static_cast<size_t>(n % 8 != 0));
      const auto abs_weight = absolute(*weight);
      for (const int64_t m : {1, 3, 8, 9, 130, 300}) {
        const int64_t ldx = k + 4 - k % 4, ldy = n + 2;
        std::vector<float> x = random_floats(rng, m * ldx);
        for (float& value : x) value *= static_cast<float>(std::exp2(8 * rng.uniform() - 4));
        // 2 terms 2^-24 and 5 * 33 * 2^-13 of what is summed.
        const auto terms = [k](std::string_view name) {
          return k + 2 + (name == "sm90_fp8" ? 5 * 33 << 10 : 0);
        };
        for (const bool accumulate : {false, true}) {
          expect_ref(rng, {*weight, *abs_weight, x, m, ldx, ldy, Compute::kFP8, accumulate, 1},
                     terms);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// What e4m3 holds exactly comes out exactly: no element, scale or block of the fp8 path is swapped
// with another, whatever its tolerance.
TEST(Matmul, Fp8ProductsOfOneElementAreExact) {
  Rng rng(printed_seed());
  const int64_t n = 392, k = 528, m = 300;
  auto weight = random_weight(rng, DType::kF8E4M3, n, k, 0);
  for (size_t i = 0; i < weight->scale_inv.size(); ++i)
    weight->scale_inv[i] = static_cast<float>(std::exp2(static_cast<double>(i % 7)));
  std::vector<float> x(static_cast<size_t>(m * k));
  std::vector<int64_t> column;
  for (int64_t i = 0; i < m; ++i) {
    column.push_back(static_cast<int64_t>(rng.below(static_cast<uint64_t>(k))));
    x[static_cast<size_t>(i * k + column.back())] = static_cast<float>(std::exp2(i % 5 - 2));
  }
  const TensorView view = {DType::kF8E4M3, {n, k}, weight->w.data};
  std::vector<float> y(static_cast<size_t>(m * n));
  const MatmulGroup group = {x.data(), k, m, weight->w, y.data(), n};
  std::vector<const char*> names = implementations({{&group, 1}, Compute::kFP8});
  names.push_back("ref");
  for (const char* name : names) {
    std::ranges::fill(y, kInfinity);
    run_as(name, 1, {{&group, 1}, Compute::kFP8});
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t col = column[static_cast<size_t>(i)];
        const float scale =
            weight->scale_inv[static_cast<size_t>(j / kScaleBlock * 5 + col / kScaleBlock)];
        const float want =
            x[static_cast<size_t>(i * k + col)] * element_as_f32(view, j * k + col) * scale;
        ASSERT_NEAR(y[static_cast<size_t>(i * n + j)], want, 1e-6 * std::fabs(want))
            << name << " row " << i << " column " << j;
      }
    }
  }
}

// A call with groups of every kind: heads as slices of a wider x and y, experts nobody chose, few
// and many tokens, one x for several weights. Also for comparing the bits of several runs.
struct ManyGroups {
  std::vector<std::unique_ptr<OwnedWeight>> weights;
  std::vector<std::vector<float>> inputs;
  std::vector<float> y;
  std::vector<MatmulGroup> groups;

  // `only`: the type of all weights, aligned then; absent: a mixture.
  ManyGroups(Rng& rng, std::optional<DType> only, bool absolutes) {
    const auto weight = [&](DType dtype, int64_t n, int64_t k) {
      return random_weight(rng, only.value_or(dtype), n, k, only.has_value() ? 0 : 1);
    };
    const auto keep = [&](std::unique_ptr<OwnedWeight> owned) {
      weights.push_back(absolutes ? absolute(*owned) : std::move(owned));
      return weights.back()->w;
    };
    const auto input = [&](int64_t count) {
      std::vector<float> values = random_floats(rng, count);
      inputs.push_back(absolutes ? absolute(values) : values);
      return inputs.back().data();
    };
    struct Place {
      size_t group;
      int64_t offset;
    };
    std::vector<Place> places;
    int64_t y_size = 0;
    const auto add = [&](const float* x, int64_t ldx, int64_t m, Weight w, int64_t offset,
                         int64_t ldy) {
      places.push_back({groups.size(), offset});
      groups.push_back({x, ldx, m, w, nullptr, ldy});
    };
    for (const int64_t m : {5, 40, 70}) {
      const float* x = input(m * 4 * 70);
      for (int64_t head = 0; head < 4; ++head) {
        add(x + head * 70, 4 * 70, m, keep(weight(kWeightTypes[head], 37, 70)), y_size + head * 37,
            4 * 37);
      }
      y_size += m * 4 * 37;
    }
    for (const int64_t m : {0, 1, 3, 9, 30, 270, 0}) {
      const float* x = input(m * 300 + 1);
      for (const int64_t n : {200, 131}) {
        add(x, 300, m, keep(weight(kWeightTypes[rng.below(4)], n, 300)), y_size, n + 1);
        y_size += m * (n + 1);
      }
    }
    y = poisoned(y_size);
    for (const Place& place : places) groups[place.group].y = y.data() + place.offset;
  }
};

void check_many_groups(std::optional<DType> only, Compute compute, bool accumulate) {
  const auto outcome = [&](const char* name, int num_threads, bool absolutes) {
    Rng rng(kSeed + 1);
    ManyGroups many(rng, only, absolutes);
    if (accumulate) {
      Rng y_rng(kSeed + 2);
      for (const MatmulGroup& group : many.groups) {
        for (int64_t i = 0; i < group.m; ++i) {
          for (int64_t j = 0; j < group.w.rows; ++j) {
            const float value = y_rng.normal();
            group.y[i * group.ldy + j] = absolutes ? std::fabs(value) : value;
          }
        }
      }
    }
    run_as(name, num_threads, {many.groups, compute, accumulate});
    return many.y;
  };
  const std::vector<float> ref = outcome("ref", 2, false);
  const std::vector<float> bound = outcome("ref", 2, true);
  Rng rng(kSeed + 1);
  const ManyGroups many(rng, only, false);
  for (const char* name : implementations({many.groups, compute, accumulate})) {
    const std::vector<float> y = outcome(name, 1, false);
    expect_close(y, ref, bound, 300 + (accumulate ? 1 : 0), name);
    for (const int num_threads : {2, 3}) {
      const std::vector<float> again = outcome(name, num_threads, false);
      EXPECT_EQ(std::memcmp(y.data(), again.data(), y.size() * sizeof(float)), 0)
          << name << " with " << num_threads << " threads";
    }
  }
}

TEST(Matmul, GroupsAccumulateStridesAndEmptyExperts) {
  for (const bool accumulate : {false, true}) {
    for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
      check_many_groups(std::nullopt, compute, accumulate);
    }
    check_many_groups(DType::kF32, Compute::kF32, accumulate);
    check_many_groups(DType::kBF16, Compute::kBF16, accumulate);
  }
}

TEST(Matmul, ScalesFollowBlocksOf128) {
  Rng rng(kSeed + 3);
  const int64_t n = 300, k = 391;
  for (const int64_t m : {1, 3, 40, 70}) {
    OwnedWeight weight(DType::kF8E4M3, n, k);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) weight.set(i, j, 1.0f);
    }
    for (size_t i = 0; i < weight.scale_inv.size(); ++i)
      weight.scale_inv[i] = static_cast<float>(1u << i);
    // Each row of x picks one column, so y is that element of w.
    std::vector<float> x(static_cast<size_t>(m * k));
    std::vector<int64_t> column;
    for (int64_t i = 0; i < m; ++i) {
      column.push_back(static_cast<int64_t>(rng.below(static_cast<uint64_t>(k))));
      x[static_cast<size_t>(i * k + column.back())] = 1;
    }
    for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
      std::vector<float> y(static_cast<size_t>(m * n));
      const MatmulGroup group = {x.data(), k, m, weight.w, y.data(), n};
      std::vector<const char*> names = implementations({{&group, 1}, compute});
      names.push_back("ref");
      for (const char* name : names) {
        run_as(name, 1, {{&group, 1}, compute});
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            const int64_t block = j / 128 * 4 + column[static_cast<size_t>(i)] / 128;
            ASSERT_EQ(y[static_cast<size_t>(i * n + j)], static_cast<float>(1 << block))
                << name << " " << i << " " << j;
          }
        }
      }
    }
  }
}

TEST(Matmul, EveryBitPatternOfAWeightIsReadExactly) {
  // w = one column of all 256 bytes (fp8) or of spread bit patterns, x = 1: y is w.
  for (const DType dtype : {DType::kF8E4M3, DType::kF16, DType::kBF16}) {
    const int64_t n = dtype == DType::kF8E4M3 ? 256 : 16384;
    OwnedWeight weight(dtype, n, 1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t bits = dtype == DType::kF8E4M3 ? i : 4 * i + 1;
      std::memcpy(weight.bytes.data() + weight.offset + i * dtype_bytes(dtype), &bits,
                  static_cast<size_t>(dtype_bytes(dtype)));
    }
    const TensorView view = {dtype, {n, 1}, weight.w.data};
    for (const int64_t m : {1, 20, 70}) {
      const std::vector<float> x(static_cast<size_t>(m), 1.0f);
      std::vector<float> y(static_cast<size_t>(m * n));
      const MatmulGroup group = {x.data(), 1, m, weight.w, y.data(), n};
      for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
        for (const char* name : implementations({{&group, 1}, compute})) {
          run_as(name, 1, {{&group, 1}, compute});
          for (int64_t i = 0; i < m * n; ++i) {
            float expected = element_as_f32(view, i % n);
            if (compute == Compute::kBF16) expected = bf16_to_f32(f32_to_bf16(expected));
            const float found = y[static_cast<size_t>(i)];
            if (std::isnan(expected)) {
              ASSERT_TRUE(std::isnan(found)) << name << " " << i;
            } else if (compute == Compute::kBF16 &&
                       std::fabs(expected) < std::numeric_limits<float>::min()) {
              ASSERT_TRUE(found == expected || found == 0)
                  << name << " " << i;  // bf16 subnormals may count as zero
            } else {
              ASSERT_EQ(found, expected) << name << " " << i;
            }
          }
        }
      }
    }
  }
}

TEST(Matmul, NanAndInfinityStayInTheirRowAndColumn) {
  Rng rng(kSeed + 4);
  for (const DType dtype : kWeightTypes) {
    for (const int64_t m : {3, 40, 70}) {
      for (const int64_t k : {33, 700}) {
        const int64_t n = 29;
        const auto weight = random_weight(rng, dtype, n, k);
        weight->set(7, k - 1, NAN);
        if (dtype != DType::kF8E4M3) weight->set(13, 5, kInfinity);
        std::vector<float> x = random_floats(rng, m * k);
        x[static_cast<size_t>(1 * k + 2)] = NAN;
        x[static_cast<size_t>(2 * k + 3)] = -kInfinity;
        for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
          std::vector<float> ref(static_cast<size_t>(m * n));
          const MatmulGroup group = {x.data(), k, m, weight->w, ref.data(), n};
          run_as("ref", 1, {{&group, 1}, compute});
          for (const char* name : implementations({{&group, 1}, compute})) {
            std::vector<float> y(static_cast<size_t>(m * n));
            MatmulGroup own = group;
            own.y = y.data();
            run_as(name, 1, {{&own, 1}, compute});
            for (size_t i = 0; i < y.size(); ++i) {
              ASSERT_EQ(std::isnan(y[i]), std::isnan(ref[i])) << name << " " << i;
              ASSERT_EQ(std::isinf(y[i]), std::isinf(ref[i])) << name << " " << i;
              if (std::isinf(ref[i])) {
                ASSERT_EQ(y[i], ref[i]);
              }
            }
            ASSERT_TRUE(std::isnan(y[static_cast<size_t>(7)])) << name;
            ASSERT_FALSE(std::isnan(y[static_cast<size_t>(8)])) << name;
            ASSERT_TRUE(std::isnan(y[static_cast<size_t>(n)])) << name;
          }
        }
      }
    }
  }
}

// Large enough for the GPU's library; of x and y all alignments occur.
TEST(Matmul, LargeProducts) {
  Rng rng(kSeed + 6);
  for (const DType dtype : kWeightTypes) {
    for (const int64_t k : {512, 1001}) {
      const int64_t m = 33, n = 300;
      for (const bool aligned : {true, false}) {
        const auto weight = random_weight(rng, dtype, n, k, aligned ? 0 : 1);
        const auto abs_weight = absolute(*weight);
        const int64_t ldx = aligned ? k + 7 - (k - 1) % 8 : k + 1, ldy = aligned ? n + 4 : n + 1;
        const std::vector<float> x = random_floats(rng, m * ldx);
        for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
          for (const bool accumulate : {false, true}) {
            expect_ref(rng, {*weight, *abs_weight, x, m, ldx, ldy, compute, accumulate},
                       [k](std::string_view) { return k + 1; });
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// Rows that fill tiles and whole blocks, and some more.
TEST(Matmul, ManyRows) {
  Rng rng(kSeed + 7);
  constexpr int64_t n = 300, k = 97, ldx = k + 2, ldy = n + 3;
  const auto weight = random_weight(rng, DType::kBF16, n, k, 0);
  const auto abs_weight = absolute(*weight);
  for (const int64_t m : {64, 65, 100, 512, 577}) {
    const std::vector<float> x = random_floats(rng, m * ldx);
    for (const bool accumulate : {false, true}) {
      expect_ref(rng, {*weight, *abs_weight, x, m, ldx, ldy, Compute::kBF16, accumulate},
                 [](std::string_view) { return k + 1; });
      if (HasFatalFailure()) return;
    }
  }
}

// Every row of a batch, of odd shapes and of more groups, has the bits that it has alone.
TEST(Matmul, BatchInvariantRowsDependOnNothingElse) {
  Rng rng(kSeed + 5);
  constexpr int64_t kMostM = 70;
  for (const DType dtype : kWeightTypes) {
    for (const int64_t n : {5, 29, 144}) {
      for (const int64_t k : {1, 33, 64, 130, 700}) {
        const auto weight = random_weight(rng, dtype, n, k),
                   other = random_weight(rng, dtype, n, k);
        const std::vector<float> x = random_floats(rng, kMostM * k),
                                 start = random_floats(rng, kMostM * n);
        for (const Compute compute : {Compute::kF32, Compute::kBF16}) {
          for (const bool accumulate : {false, true}) {
            // The last m rows, so that a row's place differs too.
            const auto rows_of = [&](const char* name, int64_t m) {
              std::vector<float> y = start, other_y = start;
              Exec exec(2);
              exec.forced["matmul"] = name;
              exec.batch_invariant = true;
              const int64_t skip = kMostM - m;
              const MatmulGroup groups[] = {
                  {x.data(), k, m, other->w, other_y.data(), n},
                  {x.data() + skip * k, k, m, weight->w, y.data() + skip * n, n}};
              matmul(exec, {std::span(groups).last(m % 2 == 0 ? 2 : 1), compute, accumulate});
              return y;
            };
            for (const char* name : {"avx512bf16", "avx512", "avx2", "ref"}) {
              const std::vector<const char*> supported = implementations({{}, compute});
              if (std::string_view(name) != "ref" &&
                  std::find(supported.begin(), supported.end(), std::string_view(name)) ==
                      supported.end())
                continue;
              const std::vector<float> all = rows_of(name, kMostM);
              for (const int64_t m : {1, 2, 3, 7, 8, 9, 16, 17, 33, 64}) {
                const std::vector<float> some = rows_of(name, m);
                ASSERT_EQ(std::memcmp(some.data() + (kMostM - m) * n, all.data() + (kMostM - m) * n,
                                      static_cast<size_t>(m * n) * sizeof(float)),
                          0)
                    << name << " " << dtype_name(dtype)
                    << (compute == Compute::kBF16 ? " bf16" : "")
                    << (accumulate ? " accumulate" : "") << " n " << n << " k " << k << " m " << m;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Matmul, ExpertsAreGroupsOfTheirRows) {
  for (const OpImpl<MatmulExpertsArgs>& impl : matmul_experts_impls()) {
    if (!can_run(impl.device)) continue;
    Rng rng(kSeed + 5);
    for (const DType dtype : kWeightTypes) {
      for (const Compute compute : {Compute::kF32, Compute::kBF16, Compute::kFP8}) {
        for (const std::vector<int32_t>& rows : std::vector<std::vector<int32_t>>{
                 {0, 0, 0}, {1, 0, 0}, {0, 3, 1, 0, 0}, {2, 2, 9, 40}, {0, 300, 17, 0, 1, 130}}) {
          const int64_t n = 131, k = 150, num_experts = static_cast<int64_t>(rows.size());
          std::vector<int32_t> row_begin = {0};
          for (const int32_t count : rows) row_begin.push_back(row_begin.back() + count);
          const int64_t total = row_begin.back(), ldx = k + 2, ldy = n + 3;
          std::vector<std::unique_ptr<OwnedWeight>> owned;
          std::vector<Weight> weights, abs_weights;
          for (int64_t e = 0; e < 2 * num_experts; ++e) {
            owned.push_back(random_weight(rng, dtype, n, k, dtype == DType::kF8E4M3 ? 0 : 16));
            weights.push_back(owned.back()->w);
          }
          for (int64_t e = 0; e < 2 * num_experts; ++e) {
            owned.push_back(absolute(*owned[static_cast<size_t>(e)]));
            abs_weights.push_back(owned.back()->w);
          }
          const std::vector<float> x = random_floats(rng, total * ldx + 1), abs_x = absolute(x);
          std::vector<float> y = poisoned(2 * total * ldy), ref = y, bound = y;
          const auto groups = [&](const std::vector<float>& from, const std::vector<Weight>& of,
                                  std::vector<float>& to) {
            std::vector<MatmulGroup> list;
            for (int64_t e = 0; e < 2 * num_experts; ++e) {
              const int64_t begin = row_begin[static_cast<size_t>(e % num_experts)];
              list.push_back({from.data() + begin * ldx, ldx,
                              rows[static_cast<size_t>(e % num_experts)],
                              of[static_cast<size_t>(e)],
                              to.data() + (e / num_experts * total + begin) * ldy, ldy});
            }
            run_as("ref", 1, {list, compute});
          };
          groups(x, weights, ref);
          groups(abs_x, abs_weights, bound);
          const std::span<const Weight> all = weights;
          const size_t experts = static_cast<size_t>(num_experts);
          const ExpertProduct products[] = {
              {x.data(), ldx, all.first(experts), nullptr, y.data(), ldy},
              {x.data(), ldx, all.last(experts), nullptr, y.data() + total * ldy, ldy}};
          run_on<MatmulExpertsArgs>(impl.device, matmul_experts, "matmul_experts", impl.name,
                                    {products, row_begin.data(), total, compute}, 2);
          expect_close(y, ref, bound, k + 2,
                       fmt::format("{} {} rows {} {}", impl.name, dtype_name(dtype), total,
                                   compute_name(compute)));
        }
      }
    }
  }
}

TEST(Matmul, RefIsTheFormula) {
  // 2 x 3 by hand: x = [1 2 3; 4 5 6], w = [1 0 -1; 0.5 0.5 0.5].
  const std::vector<float> x = {1, 2, 3, 4, 5, 6};
  OwnedWeight weight(DType::kBF16, 2, 3);
  const float w[] = {1, 0, -1, 0.5, 0.5, 0.5};
  for (int64_t i = 0; i < 6; ++i) weight.set(0, i, w[i]);
  std::vector<float> y = {10, 20, 30, 40};
  const MatmulGroup group = {x.data(), 3, 2, weight.w, y.data(), 2};
  run_as("ref", 1, {{&group, 1}, Compute::kF32});
  EXPECT_EQ(y, (std::vector<float>{-2, 3, -2, 7.5}));
  run_as("ref", 1, {{&group, 1}, Compute::kF32, true});
  EXPECT_EQ(y, (std::vector<float>{-4, 6, -4, 15}));
}

TEST(Matmul, ForcingAnUnknownImplementationSaysWhichThereAre) {
  const MatmulArgs args;
  try {
    run_as("fastest", 1, args);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("ref"), std::string::npos) << error.what();
  }
}

TEST(Matmul, CostCountsEveryOperandOnce) {
  Weight w;
  w.dtype = DType::kBF16;
  w.rows = 3;
  w.cols = 5;
  const MatmulGroup group = {nullptr, 5, 2, w, nullptr, 3};
  const Cost cost = matmul_cost({{&group, 1}});
  EXPECT_EQ(cost.flops, 2 * 2 * 3 * 5);
  EXPECT_EQ(cost.bytes, 4 * 2 * 5 + 2 * 3 * 5 + 4 * 2 * 3);
}

}  // namespace
}  // namespace indexcache
