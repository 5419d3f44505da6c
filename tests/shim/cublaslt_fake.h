// What the stand-in for cuBLASLt (cublaslt_fake.cpp) saw and how it behaves.
#pragma once

#include <cstdint>

namespace capo::shim {

struct FakeProducts {
  int searches = 0, products = 0;      // calls so far
  int last_algorithm = -1;             // of the newest product
  int fastest = 0;                     // which of its offers takes least time by its events
  std::uint32_t refused_epilogue = 0;  // no algorithm for this one
  bool capturing = false;
};
FakeProducts& fake_products();

}  // namespace capo::shim
