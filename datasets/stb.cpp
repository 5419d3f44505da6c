// stb_image: JPEG and PNG, from memory only. Compiled without our warnings.
#include <capo/datasets/stb.h>

#include <cstdlib>

namespace {

// A PNG's compressed stream may claim to grow a thousandfold, and stb keeps doubling its buffer: bound each allocation.
thread_local std::size_t max_alloc_bytes = ~std::size_t{0};

void* bounded_malloc(std::size_t n) { return n <= max_alloc_bytes ? std::malloc(n) : nullptr; }
void* bounded_realloc(void* p, std::size_t n) { return n <= max_alloc_bytes ? std::realloc(p, n) : nullptr; }

}  // namespace

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wunused-function"
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#define STBI_MAX_DIMENSIONS 16384
#define STBI_MALLOC(n) bounded_malloc(n)
#define STBI_REALLOC(p, n) bounded_realloc(p, n)
#define STBI_FREE(p) std::free(p)
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

namespace capo::detail {

bool stb_info(const unsigned char* data, int size, StbInfo* info, const char** reason) {
  max_alloc_bytes = std::size_t{1} << 20;
  const bool ok = stbi_info_from_memory(data, size, &info->width, &info->height, &info->channels) != 0;
  if (ok) {
    info->sixteen_bit = stbi_is_16_bit_from_memory(data, size) != 0;
  } else {
    *reason = stbi_failure_reason();
  }
  return ok;
}

unsigned char* stb_load_rgb(const unsigned char* data, int size, std::size_t max_alloc, int* width, int* height,
                            const char** reason) {
  int channels = 0;
  max_alloc_bytes = max_alloc;
  unsigned char* pixels = stbi_load_from_memory(data, size, width, height, &channels, 3);
  if (!pixels) *reason = stbi_failure_reason();
  return pixels;
}

void stb_free(unsigned char* pixels) { std::free(pixels); }

}  // namespace capo::detail
