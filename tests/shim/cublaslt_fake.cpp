// A stand-in for cuBLASLt and the few calls of the CUDA runtime that cuda/cublaslt.cpp makes, after NVIDIA's
// documentation of cublasLt.h: column-major matrices, op(A) [m, k], op(B) [k, n], C and D [m, n]. It computes on the
// host in f64 and throws where a call breaks a documented rule: leading dimensions, shapes, alignments promised to the
// search, pointers of the epilogue. What it cannot tell is which problems the real library declines, and its speed.
#include <capo/cuda/runtime.h>
#include <capo/engine/dtype.h>
#include <capo/engine/error.h>
#include <capo/tests/shim/cublaslt_fake.h>

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace capo {

shim::FakeProducts& shim::fake_products() {
  static FakeProducts products;
  return products;
}

void gpu::check_cuda(int code, const char* what) { CAPO_CHECK(code == cudaSuccess, what, ": the fake runtime failed"); }

namespace {

shim::FakeProducts& state() { return shim::fake_products(); }

// What lies in the library's opaque structs.
struct Desc {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  std::int32_t a, b;  // cublasOperation_t
  std::uint32_t epilogue;
  void *bias, *aux;
  std::int64_t aux_ld, aux_step, bias_step;
};
struct Layout {
  cudaDataType_t type;
  std::uint64_t rows, columns;
  std::int64_t ld, step;
  std::int32_t batches;
};
struct Preference {
  std::uint64_t workspace;
  std::uint32_t align[4];  // A, B, C, D
};
struct Algo {
  std::int32_t offer;
  std::uint32_t align[4];
};

template <class T, class Opaque>
T& inside(Opaque* opaque) {
  static_assert(sizeof(T) <= sizeof(Opaque));
  return *reinterpret_cast<T*>(opaque);
}
template <class T, class Opaque>
const T& inside(const Opaque* opaque) {
  return inside<T>(const_cast<Opaque*>(opaque));
}

template <class T>
cublasStatus_t take(T& field, const void* value, std::size_t bytes) {
  CAPO_CHECK(bytes == sizeof field, "fake cuBLASLt: an attribute of ", sizeof field, " bytes was given ", bytes);
  std::memcpy(&field, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

double load(cudaDataType_t type, const void* p, std::int64_t i) {
  if (type == CUDA_R_32F) return static_cast<const float*>(p)[i];
  if (type == CUDA_R_16BF) return to_f32(static_cast<const BFloat16*>(p)[i]);
  return to_f32(static_cast<const Half*>(p)[i]);
}
void store(cudaDataType_t type, void* p, std::int64_t i, double v) {
  const float f = static_cast<float>(v);
  if (type == CUDA_R_32F)
    static_cast<float*>(p)[i] = f;
  else if (type == CUDA_R_16BF)
    static_cast<BFloat16*>(p)[i] = to_bf16(f);
  else
    static_cast<Half*>(p)[i] = to_f16(f);
}

double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }

void check_shapes(const Desc& p, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const bool ta = p.a == CUBLAS_OP_T, tb = p.b == CUBLAS_OP_T;
  const std::uint64_t m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns;
  const std::uint64_t k2 = tb ? b.columns : b.rows, n = tb ? b.rows : b.columns;
  CAPO_CHECK(k == k2 && d.rows == m && d.columns == n && c.rows == m && c.columns == n, "fake cuBLASLt: op(A) [", m,
             ", ", k, "], op(B) [", k2, ", ", n, "], D [", d.rows, ", ", d.columns, "]");
  for (const Layout* x : {&a, &b, &c, &d}) {
    CAPO_CHECK(x->ld >= static_cast<std::int64_t>(x->rows), "fake cuBLASLt: leading dimension ", x->ld, " of ", x->rows,
               " rows");
    CAPO_CHECK(x->batches == d.batches, "fake cuBLASLt: batches ", x->batches, " and ", d.batches);
  }
  const bool aux = p.epilogue & 128,
             bias = p.epilogue & (CUBLASLT_EPILOGUE_BIAS | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB);
  CAPO_CHECK(!bias || p.bias, "fake cuBLASLt: the epilogue needs a bias pointer");
  CAPO_CHECK(!aux || (p.aux && p.aux_ld >= static_cast<std::int64_t>(m) && p.aux_ld % 8 == 0 && p.aux_step % 8 == 0 &&
                      reinterpret_cast<std::uintptr_t>(p.aux) % 16 == 0),
             "fake cuBLASLt: the epilogue's auxiliary matrix has leading dimension ", p.aux_ld);
}

void multiply(const Desc& p, double alpha, const void* A, const Layout& a, const void* B, const Layout& b, double beta,
              const void* C, const Layout& c, void* D, const Layout& d) {
  const bool ta = p.a == CUBLAS_OP_T, tb = p.b == CUBLAS_OP_T;
  const auto m = static_cast<std::int64_t>(d.rows), n = static_cast<std::int64_t>(d.columns);
  const auto k = static_cast<std::int64_t>(ta ? a.rows : a.columns);
  const bool rounds = p.compute == CUBLAS_COMPUTE_32F_FAST_16BF;
  const auto value = [&](const Layout& x, const void* data, std::int64_t batch, std::int64_t row, std::int64_t column) {
    const double v = load(x.type, data, batch * x.step + column * x.ld + row);
    return rounds ? static_cast<double>(to_f32(to_bf16(static_cast<float>(v)))) : v;
  };
  for (std::int64_t batch = 0; batch < d.batches; ++batch) {
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (std::int64_t l = 0; l < k; ++l)
          sum += (ta ? value(a, A, batch, l, i) : value(a, A, batch, i, l)) *
                 (tb ? value(b, B, batch, j, l) : value(b, B, batch, l, j));
        double y = alpha * sum;
        if (beta != 0) y += beta * load(c.type, C, batch * c.step + j * c.ld + i);
        if (p.epilogue & CUBLASLT_EPILOGUE_BIAS) y += load(d.type, p.bias, batch * p.bias_step + i);
        if (p.epilogue & CUBLASLT_EPILOGUE_GELU) {
          if (p.epilogue & 128) store(d.type, p.aux, batch * p.aux_step + j * p.aux_ld + i, y);
          y = gelu_tanh(y);
        }
        store(d.type, D, batch * d.step + j * d.ld + i, y);
      }
    if (!(p.epilogue & CUBLASLT_EPILOGUE_BGRADB)) continue;
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) sum += tb ? value(b, B, batch, j, l) : value(b, B, batch, l, j);
      store(d.type, p.bias, batch * p.bias_step + j, sum);
    }
  }
}

double clock_now = 0;  // milliseconds of "device" time

}  // namespace
}  // namespace capo

using namespace capo;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  static int there;
  *handle = reinterpret_cast<cublasLtHandle_t>(&there);
  return CUBLAS_STATUS_SUCCESS;
}
const char* cublasLtGetStatusString(cublasStatus_t) { return "fake status"; }

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t desc, std::size_t, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
  inside<Desc>(desc) = {compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, 0, 0, 0};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t bytes) {
  Desc& d = inside<Desc>(desc);
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return take(d.a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return take(d.b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return take(d.epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return take(d.bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: return take(d.aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: return take(d.aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE: return take(d.aux_step, value, bytes);
    default: detail::fail("fake cuBLASLt: attribute ", static_cast<int>(attribute), " of a product is not known");
  }
}
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, std::size_t, cudaDataType type,
                                                 std::uint64_t rows, std::uint64_t columns, std::int64_t ld) {
  inside<Layout>(layout) = {type, rows, columns, ld, 0, 1};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                std::size_t bytes) {
  Layout& l = inside<Layout>(layout);
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return take(l.batches, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return take(l.step, value, bytes);
    default: detail::fail("fake cuBLASLt: attribute ", static_cast<int>(attribute), " of a matrix is not known");
  }
}
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference, std::size_t) {
  inside<Preference>(preference) = {0, {256, 256, 256, 256}};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    std::size_t bytes) {
  Preference& p = inside<Preference>(preference);
  std::uint32_t mask;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return take(p.workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return take(mask, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return take(p.align[0], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return take(p.align[1], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return take(p.align[2], value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return take(p.align[3], value, bytes);
    default: detail::fail("fake cuBLASLt: attribute ", static_cast<int>(attribute), " of a search is not known");
  }
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                                              int wanted, cublasLtMatmulHeuristicResult_t results[], int* count) {
  const Desc& p = inside<Desc>(desc);
  check_shapes(p, inside<Layout>(a), inside<Layout>(b), inside<Layout>(c), inside<Layout>(d));
  ++state().searches;
  *count = 0;
  if (state().refused_epilogue == p.epilogue) return CUBLAS_STATUS_NOT_SUPPORTED;
  for (; *count < wanted && *count < 3; ++*count) {
    cublasLtMatmulHeuristicResult_t& r = results[*count];
    r = {};
    r.state = CUBLAS_STATUS_SUCCESS;
    Algo& algo = inside<Algo>(&r.algo);
    algo.offer = *count;
    std::memcpy(algo.align, inside<Preference>(preference).align, sizeof algo.align);
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t al, const void* b, cublasLtMatrixLayout_t bl, const void* beta,
                              const void* c, cublasLtMatrixLayout_t cl, void* d, cublasLtMatrixLayout_t dl,
                              const cublasLtMatmulAlgo_t* algo, void*, std::size_t, cudaStream_t) {
  const Desc& p = inside<Desc>(desc);
  check_shapes(p, inside<Layout>(al), inside<Layout>(bl), inside<Layout>(cl), inside<Layout>(dl));
  const Algo& chosen = inside<Algo>(algo);
  const void* const pointers[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    CAPO_CHECK(reinterpret_cast<std::uintptr_t>(pointers[i]) % chosen.align[i] == 0, "fake cuBLASLt: operand ", i,
               " is less aligned than the search was told, ", chosen.align[i]);
  multiply(p, *static_cast<const float*>(alpha), a, inside<Layout>(al), b, inside<Layout>(bl),
           *static_cast<const float*>(beta), c, inside<Layout>(cl), d, inside<Layout>(dl));
  ++state().products;
  state().last_algorithm = chosen.offer;
  clock_now += chosen.offer == state().fastest ? 1 : 2;
  return CUBLAS_STATUS_SUCCESS;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = state().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new double(0));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<double*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<double*>(event) = clock_now;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = static_cast<float>(*reinterpret_cast<double*>(end) - *reinterpret_cast<double*>(begin));
  return cudaSuccess;
}

}  // extern "C"
