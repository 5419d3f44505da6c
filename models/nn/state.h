// State dicts and weight files. Outside, tensors have PyTorch's names and layout; inside, ours (Layout says how).
#pragma once

#include <capo/engine/safetensors.h>
#include <capo/models/nn/module.h>

#include <string>
#include <vector>

namespace capo::nn {

struct NamedTensor {
  std::string name;
  Tensor value;  // contiguous, PyTorch layout
};
using StateDict = std::vector<NamedTensor>;

// Which parameters a dict holds.
enum class Part {
  model,  // base and head, without tuners: what timm knows
  tuner,  // tuners only
  head,
  all,
};

// Parameters and buffers of the subtree, declaration order, copied; on the device where they are.
StateDict state_dict(Module& m, Part part = Part::model);

struct LoadOptions {
  Part part = Part::model;
  // Names that may be missing from, or left unread in, the dict ("head.*" for another task's classifier); patterns as
  // in matches(). Everything else must agree exactly.
  std::vector<std::string> skip = {};
};
// Copies values in, cast to each parameter's dtype (f16 files into f32 models), on its device. Throws once, with number
// and first of the missing, unexpected and misfitting names; then nothing was changed. Returns the skipped names.
std::vector<std::string> load_state(Module& m, const StateDict& dict, const LoadOptions& options = {});
// Throws where load_state would and changes nothing; the module may be on the meta device.
void check_state(Module& m, const StateDict& dict, const LoadOptions& options = {});

// Between the two layouts. to_file_layout always copies, from_file_layout where the layouts differ.
Shape file_shape(const Shape& shape, Layout layout);
Tensor to_file_layout(const Tensor& t, Layout layout);
Tensor from_file_layout(const Tensor& t, Layout layout);

// Safetensors files; tensors of any device are written, read_tensors leaves them on the CPU. dtype: what floating
// tensors are stored as (non-floating ones stay).
void save_tensors(const std::string& path, const StateDict& dict, const Metadata& metadata = {});
StateDict read_tensors(const std::string& path);
void save_weights(Module& m, const std::string& path, DType dtype, const Metadata& metadata = {});
std::vector<std::string> load_weights(Module& m, const std::string& path, const LoadOptions& options = {});

// SHA-256 (hex) over (name, dtype, shape, stored bytes) of the base's parameters and buffers, sorted by name: which
// frozen model a tuner belongs to. Tuners and heads do not enter.
std::string base_hash(Module& m);

}  // namespace capo::nn
