// Weight files that say what model they are for: its configuration, its preprocessing and its class names stand in the
// metadata "model", "preprocess" and "classes", the tensors have PyTorch's names and layout.
#pragma once

#include <capo/models/nn/state.h>

#include <memory>
#include <string>
#include <vector>

namespace capo::nn {

struct NamedShape {
  std::string name;
  Shape shape;  // file layout
};

// What a file tells before a tensor is read. Texts that it lacks are "".
struct ModelHeader {
  std::string config, preprocess, classes;  // JSON; datasets::Preprocess as JSON; names, one a line
  std::vector<NamedShape> tensors;
};
ModelHeader read_model_header(const std::string& path);

// The weights of a file for a model that lies on the meta device, where only its names and shapes count, in order to be
// loaded into a real one; a size that only the file claims is thus never allocated. Strict, with errors that begin with
// the path: every tensor must find its place and the other way round, but for PyTorch's batch counters
// (num_batches_tracked) and what `unread` matches ("fc.*" for another task's head; "": nothing).
StateDict read_model_tensors(const std::string& path, Module& shapes, const std::string& unread);

// M(config, build) with the file's weights, read so; what is unread keeps its initial values.
template <class M, class Config>
std::unique_ptr<M> load_model(const std::string& path, const Config& config, const std::string& unread,
                              const Build& build) {
  M shapes(config, Build{.dtype = build.dtype, .device = kMeta});
  const StateDict dict = read_model_tensors(path, shapes, unread);
  auto model = std::make_unique<M>(config, build);
  load_state(*model, dict, {.skip = {unread}});
  return model;
}

// Writes the weights with the three texts, of which "" is left out, and what `more` holds.
void save_model(Module& model, const std::string& path, DType dtype, const ModelHeader& texts,
                const Metadata& more = {});

}  // namespace capo::nn
