// engine/npy: files byte for byte as numpy.save (2.4) writes them, other forms that are read, malformed files.
#include <capo/engine/npy.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <vector>

using namespace capo;
using namespace capo::testing;

namespace {

// The header is padded with spaces to 128 bytes in all; the last one is a newline.
std::string npy(const std::string& header, const std::string& data, int major = 1) {
  const std::size_t at = major == 1 ? 10 : 12;
  std::string out("\x93NUMPY");
  out += static_cast<char>(major);
  out += '\0';
  out += static_cast<char>(128 - at);
  out.resize(at, '\0');
  out += header;
  out.resize(127, ' ');
  return out + '\n' + data;
}

template <class T>
std::string raw(const std::vector<T>& v) {
  return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T)};
}

struct Case {
  std::string header, data;
  DType dtype;
  Shape shape;
  std::vector<double> values;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all{
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
       raw<float>({0, 1, 2, 3, 4, -0.5f}),
       f32,
       {2, 3},
       {0, 1, 2, 3, 4, -0.5}},
      {"{'descr': '<f8', 'fortran_order': False, 'shape': (), }", raw<double>({2.5}), f64, {}, {2.5}},
      {"{'descr': '<f2', 'fortran_order': False, 'shape': (2,), }",
       raw<std::uint16_t>({0x3e00, 0xc000}),
       f16,
       {2},
       {1.5, -2}},
      {"{'descr': '<i4', 'fortran_order': False, 'shape': (1, 2), }",
       raw<std::int32_t>({-3, 70000}),
       i32,
       {1, 2},
       {-3, 70000}},
      {"{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }",
       raw<std::int64_t>({-3, std::int64_t{1} << 40}),
       i64,
       {2},
       {-3, 0x1p40}},
      {"{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }",
       raw<std::uint8_t>({0, 128, 255}),
       u8,
       {3},
       {0, 128, 255}},
      {"{'descr': '|i1', 'fortran_order': False, 'shape': (3,), }",
       raw<std::int8_t>({-128, -1, 127}),
       i8,
       {3},
       {-128, -1, 127}},
      {"{'descr': '|b1', 'fortran_order': False, 'shape': (2,), }", raw<std::uint8_t>({1, 0}), boolean, {2}, {1, 0}},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 0), }", "", f32, {3, 0}, {}},
      {"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1, 2), }",
       raw<std::uint8_t>({7, 9}),
       u8,
       {1, 1, 1, 1, 1, 1, 1, 2},
       {7, 9}},
  };
  return all;
}

const std::string kFloats = "{'descr': '<f4', 'fortran_order': False, 'shape': ";  // + "(2,), }"

void bad(const std::string& content, const std::string& rule) {
  const TempFolder t;
  const std::string p = t.file("bad.npy", content), text = error_of([&] { read_npy(p); });
  CHECK_MESSAGE(starts_with(text, p + ": "), rule, " gave: ", text);
  CHECK_MESSAGE(contains(text, rule), rule, " gave: ", text);
  CHECK_MESSAGE(text.size() < 600, "a message nobody reads: ", text.size());
}
void bad_header(const std::string& header, const std::string& rule) { bad(npy(header, std::string(8, '\0')), rule); }
void bad_shape(const std::string& shape, const std::string& rule) { bad_header(kFloats + shape + ", }", rule); }
void bad_descr(const std::string& descr) {
  bad_header("{'descr': " + descr + ", 'fortran_order': False, 'shape': (2,), }", "descr must be one of <f4");
}

}  // namespace

TEST_CASE("npy: every dtype is read, and written back to the same bytes") {
  const TempFolder folder;
  for (const Case& c : cases()) {
    INFO(c.header);
    const std::string file = npy(c.header, c.data);
    const Tensor t = read_npy(folder.file("in.npy", file));
    CHECK(t.dtype() == c.dtype);
    CHECK(t.shape() == c.shape);
    CHECK(t.is_contiguous());
    CHECK(to_vector<double>(t) == c.values);
    write_npy(folder / "out.npy", t);
    CHECK((read_file(folder / "out.npy", 1 << 20) == file));
  }
  CHECK(folder.entries() == 2);  // no temporary file is left
}

TEST_CASE("npy: versions 2.0 and 3.0, and other spellings of the header") {
  const TempFolder folder;
  const std::string data = raw<float>({0, 1, 2, 3, 4, 5});
  for (const int major : {1, 2, 3})
    for (const char* header : {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
                               "{\"shape\":(2,3),\"fortran_order\":False,\"descr\":\"<f4\"}",
                               " { 'shape' : ( 2 , 3 , ) , 'descr' : '<f4' ,\n'fortran_order' : False } "}) {
      INFO(major, " ", header);
      const Tensor t = read_npy(folder.file("a.npy", npy(header, data, major)));
      CHECK(t.shape() == Shape{2, 3});
      CHECK(to_vector<double>(t) == std::vector<double>{0, 1, 2, 3, 4, 5});
    }
}

TEST_CASE("npy: Fortran order becomes row-major") {
  const TempFolder folder;
  const auto read = [&](const std::string& header, const std::string& data) {
    const Tensor t = read_npy(folder.file("f.npy", npy(header, data)));
    CHECK(t.is_contiguous());
    return to_vector<double>(t);
  };
  // numpy.asfortranarray([[0, 1, 2], [3, 4, 5]])
  CHECK(read("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", raw<float>({0, 3, 1, 4, 2, 5})) ==
        std::vector<double>{0, 1, 2, 3, 4, 5});
  std::vector<std::int64_t> columns(24);
  std::vector<double> rows(24);
  for (std::size_t i = 0; i < 2; ++i)
    for (std::size_t j = 0; j < 3; ++j)
      for (std::size_t k = 0; k < 4; ++k) {
        const std::size_t at = 12 * i + 4 * j + k;
        columns[i + 2 * (j + 3 * k)] = static_cast<std::int64_t>(at);
        rows[at] = static_cast<double>(at);
      }
  CHECK(read("{'descr': '<i8', 'fortran_order': True, 'shape': (2, 3, 4), }", raw(columns)) == rows);
  CHECK(read("{'descr': '|u1', 'fortran_order': True, 'shape': (2,), }", raw<std::uint8_t>({8, 9})) ==
        std::vector<double>{8, 9});
  CHECK(read("{'descr': '<f2', 'fortran_order': True, 'shape': (2, 0), }", "").empty());
}

TEST_CASE("npy: views are written by their values") {
  const TempFolder folder;
  const std::string p = folder / "v.npy";
  const Tensor t = from_vector<float>({0, 1, 2, 3, 4, 5}, {2, 3});
  const auto written = [&](const Tensor& view) {
    write_npy(p, view);
    return read_file(p, 1 << 20);
  };
  CHECK((written(strided_view(t, {3, 2}, {1, 3}, 0)) == npy(kFloats + "(3, 2), }", raw<float>({0, 3, 1, 4, 2, 5}))));
  CHECK((written(strided_view(t, {2, 2}, {3, 1}, 1)) == npy(kFloats + "(2, 2), }", raw<float>({1, 2, 4, 5}))));
  CHECK((written(strided_view(t, {2}, {1}, 4)) == npy(kFloats + "(2,), }", raw<float>({4, 5}))));
  CHECK((written(strided_view(t, {2, 2}, {0, 1}, 0)) == npy(kFloats + "(2, 2), }", raw<float>({0, 1, 0, 1}))));
}

TEST_CASE("npy: what cannot be written leaves the old file") {
  const TempFolder folder;
  const std::string p = folder.file("a.npy", "old");
  CHECK(starts_with(error_of([&] { write_npy(p, empty({2}, bf16)); }), "write_npy: bf16 has no .npy form"));
  CHECK(starts_with(error_of([&] { write_npy(p, empty({2}, f32, kMeta)); }), "write_npy: needs a cpu tensor, got f32"));
  CHECK(starts_with(error_of([&] { write_npy(p, Tensor()); }), "write_npy: needs a cpu tensor, got undefined"));
  CHECK(starts_with(error_of([&] { write_npy(p, empty({std::int64_t{1} << 60, 0})); }), p + ": shape is too large"));
  CHECK(read_file(p, 100) == "old");
  CHECK(contains(error_of([&] { write_npy(folder / "none/a.npy", empty({0})); }), "cannot create"));
  CHECK(folder.entries() == 1);
}

TEST_CASE("npy: malformed files") {
  const std::string good = npy(kFloats + "(2,), }", std::string(8, '\0'));
  bad("", "truncated, a .npy file has at least 12 bytes, got 0");
  bad(good.substr(0, 11), "at least 12 bytes, got 11");
  bad("\x93NUMPX" + good.substr(6), "must start with \\x93NUMPY, got \"\\x93NUMPX\"");
  bad("PK\x03\x04" + good.substr(4), "must start with \\x93NUMPY");  // a .npz
  bad(good.substr(0, 6) + std::string("\x04\x00", 2) + good.substr(8), "version must be 1.0, 2.0 or 3.0, got 4.0");
  bad(good.substr(0, 6) + std::string("\x01\x01", 2) + good.substr(8), "version must be 1.0, 2.0 or 3.0, got 1.1");
  bad(good.substr(0, 6) + std::string("\x00\x01", 2) + good.substr(8), "got 0.1");
  bad(good.substr(0, 100), "truncated, the header needs 118 bytes, got 90");
  bad(good.substr(0, 6) + std::string("\x02\x00\xff\xff\xff\xff", 6) + good.substr(12),
      "header too large, at most 10000");
  bad(good.substr(0, 8) + std::string("\x11\x27", 2) + good.substr(10),
      "header too large, at most 10000 bytes are accepted, got 10001");
  bad(good.substr(0, 8) + std::string("\x00\x00", 2) + good.substr(10), "header must end with a newline");
  bad(good.substr(0, 127) + " " + good.substr(128), "header must end with a newline");
  bad(good.substr(0, 135), "shape [2] of f32 needs 8 bytes after the header, got 7");
  bad(good + good, "shape [2] of f32 needs 8 bytes after the header, got 144");
  bad(npy("{'descr': '|b1', 'fortran_order': False, 'shape': (2,), }", "\x01\x02"), "bools must be 0 or 1, got 2");

  bad_header("", "header must be a dictionary, '{' expected");
  bad_header("[1, 2]", "header must be a dictionary, '{' expected, got \"[1, 2]");
  bad_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)", "'}' expected");
  bad_header("{'descr': '<f4' 'fortran_order': False, 'shape': (2,), }", "'}' expected");
  bad_header("{'descr', 'fortran_order': False, 'shape': (2,), }", "':' expected");
  bad_header("{,}", "header needs a string");
  bad_header("{'descr': '<f4', 'fortran_order': False, }", "header needs descr, fortran_order and shape");
  bad_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'shape': (2,), }",
             "duplicate key in the header, got \"shape\"");
  bad_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 1, }",
             "header keys must be descr, fortran_order and shape, got \"x\"");
  bad_header("{'descr: 1}", "header has a string without end");
  bad_header(kFloats + "(2,), } or exit()", "nothing may follow the header's dictionary, got \"or exit()");
  bad_header(std::string("{\0\x1b[31m", 7), "got \"\\x00\\x1b[31m");

  bad_descr("'>f4'");
  bad_descr("'|O'");
  bad_descr("'<c8'");
  bad_descr("'<f4");
  bad_descr("[('a', '<f4'), ('b', '<f4')]");
  bad_descr("('<f4', (2,))");
  for (const char* truth : {"0", "'False'", "None", "false"})
    bad_header(std::string("{'descr': '<f4', 'fortran_order': ") + truth + ", 'shape': (2,), }",
               "fortran_order must be True or False");
  for (const char* shape :
       {"2", "[2]", "(2)", "(-2,)", "(2 1)", "(2.0,)", "(02,)", "(2L,)", "(,)", "(2,,)", "(0x2,)", "(True,)", "(2,"})
    bad_shape(shape, "shape must be a tuple of sizes");
  bad_shape("(1, 1, 1, 1, 1, 1, 1, 1, 2)", "shape must have at most 8 dimensions");
  bad_shape("(9223372036854775808,)", "shape has a size above 2^63");
  bad_shape("(9223372036854775807, 2)", "shape is too large, got [9223372036854775807, 2] of f32");
  bad_shape("(0, 9223372036854775807, 2)", "shape is too large");
  bad_shape("(1000000000000,)", "needs 4000000000000 bytes after the header, got 8");  // refused before memory is taken

  const TempFolder folder;
  CHECK(contains(error_of([&] { read_npy(folder.path()); }), "must be a regular file, got a folder"));
  CHECK(contains(error_of([&] { read_npy(folder / "none.npy"); }), "cannot open the file"));
}
