// tuner.json and the model configuration: what is accepted keeps the promises of its reader.
#include <capo/models/vit/vit.h>
#include <capo/tests/fuzz/fuzz.h>
#include <capo/tests/temp_folder.h>
#include <capo/tuners/artifact.h>

#include <fstream>

namespace {

const std::string hash(64, 'a');
std::string card(const std::string& spec, const std::string& rest) {
  return "{\"format\": \"capo-tuner-1\", \"spec\": \"" + spec + "\", \"base_sha256\": \"" + hash +
         "\", \"tensors_sha256\": \"" + hash + "\", \"model\": \"{}\", \"preprocess\": \"\", " + rest + "}";
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  return {card("linear", "\"classes\": [], \"notes\": {}"),
          card("blocks.*.attn: u_prefix(length=3); head: train",
               "\"classes\": [\"a\", \"b\\u00e9\\n\"], \"notes\": {\"a\": \"\", \"b\": \"c\"}"),
          vit::to_json(vit::VitConfig{})};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace capo;
  static const testing::TempFolder folder;
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::ofstream(folder / "tuner.json", std::ios::binary) << text;
  try {
    const tuners::TunerCard c = tuners::read_tuner_card(folder.path());
    fuzz::require(c.base_hash.size() == 64 && !c.spec.empty());
  } catch (const Error&) {
  }
  try {
    const vit::VitConfig c = vit::config_from_json(text, "fuzz");
    fuzz::require(vit::to_json(vit::config_from_json(vit::to_json(c), "fuzz")) == vit::to_json(c));
  } catch (const Error&) {
  }
  return 0;
}
