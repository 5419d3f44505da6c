// Malformed files: each must give a capo::Error that starts with the file's path and names the rule.
#include <capo/datasets/augment.h>
#include <capo/datasets/cifar.h>
#include <capo/datasets/folder.h>
#include <capo/datasets/idx.h>
#include <capo/datasets/open.h>
#include <capo/datasets/png.h>
#include <capo/engine/safetensors.h>
#include <capo/tests/temp_folder.h>
#include <capo/tests/tiny_images.h>

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <functional>

using namespace capo;
using namespace capo::testing;

namespace {

std::string le64(std::uint64_t v) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(v >> (8 * i));
  return out;
}

std::string be32(std::uint32_t v) {
  std::string out;
  for (int i = 24; i >= 0; i -= 8) out += static_cast<char>(v >> i);
  return out;
}

std::string tensors_file(const std::string& json, std::size_t data_bytes) {
  return le64(json.size()) + json + std::string(data_bytes, 'd');
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":[)" + shape + R"(],"data_offsets":[)" + offsets + "]}";
}

std::string png_chunk(const std::string& type, const std::string& data) {
  const std::string body = type + data;
  return be32(static_cast<std::uint32_t>(data.size())) + body +
         be32(static_cast<std::uint32_t>(
             crc32(0, reinterpret_cast<const Bytef*>(body.data()), static_cast<uInt>(body.size()))));
}

std::string deflated(const std::string& raw) {
  uLongf size = compressBound(raw.size());
  std::string out(size, '\0');
  compress2(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(raw.data()), raw.size(), 9);
  out.resize(size);
  return out;
}

// A PNG of the given header whose IDAT inflates to `raw`.
std::string png_file(std::uint32_t w, std::uint32_t h, int depth, int color, const std::string& raw) {
  return std::string("\x89PNG\r\n\x1a\n", 8) +
         png_chunk("IHDR",
                   be32(w) + be32(h) + static_cast<char>(depth) + static_cast<char>(color) + std::string(3, '\0')) +
         png_chunk("IDAT", deflated(raw)) + png_chunk("IEND", "");
}

std::string gz(const std::string& raw) {
  z_stream z{};
  deflateInit2(&z, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&z, raw.size()) + 64, '\0');
  z.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(raw.data()));
  z.avail_in = static_cast<uInt>(raw.size());
  z.next_out = reinterpret_cast<Bytef*>(out.data());
  z.avail_out = static_cast<uInt>(out.size());
  deflate(&z, Z_FINISH);
  out.resize(z.total_out);
  deflateEnd(&z);
  return out;
}

std::string idx_file(const std::string& dims, std::size_t bytes, char rank) {
  return std::string("\0\0\x08", 3) + rank + dims + std::string(bytes, '\1');
}

int cases_run = 0;

// `open` is given the path of a file with this content.
void bad(const std::string& content, const char* rule, const std::function<void(const std::string&)>& open) {
  ++cases_run;
  const TempFolder t;
  const std::string p = t.file("bad.file", content);
  const std::string text = error_of([&] { open(p); });
  CHECK_MESSAGE(starts_with(text, p + ": "), std::string(rule), " gave: ", text);
  CHECK_MESSAGE(contains(text, rule), std::string(rule), " gave: ", text);
  CHECK_MESSAGE(text.size() < 1500, "a message nobody reads: ", text.size());
}

void bad_tensors(const std::string& content, const char* rule) {
  bad(content, rule, [](const std::string& p) { SafetensorsReader r(p); });
}
void bad_header(const std::string& json, std::size_t data_bytes, const char* rule) {
  bad_tensors(tensors_file(json, data_bytes), rule);
}
void bad_image(const std::string& content, const char* rule) {
  bad(content, rule, [](const std::string& p) { load_image(p); });
}
void bad_idx(const std::string& content, const char* rule) {
  bad(content, rule, [](const std::string& p) { read_idx(p); });
}

}  // namespace

TEST_CASE("bad files: safetensors frame") {
  bad_tensors("", "truncated");
  bad_tensors("1234567", "truncated");
  bad_tensors(le64(100) + "{}", "truncated");
  bad_tensors(le64(~0ull) + "{}", "header too large");
  bad_tensors(le64(1ull << 63) + "{}", "header too large");
  bad_tensors(le64(100'000'001) + "{}", "header too large");
  bad_tensors(le64((16u << 20) + 1) + "{}", "header too large");
  bad(tensors_file("{}  ", 0), "header too large", [](const std::string& p) { SafetensorsReader r(p, 3); });
  bad_tensors(le64(0), "must start with '{'");
  bad_header(" {}", 0, "must start with '{'");
  bad_header("[]", 0, "must start with '{'");
  bad_header("\xef\xbb\xbf{}", 0, "must start with '{'");
  bad_header("{}", 5, "trailing bytes");
  bad_header("{}{}", 0, "valid JSON");
  bad_header(std::string("{}\0", 3), 0, "valid JSON");
  bad_header(std::string("{}\0garbage", 10), 0, "got a NUL byte");
  bad_header("{", 0, "valid JSON");
  bad_header("{'a':1}", 0, "valid JSON");
  bad_header("{\"a\":NaN}", 0, "valid JSON");
  bad_header("{\"a\"}", 0, "valid JSON");
  bad_header("{\"\xff\":{}}", 0, "valid JSON");
  bad_header("{\"\xc0\x80\":{}}", 0, "valid JSON");          // overlong
  bad_header("{\"\xed\xa0\x80\":{}}", 0, "valid JSON");      // a surrogate
  bad_header("{\"\\ud800\":{}}", 0, "valid JSON");           // half a surrogate pair
  bad_header("{\"a\n\":{}}", 0, "valid JSON");               // a raw control character
}

TEST_CASE("bad files: safetensors structure") {
  bad_header("{\"a\":1}", 0, "must be an object");
  bad_header("{\"a\":-1}", 0, "must be an object");
  bad_header("{\"a\":null}", 0, "must be an object");
  bad_header("{\"a\":[[[[]]]]}", 0, "must be an object");
  bad_header("{\"a\":\"x\"}", 0, "must be an object");
  bad_header("{\"a\":{}}", 0, "needs dtype, shape and data_offsets");
  bad_header(R"({"a":{"dtype":"F32","shape":[]}})", 0, "needs dtype, shape and data_offsets");
  bad_header(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"extra":1}})", 4, "unknown field");
  bad_header(R"({"a":{"dtype":{"x":{}},"shape":[],"data_offsets":[0,4]}})", 4, "dtype must be a string");
  bad_header(R"({"a":{"dtype":4,"shape":[],"data_offsets":[0,4]}})", 4, "dtype must be a string");
  bad_header(R"({"a":{"dtype":["F32"],"shape":[],"data_offsets":[0,4]}})", 4, "dtype must be a string");
  bad_header("{" + tensor("a", "f32", "", "0,4") + "}", 4, "dtype must be one of");
  bad_header("{" + tensor("a", "F8_E4M3", "4", "0,4") + "}", 4, "got \"F8_E4M3\"");
  bad_header("{" + tensor("a", "U16", "2", "0,4") + "}", 4, "got \"U16\"");
  bad_header(R"({"a":{"dtype":"F32","shape":4,"data_offsets":[0,4]}})", 4, "shape must be a list");
  bad_header("{" + tensor("a", "F32", "[1]", "0,4") + "}", 4, "shape must be a list");
  bad_header("{" + tensor("a", "F32", "\"1\"", "0,4") + "}", 4, "shape must be a list");
  bad_header("{" + tensor("a", "F32", "-1", "0,4") + "}", 4,
             "shape must be a list of sizes, got the negative number -1");
  bad_header("{" + tensor("a", "F32", "1.0", "0,4") + "}", 4, "shape must be a list of sizes, got the number 1.0");
  bad_header("{" + tensor("a", "F32", "1e0", "0,4") + "}", 4, "shape must be a list");
  bad_header("{" + tensor("a", "F32", "true", "0,4") + "}", 4, "shape must be a list");
  bad_header("{" + tensor("a", "F32", "1,1,1,1,1,1,1,1,1", "0,4") + "}", 4, "at most 8 dimensions");
  bad_header("{" + tensor("a", "F32", "9223372036854775808", "0,4") + "}", 4, "above 2^63");
  bad_header("{" + tensor("a", "F32", "99999999999999999999999", "0,4") + "}", 4, "shape must be a list");
  bad_header("{" + tensor("a", "F32", "4611686018427387904", "0,4") + "}", 4, "overflows");
  bad_header("{" + tensor("a", "U8", "4294967296,4294967296,4294967296", "0,4") + "}", 4, "overflows");
  bad_header("{" + tensor("a", "F32", "2", "0,4") + "}", 4, "needs 8 bytes");
  bad_header("{" + tensor("a", "F32", "0", "0,4") + "}", 4, "needs 0 bytes");
  bad_header("{" + tensor("a", "F32", "", "0") + "}", 4, "data_offsets must be two");
  bad_header("{" + tensor("a", "F32", "", "0,4,8") + "}", 4, "data_offsets must be two");
  bad_header("{" + tensor("a", "F32", "", "-4,0") + "}", 4, "data_offsets must be two");
  bad_header("{" + tensor("a", "F32", "", "4,0") + "}", 4, "must be in order");
  bad_header("{" + tensor("a", "F32", "", "0,18446744073709551616") + "}", 4, "data_offsets must be two");
  bad_header("{" + tensor("a", "F32", "", "18446744073709551612,18446744073709551615") + "}", 4, "needs 4 bytes");
  bad_header("{" + tensor("a", "F32", "", "18446744073709551611,18446744073709551615") + "}", 4, "beyond the data");
  bad_header("{" + tensor("a", "F32", "", "0,4") + "}", 3, "beyond the data");
  bad_header("{" + tensor("a", "F32", "", "0,4") + "," + tensor("b", "F32", "", "2,6") + "}", 6, "overlap");
  bad_header("{" + tensor("a", "F32", "", "0,4") + "," + tensor("b", "F32", "", "0,4") + "}", 4, "overlap");
  bad_header("{" + tensor("a", "F32", "", "0,4") + "," + tensor("b", "F32", "", "5,9") + "}", 9, "hole");
  bad_header("{" + tensor("a", "F32", "", "1,5") + "}", 5, "hole");
  bad_header("{" + tensor("a", "F32", "", "0,4") + "}", 6, "trailing bytes");
  bad_header("{" + tensor("a", "F32", "", "0,4") + "," + tensor("a", "F32", "", "4,8") + "}", 8, "duplicate key");
  bad_header(R"({"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4, "duplicate key");
  bad_header(R"({"\u0061":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
             R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
             0, "duplicate key");
  bad_header(R"({"__metadata__":{"k":1}})", 0, "must be a string");
  bad_header(R"({"__metadata__":{"k":{"x":"y"}}})", 0, "must be a string");
  bad_header(R"({"__metadata__":{"k":["x"]}})", 0, "must be a string");
  bad_header(R"({"__metadata__":"k"})", 0, "must be an object");
  bad_header(R"({"__metadata__":{"k":"1","k":"2"}})", 0, "duplicate key in the metadata");
  bad_header(R"({"__metadata__":{},"__metadata__":{}})", 0, "duplicate key");
  std::string deep = "{\"a\":";
  for (int i = 0; i < 200000; ++i) deep += "[";
  bad_header(deep, 0, "must be an object");
  std::string nested;
  for (int i = 0; i < 100000; ++i) nested += "{\"a\":";
  bad_header(nested, 0, "has an unknown field");
  bad_header("{\"" + std::string(100000, 'n') + "\":1}", 0, "must be an object");  // the message stays short
}

TEST_CASE("bad files: images") {
  const std::string png = encode_png(Image(20, 20, 3, 77)), jpeg(view(kJpeg));
  bad_image("", "must be a PNG or JPEG image, got an empty file");
  bad_image("GIF89a......", "must be a PNG or JPEG");
  bad_image("BM..........", "must be a PNG or JPEG");
  bad_image(png.substr(0, 8), "header is not readable");
  bad_image(png.substr(0, 20), "header is not readable");
  bad_image(png.substr(0, png.size() - 1), "PNG is truncated");
  bad_image(png.substr(0, png.size() - 12), "PNG is truncated");
  bad_image(png.substr(0, 50), "PNG is truncated");
  std::string flipped = png;
  flipped[png.size() - 20] = static_cast<char>(flipped[png.size() - 20] ^ 1);
  bad_image(flipped, "wrong checksum");
  std::string long_chunk = png;
  long_chunk[33] = '\x7f';  // the length of the second chunk
  bad_image(long_chunk, "PNG is truncated");
  bad_image(png_file(0, 1, 8, 2, ""), "header is not readable");
  bad_image(png_file(1, 1, 8, 9, "...."), "header is not readable");
  bad_image(png_file(1, 1, 3, 0, ".."), "header is not readable");
  bad_image(png_file(16385, 1, 8, 0, std::string(16386, '\0')), "image");  // side above 16,384
  bad_image(png_file(0x7fffffff, 0x7fffffff, 8, 2, ""), "image");
  bad_image(png_file(16384, 16384, 8, 2, ""), "image too large");
  bad_image(png_file(4, 4, 8, 2, std::string(10, '\0')), "image is damaged");                    // too few rows
  bad_image(png_file(1, 1, 8, 2, std::string(20 << 20, '\0')), "image is damaged");  // a bomb: 20 MiB for one pixel
  bad_image(png_file(1, 1, 8, 2, std::string("\7\1\1\1", 4)), "image is damaged");               // unknown row filter
  bad_image(png_file(1, 1, 8, 3, std::string(2, '\0')), "header is not readable");               // palette missing
  bad_image(std::string(view(kPng16)), "16-bit images are not supported");
  bad_image(jpeg.substr(0, 3), "JPEG is truncated, it has no image data");
  bad_image(jpeg.substr(0, 100), "JPEG is truncated in a header segment");
  bad_image(jpeg.substr(0, jpeg.size() - 2), "JPEG is truncated");
  bad_image(jpeg.substr(0, jpeg.size() - 10), "JPEG is truncated");
  std::string table = jpeg;
  const auto dht = table.find("\xff\xc4");
  REQUIRE(dht != table.npos);
  table[dht + 5] = '\xff';  // codes of length 1
  bad_image(table, "Huffman table has");
  table = jpeg;
  table[dht + 3] = '\7';  // a shorter segment
  bad_image(table, "Huffman table is cut off");
  bad(std::string(view(kJpeg)).replace(2, 2, "\xff\xd9"), "header is not readable",
      [](const std::string& p) { load_image(p); });
}

TEST_CASE("bad files: IDX and gzip") {
  const std::string good = idx_file(be32(2) + be32(3), 6, 2);
  CHECK(parse_idx(good, "mem").bytes.size() == 6);
  CHECK(gunzip(gz(good), 100, "mem") == good);
  bad_idx("", "truncated");
  bad_idx(std::string("\0\0\x08", 3), "truncated");
  bad_idx(std::string("\1\0\x08\1", 4), "not an IDX file");
  bad_idx(std::string("\0\0\x0d\1", 4) + be32(0), "element type must be u8");
  bad_idx(idx_file("", 0, 0), "rank must be in");
  bad_idx(idx_file("", 0, 9), "rank must be in");
  bad_idx(idx_file(be32(1), 0, 2), "truncated");
  bad_idx(good + "x", "needs 6 bytes after the header, got 7");
  bad_idx(good.substr(0, good.size() - 1), "needs 6 bytes");
  bad_idx(idx_file(be32(~0u) + be32(~0u) + be32(~0u), 4, 3), "overflows");
  bad_idx(idx_file(be32(~0u) + be32(~0u), 4, 2), "needs 18446744065119617025 bytes");
  const std::string packed = gz(good);
  bad_idx(packed.substr(0, packed.size() - 1), "gzip stream is truncated");
  bad_idx(packed.substr(0, 2), "gzip stream is truncated");
  bad_idx(packed + "x", "trailing bytes");
  bad_idx(packed + packed, "trailing bytes");
  std::string hurt = packed;
  hurt[packed.size() - 6] = static_cast<char>(hurt[packed.size() - 6] ^ 1);  // the checksum
  bad_idx(hurt, "gzip stream is damaged");
  hurt = packed;
  hurt[2] = 7;  // no such compression method
  bad_idx(hurt, "gzip stream is damaged");
  bad(gz(std::string(1 << 20, '\0')), "content too long",
      [](const std::string& p) { gunzip(read_file(p, 1 << 20), 1000, p); });

  const TempFolder t;
  const std::string images = t.file("i", idx_file(be32(2) + be32(1) + be32(1), 2, 3));
  const auto labels = [&](const std::string& content, const char* rule) {
    bad(content, rule, [&](const std::string& p) { open_idx(images, p, "set", {"a", "b"}); });
  };
  labels(idx_file(be32(3), 3, 1), "labels must be [2]");
  labels(idx_file(be32(2) + be32(1), 2, 2), "labels must be [2]");
  labels(idx_file(be32(2), 0, 1) + "\1\2", "label must be less than 2");
  const std::string no_images = t.file("n", idx_file(be32(0) + be32(1) + be32(1), 0, 3));
  CHECK(starts_with(error_of([&] { open_idx(no_images, no_images, "set", {"a"}); }), no_images + ": images must be"));
}

TEST_CASE("bad files: CIFAR records and class names") {
  const auto planes = [](const std::string& content, const char* rule) {
    bad(content, rule, [](const std::string& p) { open_planes({p}, {2, 1, 0, 2}, "set", {"a", "b", "c"}); });
  };
  planes("", "multiple of the record's 13 bytes");
  planes(std::string(12, '\1'), "multiple of the record's 13 bytes");
  planes(std::string(27, '\1'), "multiple of the record's 13 bytes");
  planes(std::string(39, '\1'), "too many records");
  planes(std::string(13, '\3'), "label must be less than 3");
  planes(std::string(13, '\1') + std::string(13, '\xff'), "label must be less than 3, got 255 in record 1");
  const auto names = [](const std::string& content, const char* rule) {
    bad(content, rule, [](const std::string& p) { read_class_names(p, 3); });
  };
  names("", "needs 3 class names, got 0");
  names("a\nb\n", "needs 3 class names, got 2");
  names("a\nb\nc\nd", "needs 3 class names, got 4");
  names("a\n\nc\n", "must not be blank");
  names(std::string((1 << 20) + 1, 'a'), "too long");
}

TEST_CASE("bad files: preprocess JSON") {
  const std::string good = to_json(Preprocess{});
  const auto json = [&](const std::string& from, const std::string& to, const char* rule) {
    std::string text = good;
    const auto at = text.find(from);
    REQUIRE(at != text.npos);
    text.replace(at, from.size(), to);
    bad(text, rule, [](const std::string& p) { preprocess_from_json(read_file(p, 10000), p); });
  };
  json("}", "", "valid JSON");
  json("{\"size\":32,", "{", "missing key \"size\"");
  json("32", "0", "size must be an integer");
  json("32", "4097", "size must be an integer");
  json("32", "-3", "size must be an integer");
  json("32", "3.5", "size must be an integer");
  json("32", "\"32\"", "size must be an integer");
  json("32", "18446744073709551617", "size must be an integer");
  json("[0.5,0.5,0.5]", "[0.5,0.5]", "mean must be a list of 3");
  json("[0.5,0.5,0.5]", "[0.5,0.5,\"x\"]", "mean must be a number");
  json("[0.5,0.5,0.5]", "[0.5,0.5,1e300]", "mean must be a moderate number");
  json("[0.5,0.5,0.5]", "[[[0.5]]]", "nesting");
  json("\"std\":[0.5", "\"std\":[0", "std must be positive");
  json("\"std\":[0.5", "\"std\":[-1", "std must be positive");
  json("pct\":1", "pct\":1.5", "crop_pct must be in");
  json("pct\":1", "pct\":0", "crop_pct must be in");
  json("bicubic", "nearest", "interpolation must be");
  json("\"bicubic\"", "3", "interpolation must be");
  json("\"size\":32", "\"size\":32,\"size\":32", "duplicate key");
  json("\"size\":32", "\"size\":32,\"more\":1", "unknown key");
  json(good, "[1]", "must be a JSON object");
  json(good, "", "valid JSON");
  json(good, std::string(5000, ' '), "too long");
  json("bicubic", "\xff", "valid JSON");
  json("}", std::string("}\0x", 3), "got a NUL byte");
}

TEST_CASE("bad files: folders instead of files, missing files, empty folders") {
  const TempFolder t;
  const std::string dir = t.path(), none = t / "none";
  const auto both = [&](const char* what, const std::function<void(const std::string&)>& open) {
    cases_run += 2;
    const std::string folder = error_of([&] { open(dir); }), missing = error_of([&] { open(none); });
    CHECK_MESSAGE(starts_with(folder, dir + ": must be a regular file, got a folder"), std::string(what), ": ", folder);
    CHECK_MESSAGE(starts_with(missing, none + ": cannot open the file, No such file"), std::string(what), ": ",
                  missing);
  };
  both("safetensors", [](const std::string& p) { SafetensorsReader r(p); });
  both("image", [](const std::string& p) { load_image(p); });
  both("idx", [](const std::string& p) { read_idx(p); });
  both("planes", [](const std::string& p) { open_planes({p}, {}, "set", {"a"}); });
  both("names", [](const std::string& p) { read_class_names(p); });
  CHECK(starts_with(error_of([&] { open_image_folder(dir); }), dir + ": must have one sub-folder per class"));
  CHECK(starts_with(error_of([&] { open_image_folder(none); }), none + ": cannot list the folder"));
  const std::string file = t.file("f", "x");
  CHECK(starts_with(error_of([&] { open_image_folder(file); }), file + ": cannot list the folder"));
  t.file("set/empty/readme.txt", "x");
  CHECK(starts_with(error_of([&] { open_image_folder(t / "set"); }),
                    t / "set/empty" + ": class folder has no PNG or JPEG"));
  if (::geteuid() != 0) {
    ::chmod(file.c_str(), 0);
    CHECK(contains(error_of([&] { load_image(file); }), "Permission denied"));
  }
  // A bad image inside a folder is named when it is read.
  t.file("good/a/1.png", "not a png");
  const auto set = open_image_folder(t / "good");
  CHECK(starts_with(error_of([&] { set->image(0); }), t / "good/a/1.png" + ": must be a PNG or JPEG"));
  MESSAGE("malformed files tried so far: " << cases_run);
}
