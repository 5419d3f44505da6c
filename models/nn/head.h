// The classifier at the end of a network.
#pragma once

#include <capo/models/nn/module.h>

namespace capo::nn {

// y = x w^T + b; x [.., dim], weight [classes, dim], bias [classes]. Of kind head, so that a tuner file can carry it
// and another task can replace it.
class Head : public Layer<Head> {
 public:
  Head(Module* up, std::string_view name, std::int64_t dim, int classes, Init weight, Init bias);
  Tensor forward(const Tensor& x);
  Parameter weight, bias;
};

}  // namespace capo::nn
