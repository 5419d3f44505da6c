// The shim's device as tests see it (backend.cpp).
#pragma once

#include <capo/engine/backend.h>
#include <capo/tests/shim/shim.hpp>

namespace capo::shim {

// What a captured graph holds.
const std::vector<Launch>& launches_of(const CapturedWork& work);

}  // namespace capo::shim
