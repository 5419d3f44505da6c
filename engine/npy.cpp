#include <capo/engine/npy.h>

#include <capo/engine/files.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>
#include <vector>

namespace capo {
namespace {

static_assert(std::endian::native == std::endian::little, ".npy data is copied as it is");

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::uint64_t kMaxHeaderBytes = 10'000;  // NumPy's own limit for files that are not trusted
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 62;

struct Descr {
  const char* text;
  DType dtype;
};
constexpr Descr kDescrs[] = {{"<f4", f32}, {"<f8", f64}, {"<f2", f16}, {"<i4", i32},
                             {"<i8", i64}, {"|u1", u8},  {"|i1", i8},  {"|b1", boolean}};

// Text comes from the file: printable, and never longer than a line.
std::string quote(std::string_view text) {
  constexpr std::size_t kMax = 60;
  constexpr const char* kHex = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text.substr(0, kMax)) {
    const auto u = static_cast<unsigned char>(c);
    if (u >= 0x20 && u < 0x7f) {
      out += c;
    } else {
      out += cat("\\x", kHex[u >> 4], kHex[u & 15]);
    }
  }
  return out + (text.size() > kMax ? "...\"" : "\"");
}

struct Layout {
  DType dtype = f32;
  bool fortran = false;
  Shape shape;
};

// Reads {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } and white space around its tokens.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& path) : text_(text), path_(path) {}

  Layout parse() {
    Layout out;
    int seen = 0;
    expect('{');
    while (!accept('}')) {
      const std::string_view key = string();
      const int bit = key == "descr" ? 1 : key == "fortran_order" ? 2 : key == "shape" ? 4 : 0;
      CAPO_CHECK(bit != 0, path_, ": header keys must be descr, fortran_order and shape, got ", quote(key));
      CAPO_CHECK((seen & bit) == 0, path_, ": duplicate key in the header, got ", quote(key), " twice");
      seen |= bit;
      expect(':');
      if (bit == 1) out.dtype = dtype();
      if (bit == 2) out.fortran = truth();
      if (bit == 4) out.shape = shape();
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    CAPO_CHECK(seen == 7, path_, ": header needs descr, fortran_order and shape, got ", quote(text_));
    skip_space();
    check(at_ == text_.size(), "nothing may follow the header's dictionary");
    return out;
  }

 private:
  void check(bool ok, const char* rule) const {
    CAPO_CHECK(ok, path_, ": ", rule, ", got ", quote(text_.substr(at_)), " at byte ", at_, " of the header");
  }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool accept(char c) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) check(false, cat("header must be a dictionary, '", c, "' expected").c_str());
  }
  bool accept_word(std::string_view word) {
    skip_space();
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  std::string_view string() {
    skip_space();
    check(at_ < text_.size() && (text_[at_] == '\'' || text_[at_] == '"'), "header needs a string");
    const std::size_t begin = at_ + 1, end = text_.find(text_[at_], begin);
    check(end != std::string_view::npos, "header has a string without end");
    at_ = end + 1;
    return text_.substr(begin, end - begin);
  }

  DType dtype() {
    skip_space();
    const std::size_t begin = at_;
    if (at_ < text_.size() && (text_[at_] == '\'' || text_[at_] == '"')) {
      const std::string_view got = string();
      for (const Descr& d : kDescrs) {
        if (got == d.text) return d.dtype;
      }
    }
    at_ = begin;
    check(false, "descr must be one of <f4 <f8 <f2 <i4 <i8 |u1 |i1 |b1");
    return f32;
  }

  bool truth() {
    if (accept_word("True")) return true;
    if (!accept_word("False")) check(false, "fortran_order must be True or False");
    return false;
  }

  // (), (3,), (2, 3) or (2, 3,): a tuple of one size needs its comma.
  Shape shape() {
    constexpr const char* kRule = "shape must be a tuple of sizes";
    Shape out;
    bool comma = true;
    if (!accept('(')) check(false, kRule);
    while (!accept(')')) {
      check(comma, kRule);
      check(out.size() < kMaxDims, "shape must have at most 8 dimensions");
      out.push_back(size());
      comma = accept(',');
    }
    check(out.size() != 1 || comma, kRule);
    return out;
  }

  std::int64_t size() {
    skip_space();
    const std::size_t begin = at_;
    std::int64_t v = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      const bool overflow =
          __builtin_mul_overflow(v, std::int64_t{10}, &v) || __builtin_add_overflow(v, text_[at_] - '0', &v);
      check(!overflow, "shape has a size above 2^63");
      ++at_;
    }
    check(at_ > begin && (text_[begin] != '0' || at_ == begin + 1), "shape must be a tuple of sizes");
    return v;
  }

  std::string_view text_;
  const std::string& path_;
  std::size_t at_ = 0;
};

// Bytes of an array. Zero sizes count as one against overflow, so that no stride overflows either.
std::uint64_t bytes_of(const Layout& l, const std::string& path) {
  std::uint64_t n = size_of(l.dtype);
  bool empty = false;
  for (const auto x : l.shape) {
    empty |= x == 0;
    const bool overflow = __builtin_mul_overflow(n, static_cast<std::uint64_t>(std::max<std::int64_t>(x, 1)), &n);
    CAPO_CHECK(!overflow && n < kMaxBytes, path, ": shape is too large, got ", l.shape, " of ", l.dtype);
  }
  return empty ? 0 : n;
}

// Copies elements of W bytes from strided memory (strides in elements) to row-major memory.
template <std::size_t W>
void gather(const char* src, const Shape& shape, const Dims& strides, char* dst) {
  Dims index = Dims::filled(shape.size(), 0);
  const std::int64_t n = numel(shape);
  std::int64_t at = 0;
  for (std::int64_t k = 0; k < n; ++k) {
    std::memcpy(dst + static_cast<std::size_t>(k) * W, src + static_cast<std::size_t>(at) * W, W);
    for (int i = shape.size() - 1; i >= 0; --i) {
      at += strides[i];
      if (++index[i] < shape[i]) break;
      at -= shape[i] * strides[i];
      index[i] = 0;
    }
  }
}
void gather(std::size_t width, const char* src, const Shape& shape, const Dims& strides, char* dst) {
  switch (width) {
    case 1:
      return gather<1>(src, shape, strides, dst);
    case 2:
      return gather<2>(src, shape, strides, dst);
    case 4:
      return gather<4>(src, shape, strides, dst);
    default:
      return gather<8>(src, shape, strides, dst);
  }
}

Dims fortran_strides(const Shape& shape) {
  Dims strides = Dims::filled(shape.size(), 1);
  for (int i = 1; i < shape.size(); ++i) strides[i] = strides[i - 1] * shape[i - 1];
  return strides;
}

// The header of a C-ordered array, byte for byte as numpy.save writes it (version 1.0): room for the first size to grow
// to 21 digits, then 1 to 64 spaces so that the data start at a multiple of 64.
std::string header_of(const char* descr, const Shape& shape) {
  std::string sizes;
  for (int i = 0; i < shape.size(); ++i) sizes += cat(i ? ", " : "", shape[i]);
  if (shape.size() == 1) sizes += ',';
  std::string text = cat("{'descr': '", descr, "', 'fortran_order': False, 'shape': (", sizes, "), }");
  if (!shape.empty()) text.append(21 - cat(shape[0]).size(), ' ');
  const std::size_t before = kMagic.size() + 4;
  text.append(64 - (before + text.size() + 1) % 64, ' ');
  text += '\n';
  std::string out(kMagic);
  out += '\x01';
  out += '\0';
  out += static_cast<char>(text.size() & 255);
  out += static_cast<char>(text.size() >> 8);
  return out + text;
}

}  // namespace

Tensor read_npy(const std::string& path) {
  const InputFile file(path);
  const std::size_t magic = kMagic.size();
  unsigned char prefix[12] = {};
  CAPO_CHECK(file.size() >= sizeof prefix, path, ": truncated, a .npy file has at least ", sizeof prefix,
             " bytes, got ", file.size());
  file.read_at(0, prefix, sizeof prefix);
  CAPO_CHECK(std::memcmp(prefix, kMagic.data(), magic) == 0, path,
             ": not a .npy file, it must start with \\x93NUMPY, got ",
             quote({reinterpret_cast<const char*>(prefix), magic}));
  const int major = prefix[magic], minor = prefix[magic + 1];
  CAPO_CHECK(major >= 1 && major <= 3 && minor == 0, path, ": .npy version must be 1.0, 2.0 or 3.0, got ", major, ".",
             minor);
  const std::uint64_t header_at = magic + (major == 1 ? 4 : 6);
  std::uint64_t length = 0;
  for (std::uint64_t i = header_at; i-- > magic + 2;) length = length << 8 | prefix[i];
  CAPO_CHECK(length <= kMaxHeaderBytes, path, ": header too large, at most ", kMaxHeaderBytes,
             " bytes are accepted, got ", length);
  CAPO_CHECK(length <= file.size() - header_at, path, ": truncated, the header needs ", length, " bytes, got ",
             file.size() - header_at);
  std::string header(static_cast<std::size_t>(length), '\0');
  file.read_at(header_at, header.data(), header.size());
  CAPO_CHECK(!header.empty() && header.back() == '\n', path, ": header must end with a newline, got ", quote(header));
  const Layout layout = HeaderParser(header, path).parse();

  const std::uint64_t need = bytes_of(layout, path), data_at = header_at + length, got = file.size() - data_at;
  CAPO_CHECK(got == need, path, ": shape ", layout.shape, " of ", layout.dtype, " needs ", need,
             " bytes after the header, got ", got);
  const Tensor t = empty(layout.shape, layout.dtype);
  if (need == 0) return t;
  auto* data = static_cast<char*>(t.data());
  if (layout.fortran && layout.shape.size() > 1) {
    std::vector<char> columns(static_cast<std::size_t>(need));
    file.read_at(data_at, columns.data(), columns.size());
    gather(size_of(layout.dtype), columns.data(), layout.shape, fortran_strides(layout.shape), data);
  } else {
    file.read_at(data_at, data, static_cast<std::size_t>(need));
  }
  if (layout.dtype == boolean) {  // any other byte in a bool is undefined behaviour
    const auto* bad = std::find_if(data, data + need, [](char c) { return c != 0 && c != 1; });
    CAPO_CHECK(bad == data + need, path, ": bools must be 0 or 1, got ",
               static_cast<int>(static_cast<unsigned char>(*bad)));
  }
  return t;
}

void write_npy(const std::string& path, const Tensor& t) {
  CAPO_CHECK(t.defined() && t.device().is_cpu(), "write_npy: needs a cpu tensor, got ", describe(t));
  const auto* d =
      std::find_if(std::begin(kDescrs), std::end(kDescrs), [&](const Descr& x) { return x.dtype == t.dtype(); });
  CAPO_CHECK(d != std::end(kDescrs), "write_npy: ", t.dtype(), " has no .npy form, cast to f32 first, got ",
             describe(t));
  bytes_of({t.dtype(), false, t.shape()}, path);  // an empty tensor's sizes may be more than a reader accepts
  AtomicFile file(path);
  file.write(header_of(d->text, t.shape()));
  if (t.numel() > 0 && t.is_contiguous()) {
    file.write(t.data(), t.nbytes());
  } else if (t.numel() > 0) {
    std::vector<char> rows(t.nbytes());
    gather(size_of(t.dtype()), static_cast<const char*>(t.data()), t.shape(), t.strides(), rows.data());
    file.write(rows.data(), rows.size());
  }
  file.commit();
}

}  // namespace capo
