// IDX, gzip, plane records and class names. The first byte chooses the reader.
#include <capo/datasets/cifar.h>
#include <capo/datasets/idx.h>
#include <capo/tests/fuzz/fuzz.h>

#include <zlib.h>

namespace {

std::string packed(const std::string& raw) {
  z_stream z{};
  capo::fuzz::require(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) == Z_OK);
  std::string out(deflateBound(&z, static_cast<uLong>(raw.size())) + 64, '\0');
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(raw.data()));
  z.avail_in = static_cast<uInt>(raw.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  capo::fuzz::require(deflate(&z, Z_FINISH) == Z_STREAM_END);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

void read_all(const capo::ImageDataset& set) {
  for (std::int64_t i = 0; i < set.size() && i < 64; ++i) {
    const capo::Image im = set.image(i);
    capo::fuzz::require(im.pixels.size() == static_cast<std::size_t>(im.height) * im.width * im.channels);
    capo::fuzz::require(set.label(i) >= 0 && set.label(i) < set.num_classes());
  }
}

}  // namespace

std::vector<std::string> capo::fuzz::seeds() {
  const std::string idx = std::string("\0\0\x08\x02\0\0\0\x02\0\0\0\x03", 12) + "abcdef";
  const std::string images = std::string("\0\0\x08\x03\0\0\0\x02\0\0\0\x02\0\0\0\x02", 16) + "abcdefgh";
  return {'\0' + idx, '\1' + packed(idx), '\1' + packed(std::string(3000, 'z')), '\2' + std::string(26, '\1'),
          std::string("\3cat\ndog\r\nbird\n"), '\4' + images, '\4' + packed(images)};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const int which = data[0] % 5;
  const std::string_view rest(reinterpret_cast<const char*>(data + 1), size - 1);
  try {
    if (which == 0) {
      const auto a = capo::parse_idx(rest, "mem");
      capo::fuzz::require(static_cast<std::uint64_t>(capo::numel(a.shape)) == a.bytes.size());
    } else if (which == 1) {
      capo::fuzz::require(capo::gunzip(rest, 100000, "mem").size() <= 100000);
    } else {
      const capo::fuzz::MemoryFile file(data + 1, size - 1);
      if (which == 2) read_all(*capo::open_planes({file.path()}, {2, 1, 0, 0}, "set", {"a", "b", "c"}));
      if (which == 3) capo::fuzz::require(!capo::read_class_names(file.path()).empty());
      if (which == 4) {
        const std::string labels = std::string("\0\0\x08\x01\0\0\0\x02", 8) + std::string("\0\1", 2);
        const capo::fuzz::MemoryFile y(reinterpret_cast<const std::uint8_t*>(labels.data()), labels.size());
        read_all(*capo::open_idx(file.path(), y.path(), "set", {"a", "b"}));
      }
    }
  } catch (const capo::Error&) {
  }
  return 0;
}
