// stb_image: JPEG and PNG, from memory only. cmake/library.cmake says with which options it compiles, and why.
#include <capo/datasets/stb.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace {

// One decode's memory. Each block is bounded: a PNG's compressed stream may claim to grow a thousandfold, and stb keeps
// doubling its buffer. Blocks are zeroed: stb 2.27 uses JPEG tables that a damaged file never defined. And they are
// listed: a failed assertion leaves stb by an exception, and what it held is then freed here.
struct Arena {
  std::size_t limit;
  std::vector<void*> blocks;

  explicit Arena(std::size_t max_alloc);
  ~Arena();
  void* get(std::size_t n);
  void* resize(void* p, std::size_t n);
  void put(void* p);
};

thread_local Arena* arena = nullptr;

Arena::Arena(std::size_t max_alloc) : limit(max_alloc) {
  blocks.reserve(64);
  arena = this;
}

Arena::~Arena() {
  arena = nullptr;
  for (void* p : blocks) std::free(p);
}

void* Arena::get(std::size_t n) {
  void* p = n <= limit ? std::calloc(1, n) : nullptr;
  if (p) blocks.push_back(p);
  return p;
}

void* Arena::resize(void* p, std::size_t n) {
  if (!p) return get(n);
  void* q = n <= limit ? std::realloc(p, n) : nullptr;
  if (q) *std::find(blocks.begin(), blocks.end(), p) = q;
  return q;
}

void Arena::put(void* p) {
  if (!p) return;
  blocks.erase(std::find(blocks.begin(), blocks.end(), p));
  std::free(p);
}

struct AssertionFailed {};

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
#define STBI_MALLOC(n) arena->get(n)
#define STBI_REALLOC(p, n) arena->resize(p, n)
#define STBI_FREE(p) arena->put(p)
#define STBI_ASSERT(ok) ((ok) ? (void)0 : throw AssertionFailed())
#if __has_include(<stb_image.h>)
#include <stb_image.h>
#else
#include <stb/stb_image.h>
#endif
#pragma GCC diagnostic pop

namespace capo::detail {

bool stb_info(const unsigned char* data, int size, StbInfo* info, const char** reason) {
  Arena memory(std::size_t{1} << 20);
  try {
    const bool ok = stbi_info_from_memory(data, size, &info->width, &info->height, &info->channels) != 0;
    if (ok) {
      info->sixteen_bit = stbi_is_16_bit_from_memory(data, size) != 0;
    } else {
      *reason = stbi_failure_reason();
    }
    return ok;
  } catch (const AssertionFailed&) {
    *reason = "broken header";
    return false;
  }
}

bool stb_load_rgb(const unsigned char* data, int size, std::size_t max_alloc, StbPixels take, void* user,
                  const char** reason) {
  Arena memory(max_alloc);
  try {
    int width = 0, height = 0, channels = 0;
    const unsigned char* pixels = stbi_load_from_memory(data, size, &width, &height, &channels, 3);
    if (!pixels) {
      *reason = stbi_failure_reason();
      return false;
    }
    take(user, pixels, width, height);
    return true;
  } catch (const AssertionFailed&) {
    *reason = "broken data";
    return false;
  }
}

}  // namespace capo::detail
