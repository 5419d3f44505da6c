// replay <rounds | seconds followed by s> [seed] [first round]: runs a target on its seeds and on mutations of them.
// Round k of a seed is always the same input, on any machine. With CAPO_FUZZ_KEEP=FILE each input is written to FILE
// before it runs, so that a crash leaves it there. Further arguments that name files run those files instead.
#include <capo/datasets/sample_rng.h>
#include <capo/tests/fuzz/fuzz.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>

namespace {

using capo::SampleRng;

std::size_t place(SampleRng& rng, std::size_t size) {
  return static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(size) + 1));
}

void mutate(std::string& s, const std::vector<std::string>& seeds, SampleRng& rng) {
  static const char* const kTokens[] = {"\"", "{", "}", "[", "]", ",", ":", "\\u0000", "\\", "-1", "0", "1e309",
                                        "18446744073709551615", "9223372036854775807", "4294967296", "null",
                                        "\xff\xd8", "\xff\xd9", "\xff\xda", "IDAT", "IEND", "\"F32\"",
                                        "\"shape\"", "data_offsets", "__metadata__", "\xc3\xa9",
                                        "\xed\xa0\x80"};
  static const std::uint32_t kNumbers[] = {0, 1, 0x7f, 0x80, 0xff, 0x100, 0x7fff, 0x8000, 0xffff,
                                       0x10000, 0x7fffffff, 0x80000000, 0xffffffff};
  const std::size_t at = place(rng, s.size());
  const auto length = static_cast<std::size_t>(1) << rng.below(8);
  const std::size_t n = std::min<std::size_t>(place(rng, length), s.size() - at);
  switch (rng.below(10)) {
    case 0:
      if (at < s.size()) s[at] = static_cast<char>(s[at] ^ (1 << rng.below(8)));
      break;
    case 1:
      if (at < s.size()) s[at] = static_cast<char>(rng.next());
      break;
    case 2:
      s.erase(at, n);
      break;
    case 3:
      s.insert(at, s.substr(place(rng, s.size()), n));
      break;
    case 4:
      s.insert(at, kTokens[rng.below(std::size(kTokens))]);
      break;
    case 5: {  // a whole number, either byte order
      std::uint32_t v = kNumbers[rng.below(std::size(kNumbers))];
      if (rng.chance(0.5f)) v = __builtin_bswap32(v);
      if (s.size() >= 4) std::memcpy(s.data() + std::min(at, s.size() - 4), &v, 4);
      break;
    }
    case 6:
      if (rng.chance(0.3f)) s.resize(at);
      break;
    case 7: {  // the head of this, the tail of another
      const std::string& other = seeds[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(seeds.size())))];
      s = s.substr(0, at) + other.substr(std::min(other.size(), place(rng, other.size())));
      break;
    }
    case 8:  // a digit
      for (std::size_t i = at; i < s.size(); ++i) {
        if (s[i] >= '0' && s[i] <= '9') {
          s[i] = static_cast<char>('0' + rng.below(10));
          break;
        }
      }
      break;
    default:
      if (at < s.size()) s[at] = static_cast<char>(s[at] + (rng.chance(0.5f) ? 1 : -1));
  }
  if (s.size() > 200000) s.resize(200000);
}

bool run(const std::string& input, const std::string& what) {
  if (const char* keep = std::getenv("CAPO_FUZZ_KEEP")) std::ofstream(keep, std::ios::binary) << input;
  try {
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
    return true;
  } catch (const std::exception& e) {
    std::printf("FOUND by %s: exception \"%s\" escaped\n", what.c_str(), e.what());
    return false;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::printf("usage: %s ROUNDS|SECONDSs [SEED] [FIRST_ROUND]   or: %s FILE...\n", argv[0], argv[0]);
    return 2;
  }
  if (std::ifstream probe(argv[1], std::ios::binary); probe) {
    for (int i = 1; i < argc; ++i) {
      std::ifstream in(argv[i], std::ios::binary);
      if (!run(std::string(std::istreambuf_iterator<char>(in), {}), argv[i])) return 1;
    }
    return 0;
  }
  const bool by_time = std::strchr(argv[1], 's') != nullptr;
  const std::int64_t limit = std::atoll(argv[1]);
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const std::int64_t first = argc > 3 ? std::atoll(argv[3]) : 0;

  const auto seeds = capo::fuzz::seeds();
  for (std::size_t i = 0; i < seeds.size(); ++i) {
    if (!run(seeds[i], capo::cat("seed input ", i))) return 1;
  }
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  std::int64_t round = first;
  for (; by_time ? seconds() < static_cast<double>(limit) : round < first + limit; ++round) {
    SampleRng rng(seed, 1000, static_cast<std::uint64_t>(round), 0);
    std::string input = seeds[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(seeds.size())))];
    for (auto n = 1 + rng.below(6); n > 0; --n) mutate(input, seeds, rng);
    if (!run(input, capo::cat("seed ", seed, " round ", round))) return 1;
  }
  std::printf("%lld rounds and %zu seed inputs in %.1f s, nothing found\n", static_cast<long long>(round - first),
              seeds.size(), seconds());
  return 0;
}
