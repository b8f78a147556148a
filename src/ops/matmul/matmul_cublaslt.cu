// matmul through NVIDIA's cuBLASLt, loaded when it is first asked for and never linked: it is half
// a gigabyte, and a machine may have a GPU without it.
//
// Products of few rows, and the many small ones of single heads, go to our own kernels, which take
// them in one launch. So does what the library has no algorithm for.
#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "base/checked.h"
#include "base/log.h"
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
  if (status != CUBLAS_STATUS_SUCCESS)
    fail("cuBLASLt: {}: status {}", what, static_cast<int>(status));
}

// y = x w^T by rows is y^T = w^T' x^T by columns: the library sees w as [k, n], to be transposed, x
// as [k, m] and y as [n, m].
struct Plan {
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm;
  bool found = false;
};

using Key = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t>;

// Kept for the life of the program: a model has few shapes.
Plan& plan_for(bool bf16, int64_t m, int64_t n, int64_t k, int64_t ldw, int64_t ldx, int64_t ldy,
               uint32_t y_alignment) {
  static std::map<Key, Plan> plans;
  const auto [at, is_new] = plans.try_emplace(Key{bf16, m, n, k, ldw, ldx, ldy, y_alignment});
  Plan& plan = at->second;
  if (!is_new) return plan;
  const Library& lt = *library();
  const cudaDataType_t type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  check_lt(lt.desc_create(&plan.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product");
  check_lt(lt.desc_set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof(transposed)),
           "a product");
  check_lt(lt.layout_create(&plan.w, type, static_cast<uint64_t>(k), static_cast<uint64_t>(n), ldw),
           "w");
  check_lt(lt.layout_create(&plan.x, type, static_cast<uint64_t>(k), static_cast<uint64_t>(m), ldx),
           "x");
  check_lt(lt.layout_create(&plan.y, CUDA_R_32F, static_cast<uint64_t>(n), static_cast<uint64_t>(m),
                            ldy),
           "y");
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
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y_alignment),
        std::pair(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y_alignment)}) {
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

// --- operands in the type of the product, rows of `ld` elements ---

constexpr unsigned kConvertThreads = 256;

__device__ __forceinline__ void put(uint16_t* to, float value) {
  *to = static_cast<uint16_t>(f32_to_bf16_bits(value));
}
__device__ __forceinline__ void put(float* to, float value) { *to = value; }

template <class To>
__global__ void __launch_bounds__(kConvertThreads)
    convert_input(const float* x, int64_t ldx, int64_t m, int64_t k, To* to, int64_t ld) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kConvertThreads + threadIdx.x;
  if (i >= m * ld) return;
  const int64_t row = i / ld, col = i % ld;
  put(to + i, col < k ? x[row * ldx + col] : 0.0f);
}

template <DType dtype, class To>
__global__ void __launch_bounds__(kConvertThreads) convert_weight(Weight w, To* to, int64_t ld) {
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

bool is_for_library(const MatmulGroup& group) {
  constexpr int64_t kFewRows = 8, kSmallWeight = 512 * 256;
  return group.m > kFewRows && group.w.rows * group.w.cols > kSmallWeight;
}

// The library reads 16 bytes at a time.
template <class T>
bool is_aligned(const T* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * sizeof(T) % 16 == 0;
}

struct Operand {
  const void* data;
  int64_t ld;
};

// Returns whether the library could do it.
template <class Element>
bool run_group(CudaStream& stream, const MatmulGroup& group, bool accumulate) {
  constexpr bool kBF16 = sizeof(Element) == 2;
  const int64_t k = group.w.cols, ld = round_up(k, static_cast<int64_t>(16 / sizeof(Element)));
  const bool convert_x = kBF16 || !is_aligned(group.x, group.ldx);
  const bool convert_w = group.w.dtype != (kBF16 ? DType::kBF16 : DType::kF32) ||
                         !is_aligned(reinterpret_cast<const Element*>(group.w.data), k);
  const int64_t x_bytes = convert_x ? round_up(group.m * ld * sizeof(Element), int64_t{256}) : 0,
                w_bytes =
                    convert_w ? round_up(group.w.rows * ld * sizeof(Element), int64_t{256}) : 0;
  const Operand own_x{group.x, group.ldx}, own_w{group.w.data, k};
  const Plan& plan =
      plan_for(kBF16, group.m, group.w.rows, k, convert_w ? ld : k, convert_x ? ld : group.ldx,
               group.ldy, is_aligned(group.y, group.ldy) ? 16 : 4);
  if (!plan.found) return false;

  uint8_t* scratch =
      stream.scratch(kWorkspaceBytes + static_cast<size_t>(x_bytes) + static_cast<size_t>(w_bytes));
  Operand x = own_x, w = own_w;
  if (convert_x) {
    Element* to = reinterpret_cast<Element*>(scratch + kWorkspaceBytes);
    launch(convert_input<Element>, blocks_for(group.m * ld, kConvertThreads), kConvertThreads, 0,
           stream, group.x, group.ldx, group.m, k, to, ld);
    x = {to, ld};
  }
  if (convert_w) {
    Element* to = reinterpret_cast<Element*>(scratch + kWorkspaceBytes + x_bytes);
    for_weight_dtype(group.w.dtype, [&]<DType dtype>() {
      launch(convert_weight<dtype, Element>, blocks_for(group.w.rows * ld, kConvertThreads),
             kConvertThreads, 0, stream, group.w, to, ld);
    });
    w = {to, ld};
  }
  const float one = 1, beta = accumulate ? 1.0f : 0.0f;
  check_lt(library()->matmul(library()->handle, plan.desc, &one, w.data, plan.w, x.data, plan.x,
                             &beta, group.y, plan.y, group.y, plan.y, &plan.algorithm, scratch,
                             kWorkspaceBytes, stream_of(stream)),
           "a product");
  return true;
}

}  // namespace

bool matmul_cublaslt_supported(const MatmulArgs& args) {
  return std::any_of(args.groups.begin(), args.groups.end(), is_for_library) &&
         library() != nullptr;
}

void matmul_cublaslt(Exec& exec, const MatmulArgs& args) {
  std::vector<MatmulGroup> ours;
  for (const MatmulGroup& group : args.groups) {
    const bool done =
        is_for_library(group) &&
        (args.compute == Compute::kBF16 ? run_group<uint16_t>(exec.cuda(), group, args.accumulate)
                                        : run_group<float>(exec.cuda(), group, args.accumulate));
    if (!done) ours.push_back(group);
  }
  matmul_cuda(exec, {ours, args.compute, args.accumulate});
}

}  // namespace indexcache
