// SHA-256 (FIPS 180-4), incremental.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace capo {

class Sha256 {
 public:
  Sha256();
  void update(const void* data, std::size_t size);
  void update(std::string_view text) { update(text.data(), text.size()); }
  // The digest of all bytes so far; resets the object to empty.
  std::array<std::uint8_t, 32> digest();
  std::string hex();  // digest() as 64 lower-case hex digits

 private:
  void block(const std::uint8_t* p);

  std::uint32_t state_[8];
  std::uint8_t buffer_[64];
  std::uint64_t bytes_;
};

std::string sha256_hex(std::span<const std::uint8_t> data);
std::string sha256_hex(std::string_view text);
// Of a regular file, read in pieces; throws Error as InputFile does.
std::string sha256_file(const std::string& path);

}  // namespace capo
