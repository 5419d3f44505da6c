#include <capo/autograd/autograd.h>
#include <capo/engine/backend.h>
#include <capo/ops/axis_filter.h>
#include <capo/ops/copy.h>
#include <capo/ops/kernel.h>
#include <capo/ops/work_internal.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <vector>

namespace capo {

namespace {
Work axis_filter_work(const AxisFilterArgs& p, std::int64_t items) {
  return Work::moved(bytes_of(p.dtype, items / p.rows * (p.columns + p.rows) * p.inner));
}
}  // namespace

CAPO_KERNEL_CUDA(axis_filter, AxisFilterArgs, axis_filter_work)

namespace {

struct Taps {
  std::vector<std::int64_t> begin{0}, column;
  std::vector<double> weight;

  // Repeated edges fall on one column; exact zeros are left out.
  void add(std::int64_t at, double w) {
    if (w == 0) return;
    if (static_cast<std::int64_t>(column.size()) > begin.back() && column.back() == at) {
      weight.back() += w;
      return;
    }
    column.push_back(at);
    weight.push_back(w);
  }
  void end_row() { begin.push_back(static_cast<std::int64_t>(column.size())); }
};

// Keys, Cubic convolution interpolation for digital image processing, 1981.
double cubic(double x, double a) {
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return 0;
}

// The conventions of PyTorch 2.x: aten/src/ATen/native/UpSample.h and cpu/UpSampleKernel.cpp.
void interpolate_row(Taps& t, const AxisFilter& f, std::int64_t i) {
  const bool is_cubic = f.kind == FilterKind::cubic;
  const auto in = static_cast<double>(f.in), out = static_cast<double>(f.out);
  const double scale = !f.align_corners ? in / out : f.out > 1 ? (in - 1) / (out - 1) : 0;
  if (f.antialias) {
    const double stretch = scale > 1 ? scale : 1, support = (is_cubic ? 2 : 1) * stretch,
                 centre = scale * (static_cast<double>(i) + 0.5);
    const auto first = std::max(static_cast<std::int64_t>(centre - support + 0.5), std::int64_t{0});
    const auto last = std::min(static_cast<std::int64_t>(centre + support + 0.5), f.in);
    const auto weight = [&](std::int64_t j) {
      const double d = (static_cast<double>(j) - centre + 0.5) / stretch;
      return is_cubic ? cubic(d, -0.5) : std::max(1 - std::fabs(d), 0.0);
    };
    double total = 0;
    for (auto j = first; j < last; ++j) total += weight(j);
    for (auto j = first; j < last; ++j) t.add(j, total != 0 ? weight(j) / total : weight(j));
    return;
  }
  double source = f.align_corners ? scale * static_cast<double>(i) : scale * (static_cast<double>(i) + 0.5) - 0.5;
  if (!is_cubic) source = std::max(source, 0.0);
  const auto at = std::min(static_cast<std::int64_t>(std::floor(source)), f.in - 1);
  const double rest = std::clamp(source - static_cast<double>(at), 0.0, 1.0);
  if (!is_cubic) {
    t.add(at, 1 - rest);
    t.add(std::min(at + 1, f.in - 1), rest);
    return;
  }
  for (std::int64_t k = -1; k <= 2; ++k)
    t.add(std::clamp(at + k, std::int64_t{0}, f.in - 1), cubic(static_cast<double>(k) - rest, -0.75));
}

Taps taps_of(const AxisFilter& f) {
  Taps t;
  for (std::int64_t i = 0; i < f.out; ++i) {
    switch (f.kind) {
      case FilterKind::nearest: {
        const float scale = static_cast<float>(f.in) / static_cast<float>(f.out);
        t.add(std::min(static_cast<std::int64_t>(std::floor(static_cast<float>(i) * scale)), f.in - 1), 1);
        break;
      }
      case FilterKind::linear:
      case FilterKind::cubic:
        interpolate_row(t, f, i);
        break;
      case FilterKind::window:
      case FilterKind::bins: {
        const bool window = f.kind == FilterKind::window;
        const std::int64_t from = window ? i * f.stride - f.padding : i * f.in / f.out;
        const std::int64_t to = window ? from + f.kernel : ((i + 1) * f.in + f.out - 1) / f.out;
        const std::int64_t first = std::max(from, std::int64_t{0}), last = std::min(to, f.in);
        const double count = static_cast<double>(window && f.count_padding ? f.kernel : last - first);
        for (auto j = first; j < last; ++j) t.add(j, 1 / count);
        break;
      }
    }
    t.end_row();
  }
  return t;
}

// Rows become columns; each new row's taps are in ascending order again.
Taps transposed(const Taps& a, std::int64_t columns) {
  Taps t;
  std::vector<std::int64_t> next(static_cast<std::size_t>(columns) + 1, 0);
  for (auto c : a.column) ++next[static_cast<std::size_t>(c) + 1];
  for (std::size_t c = 1; c < next.size(); ++c) next[c] += next[c - 1];
  t.begin = next;
  t.column.resize(a.column.size());
  t.weight.resize(a.weight.size());
  for (std::size_t row = 0; row + 1 < a.begin.size(); ++row)
    for (auto k = static_cast<std::size_t>(a.begin[row]); k < static_cast<std::size_t>(a.begin[row + 1]); ++k) {
      const auto to = static_cast<std::size_t>(next[static_cast<std::size_t>(a.column[k])]++);
      t.column[to] = static_cast<std::int64_t>(row);
      t.weight[to] = a.weight[k];
    }
  return t;
}

Taps final_taps(const AxisFilter& f) { return f.transposed ? transposed(taps_of(f), f.in) : taps_of(f); }

void launch_here(AxisFilterArgs p, const AxisFilter& f, std::int64_t items) {
  const Taps taps = final_taps(f);
  const std::vector<float> narrow(taps.weight.begin(), taps.weight.end());
  p.begin = taps.begin.data();
  p.column = taps.column.data();
  p.weight = p.dtype == f64 ? static_cast<const void*>(taps.weight.data()) : narrow.data();
  const auto per_row = static_cast<std::int64_t>(taps.column.size()) / p.rows + 1;
  launch(kernels::axis_filter, kCpu, p, items, 1 + 16384 / (p.inner * per_row));
}

struct TapsThere {
  Tensor begin, column, weight;
};

template <class T>
Tensor upload(const std::vector<T>& v, Device device) {
  const Tensor there = empty({static_cast<std::int64_t>(v.size())}, dtype_of<T>::value, device);
  if (!v.empty()) copy_bytes(there.data(), device, v.data(), kCpu, v.size() * sizeof(T));
  return there;
}

// A model has a few filters and applies them at every step: an upload, which waits for the stream, is made once for
// each. Past kMost of them (sizes that change all the time) nothing more is kept.
TapsThere taps_there(const AxisFilter& f, Device device) {
  using Key = std::array<std::int64_t, 11>;
  constexpr std::size_t kMost = 256;
  static std::mutex mutex;
  static auto* kept = new std::map<Key, TapsThere>;  // immortal: tensors in static storage give memory back late
  const Key key{static_cast<std::int64_t>(f.kind), f.in, f.out, f.antialias, f.align_corners,
                f.kernel, f.stride, f.padding, f.count_padding, f.transposed, device.index};
  const std::lock_guard lock(mutex);
  if (const auto found = kept->find(key); found != kept->end()) return found->second;
  const Taps taps = final_taps(f);
  const std::vector<float> weight(taps.weight.begin(), taps.weight.end());
  const TapsThere there{upload(taps.begin, device), upload(taps.column, device), upload(weight, device)};
  if (kept->size() < kMost) kept->emplace(key, there);
  return there;
}

void launch_there(AxisFilterArgs p, const AxisFilter& f, Device device, std::int64_t items) {
  const TapsThere taps = taps_there(f, device);
  p.begin = taps.begin.data<std::int64_t>();
  p.column = taps.column.data<std::int64_t>();
  p.weight = taps.weight.data();
  launch(kernels::axis_filter, device, p, items, 1);
}

}  // namespace

Tensor axis_filter(const Tensor& x0, std::int64_t axis0, const AxisFilter& f) {
  CAPO_CHECK(is_floating(x0.dtype()), "axis_filter: needs a floating tensor, got ", describe(x0));
  const int axis = normalize_axis("axis_filter", axis0, x0.rank());
  const std::int64_t columns = f.transposed ? f.out : f.in, rows = f.transposed ? f.in : f.out;
  CAPO_CHECK(x0.shape()[axis] == columns, "axis_filter: axis ", axis, " must have size ", columns, ", got ",
             x0.shape());
  CAPO_CHECK(f.in > 0 && f.out > 0, "axis_filter: sizes must be positive, got ", f.in, " to ", f.out);
  if (f.kind == FilterKind::window)
    CAPO_CHECK(f.kernel >= 1 && f.stride >= 1 && f.padding >= 0 && f.padding < f.kernel &&
                   (f.out - 1) * f.stride + f.kernel <= f.in + 2 * f.padding,
               "axis_filter: windows of ", f.kernel, " stride ", f.stride, " padding ", f.padding, " do not fit ", f.in,
               " to ", f.out);
  if (is_half(x0.dtype()) && !x0.device().is_cuda()) return cast(axis_filter(cast(x0, f32), axis, f), x0.dtype());
  const Tensor x = contiguous(x0);
  Shape shape = x.shape();
  shape[axis] = rows;
  const Tensor y = empty(shape, x.dtype(), x.device());
  if (!x.device().is_meta() && y.numel() > 0) {
    AxisFilterArgs p{x.dtype(), x.data(), y.data(), nullptr, nullptr, nullptr, columns, rows, 1};
    for (int i = axis + 1; i < x.rank(); ++i) p.inner *= shape[i];
    if (x.device().is_cuda())
      launch_there(p, f, x.device(), y.numel() / p.inner);
    else
      launch_here(p, f, y.numel() / p.inner);
  }
  AxisFilter back = f;
  back.transposed = !f.transposed;
  return record("axis_filter", y, {x}, Saved(),
                [axis, back](const Saved&, const Tensor& dy, Needs) -> Grads { return {axis_filter(dy, axis, back)}; });
}

}  // namespace capo
