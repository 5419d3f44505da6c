#include <capo/datasets/gzip.h>
#include <capo/datasets/nifti.h>
#include <capo/engine/files.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace capo {
namespace {

constexpr std::size_t kHeader = 348, kFirstVoxel = 352;
constexpr std::size_t kMaxFile = std::size_t{9} << 30;
constexpr std::int64_t kMaxVoxels = std::int64_t{1} << 30;
// Offsets of the fields that we use.
enum At : std::size_t {
  kDim = 40,
  kDatatype = 70,
  kBitpix = 72,
  kPixdim = 76,
  kVoxOffset = 108,
  kSlope = 112,
  kInter = 116,
  kUnits = 123,
  kQformCode = 252,
  kSformCode = 254,
  kQuatern = 256,
  kQoffset = 268,
  kSrow = 280,
  kMagic = 344
};

template <class T>
T turned(T v) {
  auto bytes = std::bit_cast<std::array<char, sizeof(T)>>(v);
  std::reverse(bytes.begin(), bytes.end());
  return std::bit_cast<T>(bytes);
}

bool must_turn(bool big_endian) { return big_endian != (std::endian::native == std::endian::big); }

// Values at byte positions of a file image, in its byte order.
template <class T>
T get(const char* bytes, std::size_t at, bool turn) {
  T v;
  std::memcpy(&v, bytes + at, sizeof v);
  return turn ? turned(v) : v;
}
template <class T>
void put(char* bytes, std::size_t at, T v, bool turn) {
  if (turn) v = turned(v);
  std::memcpy(bytes + at, &v, sizeof v);
}

// Calls f with a value of the C++ type.
template <class F>
auto with_type(NiftiType type, F&& f) {
  switch (type) {
    case NiftiType::u8:
      return f(std::uint8_t{});
    case NiftiType::i16:
      return f(std::int16_t{});
    case NiftiType::i32:
      return f(std::int32_t{});
    case NiftiType::f32:
      return f(float{});
    case NiftiType::f64:
      return f(double{});
    case NiftiType::u16:
      break;
  }
  return f(std::uint16_t{});
}

bool known_type(int code) { return code == 2 || code == 4 || code == 8 || code == 16 || code == 64 || code == 512; }

struct Header {
  Extent extent;
  Geometry geometry;
  NiftiType type = NiftiType::f32;
  bool turn = false;
  bool scaled = false;
  double slope = 1, inter = 0;
  std::size_t data = kFirstVoxel;  // where voxels begin

  std::size_t voxel_bytes() const {
    return with_type(type, [](auto v) { return sizeof v; });
  }
  std::size_t file_bytes() const { return data + static_cast<std::size_t>(extent.voxels()) * voxel_bytes(); }
};

void parse_sizes(Header& h, const char* bytes, const std::string& name) {
  const int rank = get<std::int16_t>(bytes, kDim, h.turn);
  CAPO_CHECK(rank >= 1 && rank <= 7, name, ": NIfTI dim[0] must be in [1, 7], got ", rank);
  std::int64_t size[8] = {0, 1, 1, 1, 1, 1, 1, 1};
  for (int i = 1; i <= rank; ++i) {
    size[i] = get<std::int16_t>(bytes, kDim + 2 * static_cast<std::size_t>(i), h.turn);
    CAPO_CHECK(size[i] >= 1, name, ": NIfTI dim[", i, "] must be positive, got ", size[i]);
    CAPO_CHECK(i <= 3 || size[i] == 1, name, ": NIfTI file must hold one volume of up to 3 dimensions, got dim[", i,
               "] = ", size[i]);
  }
  h.extent = {size[3], size[2], size[1]};
  CAPO_CHECK(h.extent.voxels() <= kMaxVoxels, name, ": NIfTI volume must have at most 2^30 voxels, got ", h.extent);
}

void parse_voxels(Header& h, const char* bytes, const std::string& name) {
  const int code = get<std::int16_t>(bytes, kDatatype, h.turn), bits = get<std::int16_t>(bytes, kBitpix, h.turn);
  CAPO_CHECK(known_type(code), name,
             ": NIfTI datatype must be 2 (u8), 4 (i16), 8 (i32), 16 (f32), 64 (f64) or 512 (u16), got ", code);
  h.type = static_cast<NiftiType>(code);
  CAPO_CHECK(bits == static_cast<int>(8 * h.voxel_bytes()), name, ": NIfTI bitpix must be ", 8 * h.voxel_bytes(),
             " for datatype ", code, ", got ", bits);
  const float at = get<float>(bytes, kVoxOffset, h.turn);
  CAPO_CHECK(at >= 352 && at <= 0x1p24f && at == std::floor(at), name,
             ": NIfTI vox_offset must be a whole number in [352, 2^24], got ", at);
  h.data = static_cast<std::size_t>(at);
  const float slope = get<float>(bytes, kSlope, h.turn), inter = get<float>(bytes, kInter, h.turn);
  if (slope == 0 || std::isnan(slope)) return;  // 0: not scaled, by the standard; NaN: likewise, by nibabel
  CAPO_CHECK(std::isfinite(slope) && std::isfinite(inter), name, ": NIfTI scl_slope and scl_inter must be finite, got ",
             slope, " and ", inter);
  h.scaled = slope != 1 || inter != 0;
  h.slope = static_cast<double>(slope);
  h.inter = static_cast<double>(inter);
}

void parse_geometry(Header& h, const char* bytes, const std::string& name) {
  Geometry& g = h.geometry;
  const auto real = [&](std::size_t at, const char* what) {
    const float v = get<float>(bytes, at, h.turn);
    CAPO_CHECK(std::isfinite(v), name, ": NIfTI ", what, " must be finite, got ", v);
    return v;
  };
  const std::int64_t size[3] = {h.extent.z, h.extent.y, h.extent.x};
  for (std::size_t i = 0; i < 3; ++i) {
    const float step = get<float>(bytes, kPixdim + 4 * (3 - i), h.turn);
    const bool stated = step > 0 && std::isfinite(step);
    CAPO_CHECK(stated || size[i] == 1, name, ": NIfTI pixdim[", 3 - i, "] must be positive, got ", step);
    g.spacing[i] = stated ? step : 1;  // of the only slice, row or column nothing depends on it
  }
  const int unit = static_cast<unsigned char>(bytes[kUnits]) & 7;
  CAPO_CHECK(unit <= 3, name, ": NIfTI xyzt_units must state a unit of space in [0, 3], got ", unit);
  g.unit = static_cast<Geometry::Unit>(unit);
  g.qform_code = get<std::int16_t>(bytes, kQformCode, h.turn);
  g.sform_code = get<std::int16_t>(bytes, kSformCode, h.turn);
  CAPO_CHECK(g.qform_code >= 0 && g.qform_code <= 5, name, ": NIfTI qform_code must be in [0, 5], got ", g.qform_code);
  CAPO_CHECK(g.sform_code >= 0 && g.sform_code <= 5, name, ": NIfTI sform_code must be in [0, 5], got ", g.sform_code);
  if (g.qform_code > 0) {
    g.qfac = get<float>(bytes, kPixdim, h.turn) < 0 ? -1.0f : 1.0f;
    double length = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      g.quatern[i] = real(kQuatern + 4 * i, "quatern");
      g.qoffset[i] = real(kQoffset + 4 * i, "qoffset");
      length += static_cast<double>(g.quatern[i]) * static_cast<double>(g.quatern[i]);
    }
    CAPO_CHECK(length <= 1.00001, name, ": NIfTI quatern_b, c, d must have a length of at most 1, got ",
               std::sqrt(length));
  }
  if (g.sform_code > 0) {
    for (std::size_t i = 0; i < 3; ++i)
      for (std::size_t j = 0; j < 4; ++j) g.srow[i][j] = real(kSrow + 16 * i + 4 * j, "srow");
  }
}

// `bytes`: at least the file's first 348, or all of a shorter file.
Header parse_header(std::string_view bytes, const std::string& name) {
  CAPO_CHECK(bytes.size() >= kHeader, name, ": NIfTI file is truncated, the header needs 348 bytes, got ",
             bytes.size());
  const char* p = bytes.data();
  const auto native = get<std::int32_t>(p, 0, false);
  CAPO_CHECK(native != 540 && turned(native) != 540, name, ": NIfTI-2 is not supported, only NIfTI-1");
  CAPO_CHECK(native == 348 || turned(native) == 348, name,
             ": not a NIfTI-1 file, the header's first field must be 348, got ", native);
  Header h;
  h.turn = native != 348;
  CAPO_CHECK(std::memcmp(p + kMagic, "ni1\0", 4) != 0, name,
             ": pairs of .hdr and .img are not supported, only single files");
  CAPO_CHECK(std::memcmp(p + kMagic, "n+1\0", 4) == 0, name,
             ": not a NIfTI-1 file, the magic at byte 344 must be \"n+1\" (ANALYZE?)");
  parse_sizes(h, p, name);
  parse_voxels(h, p, name);
  parse_geometry(h, p, name);
  return h;
}

struct Loaded {
  Header header;
  std::string bytes;
};

// Header first: what a packed file may grow to is known before it does.
Loaded load(const std::string& path) {
  Loaded f;
  f.bytes = read_file(path, kMaxFile);
  if (is_gzip(f.bytes)) {
    f.header = parse_header(gunzip_head(f.bytes, kHeader, path), path);
    f.bytes = gunzip(f.bytes, f.header.file_bytes(), path);
  } else {
    f.header = parse_header(f.bytes, path);
  }
  CAPO_CHECK(f.bytes.size() >= f.header.file_bytes(), path, ": NIfTI file is truncated, ", f.header.extent,
             " voxels of ", f.header.voxel_bytes(), " bytes from byte ", f.header.data, " on need ",
             f.header.file_bytes(), " bytes, got ", f.bytes.size());
  CAPO_CHECK(f.bytes.size() == f.header.file_bytes(), path, ": trailing bytes after the voxels, got ",
             f.bytes.size() - f.header.file_bytes());
  return f;
}

template <class T>
void read_voxels(const Loaded& f, std::vector<float>& out, const std::string& name) {
  const Header& h = f.header;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const T stored = get<T>(f.bytes.data(), h.data + i * sizeof(T), h.turn);
    if (!h.scaled && std::is_same_v<T, float>) {
      std::memcpy(&out[i], &stored, sizeof out[i]);  // NaN keeps its bits
      continue;
    }
    const double v = h.scaled ? h.slope * static_cast<double>(stored) + h.inter : static_cast<double>(stored);
    out[i] = static_cast<float>(v);
    CAPO_CHECK(std::isfinite(out[i]) || !std::isfinite(v), name, ": voxel ", i, " exceeds f32's range, got ", v);
  }
}

template <class T>
void read_labels(const Loaded& f, std::vector<std::uint8_t>& out, int classes, const std::string& name) {
  const Header& h = f.header;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto stored = static_cast<double>(get<T>(f.bytes.data(), h.data + i * sizeof(T), h.turn));
    const double v = h.scaled ? h.slope * stored + h.inter : stored;
    CAPO_CHECK(v >= 0 && v < classes && v == std::floor(v), name, ": labels must be whole numbers in [0, ", classes,
               "), got ", v, " at voxel ", i);
    out[i] = static_cast<std::uint8_t>(v);
  }
}

std::string make_header(const Extent& e, const Geometry& g, const NiftiFormat& format, const std::string& name) {
  const std::int64_t size[3] = {e.x, e.y, e.z};
  for (const auto n : size) CAPO_CHECK(n >= 1 && n <= 32767, name, ": NIfTI sizes must be in [1, 32767], got ", e);
  CAPO_CHECK(known_type(static_cast<int>(format.type)), name, ": unknown NIfTI type ", static_cast<int>(format.type));
  std::string out(kFirstVoxel, '\0');
  char* p = out.data();
  const bool turn = must_turn(format.big_endian);
  const auto word = [&](std::size_t at, int v) { put(p, at, static_cast<std::int16_t>(v), turn); };
  const auto real = [&](std::size_t at, float v) { put(p, at, v, turn); };
  put(p, 0, std::int32_t{kHeader}, turn);
  word(kDim, 3);
  for (std::size_t i = 1; i < 8; ++i) word(kDim + 2 * i, i <= 3 ? static_cast<int>(size[i - 1]) : 1);
  word(kDatatype, static_cast<int>(format.type));
  word(kBitpix, with_type(format.type, [](auto v) { return static_cast<int>(8 * sizeof v); }));
  real(kPixdim, g.qfac);
  for (std::size_t i = 0; i < 3; ++i) {
    CAPO_CHECK(g.spacing[i] > 0 && std::isfinite(g.spacing[i]), name, ": spacing must be positive, got ", g.spacing[i]);
    real(kPixdim + 4 * (3 - i), g.spacing[i]);
  }
  real(kVoxOffset, static_cast<float>(kFirstVoxel));
  real(kSlope, format.slope);
  real(kInter, format.inter);
  p[kUnits] = static_cast<char>(g.unit);
  word(kQformCode, g.qform_code);
  word(kSformCode, g.sform_code);
  for (std::size_t i = 0; i < 3; ++i) {
    real(kQuatern + 4 * i, g.quatern[i]);
    real(kQoffset + 4 * i, g.qoffset[i]);
    for (std::size_t j = 0; j < 4; ++j) real(kSrow + 16 * i + 4 * j, g.srow[i][j]);
  }
  std::memcpy(p + kMagic, "n+1", 4);
  return out;
}

// The voxel as type T stores it.
template <class T>
T stored_voxel(float v, const NiftiFormat& format, std::size_t at, const std::string& name) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(v);
  } else {
    const bool scaled = format.slope != 1 || format.inter != 0;
    const double exact =
        (static_cast<double>(v) - static_cast<double>(format.inter)) / static_cast<double>(format.slope);
    const double whole = std::nearbyint(exact);
    CAPO_CHECK(scaled || whole == exact, name, ": voxel ", at,
               " must be a whole number to be stored as one without a slope, got ", v);
    CAPO_CHECK(whole >= static_cast<double>(std::numeric_limits<T>::min()) &&
                   whole <= static_cast<double>(std::numeric_limits<T>::max()),
               name, ": voxel ", at, " does not fit its stored type, got ", v);
    return static_cast<T>(whole);
  }
}

void save(const std::string& path, const std::string& bytes) {
  const bool pack = path.size() >= 3 && path.compare(path.size() - 3, 3, ".gz") == 0;
  write_file_atomic(path, pack ? gzip(bytes) : bytes);
}

template <class V>
void check_whole(const V& v, const std::string& name) {
  CAPO_CHECK(static_cast<std::int64_t>(v.voxels.size()) == v.extent.voxels(), name, ": a volume ", v.extent,
             " must have ", v.extent.voxels(), " voxels, got ", v.voxels.size());
}

}  // namespace

Volume read_nifti(const std::string& path) {
  const Loaded f = load(path);
  Volume v(f.header.extent, 0, f.header.geometry);
  with_type(f.header.type, [&](auto t) { read_voxels<decltype(t)>(f, v.voxels, path); });
  return v;
}

LabelVolume read_nifti_labels(const std::string& path, int classes) {
  CAPO_CHECK(classes >= 1 && classes <= 256, "read_nifti_labels: classes must be in [1, 256], got ", classes);
  const Loaded f = load(path);
  LabelVolume v(f.header.extent, 0, f.header.geometry);
  with_type(f.header.type, [&](auto t) { read_labels<decltype(t)>(f, v.voxels, classes, path); });
  return v;
}

void write_nifti(const std::string& path, const Volume& v, const NiftiFormat& format) {
  check_whole(v, path);
  const bool real = format.type == NiftiType::f32 || format.type == NiftiType::f64;
  CAPO_CHECK(real ? format.slope == 1 && format.inter == 0
                  : format.slope != 0 && std::isfinite(format.slope) && std::isfinite(format.inter),
             path, ": NIfTI slope must be finite and not 0, inter finite, and f32 and f64 are not scaled, got ",
             format.slope, " and ", format.inter);
  std::string bytes = make_header(v.extent, v.geometry, format, path);
  with_type(format.type, [&](auto t) {
    using T = decltype(t);
    bytes.resize(kFirstVoxel + v.voxels.size() * sizeof(T));
    for (std::size_t i = 0; i < v.voxels.size(); ++i)
      put(bytes.data(), kFirstVoxel + i * sizeof(T), stored_voxel<T>(v.voxels[i], format, i, path),
          must_turn(format.big_endian));
  });
  save(path, bytes);
}

void write_nifti(const std::string& path, const LabelVolume& v) {
  check_whole(v, path);
  std::string bytes = make_header(v.extent, v.geometry, {.type = NiftiType::u8}, path);
  bytes.append(reinterpret_cast<const char*>(v.voxels.data()), v.voxels.size());
  save(path, bytes);
}

}  // namespace capo
