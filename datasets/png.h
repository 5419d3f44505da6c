// PNG output, 8 bits, grey or RGB.
#pragma once

#include <capo/datasets/image.h>

namespace capo {

// The bytes of a PNG file. The image must have 1 or 3 channels. Deterministic for one zlib version.
std::string encode_png(const Image& image);
// Encodes and writes atomically.
void write_png(const std::string& path, const Image& image);

}  // namespace capo
