// The only door to stb_image (its symbols are static inside stb.cpp). Use decode_image of image.h instead.
#pragma once

#include <cstddef>

namespace capo::detail {

struct StbInfo {
  int width, height, channels;
  bool sixteen_bit;
};

// False: `reason` tells why. Neither function throws.
bool stb_info(const unsigned char* data, int size, StbInfo* info, const char** reason);
// RGB pixels, to be freed with stb_free; null: `reason` tells why. No single allocation exceeds max_alloc bytes.
unsigned char* stb_load_rgb(const unsigned char* data, int size, std::size_t max_alloc, int* width, int* height,
                            const char** reason);
void stb_free(unsigned char* pixels);

}  // namespace capo::detail
