// matmul through NVIDIA's cuBLASLt, loaded when it is first asked for and never linked: it is half
// a gigabyte, and a machine may have a GPU without it.
//
// Groups of one shape whose operands are evenly spaced, as the heads of a layer are, are one
// batched product. Products of few rows, and small ones, go to our own kernels, which take them in
// one launch. So does what the library has no algorithm for.
#include <cublasLt.h>
#include <dlfcn.h>

#include <compare>
#include <map>
#include <span>
#include <vector>

#include "base/checked.h"
#include "base/log.h"
#include "base/units.h"
#include "device/cuda.h"
#include "ops/kit/cuda.cuh"
#include "ops/matmul/matmul_impl.h"

namespace indexcache {

namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;

struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutSetAttribute) layout_set;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  cublasLtHandle_t handle = nullptr;
};

// Null where it is not installed.
const Library* load_library() {
  void* file = nullptr;
  for (const char* name : {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13",
                           "/usr/local/cuda/lib/libcublasLt.so.13"}) {
    if (file == nullptr) file = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (file == nullptr) {
    info("cuBLASLt 13 was not found: products use our own kernels, which are slower");
    return nullptr;
  }
  static Library library;
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, name));
    complete &= function != nullptr;
  };
  find(library.create, "cublasLtCreate");
  find(library.matmul, "cublasLtMatmul");
  find(library.desc_create, "cublasLtMatmulDescCreate");
  find(library.desc_set, "cublasLtMatmulDescSetAttribute");
  find(library.layout_create, "cublasLtMatrixLayoutCreate");
  find(library.layout_set, "cublasLtMatrixLayoutSetAttribute");
  find(library.preference_create, "cublasLtMatmulPreferenceCreate");
  find(library.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(library.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  if (!complete || library.create(&library.handle) != CUBLAS_STATUS_SUCCESS) {
    info("cuBLASLt does not start: products use our own kernels, which are slower");
    return nullptr;
  }
  return &library;
}

const Library* library() {
  static const Library* loaded = load_library();
  return loaded;
}

void check_lt(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  // Kernels are loaded when first used: where no memory is left for them that is "internal error".
  fail("cuBLASLt: {}: status {}, with {} of GPU memory free", what, static_cast<int>(status),
       format_bytes(cuda_free_bytes()));
}

// y = x w^T by rows is y^T = w^T' x^T by columns: the library sees w as [k, n], to be transposed, x
// as [k, m] and y as [n, m].
struct Plan {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm;
  bool found = false;
};

// What a plan is for; lengths and strides in elements.
struct ProductShape {
  bool bf16, y_bf16;
  int64_t m, n, k, ldw, ldx, ldy;
  int64_t batch, stride_w, stride_x, stride_y;
  uint32_t y_alignment;

  auto operator<=>(const ProductShape&) const = default;
};

cublasLtMatrixLayout_t layout_of(cudaDataType_t type, int64_t rows, int64_t cols, int64_t ld,
                                 int64_t batch, int64_t stride) {
  const Library& lt = *library();
  cublasLtMatrixLayout_t layout;
  check_lt(
      lt.layout_create(&layout, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), ld),
      "a layout");
  const auto count = static_cast<int32_t>(batch);
  check_lt(lt.layout_set(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
           "a layout");
  check_lt(
      lt.layout_set(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof(stride)),
      "a layout");
  return layout;
}

// Kept for the life of the program: a model has few shapes.
Plan& plan_for(const ProductShape& shape) {
  static std::map<ProductShape, Plan> plans;
  const auto [at, is_new] = plans.try_emplace(shape);
  Plan& plan = at->second;
  if (!is_new) return plan;
  const Library& lt = *library();
  const cudaDataType_t type = shape.bf16 ? CUDA_R_16BF : CUDA_R_32F;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check_lt(lt.desc_create(&plan.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product");
  check_lt(lt.desc_set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
           "a product");
  plan.w = layout_of(type, shape.k, shape.n, shape.ldw, shape.batch, shape.stride_w);
  plan.x = layout_of(type, shape.k, shape.m, shape.ldx, shape.batch, shape.stride_x);
  plan.y = layout_of(shape.y_bf16 ? CUDA_R_16BF : CUDA_R_32F, shape.n, shape.m, shape.ldy,
                     shape.batch, shape.stride_y);
  cublasLtMatmulPreference_t preference;
  check_lt(lt.preference_create(&preference), "a preference");
  check_lt(lt.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes,
                             sizeof(kWorkspaceBytes)),
           "a preference");
  // Otherwise it takes 256 for granted.
  const uint32_t alignment = 16;
  for (const auto& [which, bytes] :
       {std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape.y_alignment),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape.y_alignment)}) {
    check_lt(lt.preference_set(preference, which, &bytes, sizeof(bytes)), "a preference");
  }
  cublasLtMatmulHeuristicResult_t result;
  int count = 0;
  const cublasStatus_t status = lt.heuristic(library()->handle, plan.desc, plan.w, plan.x, plan.y,
                                             plan.y, preference, 1, &result, &count);
  plan.found = status == CUBLAS_STATUS_SUCCESS && count > 0;
  if (plan.found) plan.algorithm = result.algo;
  return plan;
}

// --- operands in the type of the product, rows of `ld` elements; of a batch one after the other
// ---

constexpr unsigned kConvertThreads = 256;

__device__ __forceinline__ void put(uint16_t* to, float value) {
  *to = static_cast<uint16_t>(f32_to_bf16_bits(value));
}
__device__ __forceinline__ void put(float* to, float value) { *to = value; }

template <class To>
__global__ void __launch_bounds__(kConvertThreads)
    convert_input(const float* x, int64_t ldx, int64_t stride, int64_t m, int64_t k, To* to,
                  int64_t ld) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvertThreads + threadIdx.x;
  if (i >= m * ld) return;
  const int64_t row = i / ld, col = i % ld;
  put(to + blockIdx.y * m * ld + i, col < k ? x[blockIdx.y * stride + row * ldx + col] : 0.0f);
}

// Rows that can be read and written 16 bytes at a time.
__global__ void __launch_bounds__(kConvertThreads)
    convert_aligned_input(const float* x, int64_t ldx, int64_t stride, int64_t m, int64_t k,
                          uint16_t* to) {
  wait_for_previous();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kConvertThreads + threadIdx.x) * 8;
  if (i >= m * k) return;
  const float4* from =
      reinterpret_cast<const float4*>(x + blockIdx.y * stride + i / k * ldx + i % k);
  const float4 low = from[0], high = from[1];
  *reinterpret_cast<uint4*>(to + blockIdx.y * m * k + i) =
      make_uint4(bf16_pair(low.x, low.y), bf16_pair(low.z, low.w), bf16_pair(high.x, high.y),
                 bf16_pair(high.z, high.w));
}

template <DType dtype, class To>
__global__ void __launch_bounds__(kConvertThreads) convert_weight(Weight w, To* to, int64_t ld) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvertThreads + threadIdx.x;
  if (i >= w.rows * ld) return;
  const int64_t row = i / ld, col = i % ld;
  float value = col < w.cols ? element_at<dtype>(w.data, row * w.cols + col) : 0.0f;
  if constexpr (dtype == DType::kF8E4M3) {
    if (col < w.cols)
      value *=
          w.scale_inv[row / kScaleBlock * ceil_div_cuda(w.cols, kScaleBlock) + col / kScaleBlock];
  }
  put(to + i, value);
}

// The library reads 16 bytes at a time.
template <class T>
bool is_aligned(const T* data, int64_t ld, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * sizeof(T) % 16 == 0 &&
         stride * sizeof(T) % 16 == 0;
}

// Groups of one shape, evenly spaced; strides in elements.
struct Batch {
  MatmulGroup first;
  int64_t count = 1, stride_w = 0, stride_x = 0, stride_y = 0;
};

// From group to group; 0 where there is none.
struct Spacing {
  int64_t x, w, y;
  bool operator==(const Spacing&) const = default;
};
Spacing spacing(const MatmulGroup& a, const MatmulGroup& b) {
  return {a.x16 != nullptr ? b.x16 - a.x16 : b.x - a.x, b.w.data - a.w.data,
          a.y16 != nullptr ? b.y16 - a.y16 : b.y - a.y};
}

bool same_shape(const MatmulGroup& a, const MatmulGroup& b) {
  return a.m == b.m && a.ldx == b.ldx && a.ldy == b.ldy && a.w.dtype == b.w.dtype &&
         a.w.rows == b.w.rows && a.w.cols == b.w.cols && (a.x16 == nullptr) == (b.x16 == nullptr) &&
         (a.y16 == nullptr) == (b.y16 == nullptr);
}

// The groups from `groups[0]` on that are one product of the library.
Batch leading_batch(std::span<const MatmulGroup> groups, Compute compute) {
  Batch batch{groups[0]};
  const MatmulGroup& first = groups[0];
  const bool direct = first.w.dtype == (compute != Compute::kF32 ? DType::kBF16 : DType::kF32);
  if (groups.size() < 2 || !direct || first.m == 0 || !same_shape(first, groups[1])) return batch;
  const Spacing step = spacing(first, groups[1]);
  const int64_t bytes = dtype_bytes(first.w.dtype);
  if (step.x < 0 || step.y <= 0 || step.w <= 0 || step.w % bytes != 0) return batch;
  while (batch.count < static_cast<int64_t>(groups.size()) &&
         same_shape(first, groups[static_cast<size_t>(batch.count)]) &&
         spacing(groups[static_cast<size_t>(batch.count - 1)],
                 groups[static_cast<size_t>(batch.count)]) == step)
    ++batch.count;
  batch.stride_x = step.x;
  batch.stride_y = step.y;
  batch.stride_w = step.w / bytes;
  return batch;
}

// Up to kOwnRows our own kernels read the weights at the memory's rate; small products are not
// worth a launch each.
bool is_for_library(const Batch& batch, Compute compute) {
  constexpr int64_t kOwnRows = 16, kSmallProduct = int64_t{1} << 21;
  const MatmulGroup& group = batch.first;
  return compute_for(compute, group.w.dtype) != Compute::kFP8 && group.m > kOwnRows &&
         batch.count * group.m * group.w.rows * group.w.cols > kSmallProduct;
}

// Returns whether the library could do it.
template <class Element>
bool run_batch(CudaStream& stream, const Batch& batch, bool accumulate) {
  constexpr bool kBF16 = sizeof(Element) == 2;
  const MatmulGroup& group = batch.first;
  const int64_t k = group.w.cols, ld = round_up(k, static_cast<int64_t>(16 / sizeof(Element)));
  const Element* own_w = reinterpret_cast<const Element*>(group.w.data);
  const Element* own_x = reinterpret_cast<const Element*>(
      group.x16 != nullptr ? static_cast<const void*>(group.x16) : group.x);
  const bool x_is_element = kBF16 == (group.x16 != nullptr);
  const bool convert_x = !x_is_element || !is_aligned(own_x, group.ldx, batch.stride_x);
  const bool convert_w = group.w.dtype != (kBF16 ? DType::kBF16 : DType::kF32) ||
                         !is_aligned(own_w, k, batch.stride_w);
  // Ours take rows of bf16 that the library cannot read, and batches of weights that it cannot.
  if (convert_x && group.x16 != nullptr) return false;
  if (convert_w && batch.count > 1) return false;
  const bool y_bf16 = group.y16 != nullptr;
  const bool y_aligned = y_bf16 ? is_aligned(group.y16, group.ldy, batch.stride_y)
                                : is_aligned(group.y, group.ldy, batch.stride_y);
  const ProductShape shape{kBF16,
                           y_bf16,
                           group.m,
                           group.w.rows,
                           k,
                           convert_w ? ld : k,
                           convert_x ? ld : group.ldx,
                           group.ldy,
                           batch.count,
                           batch.stride_w,
                           convert_x ? group.m * ld : batch.stride_x,
                           batch.stride_y,
                           y_aligned ? 16u
                           : y_bf16  ? 2u
                                     : 4u};
  const Plan& plan = plan_for(shape);
  if (!plan.found) return false;

  const int64_t element = sizeof(Element);
  const int64_t x_bytes =
                    convert_x ? round_up(batch.count * group.m * ld * element, int64_t{256}) : 0,
                w_bytes = convert_w ? round_up(group.w.rows * ld * element, int64_t{256}) : 0;
  uint8_t* scratch =
      stream.scratch(kWorkspaceBytes + static_cast<size_t>(x_bytes) + static_cast<size_t>(w_bytes));
  const void *x = own_x, *w = own_w;
  if (convert_x) {
    Element* to = reinterpret_cast<Element*>(scratch + kWorkspaceBytes);
    const auto blocks = [&](int64_t items) {
      return dim3(blocks_for(items, kConvertThreads).x, static_cast<unsigned>(batch.count));
    };
    if (kBF16 && k % 8 == 0 && is_aligned(group.x, group.ldx, batch.stride_x)) {
      launch(convert_aligned_input, blocks(group.m * k / 8), kConvertThreads, 0, stream, group.x,
             group.ldx, batch.stride_x, group.m, k, reinterpret_cast<uint16_t*>(to));
    } else {
      launch(convert_input<Element>, blocks(group.m * ld), kConvertThreads, 0, stream, group.x,
             group.ldx, batch.stride_x, group.m, k, to, ld);
    }
    x = to;
  }
  if (convert_w) {
    Element* to = reinterpret_cast<Element*>(scratch + kWorkspaceBytes + x_bytes);
    for_weight_dtype(group.w.dtype, [&]<DType dtype>() {
      launch(convert_weight<dtype, Element>, blocks_for(group.w.rows * ld, kConvertThreads),
             kConvertThreads, 0, stream, group.w, to, ld);
    });
    w = to;
  }
  void* y = y_bf16 ? static_cast<void*>(group.y16) : group.y;
  const float one = 1, beta = accumulate ? 1.0f : 0.0f;
  check_lt(
      library()->matmul(library()->handle, plan.desc, &one, w, plan.w, x, plan.x, &beta, y, plan.y,
                        y, plan.y, &plan.algorithm, scratch, kWorkspaceBytes, stream_of(stream)),
      "a product");
  return true;
}

// Calls take(batch, its groups) for all groups, in order.
template <class Take>
void for_batches(const MatmulArgs& args, const Take& take) {
  std::span<const MatmulGroup> rest = args.groups;
  while (!rest.empty()) {
    const Batch batch = leading_batch(rest, args.compute);
    const auto count = static_cast<size_t>(batch.count);
    take(batch, rest.first(count));
    rest = rest.subspan(count);
  }
}

}  // namespace

bool matmul_cublaslt_supported(const MatmulArgs& args) {
  bool any = false;
  for_batches(args, [&](const Batch& batch, std::span<const MatmulGroup>) {
    any |= is_for_library(batch, args.compute);
  });
  return any && library() != nullptr;
}

void matmul_cublaslt(Exec& exec, const MatmulArgs& args) {
  std::vector<MatmulGroup> ours;
  for_batches(args, [&](const Batch& batch, std::span<const MatmulGroup> groups) {
    const bool done =
        is_for_library(batch, args.compute) &&
        (args.compute != Compute::kF32 ? run_batch<uint16_t>(exec.cuda(), batch, args.accumulate)
                                       : run_batch<float>(exec.cuda(), batch, args.accumulate));
    if (!done) ours.insert(ours.end(), groups.begin(), groups.end());
  });
  matmul_cuda(exec, {ours, args.compute, args.accumulate});
}

}  // namespace indexcache
