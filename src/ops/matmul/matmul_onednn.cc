// matmul by oneDNN (version 2.6), which is how tiles (AMX) are used, and what serves CPUs without
// AVX2.
//
// oneDNN is only asked for products of one thread: the split is ours, so that the library never
// starts OpenMP threads, whose waiting is up to 100 times slower on a busy machine.
#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/checked.h"
#include "device/cpu_features.h"
#include "ops/matmul/matmul_impl.h"
#include "ops/matmul/matmul_kernels.h"

namespace indexcache {

namespace {

using dnnl::memory;

constexpr int64_t kItemRows = 256;  // of w
constexpr int64_t kItemTokens = 512;
constexpr int64_t kRowsAtOnce = 32;  // that are rounded
constexpr int64_t kMinTilesM = 64;   // fewer rows of x do not fill the tiles
// oneDNN compiles code for each number of rows, about 140 KiB of it, and the number of tokens of an
// expert varies without end: bf16 rows, which are copied anyway, are filled up to a multiple.
constexpr int64_t kRowMultiple = 64;

struct ProductShape {
  int64_t m, n, k, ldx, ldy;
  bool bf16, accumulate;
  auto operator<=>(const ProductShape&) const = default;
};

struct Product {
  dnnl::matmul::primitive_desc desc;
  dnnl::matmul primitive;
};

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

std::shared_ptr<const Product> make_product(const ProductShape& shape) {
  const auto type = shape.bf16 ? memory::data_type::bf16 : memory::data_type::f32;
  const memory::desc x({shape.m, shape.k}, type, memory::dims{shape.ldx, 1});
  const memory::desc w({shape.k, shape.n}, type, memory::dims{1, shape.k});
  const memory::desc y({shape.m, shape.n}, memory::data_type::f32, memory::dims{shape.ldy, 1});
  dnnl::primitive_attr attributes;
  // The library's own scratch memory would not be safe for two threads.
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (shape.accumulate) {
    dnnl::post_ops post_ops;
    post_ops.append_sum(1.0f);
    attributes.set_post_ops(post_ops);
  }
  auto product = std::make_shared<Product>();
  product->desc =
      dnnl::matmul::primitive_desc(dnnl::matmul::desc(x, w, y), attributes, cpu_engine());
  product->primitive = dnnl::matmul(product->desc);
  return product;
}

// Made once for each shape, for all threads. The cache is emptied when it is full.
std::shared_ptr<const Product> cached_product(const ProductShape& shape) {
  constexpr size_t kMaxProducts = 512;
  static std::mutex mutex;
  static std::map<ProductShape, std::shared_ptr<const Product>> products;
  const std::lock_guard lock(mutex);
  const auto found = products.find(shape);
  if (found != products.end()) return found->second;
  if (products.size() == kMaxProducts) products.clear();
  return products.emplace(shape, make_product(shape)).first->second;
}

// Of the calling thread, while it lives.
struct OneOpenMpThread {
  const int before = omp_get_max_threads();
  OneOpenMpThread() { omp_set_num_threads(1); }
  ~OneOpenMpThread() { omp_set_num_threads(before); }
};

struct Item {
  const MatmulGroup* group = nullptr;
  const void* x = nullptr;
  std::shared_ptr<const Product> product;
  int64_t row = 0;  // of w
  int64_t token = 0;
  int64_t num_tokens = 0;
  bool filled_up = false;  // the product has more rows, and goes to scratch memory
};

void run_item(const Item& item, bool accumulate, int64_t element_bytes, Exec& exec, int thread) {
  const MatmulGroup& group = *item.group;
  const auto& desc = item.product->desc;
  const int64_t n = desc.dst_desc().dims()[1];
  const size_t y_bytes = item.filled_up ? desc.dst_desc().get_size() : 0;
  uint8_t* scratch = exec.scratch(thread, y_bytes + desc.scratchpad_desc().get_size());
  float* const y = group.y + item.token * group.ldy + item.row;
  float* const filled = reinterpret_cast<float*>(scratch);
  const dnnl::engine& engine = cpu_engine();
  dnnl::stream stream(engine);
  const auto at = [&](const memory::desc& memory_desc, const void* data) {
    return memory(memory_desc, engine, const_cast<void*>(data));
  };
  const OneOpenMpThread one;
  item.product->primitive.execute(
      stream, {{DNNL_ARG_SRC, at(desc.src_desc(), item.x)},
               {DNNL_ARG_WEIGHTS,
                at(desc.weights_desc(), group.w.data + item.row * group.w.cols * element_bytes)},
               {DNNL_ARG_DST, at(desc.dst_desc(), item.filled_up ? filled : y)},
               {DNNL_ARG_SCRATCHPAD, at(desc.scratchpad_desc(), scratch + y_bytes)}});
  stream.wait();
  if (!item.filled_up) return;
  for (int64_t m = 0; m < item.num_tokens; ++m) {
    for (int64_t i = 0; i < n; ++i) {
      float& to = y[m * group.ldy + i];
      to = accumulate ? to + filled[m * n + i] : filled[m * n + i];
    }
  }
}

}  // namespace

bool matmul_onednn_supported(const MatmulArgs& args) {
  const bool bf16 = args.compute == Compute::kBF16;
  if (args.batch_invariant) return false;  // it blocks by the whole shape
  if (args.compute == Compute::kFP8) return false;
  if (bf16 && !cpu_features().avx512_bf16) return false;
  return std::all_of(args.groups.begin(), args.groups.end(), [&](const MatmulGroup& group) {
    const Weight& w = group.w;
    const auto alignment = static_cast<uintptr_t>(dtype_bytes(w.dtype));
    return w.dtype == (bf16 ? DType::kBF16 : DType::kF32) && w.cols > 0 &&
           reinterpret_cast<uintptr_t>(w.data) % alignment == 0 &&
           (group.m <= 1 || group.ldy >= w.rows);
  });
}

bool matmul_onednn_tiles_supported(const MatmulArgs& args) {
  return cpu_features().amx_bf16 && args.compute == Compute::kBF16 &&
         matmul_onednn_supported(args) &&
         std::all_of(args.groups.begin(), args.groups.end(),
                     [](const MatmulGroup& group) { return group.m >= kMinTilesM; });
}

void matmul_onednn(Exec& exec, const MatmulArgs& args) {
  const bool bf16 = args.compute == Compute::kBF16;
  const int64_t element_bytes = bf16 ? 2 : 4;
  const MatmulKernels& kernels = avx512bf16::kMatmulKernels;  // for bf16
  const auto row_words = [&](int64_t k) {
    return round_up(ceil_div(k, int64_t{2}), kernels.lanes);
  };

  int64_t num_words = 0, num_rows = 0;
  std::vector<int64_t> offsets, first_rows;  // of each group's x in bf16
  for (const MatmulGroup& group : args.groups) {
    offsets.push_back(num_words);
    first_rows.push_back(num_rows);
    num_words += round_up(group.m, kRowMultiple) * row_words(group.w.cols);
    num_rows += group.m;
  }
  float* rounded = nullptr;
  if (bf16) {
    rounded = reinterpret_cast<float*>(exec.shared_scratch(static_cast<size_t>(num_words) * 4));
    exec.pool.parallel_for(ceil_div(num_rows, kRowsAtOnce), [&](int64_t block, int) {
      const int64_t end = std::min(num_rows, (block + 1) * kRowsAtOnce);
      for (int64_t row = block * kRowsAtOnce; row < end;) {
        const auto index = static_cast<size_t>(
            std::upper_bound(first_rows.begin(), first_rows.end(), row) - first_rows.begin() - 1);
        const MatmulGroup& group = args.groups[index];
        const int64_t first = row - first_rows[index], count = std::min(group.m - first, end - row);
        kernels.pack_rows({group.x + first * group.ldx, group.ldx, count, group.w.cols, true,
                           rounded + offsets[index] + first * row_words(group.w.cols)});
        row += count;
      }
    });
  }

  std::vector<Item> items;
  for (size_t index = 0; index < args.groups.size(); ++index) {
    const MatmulGroup& group = args.groups[index];
    const int64_t k = group.w.cols;
    const int64_t ldx = bf16 ? 2 * row_words(k) : std::max(group.ldx, k);
    for (int64_t token = 0; token < group.m; token += kItemTokens) {
      const int64_t num_tokens = std::min(kItemTokens, group.m - token);
      // Fewer rows than fill the tiles take but so many shapes.
      const bool fills_up = bf16 && group.m >= kMinTilesM;
      const int64_t m = fills_up ? round_up(num_tokens, kRowMultiple) : num_tokens;
      const bool filled_up = m > num_tokens;
      const void* x = bf16 ? static_cast<const void*>(rounded + offsets[index] + token * ldx / 2)
                           : group.x + token * ldx;
      for (int64_t row = 0; row < group.w.rows; row += kItemRows) {
        const int64_t n = std::min(kItemRows, group.w.rows - row);
        const int64_t ldy = filled_up ? n : std::max(group.ldy, group.w.rows);
        const ProductShape shape = {m, n, k, ldx, ldy, bf16, args.accumulate && !filled_up};
        items.push_back({&group, x, cached_product(shape), row, token, num_tokens, filled_up});
      }
    }
  }
  exec.pool.parallel_for(static_cast<int64_t>(items.size()), [&](int64_t index, int thread) {
    run_item(items[static_cast<size_t>(index)], args.accumulate, element_bytes, exec, thread);
  });
}

}  // namespace indexcache
