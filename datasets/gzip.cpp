#include <capo/datasets/gzip.h>

#include <zlib.h>

#include <algorithm>

namespace capo {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 30;  // zlib counts in 32 bits

// One stream being unpacked.
class Inflate {
 public:
  Inflate(std::string_view packed, const std::string& name) : packed_(packed), name_(name) {
    CAPO_CHECK(inflateInit2(&z_, 15 + 16) == Z_OK, name, ": zlib cannot start");
  }
  ~Inflate() { inflateEnd(&z_); }
  Inflate(const Inflate&) = delete;
  Inflate& operator=(const Inflate&) = delete;

  bool ended() const { return ended_; }
  std::size_t unread() const { return packed_.size() - fed_ + z_.avail_in; }
  // Appends what comes next; returns how much.
  std::size_t next(std::string& out) {
    if (z_.avail_in == 0 && fed_ < packed_.size()) {
      const std::size_t n = std::min(packed_.size() - fed_, kPiece);
      z_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed_.data() + fed_));
      z_.avail_in = static_cast<uInt>(n);
      fed_ += n;
    }
    char piece[65536];
    z_.next_out = reinterpret_cast<Bytef*>(piece);
    z_.avail_out = sizeof piece;
    const int code = inflate(&z_, Z_NO_FLUSH);
    CAPO_CHECK(code != Z_BUF_ERROR, name_, ": gzip stream is truncated");
    CAPO_CHECK(code == Z_OK || code == Z_STREAM_END, name_, ": gzip stream is damaged, ",
               z_.msg ? z_.msg : "no reason known");
    ended_ = code == Z_STREAM_END;
    const std::size_t n = sizeof piece - z_.avail_out;
    out.append(piece, n);
    return n;
  }

 private:
  std::string_view packed_;
  const std::string& name_;
  z_stream z_{};
  std::size_t fed_ = 0;
  bool ended_ = false;
};

}  // namespace

std::string gunzip(std::string_view packed, std::size_t max_bytes, const std::string& name) {
  Inflate stream(packed, name);
  std::string out;
  while (!stream.ended()) {
    stream.next(out);
    CAPO_CHECK(out.size() <= max_bytes, name, ": gzip content too long, at most ", max_bytes, " bytes are accepted");
  }
  CAPO_CHECK(stream.unread() == 0, name, ": trailing bytes after the gzip stream, got ", stream.unread());
  return out;
}

std::string gunzip_head(std::string_view packed, std::size_t n, const std::string& name) {
  Inflate stream(packed, name);
  std::string out;
  while (!stream.ended() && out.size() < n) stream.next(out);
  out.resize(std::min(out.size(), n));
  return out;
}

std::string gzip(std::string_view raw) {
  z_stream z{};
  CAPO_CHECK(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) == Z_OK, "gzip: zlib cannot start");
  struct End {
    z_stream* z;
    ~End() { deflateEnd(z); }
  } end{&z};
  std::string out;
  std::size_t fed = 0;
  int code = Z_OK;
  while (code != Z_STREAM_END) {
    if (z.avail_in == 0 && fed < raw.size()) {
      const std::size_t n = std::min(raw.size() - fed, kPiece);
      z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(raw.data() + fed));
      z.avail_in = static_cast<uInt>(n);
      fed += n;
    }
    char piece[65536];
    z.next_out = reinterpret_cast<Bytef*>(piece);
    z.avail_out = sizeof piece;
    code = deflate(&z, fed == raw.size() ? Z_FINISH : Z_NO_FLUSH);
    CAPO_CHECK(code == Z_OK || code == Z_STREAM_END, "gzip: zlib failed, got code ", code);
    out.append(piece, sizeof piece - z.avail_out);
  }
  return out;
}

}  // namespace capo
