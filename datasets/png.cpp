#include <capo/datasets/png.h>
#include <capo/engine/files.h>

#include <zlib.h>

#include <algorithm>
#include <cstdlib>

namespace capo {
namespace {

void put32(std::string& out, std::uint32_t v) {
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(v >> shift);
}

void put_chunk(std::string& out, const char* type, const std::string& data) {
  put32(out, static_cast<std::uint32_t>(data.size()));
  const std::size_t from = out.size();
  out += type;
  out += data;
  const auto* p = reinterpret_cast<const Bytef*>(out.data() + from);
  put32(out, static_cast<std::uint32_t>(crc32(0, p, static_cast<uInt>(out.size() - from))));
}

int paeth(int a, int b, int c) {
  const int p = a + b - c, pa = std::abs(p - a), pb = std::abs(p - b), pc = std::abs(p - c);
  return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

// One row under filter 0..4; `up` is null for the first row.
void filter_row(int filter, const std::uint8_t* row, const std::uint8_t* up, int n, int step, std::uint8_t* out) {
  for (int i = 0; i < n; ++i) {
    const int a = i >= step ? row[i - step] : 0, b = up ? up[i] : 0, c = up && i >= step ? up[i - step] : 0;
    const int guess[] = {0, a, b, (a + b) / 2, paeth(a, b, c)};
    out[i] = static_cast<std::uint8_t>(row[i] - guess[filter]);
  }
}

}  // namespace

std::string encode_png(const Image& image) {
  CAPO_CHECK((image.channels == 1 || image.channels == 3) && image.height > 0 && image.width > 0 &&
                 image.pixels.size() == static_cast<std::size_t>(image.height) * image.width * image.channels,
             "encode_png: image must be grey or RGB and not empty, got ", image.height, " x ", image.width, " x ",
             image.channels, " with ", image.pixels.size(), " bytes");
  const int n = image.width * image.channels;
  std::string raw;
  raw.reserve(static_cast<std::size_t>(image.height) * (n + 1));
  std::vector<std::uint8_t> tried(n), best(n);
  for (int y = 0; y < image.height; ++y) {
    // The usual heuristic: the filter with the smallest sum of absolute differences.
    std::int64_t best_cost = -1;
    int best_filter = 0;
    for (int f = 0; f < 5; ++f) {
      filter_row(f, image.at(y, 0), y > 0 ? image.at(y - 1, 0) : nullptr, n, image.channels, tried.data());
      std::int64_t cost = 0;
      for (const auto v : tried) cost += std::abs(static_cast<int>(static_cast<std::int8_t>(v)));
      if (best_cost < 0 || cost < best_cost) {
        best_cost = cost;
        best_filter = f;
        best.swap(tried);
      }
    }
    raw += static_cast<char>(best_filter);
    raw.append(reinterpret_cast<const char*>(best.data()), best.size());
  }
  uLongf size = compressBound(raw.size());
  std::string packed(size, '\0');
  const int code = compress2(reinterpret_cast<Bytef*>(packed.data()), &size, reinterpret_cast<const Bytef*>(raw.data()),
                             raw.size(), 6);
  CAPO_CHECK(code == Z_OK, "encode_png: zlib failed with code ", code);
  packed.resize(size);

  std::string out("\x89PNG\r\n\x1a\n", 8), header;
  put32(header, static_cast<std::uint32_t>(image.width));
  put32(header, static_cast<std::uint32_t>(image.height));
  header += std::string("\x08", 1) + (image.channels == 3 ? '\x02' : '\x00') + std::string(3, '\0');
  put_chunk(out, "IHDR", header);
  put_chunk(out, "IDAT", packed);
  put_chunk(out, "IEND", "");
  return out;
}

void write_png(const std::string& path, const Image& image) { write_file_atomic(path, encode_png(image)); }

}  // namespace capo
