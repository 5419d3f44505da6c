// Matrix products by cuBLASLt: the main path of matmul and linear on a real device (cuda/gemm.cu has the choice).
// Not on the shim: cuBLASLt runs on a card alone; gemm.cu's own kernels, on which every sample runs, take its place.
// What this file asks of the library is tested against a stand-in (tests/shim/cublaslt_test.cpp).
//
// cuBLASLt is column-major: our row-major c [m, n] is its [n, m], so it computes c^T = b^T a^T with b as its first
// operand. Any of the four transpositions is read in place. What it refuses goes to our own kernel: an operand with no
// unit stride, batches that are not evenly spaced, k = 0, shapes without an algorithm.
//
// A residual is its C, added in f32 before the one rounding (beta = 1). Epilogue: the bias always; the sums of a over k
// (a bias gradient); gelu_tanh, whose formula is the same as ours; every other activation is a second pass
// (gemm_finish), which then reads z rounded to the dtype.
//
// A problem's descriptors and algorithm are made once and kept. The algorithm is the heuristic's first, or with
// set_product_tuning the fastest of its first offers, timed at the first call. In split-k only reductions in f32
// through the workspace are allowed: the same bits at every call.
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
#include <unordered_map>

namespace capo {
namespace {

using gpu::kWorkspace;  // one product at a time runs on a stream, so one serves it

constexpr int kOffers = 16;  // algorithms that tuning times

void check(cublasStatus_t status, const char* what) {
  CAPO_CHECK(status == CUBLAS_STATUS_SUCCESS, "matmul: cuBLASLt failed ", what, ": ", cublasLtGetStatusString(status));
}

// ---- A problem as cuBLASLt sees it

// A matrix operand as cuBLASLt stores it: [rows, columns], column-major, or its transpose.
struct Stored {
  std::int64_t rows, columns, ld, step;  // step: from one matrix of the batch to the next
  bool transposed;
};

// outer: rows of our a, columns of our b. Wanted untransposed: k-major for a (rows = k), outer-major for b.
std::optional<Stored> stored(bool is_a, std::int64_t outer, std::int64_t k, std::int64_t outer_stride,
                             std::int64_t k_stride, std::int64_t step) {
  const bool along_k = k_stride == 1;
  if (!along_k && outer_stride != 1) return {};
  Stored s{along_k ? k : outer, along_k ? outer : k, along_k ? outer_stride : k_stride, step, along_k != is_a};
  if (s.columns == 1 && s.ld < s.rows) s.ld = s.rows;  // never stepped over
  if (s.ld < s.rows || step < 0) return {};
  return s;
}

struct Problem {
  Stored first, second;  // our b, our a
  cublasLtEpilogue_t epilogue;
  bool aux;              // the epilogue writes z
  bool finish;           // gemm_finish applies the activation
};

std::optional<Problem> describe_problem(const GemmArgs& p, bool fused) {
  if (p.k == 0 || p.matrices == 0 || (p.dtype != f32 && p.dtype != bf16 && p.dtype != f16)) return {};
  const int last = p.rank - 1;
  const auto a = stored(true, p.m, p.k, p.a_row, p.a_k, p.rank ? p.sa[last] : 0);
  const auto b = stored(false, p.n, p.k, p.b_col, p.b_k, p.rank ? p.sb[last] : 0);
  if (!a || !b) return {};
  Problem q{*b, *a, p.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT, false, false};
  if (p.a_sums) {
    if (p.bias || p.activation != Activation::none || p.z || p.matrices != 1) return {};
    q.epilogue = CUBLASLT_EPILOGUE_BGRADB;
  } else if (fused && p.activation == Activation::gelu_tanh) {
    q.aux = p.z != nullptr;
    if (q.aux)
      q.epilogue = p.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    else
      q.epilogue = p.bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    if (q.aux && (p.c_row % 8 != 0 || reinterpret_cast<std::uintptr_t>(p.z) % 16 != 0)) return {};
  } else {
    q.finish = p.activation != Activation::none || p.z;
  }
  return q;
}

// Where the library writes: z where gemm_finish makes c of it.
void* result_of(const GemmArgs& p, bool finish) { return finish && p.z ? p.z : p.c; }
// The epilogue's vector.
const void* vector_of(const GemmArgs& p) { return p.a_sums ? p.a_sums : p.bias; }

// ---- A plan: descriptors without pointers, and the algorithm

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

struct Plan {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t first, second, d;  // d: C as well
  cublasLtMatmulAlgo_t algorithm{};
  bool aux, finish;

  Plan(const GemmArgs& p, const Problem& q) : aux(q.aux), finish(q.finish) {
    const cudaDataType_t type = p.dtype == f32 ? CUDA_R_32F : p.dtype == bf16 ? CUDA_R_16BF : CUDA_R_16F;
    check(cublasLtMatmulDescInit(&product, p.bf16 ? CUBLAS_COMPUTE_32F_FAST_16BF : CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "setting up a product");
    set(&product, CUBLASLT_MATMUL_DESC_TRANSA, q.first.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(&product, CUBLASLT_MATMUL_DESC_TRANSB, q.second.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE, q.epilogue);
    if (aux) {
      set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.c_row);
      set(&product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, p.m * p.c_row);
    }
    const auto matrix = [&](cublasLtMatrixLayoutOpaque_t& layout, const Stored& s) {
      check(cublasLtMatrixLayoutInit(&layout, type, static_cast<std::uint64_t>(s.rows),
                                     static_cast<std::uint64_t>(s.columns), s.ld),
            "setting up a matrix");
      if (p.matrices == 1) return;
      set(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, static_cast<std::int32_t>(p.matrices));
      set(&layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, s.step);
    };
    matrix(first, q.first);
    matrix(second, q.second);
    matrix(d, {p.n, p.m, p.c_row, p.m * p.c_row, false});
  }

  // The product's description for these operands; a copy, since other threads may use the plan too.
  cublasLtMatmulDescOpaque_t pointed_at(const GemmArgs& p) const {
    cublasLtMatmulDescOpaque_t desc = product;
    if (const void* vector = vector_of(p)) set(&desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
    if (aux) set(&desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.z);
    return desc;
  }

  cublasStatus_t multiply(cublasLtHandle_t handle, const GemmArgs& p, const cublasLtMatmulAlgo_t& algo, void* workspace,
                          cudaStream_t stream) {
    cublasLtMatmulDescOpaque_t desc = pointed_at(p);
    const float one = 1, beta = p.residual ? 1 : 0;
    void* const result = result_of(p, finish);
    return cublasLtMatmul(handle, &desc, &one, p.b, &first, p.a, &second, &beta, p.residual ? p.residual : result, &d,
                          result, &d, &algo, workspace, kWorkspace, stream);
  }
};

// The greatest power of two up to 256 that divides an address.
std::uint32_t alignment(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p) | 256;
  return static_cast<std::uint32_t>(address & (~address + 1));
}

// What the heuristic offers for a plan, the best guess first.
std::array<cublasLtMatmulHeuristicResult_t, kOffers> offers(cublasLtHandle_t handle, const GemmArgs& p, Plan& plan,
                                                            int wanted, int& count) {
  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), "setting up a search");
  set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  set(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  void* const result = result_of(p, plan.finish);
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.b));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.a));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.residual ? p.residual : result));
  set(&preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(result));
  std::array<cublasLtMatmulHeuristicResult_t, kOffers> found{};
  cublasLtMatmulDescOpaque_t desc = plan.pointed_at(p);  // the search looks at the pointers' alignment
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, &desc, &plan.first, &plan.second, &plan.d,
                                                               &plan.d, &preference, wanted, found.data(), &count);
  if (status != CUBLAS_STATUS_SUCCESS) count = 0;
  return found;
}

// ---- Tuning

class Event {
 public:
  Event() { gpu::check_cuda(cudaEventCreate(&event_), "matmul: making an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { gpu::check_cuda(cudaEventRecord(event_, stream), "matmul: recording an event"); }
  float since(const Event& begin) {
    gpu::check_cuda(cudaEventSynchronize(event_), "matmul: waiting for a product");
    float ms = 0;
    gpu::check_cuda(cudaEventElapsedTime(&ms, begin.event_, event_), "matmul: reading an event");
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Milliseconds of one product, the least of three goes; nothing when the algorithm refuses.
std::optional<float> time_of(cublasLtHandle_t handle, const GemmArgs& p, Plan& plan, const cublasLtMatmulAlgo_t& algo,
                             void* workspace, cudaStream_t stream) {
  constexpr int kRepeats = 3;
  if (plan.multiply(handle, p, algo, workspace, stream) != CUBLAS_STATUS_SUCCESS) return {};
  Event begin, end;
  float least = 1e30f;
  for (int go = 0; go < 3; ++go) {
    begin.record(stream);
    for (int i = 0; i < kRepeats; ++i) check(plan.multiply(handle, p, algo, workspace, stream), "multiplying");
    end.record(stream);
    const float ms = end.since(begin) / kRepeats;
    if (ms < least) least = ms;
  }
  return least;
}

// The plan's algorithm: false when there is none. Timing writes the product's results, which the product itself then
// writes again; a residual that they replace in place would be lost, so that case takes the first offer.
bool choose(cublasLtHandle_t handle, const GemmArgs& p, Plan& plan, bool tune, void* workspace, cudaStream_t stream) {
  tune = tune && p.residual != p.c;
  int count = 0;
  const auto found = offers(handle, p, plan, tune ? kOffers : 1, count);
  bool any = false;
  float least = 0;
  for (int i = 0; i < count; ++i) {
    const auto& offer = found[static_cast<std::size_t>(i)];
    if (offer.state != CUBLAS_STATUS_SUCCESS) continue;
    std::optional<float> ms = 0.0f;
    if (tune) ms = time_of(handle, p, plan, offer.algo, workspace, stream);
    if (!ms || (any && *ms >= least)) continue;
    any = true;
    least = *ms;
    plan.algorithm = offer.algo;
    if (!tune) break;
  }
  return any;
}

// ---- All plans of the process

using Key = std::array<std::int64_t, 16>;

struct HashKey {
  std::size_t operator()(const Key& key) const {
    std::uint64_t h = 0x9e3779b97f4a7c15u;
    for (const std::int64_t v : key) h = (h ^ static_cast<std::uint64_t>(v)) * 0xff51afd7ed558ccdu, h ^= h >> 32;
    return h;
  }
};

struct Library {
  std::mutex mutex;
  std::map<int, cublasLtHandle_t> handles;  // by device
  std::unordered_map<Key, std::optional<Plan>, HashKey> plans;

  static Library& get() {
    static auto* library = new Library;  // immortal: the driver may be gone before static storage is
    return *library;
  }
  cublasLtHandle_t handle(int device) {
    cublasLtHandle_t& h = handles[device];
    if (!h) check(cublasLtCreate(&h), "to start");
    return h;
  }
};

Key key_of(const GemmArgs& p, int device, bool tune) {
  const int last = p.rank - 1;
  const void* const c = p.residual ? p.residual : p.c;
  const std::int64_t flags = tune | p.bf16 << 1 | (p.a_sums != nullptr) << 2 | (p.bias != nullptr) << 3 |
                             (p.z != nullptr) << 4 | (p.residual != nullptr) << 5 | (p.residual == p.c) << 6;
  const std::int64_t aligned = alignment(p.a) | std::int64_t{alignment(p.b)} << 9 | std::int64_t{alignment(p.c)} << 18 |
                               std::int64_t{alignment(c)} << 27 | std::int64_t{alignment(p.z)} << 36 |
                               std::int64_t{alignment(vector_of(p))} << 45;
  return {device, static_cast<int>(p.dtype), static_cast<int>(p.activation), flags, aligned, p.m, p.n, p.k,
          p.matrices, p.a_row, p.a_k, p.b_k, p.b_col, p.c_row, p.rank ? p.sa[last] : 0, p.rank ? p.sb[last] : 0};
}

// Batches of several axes that are one: sa and sb of the last tell the rest.
bool one_batch_axis(const GemmArgs& p) {
  for (int i = 0; i + 1 < p.rank; ++i)
    if (p.sa[i] != p.sa[i + 1] * p.batch[i + 1] || p.sb[i] != p.sb[i + 1] * p.batch[i + 1]) return false;
  return true;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  gpu::check_cuda(cudaStreamIsCapturing(stream, &status), "matmul: asking whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

// Runs the product, or only says whether it could when `run` is false.
bool product(const GemmArgs& p, bool run, void* stream) {
  if (!one_batch_axis(p)) return false;
  int device = 0;
  gpu::check_cuda(cudaGetDevice(&device), "matmul: asking for the current device");
  const auto s = static_cast<cudaStream_t>(stream);
  const bool tune = product_tuning() && !capturing(s);
  Library& library = Library::get();
  cublasLtHandle_t handle;
  Plan* plan;
  {
    const std::lock_guard lock(library.mutex);
    handle = library.handle(device);
    const Key key = key_of(p, device, tune);
    auto at = library.plans.find(key);
    if (at == library.plans.end()) {
      std::optional<Plan> made;
      for (const bool fused : {true, false}) {  // with the activation in the epilogue, then without
        if (!fused && p.activation != Activation::gelu_tanh) break;  // the same problem again
        const auto q = describe_problem(p, fused);
        if (!q) continue;
        made.emplace(p, *q);
        if (choose(handle, p, *made, tune, backend()->workspace(device, stream, kWorkspace), s)) break;
        made.reset();
      }
      at = library.plans.emplace(key, made).first;
    }
    if (!at->second) return false;
    plan = &*at->second;  // stays where it is
  }
  if (!run) return true;
  check(plan->multiply(handle, p, plan->algorithm, backend()->workspace(device, stream, kWorkspace), s), "multiplying");
  if (plan->finish)
    kernels::gemm_finish_cuda({p.dtype, p.dtype, result_of(p, true), nullptr, nullptr, p.c, p.activation, 1,
                               p.matrices * p.m, p.n, nullptr, p.c_row},
                              stream);
  return true;
}

}  // namespace

namespace kernels {

bool cublaslt_takes(const GemmArgs& args, void* stream) { return product(args, false, stream); }
bool cublaslt_multiply(const GemmArgs& args, void* stream) { return product(args, true, stream); }

}  // namespace kernels
}  // namespace capo
