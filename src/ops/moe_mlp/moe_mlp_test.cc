// Every implementation of moe_gate_up and moe_down against ref.
#include "ops/moe_mlp/moe_mlp.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/checked.h"
#include "ops/kit/fp8_rows.h"
#include "ops/kit/testing.h"
#include "tensor/tensor.h"

namespace indexcache {

namespace {

constexpr int64_t kGuard = 64;
constexpr uint16_t kPoison = 0x5A5A;

std::vector<uint16_t> random_bf16(Rng& rng, int64_t count, float scale = 1) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  for (uint16_t& value : values) value = f32_to_bf16(scale * rng.normal());
  return values;
}

std::vector<float> as_f32(std::span<const uint16_t> values) {
  std::vector<float> floats;
  for (const uint16_t value : values) floats.push_back(bf16_to_f32(value));
  return floats;
}

int64_t num_scales(const Weight& w) {
  return w.dtype == DType::kF8E4M3 ? ceil_div(w.rows, kFp8Block) * ceil_div(w.cols, kFp8Block) : 0;
}

// A matrix for each expert, one after another.
struct Matrices {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<Weight> weights;

  Matrices(Rng& rng, DType dtype, int64_t num_experts, int64_t n, int64_t k) {
    const Weight shape = {dtype, n, k};
    for (int64_t i = 0; i < num_experts * n * k; ++i) {
      const float value = rng.normal();
      if (dtype == DType::kF8E4M3) {
        bytes.push_back(f32_to_f8e4m3(value));
      } else {
        const uint16_t bits = f32_to_bf16(value);
        bytes.push_back(static_cast<uint8_t>(bits));
        bytes.push_back(static_cast<uint8_t>(bits >> 8));
      }
    }
    for (int64_t i = 0; i < num_experts * num_scales(shape); ++i)
      scales.push_back(static_cast<float>(std::exp2(4 * rng.uniform() - 2)));
    for (int64_t e = 0; e < num_experts; ++e) {
      Weight w = shape;
      w.data = bytes.data() + e * n * k * dtype_bytes(dtype);
      if (dtype == DType::kF8E4M3) w.scale_inv = scales.data() + e * num_scales(shape);
      weights.push_back(w);
    }
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;

  double at(int64_t e, int64_t row, int64_t col) const {
    const Weight& w = weights[static_cast<size_t>(e)];
    const float value = element_as_f32({w.dtype, {w.rows, w.cols}, w.data}, row * w.cols + col);
    if (w.scale_inv == nullptr) return value;
    return static_cast<double>(value) *
           w.scale_inv[row / kFp8Block * ceil_div(w.cols, kFp8Block) + col / kFp8Block];
  }
};

void to_device(DeviceOperands& device, ExpertMatrices& matrices) {
  std::vector<Weight> weights(matrices.weights.begin(), matrices.weights.end());
  const int64_t bytes = dtype_bytes(weights[0].dtype) * weights[0].rows * weights[0].cols,
                count = static_cast<int64_t>(weights.size());
  const uint8_t* all = weights[0].data;  // one stretch, so that they lie there as here
  device.elements(all, count * bytes);
  const float* all_scales = weights[0].scale_inv;
  if (all_scales != nullptr) device.elements(all_scales, count * num_scales(weights[0]));
  for (Weight& w : weights) {
    device.elements(w.data, bytes);
    if (w.scale_inv != nullptr) device.elements(w.scale_inv, num_scales(w));
  }
  matrices.device_weights = device.upload(weights);
  matrices.weights = device.keep(std::move(weights));
}

}  // namespace

static MoeGateUpArgs to_device(DeviceOperands& device, MoeGateUpArgs args) {
  const Weight w = args.gate.weights[0];
  const int64_t num_experts = static_cast<int64_t>(args.gate.weights.size());
  device.elements(args.x, args.num_tokens * w.cols);
  device.elements(args.tokens, args.rows.num_rows);
  device.elements(args.rows.row_begin, num_experts + 1);
  to_device(device, args.gate);
  to_device(device, args.up);
  device.elements(args.y, args.rows.num_rows * w.rows + kGuard);
  return args;
}

static MoeDownArgs to_device(DeviceOperands& device, MoeDownArgs args) {
  const Weight w = args.down.weights[0];
  const int64_t num_experts = static_cast<int64_t>(args.down.weights.size());
  device.elements(args.x, args.rows.num_rows * w.cols);
  device.elements(args.rows.row_begin, num_experts + 1);
  to_device(device, args.down);
  device.elements(args.y, args.rows.num_rows * w.rows + kGuard);
  return args;
}

namespace {

struct Shape {
  std::vector<int32_t> rows;  // of each expert
  int64_t n, k, num_tokens;
  DType dtype = DType::kBF16;
};

std::vector<Shape> shapes() {
  std::vector<Shape> list = {
      {{0, 0, 1, 0}, 24, 8, 1},
      {{1, 0, 0, 2, 1}, 40, 72, 3},
      {{0, 9, 8, 0, 7, 17}, 136, 264, 11},
      {{70, 0, 1, 129}, 264, 136, 90},
  };
  if (!kCudaIsEmulated && can_run(Device::kCuda)) {
    list.push_back({{300, 0, 128, 64, 65, 1, 0, 257}, 520, 1032, 400});
    list.push_back({std::vector<int32_t>(65, 150), 1536, 2048, 2048});
  }
  std::vector<Shape> fp8 = list;
  for (Shape& shape : fp8) {
    shape.k = (shape.k + 15) / 16 * 16;
    shape.dtype = DType::kF8E4M3;
  }
  list.insert(list.end(), fp8.begin(), fp8.end());
  return list;
}

struct Problem {
  int64_t n, k, num_experts, num_rows, num_tokens;
  std::vector<int32_t> row_begin = {0}, tokens;
  std::vector<uint16_t> x, y;
  Matrices first, second;

  Problem(Rng& rng, const Shape& shape, int64_t x_rows)
      : n(shape.n),
        k(shape.k),
        num_experts(static_cast<int64_t>(shape.rows.size())),
        num_rows(std::accumulate(shape.rows.begin(), shape.rows.end(), 0)),
        num_tokens(shape.num_tokens),
        x(random_bf16(rng, x_rows * k)),
        y(static_cast<size_t>(num_rows * n + kGuard)),
        first(rng, shape.dtype, num_experts, n, k),
        second(rng, shape.dtype, num_experts, n, k) {
    for (const int32_t rows : shape.rows) row_begin.push_back(row_begin.back() + rows);
    for (int64_t r = 0; r < num_rows; ++r)
      tokens.push_back(static_cast<int32_t>(rng.below(static_cast<uint64_t>(num_tokens))));
  }

  ExpertRows rows() const { return {row_begin.data(), num_rows}; }
  MoeGateUpArgs gate_up() {
    return {x.data(),
            num_tokens,
            tokens.data(),
            rows(),
            {first.weights, nullptr},
            {second.weights, nullptr},
            y.data()};
  }
  MoeDownArgs down() { return {x.data(), rows(), {first.weights, nullptr}, y.data()}; }

  // The rows of y, after a look at what lies behind them.
  template <class Args>
  std::vector<float> run(const OpImpl<Args>& impl, void (*op)(Exec&, const Args&), const char* name,
                         const Args& args) {
    std::fill(y.begin(), y.end(), kPoison);
    run_on<Args>(impl.device, op, name, impl.name, args, 2);
    for (int64_t i = num_rows * n; i < num_rows * n + kGuard; ++i)
      EXPECT_EQ(y[static_cast<size_t>(i)], kPoison) << impl.name;
    return as_f32(std::span(y).first(static_cast<size_t>(num_rows * n)));
  }
};

// A row of x as products with `w` take it.
std::vector<float> input_row(const uint16_t* x, const Matrices& w) {
  std::vector<float> row;
  for (int64_t i = 0; i < w.weights[0].cols; ++i) row.push_back(bf16_to_f32(x[i]));
  if (w.weights[0].dtype == DType::kF8E4M3)
    round_to_fp8_blocks(row.data(), static_cast<int64_t>(row.size()));
  return row;
}

// <x, w>, and the bound of its error: 2 k 2^-24 sum |x w|, and with e4m3 5 * 33 * 2^-13 of the same
// sum, which no largest product of a block exceeds.
struct Product {
  double value = 0, error = 0;
};
Product product(const std::vector<float>& x, const Matrices& w, int64_t e, int64_t row) {
  Product p;
  for (size_t i = 0; i < x.size(); ++i) {
    const double term = static_cast<double>(x[i]) * w.at(e, row, static_cast<int64_t>(i));
    p.value += term;
    p.error += std::abs(term);
  }
  p.error *= 2 * static_cast<double>(x.size() + 2) * kHalfUlp +
             (w.weights[0].dtype == DType::kF8E4M3 ? 5 * 33 * 0x1p-13 : 0);
  return p;
}

double with_rounding(double value, double error) {
  return error + 0x1p-8 * (std::abs(value) + error) + 0x1p-110;
}

template <class Args>
std::vector<const OpImpl<Args>*> able(std::span<const OpImpl<Args>> impls, const Args& args) {
  std::vector<const OpImpl<Args>*> list;
  for (const OpImpl<Args>& impl : impls) {
    if (std::string_view(impl.name) == "ref" || !can_run(impl.device)) continue;
    if (impl.supported(args)) {
      list.push_back(&impl);
    } else {
      std::printf("skipped: %s does not take these arguments on this machine\n", impl.name);
    }
  }
  return list;
}

// In double, but only the rows that a test has time for.
int64_t checked_row_step(const Problem& p) {
  return std::max<int64_t>(1, p.num_rows * p.n * p.k / (int64_t{1} << 28));
}

TEST(MoeMlp, GateUpAgreesWithRef) {
  Rng rng(printed_seed());
  for (const Shape& shape : shapes()) {
    Problem p(rng, shape, shape.num_tokens);
    const auto impls = able(moe_gate_up_impls(), p.gate_up());
    if (impls.empty()) continue;
    const int64_t step = checked_row_step(p);
    std::vector<float> want, bound;
    for (int64_t e = 0; e < p.num_experts; ++e) {
      for (int64_t r = p.row_begin[static_cast<size_t>(e)];
           r < p.row_begin[static_cast<size_t>(e + 1)]; ++r) {
        if (r % step != 0) continue;
        const std::vector<float> x =
            input_row(p.x.data() + p.tokens[static_cast<size_t>(r)] * p.k, p.first);
        for (int64_t i = 0; i < p.n; ++i) {
          const Product gate = product(x, p.first, e, i), up = product(x, p.second, e, i);
          const double silu = gate.value / (1 + std::exp(-gate.value));
          const double error = 1.1 * gate.error * (std::abs(up.value) + up.error) +
                               std::abs(silu) * up.error +
                               16 * kHalfUlp * std::abs(silu * up.value);
          want.push_back(static_cast<float>(silu * up.value));
          bound.push_back(static_cast<float>(with_rounding(silu * up.value, error)));
        }
      }
    }
    for (const OpImpl<MoeGateUpArgs>* impl : impls) {
      const std::vector<float> all = p.run(*impl, moe_gate_up, "moe_gate_up", p.gate_up());
      std::vector<float> got;
      for (int64_t r = 0; r < p.num_rows; r += step)
        got.insert(got.end(), all.begin() + r * p.n, all.begin() + (r + 1) * p.n);
      EXPECT_TRUE(all_close(got, want, [&](size_t i) { return bound[i]; }))
          << impl->name << " n " << p.n << " k " << p.k << " rows " << p.num_rows;
    }
  }
}

TEST(MoeMlp, DownAgreesWithRef) {
  Rng rng(printed_seed());
  for (const Shape& shape : shapes()) {
    Problem p(rng, shape, std::accumulate(shape.rows.begin(), shape.rows.end(), 0));
    const auto impls = able(moe_down_impls(), p.down());
    if (impls.empty()) continue;
    const int64_t step = checked_row_step(p);
    std::vector<float> want, bound;
    for (int64_t e = 0; e < p.num_experts; ++e) {
      for (int64_t r = p.row_begin[static_cast<size_t>(e)];
           r < p.row_begin[static_cast<size_t>(e + 1)]; ++r) {
        if (r % step != 0) continue;
        const std::vector<float> x = input_row(p.x.data() + r * p.k, p.first);
        for (int64_t i = 0; i < p.n; ++i) {
          const Product one = product(x, p.first, e, i);
          want.push_back(static_cast<float>(one.value));
          bound.push_back(static_cast<float>(with_rounding(one.value, one.error)));
        }
      }
    }
    for (const OpImpl<MoeDownArgs>* impl : impls) {
      const std::vector<float> all = p.run(*impl, moe_down, "moe_down", p.down());
      std::vector<float> got;
      for (int64_t r = 0; r < p.num_rows; r += step)
        got.insert(got.end(), all.begin() + r * p.n, all.begin() + (r + 1) * p.n);
      EXPECT_TRUE(all_close(got, want, [&](size_t i) { return bound[i]; }))
          << impl->name << " n " << p.n << " k " << p.k << " rows " << p.num_rows;
    }
  }
}

// ref is what the formulas say, and rows see their own token, expert and nothing else.
class MoeMlpRef : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Types, MoeMlpRef, testing::Values(DType::kBF16, DType::kF8E4M3),
                         [](const auto& type) { return std::string(dtype_name(type.param)); });
TEST_P(MoeMlpRef, IsTheFormula) {
  Rng rng(printed_seed());
  Problem p(rng, {{2, 0, 3}, 16, 144, 4, GetParam()}, 5);
  const std::vector<float> down = p.run(moe_down_impls().back(), moe_down, "moe_down", p.down());
  const std::vector<float> gated =
      p.run(moe_gate_up_impls().back(), moe_gate_up, "moe_gate_up", p.gate_up());
  for (int64_t r = 0; r < 5; ++r) {
    const int64_t e = r < 2 ? 0 : 2;
    for (int64_t i = 0; i < p.n; ++i) {
      const size_t at = static_cast<size_t>(r * p.n + i);
      const std::vector<float> row = input_row(p.x.data() + r * p.k, p.first);
      EXPECT_EQ(down[at],
                bf16_to_f32(f32_to_bf16(static_cast<float>(product(row, p.first, e, i).value))));
      const std::vector<float> x =
          input_row(p.x.data() + p.tokens[static_cast<size_t>(r)] * p.k, p.first);
      const double gate = product(x, p.first, e, i).value, up = product(x, p.second, e, i).value;
      EXPECT_EQ(gated[at],
                bf16_to_f32(f32_to_bf16(static_cast<float>(gate / (1 + std::exp(-gate)) * up))));
    }
  }
}

TEST(MoeMlp, NanStaysInItsRow) {
  Rng rng(printed_seed());
  for (const OpImpl<MoeDownArgs>& impl : moe_down_impls()) {
    for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
      Problem p(rng, {{3, 30, 0, 20}, 40, 144, 5, dtype}, 53);
      if (!can_run(impl.device) || !impl.supported(p.down())) continue;
      p.x[static_cast<size_t>(10 * p.k + 5)] = f32_to_bf16(kNan);
      const std::vector<float> got = p.run(impl, moe_down, "moe_down", p.down());
      for (size_t i = 0; i < got.size(); ++i)
        EXPECT_EQ(std::isnan(got[i]), static_cast<int64_t>(i) / p.n == 10) << impl.name << " " << i;
    }
  }
}

TEST(MoeMlp, TheSameArgumentsGiveTheSameBits) {
  Rng rng(printed_seed());
  for (const OpImpl<MoeGateUpArgs>& impl : moe_gate_up_impls()) {
    for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
      Problem p(rng, {{3, 40, 0, 21}, 40, 144, 50, dtype}, 50);
      if (!can_run(impl.device) || !impl.supported(p.gate_up())) continue;
      const std::vector<float> first = p.run(impl, moe_gate_up, "moe_gate_up", p.gate_up());
      EXPECT_TRUE(same_bits(p.run(impl, moe_gate_up, "moe_gate_up", p.gate_up()), first))
          << impl.name;
    }
  }
}

}  // namespace
}  // namespace indexcache
