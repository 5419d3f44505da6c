// The safetensors container (8-byte header length, JSON header, raw little-endian data), without Tensor: names, dtypes,
// shapes and byte ranges. Everything in a file is distrusted; see SafetensorsReader for what is checked.
// Errors: "<path>: <rule>, got <what>".
#pragma once

#include <capo/engine/dtype.h>
#include <capo/engine/files.h>
#include <capo/engine/shape.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace capo {

// One stored tensor: bytes [begin, end) of the data part, row major, as many as shape and dtype need.
struct TensorEntry {
  std::string name;
  DType dtype = f32;
  Shape shape;
  std::uint64_t begin = 0, end = 0;

  std::uint64_t bytes() const { return end - begin; }
};

using Metadata = std::map<std::string, std::string>;

// "F32", "BF16", "BOOL", ...: the tag of a dtype in the file.
const char* safetensors_tag(DType dtype);

struct SafetensorsHeader {
  std::vector<TensorEntry> entries;  // by position in the data
  Metadata metadata;
};

inline constexpr std::uint64_t kMaxHeaderBytes = std::uint64_t{16} << 20;   // accepted by default
inline constexpr std::uint64_t kHeaderBytesLimit = 100'000'000;             // the format's own limit

// Parses and checks a JSON header whose data part has data_bytes bytes; `path` only names the source in errors.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_bytes, const std::string& path);

// Reads tensors out of a file. Construction checks all of it, before any data is read:
// header length within the file and max_header_bytes; the header is one JSON object in valid UTF-8 that starts with
// '{'; no duplicate key at any level; per tensor exactly dtype, shape and data_offsets; a known dtype (F64 F32 F16 BF16
// I64 I32 I8 U8 BOOL); rank <= 8; shape times dtype equals the range, without overflow; the ranges cover the data part
// exactly, without holes or overlap; metadata maps strings to strings. Zero sizes and rank 0 are legal; NaN and
// infinities are data. The bytes of BOOL tensors are not looked at.
// Reading is by pread into the caller's memory: a file cut short later gives an Error. Reads are thread safe.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path, std::uint64_t max_header_bytes = kMaxHeaderBytes);

  const std::string& path() const { return file_.path(); }
  const std::vector<TensorEntry>& entries() const { return header_.entries; }
  const Metadata& metadata() const { return header_.metadata; }
  std::string metadata(const std::string& key, const std::string& fallback = "") const;

  // Null when there is no tensor of this name.
  const TensorEntry* find(std::string_view name) const;
  // Throws when there is none.
  const TensorEntry& at(std::string_view name) const;
  // Copies the tensor's bytes; `bytes` must be entry.bytes(). The entry must come from this reader.
  void copy_bytes(const TensorEntry& entry, void* dst, std::uint64_t bytes) const;

 private:
  InputFile file_;
  SafetensorsHeader header_;
  std::uint64_t data_at_ = 0;
  std::vector<std::uint32_t> by_name_;  // indices of entries, sorted by name
};

// What a writer is told of a tensor.
struct TensorSpec {
  std::string name;
  DType dtype = f32;
  Shape shape;
};

// Writes a file atomically (see AtomicFile), one tensor at a time, so that only one needs to be in host memory:
//   SafetensorsWriter w(path, specs, metadata);
//   for (const TensorEntry& e : w.entries()) w.append(bytes of e.name, e.bytes());
//   w.commit();
// Data lie as in specs, but wider dtypes first: that keeps each tensor aligned, as PyTorch's reader needs. The bytes of
// the file depend only on specs, metadata and data. Throws on duplicate names, invalid UTF-8 and "__metadata__" as
// a name.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::string& path, const std::vector<TensorSpec>& specs, const Metadata& metadata = {});

  const std::vector<TensorEntry>& entries() const { return entries_; }
  // The next entry's bytes, or part of them: a tensor may be appended in pieces.
  void append(const void* data, std::uint64_t bytes);
  // Throws when bytes are missing.
  void commit();

 private:
  AtomicFile file_;
  std::string path_;
  std::vector<TensorEntry> entries_;
  std::uint64_t data_bytes_ = 0, written_ = 0;
};

// All at once: data[i] holds specs[i], contiguous.
void write_safetensors(const std::string& path, const std::vector<TensorSpec>& specs,
                       const std::vector<const void*>& data, const Metadata& metadata = {});

}  // namespace capo
