// Running statistics made again for the weights as they are.
#pragma once

#include <capo/models/train/trainer.h>

namespace capo::train {

// Precise batch norm (Wu and Johnson 2021): the running statistics of every batch norm whose weight or bias trains
// become those of the source's next `batches` batches under the present weights, in place of an average over weights
// that have gone: the mean of the batches' means, and the mean of their (unbiased) variances plus the variance of their
// means, batches weighing by their samples. The rest of the module runs in eval mode; its mode is put back. Throws
// without such a norm, and leaves the statistics as they were when a batch throws.
void precise_batch_norms(Classifier& classifier, BatchSource& source, std::int64_t batches);

}  // namespace capo::train
