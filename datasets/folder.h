// A folder with one sub-folder of PNG or JPEG images per class.
#pragma once

#include <capo/datasets/dataset.h>

namespace capo {

// Classes are the sub-folders in byte order of their names, images in byte order within; hidden entries are skipped,
// files that are not .png, .jpg or .jpeg (any case) are left out with a logged warning. Throws when there is no class
// or a class has no image. Images are decoded at each call of image(), as RGB.
DatasetPtr open_image_folder(const std::string& folder);

}  // namespace capo
