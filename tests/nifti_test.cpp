// NIfTI-1: files by nibabel, round trips of every type and byte order, and malformed files.
#include <capo/datasets/gzip.h>
#include <capo/datasets/nifti.h>
#include <capo/tests/temp_folder.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using namespace capo;
using namespace capo::testing;

namespace {

std::string golden(const char* name) { return std::string(CAPO_SOURCE_DIR) + "/tests/golden/" + name; }

Geometry oblique() {
  Geometry g;
  g.spacing = {2.5f, 0.75f, 1.25f};
  g.unit = Geometry::Unit::micrometre;
  g.qform_code = 1;
  g.qfac = -1;
  g.quatern = {0.1f, -0.2f, 0.3f};
  g.qoffset = {-7, 8.5f, 9};
  g.sform_code = 4;
  g.srow = {{{1, 0.1f, 0.2f, 3}, {0.3f, 4, 0.5f, 6}, {-0.6f, 0.7f, 8, 9}}};
  return g;
}

Volume counting(const Extent& e) {
  Volume v(e, 0, oblique());
  for (std::size_t i = 0; i < v.voxels.size(); ++i) v.voxels[i] = static_cast<float>(i % 251);
  return v;
}

bool same(const Volume& a, const Volume& b) {
  return a.extent == b.extent && a.geometry == b.geometry && a.voxels.size() == b.voxels.size() &&
         std::memcmp(a.voxels.data(), b.voxels.data(), a.voxels.size() * sizeof(float)) == 0;
}

// Header and voxels of a sound little-endian u8 file, to be damaged.
std::string sound_file(const Extent& e = {3, 4, 5}) {
  const TempFolder t;
  write_nifti(t / "a.nii", counting(e), {.type = NiftiType::u8});
  return read_file(t / "a.nii", 1 << 20);
}

template <class T>
std::string with(std::string bytes, std::size_t at, T value) {
  bytes.replace(at, sizeof value, std::string(reinterpret_cast<const char*>(&value), sizeof value));
  return bytes;
}

void bad(const std::string& content, const char* rule) {
  const TempFolder t;
  const std::string p = t.file("bad.nii", content);
  for (const std::string& text : {error_of([&] { read_nifti(p); }), error_of([&] { read_nifti_labels(p); })}) {
    CHECK_MESSAGE(starts_with(text, p + ": "), std::string(rule), " gave: ", text);
    CHECK_MESSAGE(contains(text, rule), std::string(rule), " gave: ", text);
  }
}

constexpr auto i16 = [](int v) { return static_cast<std::int16_t>(v); };

}  // namespace

TEST_CASE("nifti: files that nibabel wrote") {
  const Volume v = read_nifti(golden("nibabel_scaled.nii.gz"));
  CHECK(v.extent == Extent{3, 4, 5});
  for (std::int64_t z = 0; z < 3; ++z)
    for (std::int64_t y = 0; y < 4; ++y)
      for (std::int64_t x = 0; x < 5; ++x)
        CHECK(v.at(z, y, x) == 0.5f * static_cast<float>(40 * x - 3 * y + 7 * z - 20) - 20);
  CHECK(v.geometry.spacing == std::array<float, 3>{2.5f, 2, 1.5f});
  CHECK(v.geometry.unit == Geometry::Unit::millimetre);
  CHECK(v.geometry.qform_code == 1);
  CHECK(v.geometry.sform_code == 4);
  // nibabel's own get_qform and get_sform.
  const double q[3][4] = {{-1.2990381, -1.00000001, 0, 10}, {-0.75000001, 1.7320508, 0, -20}, {0, 0, 2.5, 30}};
  Geometry scanner = v.geometry;
  scanner.sform_code = 0;
  const Affine a = voxel_to_world(scanner), b = voxel_to_world(v.geometry);
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t j = 0; j < 4; ++j) {
      CHECK(std::fabs(a[i][j] - q[i][j]) < 1e-6);
      CHECK(std::fabs(b[i][j] - 2 * q[i][j]) < 1e-6);
    }
  }

  // Its get_qform of a header with oblique()'s quaternion.
  const double r[3][4] = {{0.92499998, -0.44731285, 0.77736185, -7},
                          {0.64552141, 0.59999999, 0.76368095, 8.5},
                          {0.53868093, 0.04910427, -2.24999999, 9}};
  scanner = oblique();
  scanner.sform_code = 0;
  for (std::size_t i = 0; i < 3; ++i)
    for (std::size_t j = 0; j < 4; ++j) CHECK(std::fabs(voxel_to_world(scanner)[i][j] - r[i][j]) < 1e-6);

  CHECK(contains(error_of([] { read_nifti_labels(golden("nibabel_plain.nii")); }),
                 "labels must be whole numbers in [0, 256), got 1000"));
  const Volume p = read_nifti(golden("nibabel_plain.nii"));  // u16, big-endian, slope stated as 1
  CHECK(p.extent == Extent{4, 2, 3});
  for (std::int64_t z = 0; z < 4; ++z)
    for (std::int64_t y = 0; y < 2; ++y)
      for (std::int64_t x = 0; x < 3; ++x) CHECK(p.at(z, y, x) == static_cast<float>(1000 * x + 100 * y + 10 * z));
  CHECK(p.geometry.unit == Geometry::Unit::micrometre);
  CHECK(p.geometry.qform_code == 0);
  CHECK(voxel_to_world(p.geometry)[1] == std::array<double, 4>{0, 2, 0, -2});
  CHECK(voxel_to_world(Geometry{.spacing = {3, 2, 1}})[2] == std::array<double, 4>{0, 0, 3, 0});
}

TEST_CASE("nifti: what is written is read back to the bit") {
  const TempFolder t;
  for (const char* name : {"a.nii", "a.nii.gz"}) {
    for (const auto type :
         {NiftiType::u8, NiftiType::i16, NiftiType::i32, NiftiType::f32, NiftiType::f64, NiftiType::u16}) {
      for (const bool big : {false, true}) {
        for (const Extent e : {Extent{3, 4, 5}, Extent{1, 7, 1}, Extent{1, 1, 1}}) {
          Volume v = counting(e);
          if (type == NiftiType::f32 || type == NiftiType::f64) v.voxels[0] = 0.1f;
          if (type == NiftiType::i16 || type == NiftiType::i32) v.voxels[0] = -32768;
          write_nifti(t / name, v, {.type = type, .big_endian = big});
          CHECK(same(read_nifti(t / name), v));
          const std::string once = read_file(t / name, 1 << 20);
          write_nifti(t / name, read_nifti(t / name), {.type = type, .big_endian = big});
          CHECK(read_file(t / name, 1 << 20) == once);
          CHECK(is_gzip(once) == (std::string(name) == "a.nii.gz"));
        }
      }
    }
  }
  Volume odd = counting({1, 1, 4});
  odd.voxels = {std::nanf("7"), -0.0f, std::numeric_limits<float>::infinity(), 1e-42f};
  for (const bool big : {false, true}) {
    write_nifti(t / "b.nii", odd, {.big_endian = big});
    CHECK(same(read_nifti(t / "b.nii"), odd));
  }
  LabelVolume l({2, 2, 2}, 0, oblique());
  l.voxels = {0, 1, 2, 255, 4, 3, 2, 1};
  write_nifti(t / "l.nii.gz", l);
  const LabelVolume back = read_nifti_labels(t / "l.nii.gz");
  CHECK(back.voxels == l.voxels);
  CHECK(back.geometry == l.geometry);
  CHECK(contains(error_of([&] { read_nifti_labels(t / "l.nii.gz", 255); }),
                 "labels must be whole numbers in [0, 255), got 255"));
  CHECK(contains(error_of([&] { read_nifti_labels(t / "b.nii"); }), "labels must be whole numbers"));
}

TEST_CASE("nifti: slope and intercept") {
  const TempFolder t;
  const Volume v = counting({2, 3, 4});
  write_nifti(t / "a.nii", v, {.type = NiftiType::i16, .slope = 0.25f, .inter = 100});
  CHECK(same(read_nifti(t / "a.nii"), v));  // quarters are exact
  CHECK(read_nifti_labels(t / "a.nii").voxels[7] == 7);
  write_nifti(t / "a.nii", v, {.type = NiftiType::u8, .slope = 3});
  const Volume coarse = read_nifti(t / "a.nii");
  for (std::size_t i = 0; i < v.voxels.size(); ++i) CHECK(std::fabs(coarse.voxels[i] - v.voxels[i]) <= 1.5f);
  const auto refused = [&](const Volume& w, const NiftiFormat& f, const char* rule) {
    CHECK_MESSAGE(contains(error_of([&] { write_nifti(t / "c.nii", w, f); }), rule), std::string(rule));
    CHECK(t.entries() == 1);
  };
  Volume half = v;
  half.voxels[3] = 0.5f;
  refused(half, {.type = NiftiType::i32}, "voxel 3 must be a whole number");
  half.voxels[3] = 256;
  refused(half, {.type = NiftiType::u8}, "voxel 3 does not fit its stored type, got 256");
  half.voxels[3] = std::nanf("");
  refused(half, {.type = NiftiType::u8, .slope = 2}, "voxel 3 does not fit");
  refused(v, {.type = NiftiType::f32, .slope = 2}, "f32 and f64 are not scaled");
  refused(v, {.type = NiftiType::u8, .slope = 0}, "slope must be finite and not 0");
  refused(Volume({1, 1, 32768}), {}, "sizes must be in [1, 32767]");
  refused(Volume(), {}, "sizes must be in [1, 32767]");
  half.voxels.pop_back();
  refused(half, {}, "must have 24 voxels, got 23");
}

TEST_CASE("nifti: slopes that say nothing; headers with an extension") {
  const TempFolder t;
  const std::string file = sound_file();
  for (const float slope : {0.0f, std::nanf("")}) {
    const std::string p = t.file("a.nii", with(with(file, 112, slope), 116, 77.0f));
    CHECK(read_nifti(p).voxels[9] == 9);
  }
  std::string longer = with(file, 108, 368.0f);
  longer.insert(352, 16, 'x');
  CHECK(read_nifti(t.file("b.nii", longer)).voxels[9] == 9);
  CHECK(read_nifti(t.file("c.nii", with(file, 40, i16(7)))).extent == Extent{3, 4, 5});  // further dims of size 1
  const std::string flat =
      with(with(sound_file({1, 4, 5}), 40, i16(2)), 88, 0.0f);  // no third dimension, no step along it
  CHECK(read_nifti(t.file("d.nii", flat)).extent == Extent{1, 4, 5});
}

TEST_CASE("nifti: bad files") {
  const std::string file = sound_file();
  bad("", "truncated, the header needs 348 bytes, got 0");
  bad(file.substr(0, 347), "the header needs 348 bytes, got 347");
  bad(file.substr(0, 348), "NIfTI file is truncated");
  bad(file.substr(0, file.size() - 1), "[3, 4, 5] voxels of 1 bytes from byte 352 on need 412 bytes, got 411");
  bad(file + "x", "trailing bytes after the voxels, got 1");
  bad(std::string(400, '\0'), "not a NIfTI-1 file, the header's first field must be 348");
  bad("\x89PNG\r\n" + file, "not a NIfTI-1 file");
  bad(with(file, 0, std::int32_t{540}), "NIfTI-2 is not supported");
  bad(with(file, 0, std::int32_t{0x7fffffff}), "not a NIfTI-1 file");
  bad(with(file, 344, std::int32_t{0}), "the magic at byte 344");
  bad(with(file, 344, std::array<char, 4>{'n', 'i', '1', '\0'}), "pairs of .hdr and .img");
  bad(with(file, 344, std::array<char, 4>{'n', '+', '2', '\0'}), "the magic at byte 344");
  for (const int rank : {0, -1, 8, 1 << 10}) bad(with(file, 40, i16(rank)), "dim[0] must be in [1, 7]");
  bad(with(file, 42, i16(0)), "dim[1] must be positive, got 0");
  bad(with(file, 46, i16(-3)), "dim[3] must be positive, got -3");
  bad(with(file, 42, std::array<std::int16_t, 3>{32767, 32767, 32767}), "at most 2^30 voxels");
  bad(with(file, 42, std::array<std::int16_t, 3>{1024, 1024, 1024}), "truncated");
  bad(with(with(file, 40, i16(4)), 48, i16(2)), "one volume of up to 3 dimensions, got dim[4] = 2");
  for (const int type : {0, 1, 32, 128, 256, 1024, 2304, -2}) bad(with(file, 70, i16(type)), "datatype must be 2 (u8)");
  bad(with(file, 72, i16(16)), "bitpix must be 8 for datatype 2, got 16");
  for (const float at : {0.0f, 348.0f, 351.0f, 352.5f, -352.0f, 1e30f, std::nanf("")})
    bad(with(file, 108, at), "vox_offset must be a whole number");
  bad(with(file, 108, 400.0f), "truncated");
  bad(with(file, 112, std::numeric_limits<float>::infinity()), "scl_slope and scl_inter must be finite");
  bad(with(with(file, 112, 2.0f), 116, std::nanf("")), "scl_slope and scl_inter must be finite");
  for (const float step : {0.0f, -1.0f, std::nanf("")}) bad(with(file, 80, step), "pixdim[1] must be positive");
  bad(with(file, 123, char{7}), "xyzt_units");
  bad(with(file, 252, i16(6)), "qform_code must be in [0, 5], got 6");
  bad(with(file, 254, i16(-1)), "sform_code must be in [0, 5], got -1");
  bad(with(file, 256, 1.0f), "must have a length of at most 1");
  bad(with(file, 260, std::nanf("")), "quatern must be finite");
  bad(with(file, 268, std::numeric_limits<float>::infinity()), "qoffset must be finite");
  bad(with(file, 280, std::nanf("")), "srow must be finite");

  const std::string packed = gzip(file);
  bad(packed.substr(0, packed.size() / 2), "gzip stream is truncated");
  bad(packed.substr(0, 5), "gzip stream is truncated");
  bad(packed + "tail", "trailing bytes after the gzip stream, got 4");
  bad(gzip(file + "x"), "gzip content too long, at most 412 bytes");
  bad(gzip(file.substr(0, 380)), "truncated");
  bad(gzip("hello"), "the header needs 348 bytes, got 5");
  bad(with(packed, packed.size() - 8, std::int32_t{0}), "gzip stream is damaged");
  bad(gzip(with(file, 42, std::array<std::int16_t, 3>{1024, 1024, 1024}) + std::string(5 << 20, '\0')), "truncated");
  CHECK(starts_with(error_of([&] { read_nifti("/nowhere/a.nii"); }), "/nowhere/a.nii: "));

  // Beyond f32's range.
  const TempFolder t;
  write_nifti(t / "a.nii", counting({1, 1, 2}), {.type = NiftiType::f64});
  std::string f64_file = with(read_file(t / "a.nii", 1 << 20), 360, 1e300);
  CHECK(contains(error_of([&] { read_nifti(t.file("a.nii", f64_file)); }), "voxel 1 exceeds f32's range"));
  f64_file = with(f64_file, 360, std::numeric_limits<double>::infinity());
  CHECK(std::isinf(read_nifti(t.file("a.nii", f64_file)).voxels[1]));
}
