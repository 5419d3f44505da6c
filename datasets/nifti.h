// NIfTI-1 single files (.nii, and .nii.gz through zlib): one volume of up to three dimensions, either byte order.
// Stored types: u8, i16, i32, f32, f64, u16. Orientation (qform, sform), spacing and its unit are kept; header
// extensions are passed over. Refused, by an Error that starts with the path: ANALYZE, .hdr/.img pairs, NIfTI-2,
// other types (RGB, complex, i8, i64), a fourth dimension longer than 1, more than 2^30 voxels, truncated files and
// bytes after the data.
#pragma once

#include <capo/datasets/volume.h>

namespace capo {

enum class NiftiType : std::int16_t { u8 = 2, i16 = 4, i32 = 8, f32 = 16, f64 = 64, u16 = 512 };

// How voxels are stored.
struct NiftiFormat {
  NiftiType type = NiftiType::f32;
  // Whole-number types only: a voxel is slope * stored + inter, stored rounded to the nearest whole number. With 1
  // and 0 every voxel must be a whole number.
  float slope = 1, inter = 0;
  bool big_endian = false;
};

// Intensities: slope * stored + inter in f64 where the header scales, rounded to f32 (so i32 and f64 may lose
// digits). A finite value beyond f32's range throws; NaN and infinities of the file stay.
Volume read_nifti(const std::string& path);
// Class labels: each voxel, scaled, must be a whole number in [0, classes), classes in [1, 256].
LabelVolume read_nifti_labels(const std::string& path, int classes = 256);

// Atomic; packed when the path ends in .gz. What is written is read back with the same bits (voxels unless scaled, and
// geometry). Throws when a voxel does not fit the type or a size exceeds 32,767.
void write_nifti(const std::string& path, const Volume& v, const NiftiFormat& format = {});
void write_nifti(const std::string& path, const LabelVolume& v);  // u8

}  // namespace capo
