// What a test says to the shim without CUDA's names: the order in which threads run, and which kernels have run.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace capo::shim {

// The order of the threads of a block; blocks run ascending, descending, or with a seed shuffled. warp_ahead: a seeded
// order of the warps, the first of which runs as far as it can, drawn anew at every barrier.
enum class Order { forward, reverse, random, warp_ahead };
inline constexpr const char* kOrderNames[] = {"ascending", "descending", "seeded threads", "seeded warps"};

struct Config {
  Order order = Order::forward;
  std::uint64_t seed = 0;  // of random and warp_ahead, and of the order of the blocks there
};
Config& config();

// The orders in which this build tries a kernel: ascending, descending, seeded. The race checker needs the first alone.
const std::vector<Config>& orders();

// The kernels that have been launched, each with the orders: bit 1 << Order.
const std::map<const void*, unsigned>& launched_kernels();
// Writes shim_coverage/<program>.txt of the build folder, for tests/shim/coverage_test.cpp: one line per function of
// the kernel files (*.cu) in this program: file, the orders as launched_kernels gives them (0: never launched), name.
void write_coverage();

}  // namespace capo::shim
