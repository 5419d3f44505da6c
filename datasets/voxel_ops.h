// Intensity changes for training on volumes, in place on a patch v of extent e. nnU-Net's definitions (Isensee et al.
// 2021; package batchgenerators), which expect normalised intensities.
#pragma once

#include <capo/datasets/sample_rng.h>
#include <capo/datasets/volume.h>

namespace capo {

// v + N(0, sd^2), independently; sd >= 0.
void add_noise(float* v, const Extent& e, float sd, SampleRng& rng);
// A Gaussian of `sigma` voxels along every axis longer than 1, cut at 4 sigma, mirrored at the border; sigma >= 0.
void blur(float* v, const Extent& e, float sigma);
// v * factor.
void change_brightness(float* v, const Extent& e, float factor);
// mean + (v - mean) * factor, kept within the values' range before.
void change_contrast(float* v, const Extent& e, float factor);
// Values are scaled to [0, 1], raised to `exponent` > 0, scaled back, then shifted and scaled to the mean and standard
// deviation they had. inverted: on -v.
void change_gamma(float* v, const Extent& e, float exponent, bool inverted);
// The patch as a scan with `zoom` in (0, 1] times as many voxels along each axis would show it: nearest voxels down,
// linear up.
void lower_resolution(float* v, const Extent& e, float zoom);

}  // namespace capo
