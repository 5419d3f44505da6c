#include <capo/bench/gpu/best_product.h>
#include <capo/engine/backend.h>
#include <capo/engine/error.h>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

namespace capo::bench {
namespace {

void check(cublasStatus_t code, const char* what) {
  CAPO_CHECK(code == CUBLAS_STATUS_SUCCESS, "bench: cuBLASLt ", what, ": ", cublasLtGetStatusString(code));
}
void check(cudaError_t code, const char* what) {
  CAPO_CHECK(code == cudaSuccess, "bench: ", what, ": ", cudaGetErrorString(code));
}

constexpr std::size_t kWorkspace = std::size_t{32} << 20;  // what Capo gives it as well
constexpr int kOffers = 64, kTimed = 5;

cublasLtHandle_t handle() {
  static cublasLtHandle_t h = [] {
    cublasLtHandle_t made;
    check(cublasLtCreate(&made), "does not start");
    return made;
  }();
  return h;
}
void* workspace() {
  static void* w = [] {
    void* made;
    check(cudaMalloc(&made, kWorkspace), "allocating a workspace");
    return made;
  }();
  return w;
}

// A matrix [rows, columns] of ours as cuBLASLt reads it, column-major: a row-major one is its own transpose there.
struct Stored {
  std::int64_t rows, columns, ld;
  cublasOperation_t op;
};
Stored stored(const Tensor& t) {
  CAPO_CHECK(t.rank() == 2 && (t.strides()[1] == 1 || t.strides()[0] == 1),
             "bench: a product needs matrices with a unit stride");
  if (t.strides()[1] == 1) return {t.size(1), t.size(0), t.strides()[0], CUBLAS_OP_N};
  return {t.size(0), t.size(1), t.strides()[1], CUBLAS_OP_T};
}

}  // namespace

struct BestProduct::State {
  Tensor a, b, bias, c;
  cudaStream_t stream;
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t first = nullptr, second = nullptr, result = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  int offered = 0, chosen = -1;

  cublasStatus_t multiply(const cublasLtMatmulAlgo_t& algo) const {
    const float one = 1, zero = 0;
    return cublasLtMatmul(handle(), product, &one, b.data(), first, a.data(), second, &zero, c.data(), result, c.data(),
                          result, &algo, workspace(), kWorkspace, stream);
  }

  // Milliseconds of one product; negative when the algorithm refuses.
  float time(const cublasLtMatmulAlgo_t& algo, cudaEvent_t begin, cudaEvent_t end) const {
    if (multiply(algo) != CUBLAS_STATUS_SUCCESS) return -1;
    float least = 1e30f;
    for (int repeat = 0; repeat < 3; ++repeat) {
      check(cudaEventRecord(begin, stream), "recording an event");
      for (int i = 0; i < kTimed; ++i) multiply(algo);
      check(cudaEventRecord(end, stream), "recording an event");
      check(cudaEventSynchronize(end), "waiting for a product");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end), "reading an event");
      least = std::min(least, ms / kTimed);
    }
    return least;
  }

  ~State() {
    for (auto* layout : {first, second, result})
      if (layout) cublasLtMatrixLayoutDestroy(layout);
    if (product) cublasLtMatmulDescDestroy(product);
  }
};

BestProduct::BestProduct(const Tensor& a, const Tensor& b, const Tensor& bias) : state_(std::make_shared<State>()) {
  State& s = *state_;
  const Device device = a.device();
  s.a = a;
  s.b = b;
  s.bias = bias;
  s.c = empty({a.size(0), b.size(1)}, a.dtype(), device);
  s.stream = static_cast<cudaStream_t>(backend_for(device).stream(device.index));
  const cudaDataType_t type = a.dtype() == f32 ? CUDA_R_32F : a.dtype() == bf16 ? CUDA_R_16BF : CUDA_R_16F;
  const Stored x = stored(b), y = stored(a);  // c^T = b^T a^T
  check(cublasLtMatmulDescCreate(&s.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "makes no description");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check(cublasLtMatmulDescSetAttribute(s.product, attribute, &value, sizeof value), "takes no setting");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, x.op);
  set(CUBLASLT_MATMUL_DESC_TRANSB, y.op);
  if (bias.defined()) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(bias.data()));
  }
  const auto layout = [&](cublasLtMatrixLayout_t& made, const Stored& m) {
    check(cublasLtMatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(m.rows),
                                     static_cast<std::uint64_t>(m.columns), m.ld),
          "makes no layout");
  };
  layout(s.first, x);
  layout(s.second, y);
  layout(s.result, {b.size(1), a.size(0), b.size(1), CUBLAS_OP_N});

  cublasLtMatmulPreference_t preference;
  check(cublasLtMatmulPreferenceCreate(&preference), "makes no preference");
  check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspace,
                                             sizeof kWorkspace),
        "takes no workspace");
  std::vector<cublasLtMatmulHeuristicResult_t> found(kOffers);
  const cublasStatus_t asked = cublasLtMatmulAlgoGetHeuristic(handle(), s.product, s.first, s.second, s.result,
                                                              s.result, preference, kOffers, found.data(), &s.offered);
  cublasLtMatmulPreferenceDestroy(preference);
  check(asked, "offers nothing");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "making an event");
  check(cudaEventCreate(&end), "making an event");
  float least = 1e30f;
  for (int i = 0; i < s.offered; ++i) {
    if (found[static_cast<std::size_t>(i)].state != CUBLAS_STATUS_SUCCESS) continue;
    const auto& algo = found[static_cast<std::size_t>(i)].algo;
    const float ms = s.time(algo, begin, end);
    if (ms < 0 || ms >= least) continue;
    least = ms;
    s.chosen = i;
    s.algorithm = algo;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  CAPO_CHECK(s.chosen >= 0, "bench: cuBLASLt runs none of its ", s.offered, " algorithms for this product");
}

void BestProduct::run() const { check(state_->multiply(state_->algorithm), "does not multiply"); }
int BestProduct::offered() const { return state_->offered; }
int BestProduct::chosen() const { return state_->chosen; }

}  // namespace capo::bench
