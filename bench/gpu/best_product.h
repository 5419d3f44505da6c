// cuBLASLt's fastest algorithm for one product, found by timing everything that its heuristic offers: what Capo's
// choice is held against. CUDA builds only.
#pragma once

#include <capo/engine/tensor.h>

#include <memory>
#include <string>

namespace capo::bench {

class BestProduct {
 public:
  // c = a b (+ bias along the columns), a [M, K] and b [K, N] of one dtype (bf16, f16, f32), each row-major or the
  // transpose of a row-major matrix. bias may be undefined.
  BestProduct(const Tensor& a, const Tensor& b, const Tensor& bias);
  void run() const;
  int offered() const;  // algorithms timed
  int chosen() const;   // place of the fastest in the heuristic's order, from 0

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace capo::bench
