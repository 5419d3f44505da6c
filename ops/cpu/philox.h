// Philox4x32-10 for ops/cpu files, sixteen blocks at a time; the words of engine/rng.h's philox().
#pragma once

#include <capo/ops/cpu/kernel.h>

namespace {

constexpr int kPhiloxBlocks = 16;
constexpr int kPhiloxWords = 4 * kPhiloxBlocks;

// words[4 b + j] = word j of block (counter + b), for 16 blocks.
inline void philox_words(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter, std::uint32_t* words) {
  std::uint32_t c0[kPhiloxBlocks], c1[kPhiloxBlocks], c2[kPhiloxBlocks], c3[kPhiloxBlocks];
  for (int b = 0; b < kPhiloxBlocks; ++b) {
    const std::uint64_t at = counter + static_cast<std::uint64_t>(b);
    c0[b] = static_cast<std::uint32_t>(at);
    c1[b] = static_cast<std::uint32_t>(at >> 32);
    c2[b] = static_cast<std::uint32_t>(stream);
    c3[b] = static_cast<std::uint32_t>(stream >> 32);
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int b = 0; b < kPhiloxBlocks; ++b) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0[b], p1 = std::uint64_t{0xCD9E8D57u} * c2[b];
      c0[b] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[b] ^ k0;
      c2[b] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[b] ^ k1;
      c1[b] = static_cast<std::uint32_t>(p1);
      c3[b] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int b = 0; b < kPhiloxBlocks; ++b) {
    words[4 * b] = c0[b];
    words[4 * b + 1] = c1[b];
    words[4 * b + 2] = c2[b];
    words[4 * b + 3] = c3[b];
  }
}

}  // namespace
