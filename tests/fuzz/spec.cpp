// Tuner specs: whatever parses is a fixed point of writing, and applying it succeeds or leaves no tuner behind.
#include <capo/models/vit/vit.h>
#include <capo/tests/fuzz/fuzz.h>
#include <capo/tuners/presets.h>
#include <capo/tuners/spec.h>

std::vector<std::string> capo::fuzz::seeds() {
  std::vector<std::string> all{
      "blocks.*.mlp: u_adapter(dim=4, scale=0.1, on=x, act=relu, init=xavier); **.norm*: train",
      "blocks.*.attn.qkv: lora(rank=2, alpha=1e0, slices=q+v, rslora=true, dropout=.5)", "linear; bitfit;"};
  for (const auto& m : tuners::kMethods) all.push_back(m.spec);
  return all;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace capo;
  const std::string text(reinterpret_cast<const char*>(data), std::min<std::size_t>(size, 2000));
  try {
    const std::string written = tuners::to_string(tuners::parse_spec(text));
    fuzz::require(tuners::to_string(tuners::parse_spec(written)) == written);
  } catch (const Error&) {
  }
  vit::VitConfig c;
  c.image = 8;
  c.patch = 4;
  c.dim = 12;
  c.depth = 2;
  c.heads = 3;
  c.classes = 3;
  vit::Vit model(c, {.device = kMeta});
  try {
    tuners::apply_spec(model, text);
    model(empty({2, 8, 8, 3}, f32, kMeta));
    tuners::detach_tuners(model);
  } catch (const Error&) {
  }
  fuzz::require(tuners::tuners_of(model).empty());
  return 0;
}
