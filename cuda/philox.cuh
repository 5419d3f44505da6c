// Random words in kernels: those of engine/rng.h, so that masks and draws are the CPU's, bit for bit.
#pragma once

#include <capo/cuda/gpu.h>
#include <capo/engine/rng.h>

namespace capo::gpu {

// Philox4x32-10: the four words of block `block` of a range.
__device__ inline void philox_block(const RngRange& range, std::uint64_t block, std::uint32_t* out) {
  const std::uint64_t at = range.offset + block + (range.place ? range.place->offset : 0);
  const std::uint64_t seed = range.place ? range.place->seed : range.seed;
  std::uint32_t c0 = static_cast<std::uint32_t>(at), c1 = static_cast<std::uint32_t>(at >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(range.stream), c3 = static_cast<std::uint32_t>(range.stream >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace capo::gpu
