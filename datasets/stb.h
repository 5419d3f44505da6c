// The only door to stb_image (its symbols are static inside stb.cpp). Use decode_image of image.h instead.
#pragma once

#include <cstddef>

namespace capo::detail {

struct StbInfo {
  int width, height, channels;
  bool sixteen_bit;
};

// False: `reason` tells why.
bool stb_info(const unsigned char* data, int size, StbInfo* info, const char** reason);

// Hands RGB pixels to `take`, which copies them (they are gone afterwards). False: `reason` tells why.
// No single allocation exceeds max_alloc bytes.
using StbPixels = void (*)(void* user, const unsigned char* rgb, int width, int height);
bool stb_load_rgb(const unsigned char* data, int size, std::size_t max_alloc, StbPixels take, void* user,
                  const char** reason);

}  // namespace capo::detail
