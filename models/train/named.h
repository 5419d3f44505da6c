// Lists of named state tensors: how optimisers, averages and checkpoints are stored and read back.
#pragma once

#include <capo/models/nn/state.h>

#include <string>
#include <vector>

namespace capo::train {

// A tensor that is state, under the name and in the layout it has in a file. `value` is the state itself, not a copy.
struct NamedState {
  std::string name;
  Tensor value;
  nn::Layout layout = nn::Layout::plain;
};
using StateList = std::vector<NamedState>;

// Copies on the host, contiguous, file layout.
nn::StateDict copy_out(const StateList& list);
// Throws "<who>: ..." once, with the number and the first of the missing, unexpected and misfitting (shape or dtype)
// names; an empty text in `who` is not allowed.
void check_names(const std::string& who, const StateList& list, const nn::StateDict& dict);
// check_names, then copies every value in.
void copy_in(const std::string& who, const StateList& list, const nn::StateDict& dict);

// to(t, device) without a graph: the tensor itself where it is there already. Copies wait for the device.
Tensor to_host(const Tensor& t);
Tensor to_device(const Tensor& t, Device device);

}  // namespace capo::train
