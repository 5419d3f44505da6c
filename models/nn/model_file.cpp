#include <capo/models/nn/model_file.h>

namespace capo::nn {

ModelHeader read_model_header(const std::string& path) {
  const SafetensorsReader file(path);
  ModelHeader h{file.metadata("model"), file.metadata("preprocess"), file.metadata("classes"), {}};
  for (const auto& e : file.entries()) h.tensors.push_back({e.name, e.shape});
  return h;
}

StateDict read_model_tensors(const std::string& path, Module& shapes, const std::string& unread) {
  StateDict dict = read_tensors(path);
  std::erase_if(dict, [&](const NamedTensor& t) {
    return matches(unread, t.name) || matches("**num_batches_tracked", t.name);
  });
  try {
    check_state(shapes, dict, {.skip = {unread}});
  } catch (const Error& e) {
    throw Error(cat(path, ": ", e.what()));
  }
  return dict;
}

void save_model(Module& model, const std::string& path, DType dtype, const ModelHeader& texts, const Metadata& more) {
  Metadata metadata = more;
  if (!texts.config.empty()) metadata["model"] = texts.config;
  if (!texts.preprocess.empty()) metadata["preprocess"] = texts.preprocess;
  if (!texts.classes.empty()) metadata["classes"] = texts.classes;
  save_weights(model, path, dtype, metadata);
}

}  // namespace capo::nn
