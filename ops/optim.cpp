#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/args.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/optim.h>
#include <capo/ops/reduce.h>
#include <capo/ops/work_internal.h>

#include <cmath>

namespace capo {

namespace {
// Each element of the table's tensors is read or written `times` times.
Work table_work(const TensorTable& t, std::int64_t times) {
  std::int64_t n = 0;
  for (int i = 0; i < t.count; ++i) n += t.size[i];
  return Work::moved(bytes_of(t.dtype, n * times));
}
Work sgd_work(const SgdArgs& p, std::int64_t) { return table_work(p.table, p.options.momentum != 0 ? 5 : 3); }
Work adamw_work(const AdamwArgs& p, std::int64_t) { return table_work(p.table, 7); }
Work ema_work(const EmaArgs& p, std::int64_t) { return table_work(p.table, 3); }
Work scale_work(const ScaleArgs& p, std::int64_t) { return table_work(p.table, 2); }
Work grad_stat_work(const GradStatArgs& p, std::int64_t) { return table_work(p.table, 1); }
}  // namespace

CAPO_KERNEL_CUDA(sgd, SgdArgs, sgd_work)
CAPO_KERNEL_CUDA(adamw, AdamwArgs, adamw_work)
CAPO_KERNEL_CUDA(ema, EmaArgs, ema_work)
CAPO_KERNEL_CUDA(optim_scale, ScaleArgs, scale_work)
CAPO_KERNEL_CUDA(grad_stat, GradStatArgs, grad_stat_work)
CAPO_KERNEL_CUDA_ONLY(grad_total, GradTotalArgs)

namespace {

// One tensor's row of a table; undefined where a list is not used. [0] is read or written, the rest as the kernel says.
struct Row {
  Tensor t[5];
};

std::int64_t chunks_of(const Tensor& t) { return (t.numel() + kOptimChunk - 1) / kOptimChunk; }

// Calls run(table, device, chunks) for batches of rows of one device and dtypes.
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
    const auto dtype = [&](int list) { return row.t[list].defined() ? row.t[list].dtype() : t.dtype(); };
    const bool alike = t.dtype() == table.dtype && dtype(1) == table.gradient && dtype(4) == table.weight &&
                       t.device() == device;
    if (table.count == TensorTable::kMax || !alike) flush();
    device = t.device();
    table.dtype = t.dtype();
    table.gradient = dtype(1);
    table.weight = dtype(4);
    const int k = table.count++;
    for (int list = 0; list < 5; ++list) table.data[list][k] = data_or_null(row.t[list]);
    table.size[k] = t.numel();
    table.first[0] = 0;
    table.first[k + 1] = table.first[k] + chunks_of(t);
  }
  flush();
}

void check_list(const char* op, const char* what, const TensorList& list, std::size_t n) {
  CAPO_CHECK(list.size() == n, op, ": ", what, " has ", list.size(), " tensors for ", n, " to write");
}

// 16-bit t beside f32 where the kernel widens it.
void check_alike(const char* op, const char* what, const Tensor& t, const Tensor& first, bool or_half = false) {
  CAPO_CHECK(t.defined(), op, ": ", what, " is undefined for a tensor ", first.shape());
  const bool dtype = t.dtype() == first.dtype() || (or_half && first.dtype() == f32 && is_half(t.dtype()));
  CAPO_CHECK(dtype && t.shape() == first.shape() && t.device() == first.device(), op, ": ", what, " must be like ",
             describe(first), ", got ", describe(t));
}

void check_written(const char* op, const Tensor& t) {
  CAPO_CHECK(t.defined(), op, ": a tensor to write is undefined");
  CAPO_CHECK(t.dtype() == f32 || t.dtype() == f64, op, ": writes f32 or f64 (keep f32 masters), got ", describe(t));
  CAPO_CHECK(t.is_contiguous(), op, ": a written tensor must be contiguous, got ", describe(t));
}

// A 16-bit weight beside its f32 param; undefined: none.
void check_weight(const char* op, const Tensor& weight, const Tensor& param) {
  if (!weight.defined()) return;
  CAPO_CHECK(is_half(weight.dtype()) && param.dtype() == f32, op,
             ": a weight beside its param must be bf16 or f16 and the param f32, got ", describe(weight), " beside ",
             describe(param));
  CAPO_CHECK(weight.shape() == param.shape() && weight.device() == param.device(), op,
             ": weight must be like its param ", describe(param), ", got ", describe(weight));
  CAPO_CHECK(weight.is_contiguous(), op, ": a written tensor must be contiguous, got ", describe(weight));
}

// The call's rows: params, state and weights written, gradients read. Everything is checked before anything is written.
std::vector<Row> rows_of(const char* op, const TensorList& params, const TensorList& grads, const TensorList& state1,
                         const TensorList& state2, const char* name1, const char* name2, const TensorList& weights) {
  check_list(op, "the list of gradients", grads, params.size());
  if (!weights.empty()) check_list(op, "the list of weights", weights, params.size());
  std::vector<Row> rows;
  for (std::size_t i = 0; i < params.size(); ++i) {
    if (!grads[i].defined()) continue;
    check_written(op, params[i]);
    const Tensor weight = weights.empty() ? Tensor() : weights[i];
    check_weight(op, weight, params[i]);
    check_alike(op, "gradient", grads[i], weight.defined() && is_half(grads[i].dtype()) ? weight : params[i]);
    rows.push_back({{params[i], contiguous(grads[i]), {}, {}, weight}});
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

const float* checked_numbers(const char* op, const char* what, const Tensor& t, std::int64_t n, Device device) {
  if (!t.defined()) return nullptr;
  CAPO_CHECK(t.dtype() == f32 && t.numel() == n && t.is_contiguous() && t.device() == device, op, ": ", what,
             " must be f32 [", n, "] on ", device, ", got ", describe(t));
  return t.data<float>();
}

// n: how many numbers the op takes.
AtRunArgs args_of(const char* op, const AtRun& a, std::int64_t n, Device device) {
  const bool any = a.numbers.defined() || a.scale.defined() || a.skip.defined();
  CAPO_CHECK(!any || device.is_cuda(), op,
             ": numbers that are read at run are for CUDA tensors, got ", device);
  return {checked_numbers(op, "the numbers at run", a.numbers, n, device),
          checked_numbers(op, "the scale at run", a.scale, 1, device),
          checked_numbers(op, "the skip at run", a.skip, 1, device)};
}

// What grad_stat makes of all chunks of tensors on one CUDA device, in order.
Tensor parts_there(const std::vector<Row>& rows, bool count_non_finite) {
  std::int64_t chunks_of_all = 0;
  for (const Row& row : rows) chunks_of_all += chunks_of(row.t[0]);
  const Tensor parts = empty({chunks_of_all}, f64, rows[0].t[0].device());
  double* out = parts.data<double>();
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::grad_stat, device, GradStatArgs{table, count_non_finite, out}, chunks, 1);
    out += chunks;
  });
  return parts;
}

double total_there(const char* op, const std::vector<Row>& rows, bool count_non_finite) {
  if (rows.empty()) return 0;
  refuse_capture(op);
  const Tensor parts = parts_there(rows, count_non_finite), sum_of_all = empty({1}, f64, parts.device());
  GradTotalArgs args{};
  args.parts = parts.data<double>();
  args.count = parts.numel();
  args.total = sum_of_all.data<double>();
  launch(kernels::grad_total, parts.device(), args, 1, 1);
  detail::observe(op, {});
  return sum_of_all.item();
}

double total_here(const std::vector<Row>& rows, bool count_non_finite) {
  double sum_of_all = 0;
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    const Tensor parts = empty({chunks}, f64, device);
    launch(kernels::grad_stat, device, GradStatArgs{table, count_non_finite, parts.data<double>()}, chunks, 1);
    detail::observe(count_non_finite ? "all_finite" : "global_norm", {});
    sum_of_all += sum(parts).item();
  });
  return sum_of_all;
}

void check_floating(const char* op, const Tensor& t) {
  CAPO_CHECK(is_floating(t.dtype()), op, ": needs floating tensors, got ", describe(t));
}

Row row_of(const Tensor& t) {
  return {{contiguous(is_half(t.dtype()) && !t.device().is_cuda() ? cast(t, f32) : t), {}, {}, {}, {}}};
}

// Sums over all chunks of all tensors, in order.
double total(const char* op, const TensorList& tensors, bool count_non_finite) {
  const NoGrad off;
  std::vector<Row> here, there;
  for (const Tensor& t : tensors) {
    if (!t.defined()) continue;
    check_floating(op, t);
    if (!t.device().is_meta()) (t.device().is_cuda() ? there : here).push_back(row_of(t));
  }
  return total_here(here, count_non_finite) + total_there(op, there, count_non_finite);
}

// The f64 values of a step, from which kernels take theirs.
AdamwArgs adamw_args(const AdamwOptions& o) {
  const double t = static_cast<double>(o.step);
  AdamwArgs args{};
  args.decay = 1 - o.lr * o.weight_decay;
  args.beta1 = o.beta1;
  args.beta2 = o.beta2;
  args.eps = o.eps;
  args.grad_scale = o.grad_scale;
  args.step_size = o.lr / (1 - std::pow(o.beta1, t));
  args.root_correction = std::sqrt(1 - std::pow(o.beta2, t));
  return args;
}

}  // namespace

void sgd_(const TensorList& params, const TensorList& grads, const TensorList& buffers, const SgdOptions& o,
          const AtRun& at_run, const TensorList& weights) {
  const char* op = "sgd_";
  const NoGrad off;
  CAPO_CHECK(o.lr >= 0 && o.momentum >= 0 && o.weight_decay >= 0, op,
             ": lr, momentum and weight_decay must be >= 0, got ", o.lr, ", ", o.momentum, ", ", o.weight_decay);
  CAPO_CHECK(!o.nesterov || (o.momentum > 0 && o.dampening == 0), op,
             ": nesterov needs momentum > 0 and dampening 0, got ", o.momentum, " and ", o.dampening);
  const bool buffered = o.momentum != 0;
  if (buffered) check_list(op, "the list of momentum buffers", buffers, params.size());
  const auto rows = rows_of(op, params, grads, buffers, {}, buffered ? "momentum buffer" : nullptr, nullptr, weights);
  write_all(op, rows, {0, 2, 4});
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::sgd, device, SgdArgs{table, o, args_of(op, at_run, 1, device)}, chunks, 1);
  });
  detail::observe(op, {});
}

void adamw_(const TensorList& params, const TensorList& grads, const TensorList& m, const TensorList& v,
            const AdamwOptions& o, const AtRun& at_run, const TensorList& weights) {
  const char* op = "adamw_";
  const NoGrad off;
  CAPO_CHECK(o.lr >= 0 && o.weight_decay >= 0 && o.eps >= 0, op, ": lr, weight_decay and eps must be >= 0, got ", o.lr,
             ", ", o.weight_decay, ", ", o.eps);
  CAPO_CHECK(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1, op,
             ": beta1 and beta2 must be in [0, 1), got ", o.beta1, ", ", o.beta2);
  CAPO_CHECK(o.step >= 1, op, ": step counts from 1, got ", o.step);
  check_list(op, "the list m", m, params.size());
  check_list(op, "the list v", v, params.size());
  const auto rows = rows_of(op, params, grads, m, v, "m", "v", weights);
  write_all(op, rows, {0, 2, 3, 4});
  AdamwArgs args = adamw_args(o);
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    args.table = table;
    args.at_run = args_of(op, at_run, 3, device);
    launch(kernels::adamw, device, args, chunks, 1);
  });
  detail::observe(op, {});
}

void adamw_numbers(const AdamwOptions& o, float* three) {
  const AdamwArgs args = adamw_args(o);
  three[0] = static_cast<float>(args.decay);
  three[1] = static_cast<float>(args.step_size);
  three[2] = static_cast<float>(1 / args.root_correction);
}

void ema_(const TensorList& averages, const TensorList& values, double decay, const AtRun& at_run) {
  const char* op = "ema_";
  const NoGrad off;
  CAPO_CHECK(decay >= 0 && decay <= 1, op, ": decay must be in [0, 1], got ", decay);
  check_list(op, "the list of values", values, averages.size());
  std::vector<Row> rows;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const Tensor &average = averages[i], &value = values[i];
    CAPO_CHECK(value.defined(), op, ": value ", i, " is undefined");
    check_written(op, average);
    const bool in_pass = average.dtype() == f32 && is_half(value.dtype());
    const Tensor v = is_floating(value.dtype()) && !in_pass ? cast(value, average.dtype()) : value;
    check_alike(op, "value", v, average, true);
    rows.push_back({{average, contiguous(v), {}, {}, {}}});
  }
  write_all(op, rows, {0});
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::ema, device, EmaArgs{table, 1 - decay, args_of(op, at_run, 1, device)}, chunks, 1);
  });
  detail::observe(op, {});
}

void scale_(const TensorList& tensors, double scale, const AtRun& at_run) {
  const char* op = "scale_";
  const NoGrad off;
  std::vector<Row> rows;
  for (const Tensor& t : tensors) {
    if (!t.defined()) continue;
    check_written(op, t);
    rows.push_back({{t, {}, {}, {}, {}}});
  }
  write_all(op, rows, {0});
  by_tables(rows, [&](const TensorTable& table, Device device, std::int64_t chunks) {
    launch(kernels::optim_scale, device, ScaleArgs{table, scale, args_of(op, at_run, 0, device)}, chunks, 1);
  });
  detail::observe(op, {});
}

void sgd_(const Tensor& param, const Tensor& grad, const Tensor& buffer, const SgdOptions& o) {
  sgd_(TensorList{param}, TensorList{grad}, TensorList{buffer}, o);
}
void adamw_(const Tensor& param, const Tensor& grad, const Tensor& m, const Tensor& v, const AdamwOptions& o) {
  adamw_(TensorList{param}, TensorList{grad}, TensorList{m}, TensorList{v}, o);
}
void ema_(const Tensor& average, const Tensor& value, double decay) {
  ema_(TensorList{average}, TensorList{value}, decay);
}
void scale_(const Tensor& t, double scale) { scale_(TensorList{t}, scale); }

double global_norm(const TensorList& tensors) { return std::sqrt(total("global_norm", tensors, false)); }
bool all_finite(const TensorList& tensors) { return total("all_finite", tensors, true) == 0; }
bool all_finite(const Tensor& t) { return all_finite(TensorList{t}); }

GradVerdict grad_verdict(const TensorList& gradients, const TensorList& losses, double max_norm,
                         const Tensor& loss_scale) {
  const char* op = "grad_verdict";
  const NoGrad off;
  CAPO_CHECK(max_norm >= 0, op, ": max_norm must not be negative, got ", max_norm);
  std::vector<Row> rows, loss_rows;
  Device device = kCpu;
  const auto add = [&](std::vector<Row>& list, const Tensor& t) {
    if (!t.defined()) return;
    check_floating(op, t);
    if (rows.empty()) device = t.device();
    CAPO_CHECK(device.is_cuda() && t.device() == device, op, ": needs tensors of one CUDA device, got ", describe(t));
    list.push_back(row_of(t));
  };
  for (const Tensor& t : gradients) add(rows, t);
  CAPO_CHECK(!rows.empty(), op, ": needs a gradient");
  for (const Tensor& t : losses) add(loss_rows, t);
  const Tensor parts = parts_there(rows, false), wrong = loss_rows.empty() ? Tensor() : parts_there(loss_rows, true);
  const GradVerdict v{empty({1}, f64, device), empty({1}, f32, device), empty({1}, f32, device)};
  const GradTotalArgs args{parts.data<double>(), parts.numel(), nullptr, v.norm.data<double>(),
                           v.scale.data<float>(), v.skip.data<float>(),
                           static_cast<const double*>(data_or_null(wrong)), wrong.defined() ? wrong.numel() : 0,
                           max_norm, checked_numbers(op, "the loss scale", loss_scale, 1, device)};
  launch(kernels::grad_total, device, args, 1, 1);
  detail::observe(op, {});
  return v;
}

}  // namespace capo
