#include <capo/models/unet/pyramid.h>
#include <capo/ops/join.h>
#include <capo/ops/resize.h>

#include <algorithm>
#include <string>

namespace capo::unet {

ConvNormRelu::ConvNormRelu(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t out)
    : Layer(up, name),
      conv(this, "0", in, out, {3, 3}, {.pad_before = {1}}, false, nn::Init::kaiming(0)),
      norm(this, "1", out) {
  norm.set_source(&conv);
}

UpBlock::UpBlock(nn::Module* up, std::string_view name, std::int64_t in, std::int64_t skip, std::int64_t out)
    : Module(up, name), conv1(this, "conv1", in + skip, out), conv2(this, "conv2", out, out) {}

Tensor UpBlock::operator()(const Tensor& x, const std::vector<Tensor>& skips) {
  std::vector<Tensor> parts{resize(x, 2 * x.size(1), 2 * x.size(2), ResizeMode::nearest)};
  parts.insert(parts.end(), skips.begin(), skips.end());
  return conv2(conv1(parts.size() > 1 ? concat(parts, -1) : parts[0]));
}

PyramidDecoder::PyramidDecoder(nn::Module* up, std::string_view name, std::vector<std::int64_t> channels,
                               const std::vector<int>& widths, bool plusplus)
    : Module(up, name), plusplus_(plusplus), maps_(static_cast<int>(channels.size())), blocks_(this, "blocks") {
  CAPO_CHECK(maps_ >= 2 && widths.size() == channels.size(),
             "unet: a decoder needs two maps or more and a width for each, got ", maps_, " and ", widths.size());
  std::reverse(channels.begin(), channels.end());
  const auto map = [&](int l) { return channels[static_cast<std::size_t>(l)]; };
  const auto width = [&](int l) { return static_cast<std::int64_t>(widths[static_cast<std::size_t>(l)]); };
  const auto below = [&](int l) { return l == 0 ? map(0) : width(l - 1); };
  const int last = maps_ - 1;
  if (!plusplus) {
    for (int l = 0; l <= last; ++l)
      row_.push_back(&add(below(l), l < last ? map(l + 1) : 0, width(l), std::to_string(l)));
    return;
  }
  dense_.resize(static_cast<std::size_t>(last));
  for (int l = 0; l < last; ++l)
    for (int d = 0; d <= l; ++d) {
      const std::int64_t skip = map(l + 1) * (l + 1 - d);
      dense_[static_cast<std::size_t>(d)].push_back(d == 0 ? &add(below(l), skip, width(l), cat("x_0_", l))
                                                           : &add(map(l), skip, map(l + 1), cat("x_", d, "_", l)));
    }
  dense_[0].push_back(&add(width(last - 1), 0, width(last), cat("x_0_", last)));
}

UpBlock& PyramidDecoder::add(std::int64_t in, std::int64_t skip, std::int64_t out, const std::string& name) {
  owned_.push_back(std::make_unique<UpBlock>(&blocks_, name, in, skip, out));
  return *owned_.back();
}

Tensor PyramidDecoder::operator()(const std::vector<Tensor>& maps) {
  CAPO_CHECK(static_cast<int>(maps.size()) == maps_, "unet: the decoder reads ", maps_, " maps, got ", maps.size());
  for (std::size_t i = 1; i < maps.size(); ++i)
    CAPO_CHECK(maps[i - 1].size(1) == 2 * maps[i].size(1) && maps[i - 1].size(2) == 2 * maps[i].size(2),
               "unet: each map must be half as large as the one before, got ", maps[i - 1].shape(), " and ",
               maps[i].shape());
  const std::vector<Tensor> from_coarse(maps.rbegin(), maps.rend());
  return plusplus_ ? plusplus(from_coarse) : unet(from_coarse);
}

Tensor PyramidDecoder::unet(const std::vector<Tensor>& map) {
  Tensor x = map[0];
  for (std::size_t l = 0; l < row_.size(); ++l)
    x = (*row_[l])(x, l + 1 < map.size() ? std::vector<Tensor>{map[l + 1]} : std::vector<Tensor>{});
  return x;
}

Tensor PyramidDecoder::plusplus(const std::vector<Tensor>& map) {
  // column[d] is x_d_l; those of column l are made from d = l down to 0, each from the one left of it, x_d_(l-1).
  const int last = maps_ - 1;
  std::vector<Tensor> left(static_cast<std::size_t>(last)), column(static_cast<std::size_t>(last));
  for (int l = 0; l < last; ++l) {
    for (int d = l; d >= 0; --d) {
      std::vector<Tensor> skips(column.begin() + d + 1, column.begin() + l + 1);
      skips.push_back(map[static_cast<std::size_t>(l) + 1]);
      const std::size_t at = static_cast<std::size_t>(d);
      column[at] = dense(d, l)(d == l ? map[at] : left[at], skips);
    }
    left = column;
  }
  return dense(0, last)(left[0], {});
}

}  // namespace capo::unet
