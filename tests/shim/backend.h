// The shim's device as tests see it (backend.cpp).
#pragma once

#include <capo/engine/backend.h>
#include <capo/tests/shim/shim.hpp>

namespace capo::shim {

// Storages made from here on come from the engine's caching allocator, as on a card, in place of blocks of exact size
// that nobody reuses. Returns what it was.
bool use_caching_allocator(bool on);
// What a captured graph holds.
const std::vector<Launch>& launches_of(const CapturedWork& work);

}  // namespace capo::shim
