// Matrix products by cuBLASLt: the main path of matmul and linear on a real device (cuda/gemm.cu has the choice).
// Not on the shim: cuBLASLt runs on a card alone; gemm.cu's own kernels, on which every sample runs, take its place.
//
// cuBLASLt is column-major: our row-major c [m, n] is its [n, m], so it computes c^T = b^T a^T with b as its first
// operand. Any of the four transpositions is read in place. What it refuses goes to our own kernel: an operand with no
// unit stride, batches that are not evenly spaced, k = 0, shapes without an algorithm.
//
// A residual is its C, added in f32 before the one rounding (beta = 1). Epilogue: the bias always; gelu_tanh, whose formula is the same as ours; every other activation is a second pass
// (gemm_finish), which then reads z rounded to the dtype. The algorithm is the heuristic's first, kept per problem; in
// split-k only reductions in f32 through the workspace are allowed: the same bits every time on one kind of device.
#include <capo/cuda/gemm.h>
#include <capo/cuda/runtime.h>
#include <capo/engine/backend.h>
#include <capo/engine/error.h>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>

namespace capo {
namespace {

void check(cublasStatus_t status, const char* what) {
  CAPO_CHECK(status == CUBLAS_STATUS_SUCCESS, "matmul: cuBLASLt failed ", what, ": ", cublasLtGetStatusString(status));
}

// A matrix operand as cuBLASLt stores it: [rows, columns], column-major, or its transpose.
struct Stored {
  std::int64_t rows, columns, ld, step;  // step: from one matrix of the batch to the next
  bool transposed;
};

// outer: rows of our a, columns of our b. Wanted untransposed: k-major for a (rows = k), outer-major for b.
std::optional<Stored> stored(bool is_a, std::int64_t outer, std::int64_t k, std::int64_t outer_stride, std::int64_t k_stride,
                             std::int64_t step) {
  const bool along_k = k_stride == 1;
  if (!along_k && outer_stride != 1) return {};
  Stored s{along_k ? k : outer, along_k ? outer : k, along_k ? outer_stride : k_stride, step, along_k != is_a};
  if (s.columns == 1 && s.ld < s.rows) s.ld = s.rows;  // never stepped over
  if (s.ld < s.rows || step < 0) return {};
  return s;
}

struct Problem {
  Stored first, second;  // our b, our a
  std::int64_t batches;
  cublasLtEpilogue_t epilogue;
  bool aux;              // the epilogue writes z
  bool finish;           // gemm_finish applies the activation
  void* d;
};

std::optional<Problem> describe_problem(const GemmArgs& p, bool fused) {
  if (p.k == 0 || p.matrices == 0 || (p.dtype != f32 && p.dtype != bf16 && p.dtype != f16)) return {};
  // The batch axes must be one: each a whole number of the next.
  for (int i = 0; i + 1 < p.rank; ++i)
    if (p.sa[i] != p.sa[i + 1] * p.batch[i + 1] || p.sb[i] != p.sb[i + 1] * p.batch[i + 1]) return {};
  const int last = p.rank - 1;
  const auto a = stored(true, p.m, p.k, p.a_row, p.a_k, p.rank ? p.sa[last] : 0);
  const auto b = stored(false, p.n, p.k, p.b_col, p.b_k, p.rank ? p.sb[last] : 0);
  if (!a || !b) return {};
  Problem q{*b, *a, p.matrices, p.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT, false, false, p.c};
  if (fused && p.activation == Activation::gelu_tanh) {
    q.aux = p.z != nullptr;
    if (q.aux)
      q.epilogue = p.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    else
      q.epilogue = p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    if (q.aux && (p.n % 8 != 0 || reinterpret_cast<std::uintptr_t>(p.z) % 16 != 0)) return {};
  } else if (p.activation != Activation::none || p.z) {
    q.finish = true;
    if (p.z) q.d = p.z;
  }
  return q;
}

template <class T>
void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof(value)), "setting up a product");
}
template <class T>
void set(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute, const T& value) {
  check(cublasLtMatrixLayoutSetAttribute(layout, attribute, &value, sizeof(value)), "setting up a matrix");
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)), "setting up a search");
}

// The library's descriptors of one call, on the stack.
struct Descriptors {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t first, second, d;

  Descriptors(const GemmArgs& p, const Problem& q) {
    const cudaDataType_t type = p.dtype == f32 ? CUDA_R_32F : p.dtype == bf16 ? CUDA_R_16BF : CUDA_R_16F;
    check(cublasLtMatmulDescInit(&product, p.bf16 ? CUBLAS_COMPUTE_32F_FAST_16BF : CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "setting up a product");
    set(&product, CUBLASLT_MATMUL_DESC_TRANSA, q.first.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(&product, CUBLASLT_MATMUL_DESC_TRANSB, q.second.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE, q.epilogue);
    if (p.bias) set(&product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    if (q.aux) {
      set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.z);
      set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.n);
      set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, p.m * p.n);
    }
    const auto matrix = [&](cublasLtMatrixLayoutOpaque_t& layout, const Stored& s) {
      check(cublasLtMatrixLayoutInit(&layout, type, static_cast<std::uint64_t>(s.rows), static_cast<std::uint64_t>(s.columns), s.ld),
            "setting up a matrix");
      if (q.batches == 1) return;
      set(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, static_cast<std::int32_t>(q.batches));
      set(&layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, s.step);
    };
    matrix(first, q.first);
    matrix(second, q.second);
    matrix(d, {p.n, p.m, p.c_row, p.m * p.c_row, false});  // C as well
  }
};

using gpu::kWorkspace;  // one product at a time runs on a stream, so one serves it

struct Library {
  using Key = std::array<std::int64_t, 23>;

  std::mutex mutex;
  std::map<int, cublasLtHandle_t> handles;                  // by device
  std::map<Key, std::optional<cublasLtMatmulAlgo_t>> algorithms;

  static Library& get() {
    static auto* library = new Library;  // immortal: the driver may be gone before static storage is
    return *library;
  }
  static int device() {
    int index = 0;
    gpu::check_cuda(cudaGetDevice(&index), "matmul: asking for the current device");
    return index;
  }
  cublasLtHandle_t handle(int device) {
    const std::lock_guard lock(mutex);
    cublasLtHandle_t& h = handles[device];
    if (!h) check(cublasLtCreate(&h), "to start");
    return h;
  }
};

// The greatest power of two up to 256 that divides an address.
std::uint32_t alignment(const void* p) {
  std::uint32_t a = 256;
  while (reinterpret_cast<std::uintptr_t>(p) % a != 0) a /= 2;
  return a;
}

std::optional<cublasLtMatmulAlgo_t> search(cublasLtHandle_t handle, const GemmArgs& p, const Problem& q, Descriptors& desc) {
  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), "setting up a search");
  set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  set(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.b));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.a));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.residual ? p.residual : q.d));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(q.d));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, &desc.product, &desc.first, &desc.second, &desc.d, &desc.d,
                                                               &preference, 1, &found, &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0 || found.state != CUBLAS_STATUS_SUCCESS) return {};
  return found.algo;
}

std::optional<cublasLtMatmulAlgo_t> algorithm(int device, cublasLtHandle_t handle, const GemmArgs& p, const Problem& q,
                                              Descriptors& desc) {
  Library& library = Library::get();
  const Library::Key key{device, static_cast<int>(p.dtype), p.bf16, q.epilogue, p.m, p.n, p.k, q.batches,
                         q.first.transposed, q.first.ld, q.first.step, q.second.transposed, q.second.ld, q.second.step,
                         alignment(p.a), alignment(p.b), alignment(q.d), p.bias ? alignment(p.bias) : 0, q.aux ? alignment(p.z) : 0,
                         q.first.rows, q.second.rows, p.c_row, p.residual ? alignment(p.residual) : 0};
  const std::lock_guard lock(library.mutex);
  const auto at = library.algorithms.find(key);
  if (at != library.algorithms.end()) return at->second;
  return library.algorithms.emplace(key, search(handle, p, q, desc)).first->second;
}

// Runs the product, or only says whether it could when `run` is false. Fused first, then without the activation.
bool product(const GemmArgs& p, bool run, void* stream) {
  Library& library = Library::get();
  for (const bool fused : {true, false}) {
    if (!fused && p.activation != Activation::gelu_tanh) break;  // the same problem again
    const auto q = describe_problem(p, fused);
    if (!q) continue;
    const int device = Library::device();
    const cublasLtHandle_t handle = library.handle(device);
    Descriptors desc(p, *q);
    const auto algo = algorithm(device, handle, p, *q, desc);
    if (!algo) continue;
    if (!run) return true;
    const float one = 1, beta = p.residual ? 1 : 0;
    const void* const c = p.residual ? p.residual : q->d;
    check(cublasLtMatmul(handle, &desc.product, &one, p.b, &desc.first, p.a, &desc.second, &beta, c, &desc.d, q->d, &desc.d,
                         &*algo, backend()->workspace(device, stream, kWorkspace), kWorkspace, static_cast<cudaStream_t>(stream)),
          "multiplying");
    if (q->finish)
      kernels::gemm_finish_cuda({p.dtype, p.dtype, q->d, nullptr, nullptr, p.c, p.activation, 1, p.matrices * p.m, p.n, nullptr, p.n},
                                stream);
    return true;
  }
  return false;
}

}  // namespace

namespace kernels {

bool cublaslt_takes(const GemmArgs& args) { return product(args, false, nullptr); }
bool cublaslt_multiply(const GemmArgs& args, void* stream) { return product(args, true, stream); }

}  // namespace kernels
}  // namespace capo
