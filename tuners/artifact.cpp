#include <capo/engine/files.h>
#include <capo/engine/json.h>
#include <capo/engine/sha256.h>
#include <capo/models/nn/misfits_internal.h>
#include <capo/models/nn/state.h>
#include <capo/ops/copy.h>
#include <capo/tuners/artifact.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

namespace capo::tuners {
namespace {

constexpr const char* kFormat = "capo-tuner-1";
constexpr std::size_t kMaxJson = std::size_t{16} << 20;

std::string tensors_path(const std::string& folder) { return folder + "/tuner.safetensors"; }
std::string card_path(const std::string& folder) { return folder + "/tuner.json"; }

nn::StateDict trained_state(nn::Module& model) {
  const NoGrad off;
  nn::StateDict dict;
  const auto trained = [](nn::Module& m) {  // a buffer moves with its module's parameters (batch-norm statistics)
    for (nn::Parameter* p : m.own_parameters())
      if (p->trainable()) return true;
    return false;
  };
  for (nn::Parameter* p : model.parameters(true))
    if (p->kind() == nn::Kind::tuner || (p->is_buffer() ? trained(p->owner()) : p->trainable()))
      dict.push_back({p->path(), nn::to_file_layout(p->value(), p->layout())});
  return dict;
}

bool is_hash(const std::string& s) {
  return s.size() == 64 && s.find_first_not_of("0123456789abcdef") == std::string::npos;
}

}  // namespace

void save_tuner(const std::string& folder, nn::Module& model, const TunerCard& card) {
  CAPO_CHECK(is_hash(card.base_hash), "save_tuner: base_hash must be nn::base_hash() of the untuned model, got \"",
             card.base_hash, "\"");
  parse_spec(card.spec);
  for (Tuner* t : tuners_of(model)) CAPO_CHECK(!t->merged(), "save_tuner: ", t->path(), " is merged; unmerge first");
  CAPO_CHECK(::mkdir(folder.c_str(), 0777) == 0 || errno == EEXIST, folder, ": cannot make the folder, ",
             std::strerror(errno));
  nn::save_tensors(tensors_path(folder), trained_state(model), {{"format", kFormat}});
  nlohmann::json j{{"format", kFormat}, {"spec", card.spec}, {"base_sha256", card.base_hash},
                   {"tensors_sha256", sha256_file(tensors_path(folder))}, {"model", card.model},
                   {"preprocess", card.preprocess}, {"classes", card.classes}, {"notes", card.notes}};
  std::string text;
  try {
    text = j.dump(2) + "\n";
  } catch (const nlohmann::json::exception&) {
    detail::fail("save_tuner: the card's texts must be UTF-8");
  }
  write_file_atomic(card_path(folder), text);
}

namespace {

TunerCard parse_card(const std::string& folder, std::string& tensors_hash) {
  const std::string path = card_path(folder);
  CAPO_CHECK(::access(path.c_str(), F_OK) == 0, path,
             ": not found; give the folder that save_tuner wrote (tune: OUT/tuner)");
  const std::string written = read_file(path, kMaxJson);
  check_json_object(written, path, 8);
  const nlohmann::json j = nlohmann::json::parse(written);
  const auto text = [&](const char* key) {
    CAPO_CHECK(j.contains(key) && j[key].is_string(), path, ": needs the text \"", key, "\"");
    return j[key].get<std::string>();
  };
  for (const auto& [key, value] : j.items())
    CAPO_CHECK(key == "format" || key == "spec" || key == "base_sha256" || key == "tensors_sha256" || key == "model" ||
                   key == "preprocess" || key == "classes" || key == "notes",
               path, ": unknown key \"", key, "\"");
  CAPO_CHECK(text("format") == kFormat, path, ": format must be ", kFormat, ", got \"", text("format"), "\"");
  TunerCard card{text("spec"), text("base_sha256"), text("model"), text("preprocess"), {}, {}};
  tensors_hash = text("tensors_sha256");
  CAPO_CHECK(is_hash(card.base_hash) && is_hash(tensors_hash), path, ": the SHA-256 values must be 64 hex digits");
  CAPO_CHECK(j.contains("classes") && j["classes"].is_array(), path, ": needs the list \"classes\"");
  for (const auto& c : j["classes"]) {
    CAPO_CHECK(c.is_string(), path, ": classes must be texts, got ", c.dump());
    card.classes.push_back(c.get<std::string>());
  }
  CAPO_CHECK(j.contains("notes") && j["notes"].is_object(), path, ": needs the object \"notes\"");
  for (const auto& [key, value] : j["notes"].items()) {
    CAPO_CHECK(value.is_string(), path, ": notes must be texts, got ", value.dump());
    card.notes[key] = value.get<std::string>();
  }
  parse_spec(card.spec);
  return card;
}

}  // namespace

TunerCard read_tuner_card(const std::string& folder) {
  std::string hash;
  return parse_card(folder, hash);
}

TunerCard load_tuner(const std::string& folder, nn::Module& model) {
  std::string wanted_hash;
  const TunerCard card = parse_card(folder, wanted_hash);
  CAPO_CHECK(tuners_of(model).empty(), folder, ": the model carries tuners already; detach them first");
  const std::string hash = nn::base_hash(model);
  CAPO_CHECK(hash == card.base_hash, folder, ": was trained on a base with SHA-256 ", card.base_hash, ", this one has ",
             hash);
  const std::string path = tensors_path(folder);
  CAPO_CHECK(sha256_file(path) == wanted_hash, path, ": its SHA-256 is not the one tuner.json names");
  const nn::StateDict dict = nn::read_tensors(path);
  apply_spec(model, card.spec);
  try {
    std::map<std::string, const Tensor*> given;
    for (const auto& t : dict) given[t.name] = &t.value;
    std::vector<std::pair<nn::Parameter*, Tensor>> pairs;
    nn::Misfits misfits;
    for (const auto& t : trained_state(model)) {
      const auto it = given.find(t.name);
      if (it == given.end())
        misfits.missing.push_back(t.name);
      else if (it->second->shape() != t.value.shape() || it->second->dtype() != t.value.dtype())
        misfits.misfitting.push_back(cat(t.name, " must be ", describe(t.value), ", got ", describe(*it->second)));
      else
        pairs.emplace_back(nn::find_parameters(model, t.name)[0], *it->second);
      if (it != given.end()) given.erase(it);
    }
    for (const auto& [name, value] : given) misfits.unexpected.push_back(name);
    misfits.refuse(path + ": tensors must be exactly the spec's");
    const NoGrad off;
    for (auto& [p, t] : pairs) copy_into(p->value(), to(nn::from_file_layout(t, p->layout()), p->value().device()));
  } catch (...) {
    detach_tuners(model);
    model.set_trainable(false);
    throw;
  }
  return card;
}

}  // namespace capo::tuners
