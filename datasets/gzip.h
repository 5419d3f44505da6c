// gzip streams in memory.
#pragma once

#include <capo/engine/error.h>

#include <cstddef>
#include <string>
#include <string_view>

namespace capo {

inline bool is_gzip(std::string_view bytes) { return bytes.size() >= 2 && bytes[0] == '\x1f' && bytes[1] == '\x8b'; }

// The content of a gzip stream. Throws when it is damaged, truncated, followed by other bytes, or longer than
// max_bytes. `name` starts the text of errors.
std::string gunzip(std::string_view packed, std::size_t max_bytes, const std::string& name);
// Its first n bytes, or all of it where it is shorter: to judge by a header before the rest is unpacked.
std::string gunzip_head(std::string_view packed, std::size_t n, const std::string& name);
// A stream without file name and time: the same bytes for the same zlib.
std::string gzip(std::string_view raw);

}  // namespace capo
