// What is done to the batch norms of a whole model at once.
#pragma once

#include <capo/models/nn/conv_layers.h>

namespace capo::nn {

std::vector<BatchNorm*> batch_norms(Module& model);  // in the order of modules()

// For inference: every batch norm that knows the convolution it reads (BatchNorm::set_source) is worked into it,
//   w' = w g, b' = (b - mean) g + bias, g = weight / sqrt(running_var + eps)    in f64, rounded once
// and passes its input on from then on. The convolution gains a bias where it had none, so the folded model's state
// dict is not the unfolded one's; the norm's own tensors stay as they were. Returns how many were folded now. Throws,
// with nothing changed, where a norm is in train(), or it or its convolution carries a tap.
int fold_batch_norms(Module& model);

}  // namespace capo::nn
