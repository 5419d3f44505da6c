// The preprocess JSON: whatever is accepted is in range and survives being written.
#include <capo/datasets/augment.h>
#include <capo/tests/fuzz/fuzz.h>

#include <cstring>

std::vector<std::string> capo::fuzz::seeds() {
  Preprocess p;
  p.size = 224;
  p.mean[0] = 0.485f;
  p.std[2] = 0.225f;
  p.crop_pct = 0.875f;
  p.interpolation = Interpolation::bilinear;
  return {to_json(Preprocess{}), to_json(p),
          "{ \"crop_pct\" : 9e-1, \"size\":1,\"mean\":[0,-0,1E2],\"std\":[1,1,1],\n\"interpolation\":\"bicubic\"}"};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto p = capo::preprocess_from_json(std::string(reinterpret_cast<const char*>(data), size));
    capo::fuzz::require(p.size >= 1 && p.size <= 4096 && p.crop_pct > 0 && p.crop_pct <= 1 && p.std[0] > 0 &&
                        p.std[1] > 0 && p.std[2] > 0);
    const auto q = capo::preprocess_from_json(capo::to_json(p));
    capo::fuzz::require(std::memcmp(p.mean, q.mean, sizeof p.mean) == 0 &&
                        std::memcmp(p.std, q.std, sizeof p.std) == 0 && p.size == q.size && p.crop_pct == q.crop_pct &&
                        p.interpolation == q.interpolation);
  } catch (const capo::Error&) {
  }
  return 0;
}
