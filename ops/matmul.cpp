#include <capo/autograd/autograd.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/matmul.h>
#include <capo/ops/reduce.h>
#include <capo/ops/unary.h>
#include <capo/ops/view.h>
#include <capo/ops/work_internal.h>

#include <algorithm>
#include <atomic>

namespace capo {

namespace {
std::int64_t matrices_of(int rank, const std::int64_t* batch) {
  std::int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= batch[i];
  return n;
}
Work matmul_work(const MatmulArgs& p, std::int64_t) {
  return Work::computed(2 * matrices_of(p.rank, p.batch) * p.m * p.n * p.k);
}
DType summed(DType t) { return is_half(t) ? f32 : t; }
Work matmul_pack_work(const MatmulPackArgs& p, std::int64_t) {
  const DType packed = p.bf16_dot ? bf16 : summed(p.dtype);
  return Work::moved(matrices_of(p.rank, p.batch) * p.n * p.k * (bytes_of(p.dtype, 1) + bytes_of(packed, 1)));
}
Work matmul_sum_work(const MatmulSumArgs& p, std::int64_t items) {
  const std::int64_t tensors = (p.z ? 2 : 1) + (p.residual ? 1 : 0);
  return Work::moved(bytes_of(summed(p.dtype), items * p.chunks) +
                     bytes_of(p.dtype, items * tensors + (p.bias ? p.n : 0)));
}
Work gemm_work(const GemmArgs& p, std::int64_t) { return Work::computed(2 * p.matrices * p.m * p.n * p.k); }
}  // namespace

CAPO_KERNEL(matmul, MatmulArgs, matmul_work)
CAPO_KERNEL(matmul_pack, MatmulPackArgs, matmul_pack_work)
CAPO_KERNEL(matmul_sum, MatmulSumArgs, matmul_sum_work)
CAPO_KERNEL_CUDA_ONLY(gemm, GemmArgs, gemm_work)
#if defined(CAPO_WITH_CUDA)
namespace kernels {
// cuda/gemm.cu: cuBLASLt multiplies, and cuts k as it likes.
bool gemm_in_library(const GemmArgs& args, void* stream);
}
#endif

namespace {
std::atomic<bool> rounds_to_bf16{false}, tunes{false};
}

DType matmul_precision() { return rounds_to_bf16.load(std::memory_order_relaxed) ? bf16 : f32; }
bool product_tuning() { return tunes.load(std::memory_order_relaxed); }
void set_product_tuning(bool on) { tunes = on; }

void set_matmul_precision(DType precision) {
  CAPO_CHECK(precision == f32 || precision == bf16, "set_matmul_precision: must be f32 or bf16, got ", precision);
  rounds_to_bf16 = precision == bf16;
}

namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Rows of A for a few columns of B that lie side by side: vectors along k (plan's dots) need each column in one piece.
bool wants_columns(const MatmulArgs& p) {
  const bool in_place =
      p.a_k == 1 && ((!p.bf16 && !is_half(p.dtype)) || (p.dtype == bf16 && p.bf16_dot && p.k % 2 == 0));
  return in_place && p.b_col == 1 && p.b_k != 1 && p.n > 1 && p.n < 16 && p.k >= 64 && p.m >= 64;
}

// A^T B of row-major operands whose C stays in a cache while a long k passes: the weight gradient of a layer.
bool is_turned(const MatmulArgs& p) {
  const bool as_is = !p.bf16 && !is_half(p.dtype);
  return as_is && p.a_row == 1 && p.a_k != 1 && p.b_col == 1 && p.m >= 4 && p.n >= 32 && p.k >= 128 &&
         bytes_of(p.dtype, p.m * p.n) <= (768 << 10);
}
// Chunks of k, each of which reads its part of A and B once; then the longer side of C.
void cut_turned(MatmulArgs& p, std::int64_t matrices) {
  constexpr std::int64_t kItems = 16, kMinDepth = 384, kMinWork = 1 << 18, kPartBytes = 4 << 20;
  p.turned = true;
  const std::int64_t work = p.m * p.n * p.k, wanted = std::min(ceil_div(kItems, matrices), work / kMinWork);
  const std::int64_t most = std::min(p.k / kMinDepth, kPartBytes / bytes_of(p.dtype, matrices * p.m * p.n));
  const std::int64_t chunks = std::max<std::int64_t>(std::min(wanted, most), 1);
  p.k_chunk = round_up(ceil_div(p.k, chunks), 16);
  p.k_chunks = ceil_div(p.k, p.k_chunk);
  const std::int64_t sides = std::max<std::int64_t>(ceil_div(wanted, p.k_chunks), 1);
  const bool low = p.m == 7 || p.m == 8;  // tiles of 8 x 48
  p.row_block = p.m, p.col_block = p.n;
  if (p.m > p.n)
    p.row_block = round_up(ceil_div(p.m, sides), 48);
  else
    p.col_block = round_up(ceil_div(p.n, sides), low ? 48 : 64);
  p.row_blocks = ceil_div(p.m, p.row_block), p.col_blocks = ceil_div(p.n, p.col_block);
  p.parts = p.k_chunks > 1;
}

// Cuts a product into work items, by shape alone: enough for many cores, each big enough to hide its start.
// Returns whether B is packed once for all blocks of rows.
bool plan(MatmulArgs& p, std::int64_t matrices) {
  constexpr std::int64_t kItems = 16, kMinItems = 8, kMinWork = 1 << 18;
  const bool half = is_half(p.dtype), as_is = !p.bf16 && !half;
  p.a_in_place = p.a_k == 1 && (as_is || (p.dtype == bf16 && p.bf16_dot && p.k % 2 == 0));
  // A few rows that every block of columns packs again: wide blocks (of 6 x 48 or 4 x 64 columns).
  const std::int64_t grain = p.a_in_place || p.m > 16 ? 64 : p.m == 7 || p.m == 8 ? 288 : 256,
                     columns = ceil_div(p.n, grain);
  // B is read as it lies where it is little reused.
  const bool in_place = p.b_col == 1 && p.n % 16 == 0 && (p.m <= 256 || p.k <= 16) && as_is;
  const bool whole = p.m <= 96 || (p.m <= 256 && p.a_in_place && (matrices >= kItems || matrices * columns >= 12));
  p.dots = p.a_in_place && p.b_k == 1 && (p.b_col != 1 || p.n == 1) && p.k >= 64 && (p.n < 16 || p.m <= 16);
  p.far = matrices * p.m * p.n * size_of(p.dtype) > (8 << 20);
  const bool shared = !whole && !in_place && !p.dots;
  p.col_block = p.n;
  p.k_chunk = p.k > 0 ? p.k : 1;
  if (is_turned(p)) {
    cut_turned(p, matrices);
    return false;
  }
  const std::int64_t row_blocks = whole ? 1 : ceil_div(p.m, p.a_in_place && p.k <= 64 ? 96 : 48);
  p.row_block = whole ? p.m : round_up(ceil_div(p.m, row_blocks), 6);
  p.row_blocks = ceil_div(p.m, p.row_block);
  const std::int64_t work = matrices * (p.m < 8 ? 8 : p.m) * p.n * p.k;
  std::int64_t items = matrices * p.row_blocks;
  if (items * columns < kMinItems && p.k >= 1024 && work >= 4 * kMinWork) {
    const std::int64_t a = ceil_div(kItems, items), b = p.k / 512, chunks = a < b ? a : b;
    p.k_chunk = round_up(ceil_div(p.k, chunks), 16);
  }
  p.k_chunks = p.k > 0 ? ceil_div(p.k, p.k_chunk) : 1;
  items *= p.k_chunks;
  if (items < kItems && work / items >= 2 * kMinWork) {
    const std::int64_t a = ceil_div(kItems, items), b = work / items / kMinWork;
    p.col_block = round_up(ceil_div(p.n, a < b ? a : b), grain);
  }
  p.col_blocks = ceil_div(p.n, p.col_block);
  const std::int64_t row_size = p.bf16_dot ? 2 : p.dtype == f64 ? 8 : 4;
  p.a_part = (kMatmulPackedBytes / row_size / round_up(p.row_block > 0 ? p.row_block : 1, 16) - 32) / 32 * 32;
  p.parts = p.k_chunks > 1 || (half && !p.a_in_place && p.k_chunk > p.a_part);
  return shared;
}

Dims batch_strides(const Tensor& t, const Shape& batch) {
  Dims out = Dims::filled(batch.size(), 0);
  const int own = t.rank() - 2, lead = batch.size() - own;
  for (int i = 0; i < own; ++i) out[lead + i] = t.shape()[i] == 1 ? 0 : t.strides()[i];
  return out;
}

// Sizes and strides of either argument struct. Batch axes that b repeats and a's rows continue become rows.
template <class Args>
std::int64_t lay_out(Args& p, const Tensor& a, const Tensor& b, const Shape& batch) {
  p.m = a.size(-2), p.k = a.size(-1), p.n = b.size(-1);
  p.a_row = a.strides()[a.rank() - 2], p.a_k = p.k == 1 ? 1 : a.strides()[a.rank() - 1];
  p.b_k = b.strides()[b.rank() - 2], p.b_col = p.n == 1 ? 1 : b.strides()[b.rank() - 1];
  const Dims sa = batch_strides(a, batch), sb = batch_strides(b, batch);
  bool folding = true;
  int kept = 0;
  std::int64_t axes[kMaxDims], matrices = 1;
  for (int i = batch.size() - 1; i >= 0; --i) {  // innermost first
    if (batch[i] == 1) continue;
    folding = folding && sb[i] == 0 && (p.m == 1 || sa[i] == p.m * p.a_row);
    if (folding) {
      if (p.m == 1) p.a_row = sa[i];
      p.m *= batch[i];
      continue;
    }
    axes[kept++] = i;
    matrices *= batch[i];
  }
  p.rank = kept;
  for (int i = 0; i < kept; ++i) {
    const int axis = static_cast<int>(axes[kept - 1 - i]);
    p.batch[i] = batch[axis], p.sa[i] = sa[axis], p.sb[i] = sb[axis];
  }
  return matrices;
}

const void* data_of(const Tensor& t) { return t.defined() ? t.data() : nullptr; }

// From one row of a result to the next: [..., M, N] without gaps, or [M, N] of any row stride.
std::int64_t row_step(const Tensor& c) { return c.rank() == 2 && c.size(0) > 1 ? c.strides()[0] : c.size(-1); }

#if defined(CAPO_WITH_CUDA)
GemmArgs gemm_args(const Tensor& a, const Tensor& b, const Shape& batch, const Tensor& c) {
  GemmArgs p{};
  p.dtype = c.dtype();
  p.bf16 = c.dtype() == f32 && matmul_precision() == bf16;
  p.matrices = lay_out(p, a, b, batch);
  p.a = data_of(a), p.b = data_of(b), p.c = c.data();
  p.c_row = row_step(c);
  p.k_chunk = p.k, p.k_chunks = 1;
  return p;
}

// One kernel over all matrices, and few tiles with a long k (weight gradients) in chunks of k, by shape alone.
Tensor product_cuda(const Tensor& a, const Tensor& b, const Shape& batch, const Tensor& c, const Tensor& bias,
                    Activation activation, const Tensor* z, const Tensor& residual) {
  GemmArgs p = gemm_args(a, b, batch, c);
  p.activation = activation;
  p.bias = data_of(bias), p.z = z ? z->data() : nullptr, p.residual = data_of(residual);
  Tensor parts;
  if (!kernels::gemm_in_library(p, detail::current_stream(c.device()))) {
    constexpr std::int64_t kTile = 64, kBlocks = 256, kMinChunk = 512, kMaxChunks = 64;
    const std::int64_t tiles = ceil_div(p.m, kTile) * ceil_div(p.n, kTile) * p.matrices, wanted = kBlocks / tiles;
    std::int64_t chunks = p.k / kMinChunk;
    if (chunks > wanted) chunks = wanted;
    if (chunks > kMaxChunks) chunks = kMaxChunks;
    if (chunks > 1) {
      p.k_chunk = round_up(ceil_div(p.k, chunks), kTile);
      p.k_chunks = ceil_div(p.k, p.k_chunk);
      parts = empty({p.k_chunks, p.matrices, p.m, p.n}, f32, c.device());
      p.parts = static_cast<float*>(parts.data());
    }
  }
  launch(kernels::gemm, c.device(), p, p.matrices, 1);
  return c;
}
#endif

// c = act(a b + bias), also z = a b + bias when z is given; or c = a b + bias + residual, whose rows lie like c's.
// a [batch.., M, K], b [batch.., K, N] of any strides.
Tensor product_into(const Tensor& c, const Tensor& a, const Tensor& b, const Shape& batch, const Tensor& bias,
                    Activation activation, const Tensor* z, const Tensor& residual) {
  const DType t = a.dtype();
  const Device device = a.device();
  if (c.numel() == 0) return c;
#if defined(CAPO_WITH_CUDA)
  if (device.is_cuda()) return product_cuda(a, b, batch, c, bias, activation, z, residual);
#endif

  MatmulArgs p{};
  p.dtype = t;
  p.bf16 = t == f32 && matmul_precision() == bf16;
  p.bf16_dot = (p.bf16 || t == bf16) && has_bf16_dot();
  p.activation = activation;
  const std::int64_t matrices = lay_out(p, a, b, batch);
  Tensor columns;  // of b, one after the other
  if (b.rank() == 2 && wants_columns(p)) {
    columns = contiguous(transpose(b.detach(), 0, 1));
    p.b_k = 1, p.b_col = p.k;
  }
  p.packed = plan(p, matrices);

  const DType sums = is_half(t) ? f32 : t;
  Tensor packed, parts;
  MatmulPackArgs pack{};
  if (p.packed) {
    pack.dtype = t;
    pack.bf16 = p.bf16, pack.bf16_dot = p.bf16_dot;
    pack.n = p.n, pack.k = p.k, pack.k_chunk = p.k_chunk, pack.b_k = p.b_k, pack.b_col = p.b_col;
    std::int64_t distinct = 1;
    for (int i = 0; i < p.rank; ++i) {
      if (p.sb[i] == 0) continue;
      pack.batch[pack.rank] = p.batch[i], pack.sb[pack.rank++] = p.sb[i];
    }
    for (int i = p.rank - 1; i >= 0; --i) {
      if (p.sb[i] == 0) continue;
      p.sb[i] = distinct;
      distinct *= p.batch[i];
    }
    packed = empty({distinct, p.bf16_dot ? ceil_div(p.k, 2) : p.k, round_up(p.n, 16)}, sums, device);
  }
  const std::int64_t c_row = row_step(c);
  p.c_row = c_row, p.residual = nullptr;
  if (p.parts) parts = empty({matrices, p.k_chunks, p.m, p.n}, sums, device), p.c_row = p.n;
  if (device.is_meta()) return c;

  p.a = a.data();
  p.b = columns.defined() ? columns.data() : b.data();
  p.c = parts.defined() ? parts.data() : c.data();
  p.bias = data_of(bias);
  p.z = z ? z->data() : nullptr;
  p.residual = data_of(residual);
  if (p.packed && p.k > 0) {
    pack.b = p.b;
    pack.packed = packed.data();
    p.b = pack.packed;
    // As many blocks of k per chunk as any instruction set makes of it (gemm.h's k_block); spare items do nothing.
    const std::int64_t longest = p.bf16_dot ? 896 : t == f64 ? 224 : 448;
    const std::int64_t steps = p.k_chunk > longest ? ceil_div(p.k_chunk, longest) : 1;
    std::int64_t distinct = 1;
    for (int i = 0; i < pack.rank; ++i) distinct *= pack.batch[i];
    launch(kernels::matmul_pack, device, pack, distinct * p.k_chunks * steps * ceil_div(p.n, 64), 1);
  }
  const std::int64_t items = matrices * p.k_chunks * p.row_blocks * p.col_blocks;
  const std::int64_t work = p.row_block * p.col_block * p.k_chunk + 1;  // of an item, in multiply-adds
  launch(kernels::matmul, device, p, items, work >= (1 << 17) ? 1 : (1 << 17) / work + 1);
  if (parts.defined()) {
    const MatmulSumArgs sum{t,          p.c,        p.bias,    p.z, c.data(),   activation,
                            p.k_chunks, p.m * p.n, p.n, p.residual, c_row};
    launch(kernels::matmul_sum, device, sum, c.numel(), 8192);
  }
  return c;
}

// A transposed A of many rows for few columns (the weight gradient of a narrow layer): the transpose of C packs less.
bool is_narrow_gradient(const Tensor& a, const Tensor& b, const Shape& batch) {
  const auto unit = [](const Tensor& x, int axis) { return x.strides()[x.rank() - axis] == 1; };
  const std::int64_t m = a.size(-2), n = b.size(-1), k = a.size(-1);
  // is_turned's: whole panels as they are.
  const bool turned = n >= 64 && a.dtype() == f32 && matmul_precision() == f32;
  return numel(batch) == 1 && n > 1 && n <= 96 && !turned && m >= 4 * n && k >= 64 &&
         unit(a, 2) && !unit(a, 1) && unit(b, 1);
}

Tensor product(const Tensor& a, const Tensor& b, const Shape& batch, const Shape& out, const Tensor& bias = {},
               Activation activation = Activation::none, Tensor* z = nullptr) {
  if (!a.device().is_cuda() && !bias.defined() && activation == Activation::none && !z &&
      is_narrow_gradient(a, b, batch)) {
    const auto flipped = [](const Tensor& x) {
      return strided_view(x, {x.size(-1), x.size(-2)}, {x.strides()[x.rank() - 1], x.strides()[x.rank() - 2]},
                          x.offset());
    };
    const Tensor c = product(flipped(b), flipped(a), {}, {b.size(-1), a.size(-2)});
    return reshape(contiguous(flipped(c)), out);
  }
  if (z) *z = empty(out, a.dtype(), a.device());
  return product_into(empty(out, a.dtype(), a.device()), a, b, batch, bias, activation, z, {});
}

Tensor matrix_transpose(const Tensor& x) { return transpose(x, -2, -1); }

// [..., C] -> [rows, C]
Tensor as_rows(const Tensor& x) {
  const std::int64_t c = x.size(-1);
  std::int64_t rows = 1;
  for (int i = 0; i + 1 < x.rank(); ++i) rows *= x.shape()[i];
  return reshape(x, {rows, c});
}

UnaryKind unary_of(Activation activation) {
  switch (activation) {
    case Activation::relu: return UnaryKind::relu;
    case Activation::gelu: return UnaryKind::gelu;
    case Activation::gelu_tanh: return UnaryKind::gelu_tanh;
    case Activation::quick_gelu: return UnaryKind::quick_gelu;
    default: return UnaryKind::silu;
  }
}

// dy act'(z), from z or, for relu, from y.
Tensor activation_gradient(Activation activation, const Tensor& dy, const Tensor& saved) {
  if (is_half(dy.dtype()) && !dy.device().is_cuda())
    return cast(unary_gradient(unary_of(activation), cast(dy, f32), cast(saved, f32)), dy.dtype());
  return unary_gradient(unary_of(activation), dy, saved);
}

// dz w, added to what `pending` holds for that input.
Tensor input_gradient(const Tensor& dz, const Tensor& w, int input, Pending& pending) {
  if (const Tensor before = pending.take(input); before.defined())
    return add_linear(before, {{dz, matrix_transpose(w)}});
  return dz.rank() > 1 ? matmul(dz, w) : reshape(matmul(as_rows(dz), w), {w.size(1)});
}

// dw = dz^T x and db, the sum of dz's rows, from one pass over dz, where the device's library gives both. dz [T, O],
// x [T, I].
bool joint_gradient([[maybe_unused]] const Tensor& dz, [[maybe_unused]] const Tensor& x, [[maybe_unused]] Tensor& dw,
                    [[maybe_unused]] Tensor& db) {
#if defined(CAPO_WITH_CUDA)
  if (!dz.device().is_cuda() || grad_enabled() || dz.numel() == 0 || x.numel() == 0) return false;
  const Tensor c = empty({dz.size(1), x.size(1)}, dz.dtype(), dz.device()),
               sums = empty({dz.size(1)}, dz.dtype(), dz.device());
  GemmArgs p = gemm_args(matrix_transpose(dz), x, {}, c);
  p.a_sums = sums.data();
  if (!kernels::gemm_in_library(p, detail::current_stream(c.device()))) return false;
  launch(kernels::gemm, c.device(), p, 1, 1);
  dw = c, db = sums;
  return true;
#else
  return false;
#endif
}

Grads linear_gradient(const Saved& s, const Tensor& dz, Needs need, Pending& pending) {
  Tensor dx, dw, db;
  if (need[0]) dx = input_gradient(dz, s[1], 0, pending);
  if (need[1] && need[2] && joint_gradient(as_rows(dz), as_rows(s[0]), dw, db)) return {dx, dw, db};
  if (need[1]) dw = matmul(matrix_transpose(as_rows(dz)), as_rows(s[0]));
  if (need[2]) db = sum(as_rows(dz), {0});
  return {dx, dw, db};
}

}  // namespace

Tensor matmul(const Tensor& a, const Tensor& b) {
  CAPO_CHECK(is_floating(a.dtype()) && a.dtype() == b.dtype(), "matmul: a and b must have one floating dtype, got ",
             describe(a), " and ", describe(b));
  CAPO_CHECK(a.device() == b.device(), "matmul: devices must be equal, got ", a.device(), " and ", b.device());
  CAPO_CHECK(a.rank() >= 2 && b.rank() >= 2, "matmul: a and b need rank 2 or more, got ", a.shape(), " and ",
             b.shape());
  CAPO_CHECK(a.size(-1) == b.size(-2), "matmul: columns of a must equal rows of b, got ", a.shape(), " and ",
             b.shape());
  Shape abatch = a.shape(), bbatch = b.shape();
  for (int i = 0; i < 2; ++i) abatch.pop_back(), bbatch.pop_back();
  const Shape batch = broadcast_shapes("matmul", abatch, bbatch);
  Shape out = batch;
  out.push_back(a.size(-2));
  out.push_back(b.size(-1));
  const Tensor y = product(a, b, batch, out);
  const Needs need = needs_of({a, b});
  const Shape ashape = a.shape(), bshape = b.shape();
  return record("matmul", y, {a, b}, Saved({keep_if(need[1], a), keep_if(need[0], b)}),
                [ashape, bshape](const Saved& s, const Tensor& dy, Needs n) -> Grads {
                  Tensor da, db;
                  if (n[0]) da = sum_to(matmul(dy, matrix_transpose(s[1])), ashape);
                  // One b: the batch joins the sum.
                  if (n[1] && numel(bshape) == bshape.back() * bshape[bshape.size() - 2]) {
                    Shape full = dy.shape();
                    full.back() = ashape.back();
                    db = reshape(matmul(matrix_transpose(as_rows(expand(s[0], full))), as_rows(dy)), bshape);
                  } else if (n[1]) {
                    db = sum_to(matmul(matrix_transpose(s[0]), dy), bshape);
                  }
                  return {da, db};
                });
}

Tensor linear(const Tensor& x, const Tensor& w, const Tensor& b, Activation activation) {
  CAPO_CHECK(is_floating(x.dtype()) && x.dtype() == w.dtype(), "linear: x and w must have one floating dtype, got ",
             describe(x), " and ", describe(w));
  CAPO_CHECK(x.rank() >= 1 && w.rank() == 2, "linear: needs x [..., I] and w [O, I], got ", x.shape(), " and ",
             w.shape());
  CAPO_CHECK(x.size(-1) == w.size(1), "linear: w must be [O, ", x.size(-1), "] to match the last axis of x ", x.shape(),
             ", got ", w.shape());
  CAPO_CHECK(x.device() == w.device(), "linear: devices must be equal, got ", x.device(), " and ", w.device());
  if (b.defined())
    CAPO_CHECK(b.shape() == Shape{w.size(0)} && b.dtype() == x.dtype() && b.device() == x.device(),
               "linear: b must be ", x.dtype(), " [", w.size(0), "] on ", x.device(), ", got ", describe(b));

  Shape out = x.shape();
  out.back() = w.size(0);
  Tensor rows = x.detach();  // the kernel's view: at least one row axis
  if (x.rank() == 1) rows = strided_view(rows, {1, x.size(0)}, {x.size(0), x.strides()[0]}, x.offset());
  Shape batch = rows.shape();
  for (int i = 0; i < 2; ++i) batch.pop_back();
  const Tensor wt = strided_view(w, {w.size(1), w.size(0)}, {w.strides()[1], w.strides()[0]}, w.offset());
  const Tensor bias = b.defined() ? contiguous(b.detach()) : b;

  const Needs need = needs_of({x, w, b});
  const auto record_linear = [&](const Tensor& y) {
    return record("linear", y, {x, w, b}, Saved({keep_if(need[1], x), keep_if(need[0], w)}), linear_gradient);
  };
  if (!need.any() || activation == Activation::none)
    return record_linear(product(rows, wt, batch, out, bias, activation));

  // Two nodes from one pass: z = x w^T + b, then y = act(z).
  if (activation == Activation::relu) {  // y alone tells the slope: z is never stored
    const Tensor y = product(rows, wt, batch, out, bias, activation), z = record_linear(y.detach());
    return record("relu", y, {z}, Saved({}, {y}), [](const Saved& s, const Tensor& dy, Needs) -> Grads {
      return {activation_gradient(Activation::relu, dy, s[0])};
    });
  }
  Tensor z;
  const Tensor y = product(rows, wt, batch, out, bias, activation, &z);
  z = record_linear(z);
  const auto gradient = [activation](const Saved& s, const Tensor& dy, Needs) -> Grads {
    return {activation_gradient(activation, dy, s[0])};
  };
  const bool remakes = !is_half(y.dtype()) || y.device().is_cuda();  // y is made of z before its rounding to 16 bits
  return record(name_of(activation), y, {z}, Saved({z}), gradient, RemakesUnary{unary_of(activation), 0, 0, remakes});
}

namespace {

void check_branch(const Tensor& r, const LinearBranch& branch, std::int64_t first) {
  const auto& [x, w, b, column] = branch;
  CAPO_CHECK(x.dtype() == r.dtype() && w.dtype() == r.dtype(), "add_linear: x and w must be ", r.dtype(),
             " like r, got ", describe(x), " and ", describe(w));
  CAPO_CHECK(x.device() == r.device() && w.device() == r.device(), "add_linear: devices must be equal, got ",
             r.device(), ", ", x.device(), " and ", w.device());
  CAPO_CHECK(w.rank() == 2 && x.rank() == r.rank(), "add_linear: needs x [..., I] of r's rank and w [O, I], got r ",
             r.shape(), ", x ", x.shape(), " and w ", w.shape());
  for (int i = 0; i + 1 < r.rank(); ++i)
    CAPO_CHECK(x.shape()[i] == r.shape()[i], "add_linear: x must have the leading axes of r ", r.shape(), ", got ",
               x.shape());
  CAPO_CHECK(x.size(-1) == w.size(1), "add_linear: w must be [O, ", x.size(-1), "] to match the last axis of x ",
             x.shape(), ", got ", w.shape());
  CAPO_CHECK(column >= first && column + w.size(0) <= r.size(-1), "add_linear: columns ", column, " .. ",
             column + w.size(0), " must follow each other in r's ", r.size(-1), ", from ", first, " on");
  if (b.defined())
    CAPO_CHECK(b.shape() == Shape{w.size(0)} && b.dtype() == r.dtype() && b.device() == r.device(),
               "add_linear: b must be ", r.dtype(), " [", w.size(0), "] on ", r.device(), ", got ", describe(b));
}

// What add_linear's gradient takes besides tensors: where its branches' columns lie.
struct Columns {
  int count;
  Dims first, widths;
};

// y = r + the branches, all rows of length r.size(-1).
void add_branches(const Tensor& y, const Tensor& r, const std::vector<LinearBranch>& branches) {
  const std::int64_t width = r.size(-1), rows = width ? r.numel() / width : 0;
  const auto part = [&](const Tensor& t, std::int64_t from, std::int64_t to) {
    return strided_view(t, {rows, to - from}, {width, 1}, t.offset() + from);
  };
  const auto copy = [&](std::int64_t from, std::int64_t to) {
    if (from < to) copy_into(part(y, from, to), part(r, from, to));
  };
  std::int64_t done = 0;
  for (const auto& [x, w, b, column] : branches) {
    const std::int64_t end = column + w.size(0);
    copy(done, column);
    const Tensor wt = strided_view(w, {w.size(1), w.size(0)}, {w.strides()[1], w.strides()[0]}, w.offset());
    product_into(part(y, column, end), as_rows(x.detach()), wt, {}, b.defined() ? contiguous(b.detach()) : b,
                 Activation::none, nullptr, part(r, column, end));
    done = end;
  }
  copy(done, width);
}

}  // namespace

Tensor add_linear(const Tensor& r, const std::vector<LinearBranch>& branches) {
  CAPO_CHECK(is_floating(r.dtype()) && r.rank() >= 1, "add_linear: r must be floating, of rank 1 or more, got ",
             describe(r));
  CAPO_CHECK(!branches.empty() && branches.size() <= kMaxDims, "add_linear: needs 1 to ", kMaxDims, " branches, got ",
             branches.size());
  Columns at{static_cast<int>(branches.size()), {}, {}};
  std::vector<Tensor> inputs{r};
  std::int64_t end = 0;
  for (const auto& branch : branches) {
    check_branch(r, branch, end);
    end = branch.column + branch.w.size(0);
    at.first.push_back(branch.column), at.widths.push_back(branch.w.size(0));
    for (const Tensor& t : {branch.x, branch.w, branch.b}) inputs.push_back(t);
  }

  const Tensor y = empty(r.shape(), r.dtype(), r.device());
  if (y.numel() > 0) {
    const NoGrad off;
    add_branches(y, contiguous(r.detach()), branches);
  }
  const Needs need = needs_of(inputs);
  std::vector<Tensor> kept;
  for (int i = 0; i < at.count; ++i) {
    const LinearBranch& branch = branches[static_cast<std::size_t>(i)];
    kept.push_back(keep_if(need[3 * i + 2], branch.x));
    kept.push_back(keep_if(need[3 * i + 1], branch.w));
  }
  return record("add_linear", y, inputs, Saved(kept, {}),
                [at](const Saved& s, const Tensor& dy, Needs n, Pending& pending) -> Grads {
                  Grads g{keep_if(n[0], dy)};
                  for (int i = 0; i < at.count; ++i) {
                    const Tensor dz = slice(dy, -1, at.first[i], at.first[i] + at.widths[i]);
                    const int x = 3 * i + 1;
                    g.push_back(n[x] ? input_gradient(dz, s[2 * i + 1], x, pending) : Tensor());
                    g.push_back(n[x + 1] ? matmul(matrix_transpose(as_rows(dz)), as_rows(s[2 * i])) : Tensor());
                    g.push_back(n[x + 2] ? sum(as_rows(dz), {0}) : Tensor());
                  }
                  return g;
                });
}

}  // namespace capo
