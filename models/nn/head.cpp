#include <capo/models/nn/head.h>
#include <capo/ops/matmul.h>

namespace capo::nn {

Head::Head(Module* up, std::string_view name, std::int64_t dim, int classes, Init w, Init b)
    : Layer(up, name, Kind::head),
      weight(this, "weight", {classes, dim}, w),
      bias(this, "bias", {classes}, b) {}

Tensor Head::forward(const Tensor& x) { return linear(x, weight, bias); }

}  // namespace capo::nn
