#include <capo/autograd/autograd.h>
#include <capo/models/segment/sliding_window.h>
#include <capo/ops/binary.h>
#include <capo/ops/copy.h>
#include <capo/ops/join.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cmath>

namespace capo::segment {
namespace {

void check(const Tensor& x, const SlidingWindow& o) {
  const int axes = o.patch.size();
  CAPO_CHECK(axes >= 1 && x.rank() == axes + 2 && x.numel() > 0, "sliding_window: patch ", o.patch,
             " needs x [B, spatial.., channels] with as many spatial axes, none empty, got ", x.shape());
  for (auto p : o.patch) CAPO_CHECK(p > 0, "sliding_window: patch must be positive, got ", o.patch);
  CAPO_CHECK(o.overlap >= 0 && o.overlap < 1, "sliding_window: overlap must be in [0, 1), got ", o.overlap);
  for (int i = 0; i < o.mirror.size(); ++i) {
    const auto a = o.mirror[i];
    CAPO_CHECK(a >= 0 && a < axes, "sliding_window: mirror axes must be in [0, ", axes, "), got ", o.mirror);
    CAPO_CHECK(std::count(o.mirror.begin(), o.mirror.end(), a) == 1, "sliding_window: mirror axes repeat in ",
               o.mirror);
  }
}

// The mean over all flips of the chosen axes.
Tensor mirrored(detail::Network call, void* network, const Tensor& x, const Dims& mirror) {
  Tensor sum;
  const int flips = 1 << mirror.size();
  for (int bits = 0; bits < flips; ++bits) {
    Dims axes;
    for (int i = 0; i < mirror.size(); ++i)
      if (bits >> i & 1) axes.push_back(mirror[i] + 1);
    const Tensor y = bits ? flip(call(network, flip(x, axes)), axes) : call(network, x);
    sum = sum.defined() ? sum + y : y;
  }
  return flips > 1 ? sum * (1.0 / flips) : sum;
}

Tensor window(const Tensor& x, const Dims& at, const Dims& size) {
  Tensor y = x;
  for (int a = 0; a < at.size(); ++a) y = slice(y, a + 1, at[a], at[a] + size[a]);
  return y;
}

}  // namespace

std::vector<std::int64_t> window_steps(std::int64_t size, std::int64_t patch, double overlap) {
  CAPO_CHECK(size >= patch && patch > 0 && overlap >= 0 && overlap < 1,
             "window_steps: needs size >= patch > 0 and overlap in [0, 1), got ", size, ", ", patch, " and ", overlap);
  const double rest = static_cast<double>(size - patch);
  const auto more =
      static_cast<std::int64_t>(std::ceil(rest / std::max(1.0, static_cast<double>(patch) * (1 - overlap))));
  std::vector<std::int64_t> at(static_cast<std::size_t>(more) + 1, 0);
  for (std::int64_t i = 1; i <= more; ++i)
    at[static_cast<std::size_t>(i)] = std::llrint(rest / static_cast<double>(more) * static_cast<double>(i));
  return at;
}

Tensor gaussian_importance(const Dims& patch, DType dtype, Device device) {
  const NoGrad off;
  Tensor map;
  for (int a = 0; a < patch.size(); ++a) {
    std::vector<double> w(static_cast<std::size_t>(patch[a]));
    const double sigma = static_cast<double>(patch[a]) / 8;
    for (std::int64_t i = 0; i < patch[a]; ++i) {
      const double d = static_cast<double>(i - patch[a] / 2) / sigma;
      w[static_cast<std::size_t>(i)] = std::exp(-d * d / 2);
    }
    Shape shape = Dims::filled(patch.size() + 1, 1);
    shape[a] = patch[a];
    const Tensor axis = from_vector(w, shape);
    map = map.defined() ? map * axis : axis;
  }
  return to(cast(map, dtype), device);
}

namespace detail {

Tensor sliding_window(Network call, void* network, const Tensor& image, const SlidingWindow& o) {
  check(image, o);
  const NoGrad off;
  const int axes = o.patch.size();
  Dims before = Dims::filled(axes + 2, 0), after = before, crop, whole;
  std::vector<std::vector<std::int64_t>> steps;
  std::size_t windows = 1;
  for (int a = 0; a < axes; ++a) {
    const std::int64_t missing = std::max<std::int64_t>(0, o.patch[a] - image.size(a + 1));
    before[a + 1] = missing / 2;
    after[a + 1] = missing - missing / 2;
    crop.push_back(missing / 2);
    whole.push_back(image.size(a + 1));
    steps.push_back(window_steps(image.size(a + 1) + missing, o.patch[a], o.overlap));
    windows *= steps.back().size();
  }
  const Tensor x = before == after && before == Dims::filled(axes + 2, 0) ? image : pad(image, before, after);

  Tensor sum, weight, importance;
  for (std::size_t w = 0; w < windows; ++w) {
    Dims at = Dims::filled(axes, 0);
    for (std::size_t rest = w, a = static_cast<std::size_t>(axes); a-- > 0;) {  // last axis fastest
      at[static_cast<int>(a)] = steps[a][rest % steps[a].size()];
      rest /= steps[a].size();
    }
    Tensor y = mirrored(call, network, contiguous(window(x, at, o.patch)), o.mirror);
    Shape want = Dims{x.size(0)};
    for (auto p : o.patch) want.push_back(p);
    want.push_back(y.rank() > 0 ? y.size(-1) : 0);
    CAPO_CHECK(y.shape() == want && is_floating(y.dtype()), "sliding_window: the network must keep the patch, got ",
               y.dtype(), " ", y.shape(), " from ", o.patch);
    if (is_half(y.dtype())) y = cast(y, f32);
    y = to(y, o.on_host ? kCpu : image.device());
    if (!sum.defined()) {
      Shape shape = x.shape();
      shape.back() = y.size(-1);
      sum = zeros(shape, y.dtype(), y.device());
      shape.back() = shape[0] = 1;
      weight = zeros(shape, y.dtype(), y.device());
      importance = o.gaussian ? gaussian_importance(o.patch, y.dtype(), y.device())
                              : ones(Dims::filled(axes + 1, 1), y.dtype(), y.device());
    }
    const Tensor here = window(sum, at, o.patch), counted = window(weight, at, o.patch);
    copy_into(here, here + y * importance);
    copy_into(counted, counted + importance);
  }
  const Tensor inside = window(sum, crop, whole) / window(weight, crop, whole);
  return inside;
}

}  // namespace detail

}  // namespace capo::segment
