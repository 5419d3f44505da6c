#include <capo/models/nn/head.h>
#include <capo/ops/matmul.h>

#include <cmath>

namespace capo::nn {

Head::Head(Module* up, std::string_view name, std::int64_t dim, int classes, Init init)
    : Layer(up, name, Kind::head),
      weight(this, "weight", {classes, dim}, init),
      bias(this, "bias", {classes}, Init::uniform(1 / std::sqrt(static_cast<double>(dim)))) {}

Tensor Head::forward(const Tensor& x) { return linear(x, weight, bias); }

}  // namespace capo::nn
