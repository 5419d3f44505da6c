// NumPy's .npy files (numpy.lib.format): one array each.
//
// dtypes: f32 '<f4', f64 '<f8', f16 '<f2', i32 '<i4', i64 '<i8', u8 '|u1', i8 '|i1', bool '|b1'. Values and axes stay
// as they are: an image read here is [H, W, C] only if it was written so. Errors: "<path>: <rule>, got <what>".
#pragma once

#include <capo/engine/tensor.h>

#include <string>

namespace capo {

// A fresh contiguous CPU tensor; arrays in Fortran order are rearranged. Versions 1.0, 2.0 and 3.0.
// The file is distrusted. The header, at most 10,000 bytes, must be a Python dictionary of exactly 'descr',
// 'fortran_order' and 'shape': that grammar is read and nothing is evaluated. Rank <= 8, and exactly the bytes that the
// shape needs must follow: both are checked before memory is taken. Bools must be 0 or 1. Object arrays (pickles),
// big-endian numbers and structures are refused.
Tensor read_npy(const std::string& path);

// Replaces the file all at once (AtomicFile) with the bytes that numpy.save writes for a C-ordered array of these
// values. t: CPU, any strides, not bf16 (NumPy has none: cast to f32 first).
void write_npy(const std::string& path, const Tensor& t);

}  // namespace capo
