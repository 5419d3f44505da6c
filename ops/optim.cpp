#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/args.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/optim.h>
#include <capo/ops/reduce.h>

#include <cmath>

namespace capo {

CAPO_KERNEL_CUDA(sgd, SgdArgs)
CAPO_KERNEL_CUDA(adamw, AdamwArgs)
CAPO_KERNEL_CUDA(ema, EmaArgs)
CAPO_KERNEL_CUDA(optim_scale, ScaleArgs)
CAPO_KERNEL_CUDA(grad_stat, GradStatArgs)

namespace {

// One tensor's row of a table; undefined where a list is not used. [0] is read or written, the rest as the kernel says.
struct Row {
  Tensor t[4];
};

std::int64_t chunks_of(const Tensor& t) { return (t.numel() + kOptimChunk - 1) / kOptimChunk; }

// Calls run(table, device, chunks) for batches of rows of one device and dtype.
template <class F>
void by_tables(const std::vector<Row>& rows, F run) {
  TensorTable table{};
  Device device = kCpu;
  const auto flush = [&] {
    if (table.count > 0 && table.first[table.count] > 0) run(table, device, table.first[table.count]);
    table.count = 0;
  };
  for (const Row& row : rows) {
    const Tensor& t = row.t[0];
    if (table.count == TensorTable::kMax || t.dtype() != table.dtype || !(t.device() == device)) flush();
    device = t.device();
    table.dtype = t.dtype();
    const int k = table.count++;
    for (int list = 0; list < 4; ++list) table.data[list][k] = data_or_null(row.t[list]);
    table.size[k] = t.numel();
    table.first[0] = 0;
    table.first[k + 1] = table.first[k] + chunks_of(t);
  }
  flush();
}

void check_list(const char* op, const char* what, const TensorList& list, std::size_t n) {
  CAPO_CHECK(list.size() == n, op, ": ", what, " has ", list.size(), " tensors for ", n, " to write");
}

void check_alike(const char* op, const char* what, const Tensor& t, const Tensor& first) {
  CAPO_CHECK(t.defined(), op, ": ", what, " is undefined for a tensor ", first.shape());
  CAPO_CHECK(t.shape() == first.shape() && t.dtype() == first.dtype() && t.device() == first.device(), op, ": ", what,
             " must be like ", describe(first), ", got ", describe(t));
}

void check_written(const char* op, const Tensor& t) {
  CAPO_CHECK(t.defined(), op, ": a tensor to write is undefined");
  CAPO_CHECK(t.dtype() == f32 || t.dtype() == f64, op, ": writes f32 or f64 (keep f32 masters), got ", describe(t));
  CAPO_CHECK(t.is_contiguous(), op, ": a written tensor must be contiguous, got ", describe(t));
}

// The call's rows: params and state written, gradients read. Everything is checked before anything is written.
std::vector<Row> rows_of(const char* op, const TensorList& params, const TensorList& grads, const TensorList& state1,
                         const TensorList& state2, const char* name1, const char* name2) {
  check_list(op, "the list of gradients", grads, params.size());
  std::vector<Row> rows;
  for (std::size_t i = 0; i < params.size(); ++i) {
    if (!grads[i].defined()) continue;
    check_written(op, params[i]);
    check_alike(op, "gradient", grads[i], params[i]);
    rows.push_back({{params[i], contiguous(grads[i]), {}, {}}});
    for (int k = 0; k < 2; ++k) {
      const TensorList& state = k ? state2 : state1;
      const char* name = k ? name2 : name1;
      if (!name) continue;
      check_alike(op, name, state[i], params[i]);
      check_written(op, state[i]);
      rows.back().t[2 + k] = state[i];
    }
  }
  return rows;
}

void write_all(const char* op, const std::vector<Row>& rows, std::initializer_list<int> lists) {
  for (const Row& row : rows)
    for (int list : lists)
      if (row.t[list].defined()) write_in_place(op, row.t[list]);
}

// The sum of what a kernel left per chunk. A device's parts are added here: a few numbers, in order, in f64.
double sum_of_parts(const Tensor& parts) {
  if (!parts.device().is_cuda()) return sum(parts).item();
  std::vector<double> here(static_cast<std::size_t>(parts.numel()));
  copy_bytes(here.data(), kCpu, parts.data(), parts.device(), here.size() * sizeof(double));
  double sum = 0;
  for (const double v : here) sum += v;
  return sum;
}

// Sums over all chunks of all tensors, in order.
double total(const char* op, const TensorList& tensors, bool count_non_finite) {
  const NoGrad off;
  std::vector<Row> rows;
  for (const Tensor& t : tensors) {
    if (!t.defined()) continue;
    CAPO_CHECK(is_floating(t.dtype()), op, ": needs floating tensors, got ", describe(t));
    if (t.device().is_meta()) continue;
    rows.push_back({{contiguous(is_half(t.dtype()) && !t.device().is_cuda() ? cast(t, f32) : t), {}, {}, {}}});
  }
  TensorList parts;  // read once all kernels are under way
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    parts.push_back(empty({chunks}, f64, device));
    const GradStatArgs args{table, count_non_finite, static_cast<double*>(parts.back().data())};
    launch(kernels::grad_stat, device, args, chunks, 1);
  });
  double sum_of_all = 0;
  for (const Tensor& p : parts) sum_of_all += sum_of_parts(p);
  return sum_of_all;
}

}  // namespace

void sgd_(const TensorList& params, const TensorList& grads, const TensorList& buffers, const SgdOptions& o) {
  const char* op = "sgd_";
  const NoGrad off;
  CAPO_CHECK(o.lr >= 0 && o.momentum >= 0 && o.weight_decay >= 0, op, ": lr, momentum and weight_decay must be >= 0, got ",
             o.lr, ", ", o.momentum, ", ", o.weight_decay);
  CAPO_CHECK(!o.nesterov || (o.momentum > 0 && o.dampening == 0), op, ": nesterov needs momentum > 0 and dampening 0, got ",
             o.momentum, " and ", o.dampening);
  const bool buffered = o.momentum != 0;
  if (buffered) check_list(op, "the list of momentum buffers", buffers, params.size());
  const auto rows = rows_of(op, params, grads, buffers, {}, buffered ? "momentum buffer" : nullptr, nullptr);
  write_all(op, rows, {0, 2});
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::sgd, device, SgdArgs{table, o}, chunks, 1);
  });
}

void adamw_(const TensorList& params, const TensorList& grads, const TensorList& m, const TensorList& v, const AdamwOptions& o) {
  const char* op = "adamw_";
  const NoGrad off;
  CAPO_CHECK(o.lr >= 0 && o.weight_decay >= 0 && o.eps >= 0, op, ": lr, weight_decay and eps must be >= 0, got ", o.lr, ", ",
             o.weight_decay, ", ", o.eps);
  CAPO_CHECK(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1, op, ": beta1 and beta2 must be in [0, 1), got ",
             o.beta1, ", ", o.beta2);
  CAPO_CHECK(o.step >= 1, op, ": step counts from 1, got ", o.step);
  check_list(op, "the list m", m, params.size());
  check_list(op, "the list v", v, params.size());
  const auto rows = rows_of(op, params, grads, m, v, "m", "v");
  write_all(op, rows, {0, 2, 3});
  const double t = static_cast<double>(o.step);
  AdamwArgs args{};
  args.decay = 1 - o.lr * o.weight_decay;
  args.beta1 = o.beta1;
  args.beta2 = o.beta2;
  args.eps = o.eps;
  args.grad_scale = o.grad_scale;
  args.step_size = o.lr / (1 - std::pow(o.beta1, t));
  args.root_correction = std::sqrt(1 - std::pow(o.beta2, t));
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    args.table = table;
    launch(kernels::adamw, device, args, chunks, 1);
  });
}

void ema_(const TensorList& averages, const TensorList& values, double decay) {
  const char* op = "ema_";
  const NoGrad off;
  CAPO_CHECK(decay >= 0 && decay <= 1, op, ": decay must be in [0, 1], got ", decay);
  check_list(op, "the list of values", values, averages.size());
  TensorList cast_values;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const Tensor& v = values[i];
    cast_values.push_back(v.defined() && is_floating(v.dtype()) && averages[i].defined() ? cast(v, averages[i].dtype()) : v);
  }
  for (std::size_t i = 0; i < values.size(); ++i) CAPO_CHECK(values[i].defined(), op, ": value ", i, " is undefined");
  const auto rows = rows_of(op, averages, cast_values, {}, {}, nullptr, nullptr);
  write_all(op, rows, {0});
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::ema, device, EmaArgs{table, 1 - decay}, chunks, 1);
  });
}

void scale_(const TensorList& tensors, double scale) {
  const char* op = "scale_";
  const NoGrad off;
  std::vector<Row> rows;
  for (const Tensor& t : tensors) {
    if (!t.defined()) continue;
    check_written(op, t);
    rows.push_back({{t, {}, {}, {}}});
  }
  write_all(op, rows, {0});
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::optim_scale, device, ScaleArgs{table, scale}, chunks, 1);
  });
}

void sgd_(const Tensor& param, const Tensor& grad, const Tensor& buffer, const SgdOptions& o) {
  sgd_(TensorList{param}, TensorList{grad}, TensorList{buffer}, o);
}
void adamw_(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v, const AdamwOptions& o) {
  adamw_(TensorList{param}, TensorList{grad}, TensorList{m}, TensorList{v}, o);
}
void ema_(const Tensor& average, const Tensor& value, double decay) { ema_(TensorList{average}, TensorList{value}, decay); }
void scale_(const Tensor& t, double scale) { scale_(TensorList{t}, scale); }

double global_norm(const TensorList& tensors) { return std::sqrt(total("global_norm", tensors, false)); }
bool all_finite(const TensorList& tensors) { return total("all_finite", tensors, true) == 0; }
bool all_finite(const Tensor& t) { return all_finite(TensorList{t}); }

}  // namespace capo
