#include <capo/datasets/segmentation.h>
#include <capo/engine/files.h>
#include <capo/engine/json.h>
#include <capo/engine/sha256.h>

#include <nlohmann/json.hpp>

#include <cmath>

namespace capo {
namespace {

using Json = nlohmann::json;

const Json& member(const Json& j, const char* key, const std::string& name) {
  CAPO_CHECK(j.is_object() && j.contains(key), name, ": missing key \"", key, "\"");
  return j[key];
}

std::string text_of(const Json& j, const char* key, const std::string& name) {
  const Json& v = member(j, key, name);
  CAPO_CHECK(v.is_string(), name, ": \"", key, "\" must be a string");
  return v.get<std::string>();
}

std::int64_t size_of(const Json& v, const char* what, const std::string& name) {
  CAPO_CHECK(v.is_number_unsigned() && v.get<std::uint64_t>() <= std::uint64_t{1} << 32, name, ": ", what,
             " must be a whole number in [0, 2^32]");
  return v.get<std::int64_t>();
}

double positive(const Json& v, const char* what, const std::string& name) {
  CAPO_CHECK(v.is_number() && v.get<double>() > 0 && v.get<double>() < 1e6, name, ": ", what,
             " must be a positive number below 1e6");
  return v.get<double>();
}

const Json& three(const Json& j, const char* key, const std::string& name) {
  const Json& v = member(j, key, name);
  CAPO_CHECK(v.is_array() && v.size() == 3, name, ": \"", key, "\" must be a list of 3 numbers");
  return v;
}

Extent extent_of(const Json& j, const std::string& name) {
  const Json& v = three(j, "shape_zyx", name);
  const Extent e{size_of(v[0], "shape_zyx", name), size_of(v[1], "shape_zyx", name), size_of(v[2], "shape_zyx", name)};
  for (const auto n : {e.z, e.y, e.x}) CAPO_CHECK(n >= 1 && n <= 1024, name, ": sizes must be in [1, 1024], got ", e);
  return e;
}

// The volume's bytes from the offset under `key` on.
std::string_view voxels_at(const Json& j, const char* key, const Extent& e, std::string_view bytes,
                           const std::string& name) {
  const auto at = static_cast<std::size_t>(size_of(member(j, key, name), key, name)),
             n = static_cast<std::size_t>(e.voxels());
  CAPO_CHECK(at <= bytes.size() && n <= bytes.size() - at, name, ": \"", key, "\" and shape ", e, " must lie in the ",
             bytes.size(), " bytes of the .bin file, got ", at);
  return bytes.substr(at, n);
}

SegmentationCase read_case(const Json& j, std::string_view bytes, const std::string& path) {
  SegmentationCase c;
  c.name = text_of(j, "name", path);
  // It may become a file's name.
  CAPO_CHECK(!c.name.empty() && c.name.size() <= 100 && c.name.find_first_of("/\\") == c.name.npos && c.name[0] != '.',
             path, ": a volume's name must have 1 to 100 bytes, no slash, and not begin with a dot");
  const std::string where = cat(path, ": ", c.name);
  const Extent e = extent_of(j, where);
  Geometry place;
  const Json& spacing = three(j, "voxel_mm", where);
  for (std::size_t i = 0; i < 3; ++i) place.spacing[i] = static_cast<float>(positive(spacing[i], "voxel_mm", where));
  const double unit = positive(member(j, "unit_per_step", where), "unit_per_step", where);
  const std::string_view image = voxels_at(j, "image_offset", e, bytes, where),
                         label = voxels_at(j, "label_offset", e, bytes, where);
  c.channels.emplace_back(e, 0.0f, place);
  c.label = LabelVolume(e, 0, place);
  for (std::size_t i = 0; i < image.size(); ++i) {
    c.channels[0].voxels[i] = static_cast<float>(static_cast<unsigned char>(image[i]) * unit);
    c.label.voxels[i] = static_cast<std::uint8_t>(label[i]);
    CAPO_CHECK(c.label.voxels[i] <= 2, where, ": labels must be 0, 1 or 2, got ", static_cast<int>(c.label.voxels[i]),
               " at voxel ", i);
  }
  return c;
}

}  // namespace

SegmentationSet read_hippocampus(const std::string& folder, const std::string& split) {
  CAPO_CHECK(split == "train" || split == "test", "hippocampus: split must be train or test, got ", split);
  const std::string path = folder + "/hippocampus-u8.json", data = folder + "/hippocampus-u8.bin";
  const std::string text = read_file(path, std::size_t{1} << 24);
  check_json_object(text, path, 4);
  const Json j = Json::parse(text);
  const std::string bytes = read_file(data, std::size_t{1} << 30);
  const std::string hash = text_of(j, "sha256", path);
  CAPO_CHECK(sha256_hex(bytes) == hash, data, ": SHA-256 must be ", hash.substr(0, 64), " as its .json says, got ",
             sha256_hex(bytes));
  const Json& volumes = member(j, "volumes", path);
  CAPO_CHECK(volumes.is_array(), path, ": \"volumes\" must be a list");
  SegmentationSet set{cat("hippocampus ", split), {"background", "anterior", "posterior"}, {}};
  for (const Json& v : volumes) {
    const std::string where = text_of(v, "split", path);
    CAPO_CHECK(where == "train" || where == "test", path, ": \"split\" must be train or test");
    if (where == split) set.cases.push_back(read_case(v, bytes, path));
  }
  CAPO_CHECK(!set.cases.empty(), path, ": no volume of split ", split);
  return set;
}

}  // namespace capo
