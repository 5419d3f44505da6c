// engine/safetensors: round trips, bytes of the format, real files. Malformed files: bad_files_test.cpp.
#include <capo/engine/safetensors.h>
#include <capo/engine/sha256.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

using namespace capo;
using namespace capo::testing;

namespace {

template <class T>
std::vector<T> values_of(const SafetensorsReader& r, const char* name) {
  const TensorEntry& e = r.at(name);
  std::vector<T> v(e.bytes() / sizeof(T));
  r.copy_bytes(e, v.data(), e.bytes());
  return v;
}

}  // namespace

TEST_CASE("safetensors: round trip of every dtype, empty, rank 0, rank 8") {
  const TempFolder t;
  const std::string p = t / "a.safetensors";
  std::vector<TensorSpec> specs;
  std::vector<std::string> bytes;
  const DType all[] = {boolean, u8, i8, f16, bf16, i32, f32, i64, f64};
  for (const DType d : all) {
    specs.push_back({"t." + to_string(d), d, {2, 3}});
    bytes.push_back(std::string(6 * size_of(d), static_cast<char>('a' + static_cast<int>(d))));
  }
  specs.push_back({"scalar", f32, {}});
  bytes.push_back(std::string("\0\0\x80\x3f", 4));
  specs.push_back({"empty", f64, {3, 0, 1LL << 40, 1LL << 40}});
  bytes.push_back("");
  specs.push_back({"deep", u8, {1, 1, 1, 1, 1, 1, 1, 2}});
  bytes.push_back("zz");
  specs.push_back({"näme \"quoted\"\n\\", u8, {1}});
  bytes.push_back("q");
  std::vector<const void*> data;
  for (const auto& b : bytes) data.push_back(b.data());
  const Metadata meta{{"format", "pt"}, {"läyout", "{\"a\": \"\\u00e9\"}"}};
  write_safetensors(p, specs, data, meta);

  const SafetensorsReader r(p);
  CHECK(r.metadata() == meta);
  CHECK(r.metadata("format") == "pt");
  CHECK(r.metadata("none", "x") == "x");
  REQUIRE(r.entries().size() == specs.size());
  std::uint64_t at = 0;
  for (const auto& e : r.entries()) {
    CHECK(e.begin == at);
    CHECK(e.begin % size_of(e.dtype) == 0);
    at = e.end;
  }
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const TensorEntry& e = r.at(specs[i].name);
    CHECK(e.dtype == specs[i].dtype);
    CHECK(e.shape == specs[i].shape);
    std::string got(e.bytes(), '?');
    r.copy_bytes(e, got.data(), got.size());
    CHECK(got == bytes[i]);
  }
  CHECK(values_of<float>(r, "scalar") == std::vector<float>{1.0f});
  CHECK(r.find("t.") == nullptr);
  CHECK(error_of([&] { r.at("none"); }) == p + ": no tensor named \"none\" among 13");
  char room[8];
  CHECK(contains(error_of([&] { r.copy_bytes(r.at("scalar"), room, 8); }), "has 4 bytes, got room for 8"));

  const std::string first = read_file(p, 1 << 20);
  write_safetensors(p, specs, data, meta);
  CHECK(read_file(p, 1 << 20) == first);  // same input, same bytes
}

TEST_CASE("safetensors: the bytes of a small file") {
  const TempFolder t;
  const std::string p = t / "a.safetensors";
  const float x[2] = {1.0f, -2.0f};
  write_safetensors(p, {{"x", f32, {2}}}, {x}, {{"k", "v"}});
  const std::string json = R"({"__metadata__":{"k":"v"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  std::string want(8, '\0');
  want[0] = static_cast<char>((json.size() + 7) / 8 * 8);
  want += json + std::string((8 - json.size() % 8) % 8, ' ') + std::string("\0\0\x80\x3f\0\0\0\xc0", 8);
  CHECK(read_file(p, 1000) == want);

  write_safetensors(p, {}, {});
  CHECK(read_file(p, 1000) == std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
  CHECK(SafetensorsReader(p).entries().empty());
}

TEST_CASE("safetensors: other writers' liberties are accepted") {
  // Keys in any order, spaces, escapes, an odd header length, odd alignment, several empty tensors.
  const std::string json =
      " \n"  // removed below: the first byte must be '{'
      R"({ "b" : {"data_offsets":[1,5], "shape":[], "dtype":"F32"}, )"
      R"("\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
      R"("e":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},"f":{"dtype":"F32","shape":[0],"data_offsets":[5,5]}})";
  const SafetensorsHeader h = parse_safetensors_header(std::string_view(json).substr(2), 5, "mem");
  REQUIRE(h.entries.size() == 4);
  CHECK(h.entries[0].name == "a");
  CHECK(h.entries[1].name == "e");
  CHECK(h.entries[2].name == "b");
  CHECK(h.entries[2].begin == 1);
  CHECK(h.entries[3].name == "f");
}

TEST_CASE("safetensors: streamed in pieces, and the writer's errors") {
  const TempFolder t;
  const std::string p = t.file("a", "old");
  {
    SafetensorsWriter w(p, {{"x", u8, {3}}});
    w.append("ab", 2);
    CHECK(starts_with(error_of([&] { w.commit(); }), p + ": data missing at commit"));
    CHECK(starts_with(error_of([&] { w.append("cde", 3); }), p + ": more data than"));
    CHECK(read_file(p, 10) == "old");
    w.append("c", 1);
    w.commit();
  }
  CHECK(values_of<char>(SafetensorsReader(p), "x") == std::vector<char>{'a', 'b', 'c'});
  const auto fails = [&](const std::vector<TensorSpec>& specs, const Metadata& m, const char* rule) {
    const std::string text = error_of([&] { SafetensorsWriter w(p, specs, m); });
    CHECK_MESSAGE(starts_with(text, p + ": "), text);
    CHECK_MESSAGE(contains(text, rule), text);
  };
  fails({{"x", u8, {1}}, {"x", f32, {1}}}, {}, "must be unique");
  fails({{"__metadata__", u8, {1}}}, {}, "reserved");
  fails({{"\xff", u8, {1}}}, {}, "valid UTF-8");
  fails({}, {{"k", "\xc3"}}, "valid UTF-8");
  fails({{"x", f64, {1LL << 60}}}, {}, "overflows");
  fails({{"x", u8, {1LL << 61}}, {"y", u8, {1LL << 61}}}, {}, "overflows");
  fails({{"x", u8, {-1}}}, {}, "negative size");
  CHECK(t.entries() == 1);
}

TEST_CASE("safetensors: a file cut short after opening gives an error, not SIGBUS") {
  const TempFolder t;
  const std::string p = t / "a";
  const std::string big(100000, 'x');
  write_safetensors(p, {{"x", u8, {100000}}}, {big.data()});
  const SafetensorsReader r(p);
  REQUIRE(::truncate(p.c_str(), 5000) == 0);
  std::string room(100000, '\0');
  CHECK(starts_with(error_of([&] { r.copy_bytes(r.at("x"), room.data(), room.size()); }), p + ": truncated after"));
}

TEST_CASE("safetensors: real weights") {
  // CAPO_WEIGHTS, or a folder shared/data/weights beside the checkout.
  const char* folder = std::getenv("CAPO_WEIGHTS");
  const auto beside = std::filesystem::path(__FILE__).parent_path() / "../../shared/data/weights";
  const std::string p = (folder ? std::string(folder) : beside.string()) + "/resnet20-cifar10.safetensors";
  if (::access(p.c_str(), R_OK) != 0) {
    MESSAGE("SKIPPED: no " << p << " (set CAPO_WEIGHTS to the folder of real weights)");
    return;
  }
  CHECK(sha256_file(p) == "379826f520765c59d4632f20ae5e89c1a20e04cec13bf675cea72352f753d16a");
  const SafetensorsReader r(p);
  const TensorEntry& e = r.at("conv1.weight");
  CHECK(to_string(e.shape) == "[16, 3, 3, 3]");
  CHECK(e.dtype == f32);
  const auto w = values_of<float>(r, "conv1.weight");
  double sum = 0;
  for (const float v : w) sum += static_cast<double>(v) * static_cast<double>(v);
  CHECK(sum > 1.0);
  CHECK(sum < 1000.0);
}
