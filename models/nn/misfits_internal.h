// What is told of stored tensors that do not fit the places that wait for them.
#pragma once

#include <string>
#include <vector>

namespace capo::nn {

struct Misfits {
  std::vector<std::string> missing, unexpected, misfitting;  // names; of the last also what was wanted and what came

  // Throws unless all are empty: "<who>: names, shapes and dtypes must agree; 2 missing: a, b; 340 unexpected: c, d, e,
  // f, g, ..", the first five of each kind.
  void refuse(const std::string& who) const;
};

}  // namespace capo::nn
