// A tuner on disk, without its base: a folder with
//   tuner.safetensors  every tensor that was trained: tuners, head, unfrozen base parameters; PyTorch layout
//   tuner.json         spec, SHA-256 of the base, of the tensors file, model, preprocessing, class names, notes
// Loading is strict: the base must be the very one (hash), and names and shapes must be exactly the spec's.
#pragma once

#include <capo/tuners/spec.h>

#include <map>
#include <string>
#include <vector>

namespace capo::tuners {

struct TunerCard {
  std::string spec;
  std::string base_hash;                     // nn::base_hash() of the model before tuning
  std::string model;                         // the model's configuration as JSON text
  std::string preprocess;                    // datasets::Preprocess as JSON text; "" when there is none
  std::vector<std::string> classes;          // names by label; empty when unknown
  std::map<std::string, std::string> notes;  // free text: data set, accuracy, seed, ...
};

// Writes both files atomically, the JSON last; the folder is made when missing. The model carries the applied spec.
void save_tuner(const std::string& folder, nn::Module& model, const TunerCard& card);

// Reads and checks tuner.json alone (to know which model to build).
TunerCard read_tuner_card(const std::string& folder);

// Applies the card's spec to a model that is still the bare base and loads the tensors. Throws when the base's hash
// differs, when the tensors file was changed, and on any missing, unexpected or misshapen tensor; the model is then
// left without tuners.
TunerCard load_tuner(const std::string& folder, nn::Module& model);

}  // namespace capo::tuners
