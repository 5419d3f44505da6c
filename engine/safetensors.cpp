#include <capo/engine/safetensors.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <optional>
#include <unordered_map>
#include <unordered_set>

namespace capo {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is copied as it is");

constexpr const char* kMetadataKey = "__metadata__";

struct Tag {
  const char* text;
  DType dtype;
};
constexpr Tag kTags[] = {{"F32", f32}, {"F64", f64}, {"BF16", bf16}, {"F16", f16},    {"I32", i32},
                         {"I64", i64}, {"U8", u8},   {"I8", i8},     {"BOOL", boolean}};

// Names come from the file: quoted, and never longer than a line.
std::string quote(std::string_view text) {
  constexpr std::size_t kMax = 200;
  return text.size() <= kMax ? cat("\"", text, "\"") : cat("\"", text.substr(0, kMax), "...\"");
}

// Bytes that shape and dtype need; nothing when a size overflows.
std::optional<std::uint64_t> bytes_of(const Shape& shape, DType dtype) {
  std::uint64_t n = size_of(dtype);
  // A zero anywhere makes the tensor empty, however large the other sizes are.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  for (const auto x : shape) {
    if (__builtin_mul_overflow(n, static_cast<std::uint64_t>(x), &n)) return std::nullopt;
  }
  return n < (std::uint64_t{1} << 62) ? std::optional(n) : std::nullopt;
}

// Receives the header's tokens. The grammar is fixed, so the nesting depth tells what a token means:
// 1 = the root's keys, 2 = fields of a tensor or of the metadata, 3 = the two number lists.
class HeaderSax {
 public:
  HeaderSax(const std::string& path, SafetensorsHeader& out) : path_(path), out_(out) {}

  bool null() { return unexpected("null"); }
  bool boolean(bool) { return unexpected("a boolean"); }
  bool number_integer(std::int64_t v) { return unexpected(cat("the negative number ", v).c_str()); }
  bool number_float(double, const std::string& text) {
    return unexpected(cat("the number ", text.substr(0, 40)).c_str());
  }
  bool binary(Json::binary_t&) { return unexpected("binary"); }

  bool number_unsigned(std::uint64_t v) {
    if (depth_ != 3) return unexpected(cat("the number ", v).c_str());
    if (field_ == Field::shape) {
      check(v <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()), "shape has a size above 2^63",
            v);
      check(tensor_.shape.size() < kMaxDims, "shape must have at most 8 dimensions", "more");
      tensor_.shape.push_back(static_cast<std::int64_t>(v));
    } else {
      check(offsets_ < 2, "data_offsets must be two numbers", "more");
      (offsets_++ == 0 ? tensor_.begin : tensor_.end) = v;
    }
    return true;
  }

  bool string(std::string& v) {
    if (depth_ == 2 && in_metadata_) {
      out_.metadata[key_] = v;
    } else if (depth_ == 2 && field_ == Field::dtype) {
      const auto* tag = std::find_if(std::begin(kTags), std::end(kTags), [&](const Tag& t) { return v == t.text; });
      check(tag != std::end(kTags), "dtype must be one of F32 F64 BF16 F16 I32 I64 U8 I8 BOOL", quote(v));
      tensor_.dtype = tag->dtype;
    } else {
      return unexpected(cat("the string ", quote(v)).c_str());
    }
    return true;
  }

  bool start_object(std::size_t) {
    if (depth_ == 1) {
      tensor_ = TensorEntry{};
      tensor_.name = name_;
      seen_ = 0;
      offsets_ = 0;
      field_ = Field::none;
    } else if (depth_ != 0) {
      return unexpected("an object");
    }
    ++depth_;
    return true;
  }

  bool end_object() {
    if (depth_ == 2 && !in_metadata_) {
      check(seen_ == 7, "needs dtype, shape and data_offsets", "fewer");
      out_.entries.push_back(std::move(tensor_));
    }
    --depth_;
    return true;
  }

  bool start_array(std::size_t) {
    if (depth_ != 2 || in_metadata_ || (field_ != Field::shape && field_ != Field::offsets))
      return unexpected("a list");
    ++depth_;
    return true;
  }

  bool end_array() {
    check(field_ != Field::offsets || offsets_ == 2, "data_offsets must be two numbers", offsets_);
    --depth_;
    return true;
  }

  bool key(std::string& k) {
    if (depth_ == 1) {
      CAPO_CHECK(names_.insert(k).second, path_, ": duplicate key in the header, got ", quote(k), " twice");
      name_ = k;
      in_metadata_ = k == kMetadataKey;
    } else if (in_metadata_) {
      CAPO_CHECK(out_.metadata.emplace(k, "").second, path_, ": duplicate key in the metadata, got ", quote(k),
                 " twice");
      key_ = k;
    } else {
      field_ = k == "dtype" ? Field::dtype : k == "shape" ? Field::shape
               : k == "data_offsets" ? Field::offsets : Field::none;
      check(field_ != Field::none, "has an unknown field", quote(k));
      check((seen_ & static_cast<int>(field_)) == 0, "duplicate key", quote(k));
      seen_ |= static_cast<int>(field_);
    }
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& e) {
    const std::string_view text = e.what();
    const auto at = text.find("] ");  // after "[json.exception.parse_error.101] "
    CAPO_CHECK(false, path_, ": header must be valid JSON, got at byte ", position, ": ",
               text.substr(at == text.npos ? 0 : at + 2).substr(0, 300));
    return false;
  }

 private:
  enum class Field { none = 0, dtype = 1, shape = 2, offsets = 4 };

  template <class T>
  void check(bool ok, const char* rule, const T& got) const {
    CAPO_CHECK(ok, path_, ": tensor ", quote(name_), " ", rule, ", got ", got);
  }

  bool unexpected(const char* what) const {
    CAPO_CHECK(depth_ != 0, path_, ": header must be a JSON object, got ", what);
    CAPO_CHECK(depth_ != 1, path_, ": header entry ", quote(name_), " must be an object, got ", what);
    CAPO_CHECK(!in_metadata_, path_, ": metadata ", quote(key_), " must be a string, got ", what);
    const char* name = field_ == Field::dtype     ? "dtype must be a string"
                       : field_ == Field::shape   ? "shape must be a list of sizes"
                       : field_ == Field::offsets ? "data_offsets must be two byte offsets"
                                                  : "must have only dtype, shape and data_offsets";
    check(false, name, what);
    return false;
  }

  const std::string& path_;
  SafetensorsHeader& out_;
  int depth_ = 0;
  bool in_metadata_ = false;
  std::string name_, key_;
  TensorEntry tensor_;
  Field field_ = Field::none;
  int seen_ = 0, offsets_ = 0;
  std::unordered_set<std::string> names_;
};

void check_ranges(const std::vector<TensorEntry>& entries, std::uint64_t data_bytes, const std::string& path) {
  std::uint64_t at = 0;
  for (const auto& e : entries) {
    const auto fail_if = [&](bool bad, const char* rule) {
      CAPO_CHECK(!bad, path, ": tensor ", quote(e.name), " ", rule, ", got [", e.begin, ", ", e.end, ") at byte ", at,
                 " of ", data_bytes);
    };
    fail_if(e.end > data_bytes, "data_offsets reach beyond the data");
    fail_if(e.begin < at, "data overlap another tensor's");
    fail_if(e.begin > at, "leaves a hole before its data");
    at = e.end;
  }
  CAPO_CHECK(at == data_bytes, path, ": tensors must cover the data exactly, got ", data_bytes - at,
             " trailing bytes in no tensor");
}

std::string json_string(const std::string& text, const std::string& path) {
  try {
    return Json(text).dump();
  } catch (const Json::exception&) {
    CAPO_CHECK(false, path, ": names and metadata must be valid UTF-8, got ", text.size(), " bytes that are not");
  }
  return {};
}

}  // namespace

const char* safetensors_tag(DType dtype) {
  for (const auto& t : kTags) {
    if (t.dtype == dtype) return t.text;
  }
  return "";
}

SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_bytes, const std::string& path) {
  CAPO_CHECK(!json.empty() && json[0] == '{', path, ": header must start with '{'");
  // nlohmann takes a NUL byte for the end of its input and would not look at what follows.
  CAPO_CHECK(json.find('\0') == json.npos, path, ": header must be valid JSON, got a NUL byte");
  SafetensorsHeader out;
  HeaderSax sax(path, out);
  Json::sax_parse(json.begin(), json.end(), &sax);

  for (const auto& e : out.entries) {
    CAPO_CHECK(e.begin <= e.end, path, ": tensor ", quote(e.name), " data_offsets must be in order, got [", e.begin,
               ", ", e.end, ")");
    const auto need = bytes_of(e.shape, e.dtype);
    CAPO_CHECK(need, path, ": tensor ", quote(e.name), " shape overflows, got ", e.shape, " of ", e.dtype);
    CAPO_CHECK(*need == e.bytes(), path, ": tensor ", quote(e.name), " shape ", e.shape, " of ", e.dtype, " needs ",
               *need, " bytes, got data_offsets [", e.begin, ", ", e.end, ")");
  }
  // The order of JSON keys means nothing; empty tensors come before the data they touch.
  std::stable_sort(out.entries.begin(), out.entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  check_ranges(out.entries, data_bytes, path);
  return out;
}

SafetensorsReader::SafetensorsReader(const std::string& path, std::uint64_t max_header_bytes) : file_(path) {
  CAPO_CHECK(file_.size() >= 8, path, ": truncated, a safetensors file has at least 8 bytes, got ", file_.size());
  unsigned char length_bytes[8];
  file_.read_at(0, length_bytes, 8);
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | length_bytes[i];
  const std::uint64_t limit = std::min(max_header_bytes, kHeaderBytesLimit);
  CAPO_CHECK(length <= limit, path, ": header too large, at most ", limit, " bytes are accepted, got ", length);
  CAPO_CHECK(length <= file_.size() - 8, path, ": truncated, the header needs ", length, " bytes, got ",
             file_.size() - 8);
  std::string json(static_cast<std::size_t>(length), '\0');
  file_.read_at(8, json.data(), json.size());
  data_at_ = 8 + length;
  header_ = parse_safetensors_header(json, file_.size() - data_at_, path);

  by_name_.resize(header_.entries.size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(),
            [&](std::uint32_t a, std::uint32_t b) { return header_.entries[a].name < header_.entries[b].name; });
}

std::string SafetensorsReader::metadata(const std::string& key, const std::string& fallback) const {
  const auto it = header_.metadata.find(key);
  return it == header_.metadata.end() ? fallback : it->second;
}

const TensorEntry* SafetensorsReader::find(std::string_view name) const {
  const auto it = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                   [&](std::uint32_t i, std::string_view n) { return header_.entries[i].name < n; });
  return it != by_name_.end() && header_.entries[*it].name == name ? &header_.entries[*it] : nullptr;
}

const TensorEntry& SafetensorsReader::at(std::string_view name) const {
  const TensorEntry* e = find(name);
  CAPO_CHECK(e, path(), ": no tensor named ", quote(name), " among ", entries().size());
  return *e;
}

void SafetensorsReader::copy_bytes(const TensorEntry& entry, void* dst, std::uint64_t bytes) const {
  CAPO_CHECK(bytes == entry.bytes(), path(), ": tensor ", quote(entry.name), " has ", entry.bytes(),
             " bytes, got room for ", bytes);
  if (bytes > 0) file_.read_at(data_at_ + entry.begin, dst, static_cast<std::size_t>(bytes));
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, const std::vector<TensorSpec>& specs,
                                     const Metadata& metadata)
    : file_(path), path_(path) {
  std::unordered_set<std::string_view> names;
  for (const auto& s : specs) {
    CAPO_CHECK(s.name != kMetadataKey, path, ": ", kMetadataKey, " is reserved and cannot name a tensor");
    CAPO_CHECK(names.insert(s.name).second, path, ": tensor names must be unique, got ", quote(s.name), " twice");
    for (const auto x : s.shape) CAPO_CHECK(x >= 0, path, ": tensor ", quote(s.name), " has a negative size ", s.shape);
    entries_.push_back({s.name, s.dtype, s.shape, 0, 0});
  }
  std::stable_sort(entries_.begin(), entries_.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return size_of(a.dtype) > size_of(b.dtype);
  });

  std::string header = "{";
  if (!metadata.empty()) {
    header += cat("\"", kMetadataKey, "\":{");
    for (const auto& [k, v] : metadata) header += json_string(k, path) + ":" + json_string(v, path) + ",";
    header.back() = '}';
    header += ",";
  }
  for (auto& e : entries_) {
    const auto need = bytes_of(e.shape, e.dtype);
    CAPO_CHECK(need && *need < (std::uint64_t{1} << 62) - data_bytes_, path, ": tensor ", quote(e.name), " shape ",
               e.shape, " overflows");
    e.begin = data_bytes_;
    e.end = data_bytes_ += *need;
    header += cat(json_string(e.name, path), ":{\"dtype\":\"", safetensors_tag(e.dtype), "\",\"shape\":[");
    for (int i = 0; i < e.shape.size(); ++i) header += cat(i ? "," : "", e.shape[i]);
    header += cat("],\"data_offsets\":[", e.begin, ",", e.end, "]},");
  }
  if (header.back() == ',') header.pop_back();
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');
  CAPO_CHECK(header.size() <= kHeaderBytesLimit, path, ": header too large, at most ", kHeaderBytesLimit,
             " bytes are written, got ", header.size());
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(std::uint64_t{header.size()} >> (8 * i));
  file_.write(length, 8);
  file_.write(header);
}

void SafetensorsWriter::append(const void* data, std::uint64_t bytes) {
  CAPO_CHECK(bytes <= data_bytes_ - written_, path_, ": more data than the tensors hold, ", data_bytes_,
             " bytes were declared, got ", bytes, " more after ", written_);
  if (bytes > 0) file_.write(data, static_cast<std::size_t>(bytes));
  written_ += bytes;
}

void SafetensorsWriter::commit() {
  CAPO_CHECK(written_ == data_bytes_, path_, ": data missing at commit, ", data_bytes_, " bytes were declared, got ",
             written_);
  file_.commit();
}

void write_safetensors(const std::string& path, const std::vector<TensorSpec>& specs,
                       const std::vector<const void*>& data, const Metadata& metadata) {
  CAPO_CHECK(data.size() == specs.size(), path, ": one data pointer per tensor is needed, got ", data.size(), " for ",
             specs.size());
  std::unordered_map<std::string_view, const void*> by_name;
  for (std::size_t i = 0; i < specs.size(); ++i) by_name[specs[i].name] = data[i];
  SafetensorsWriter w(path, specs, metadata);
  for (const auto& e : w.entries()) w.append(by_name.at(e.name), e.bytes());
  w.commit();
}

}  // namespace capo
