// The pictures of examples/dependencies.cpp: who is made of whom, and what that costs.
#pragma once

#include <capo/datasets/canvas.h>
#include <capo/models/dependencies/covlasso.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

namespace capo::examples {

// Categories on a circle; from each target a line to the `strongest` categories that it is made of, blue for positive,
// red for negative coefficients, wider and darker the larger |theta|.
inline Image dependency_graph(const std::vector<dependencies::Dependency>& found, const std::vector<std::string>& names,
                              int strongest = 3) {
  constexpr int kSide = 1400;
  constexpr float kMiddle = kSide / 2.0f, kRadius = 510;
  Canvas canvas(kSide, kSide);
  const auto place = [&](int i, float radius) {
    const float angle = 2 * std::numbers::pi_v<float> * static_cast<float>(i) / static_cast<float>(names.size());
    return std::pair{kMiddle - radius * std::cos(angle), kMiddle + radius * std::sin(angle)};
  };
  const auto n = static_cast<int>(names.size());
  for (const auto& d : found) {
    std::vector<std::size_t> order(d.support.size());
    for (std::size_t k = 0; k < order.size(); ++k) order[k] = k;
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return std::abs(d.theta[a]) > std::abs(d.theta[b]); });
    for (std::size_t k = 0; k < order.size() && k < static_cast<std::size_t>(strongest); ++k) {
      const float theta = static_cast<float>(d.theta[order[k]]), size = std::min(1.0f, std::abs(theta));
      const auto [y0, x0] = place(d.target % n, kRadius);
      const auto [y1, x1] = place(d.support[order[k]] % n, kRadius);
      canvas.line(y0, x0, y1, x1, 0.5f + 2.5f * size, theta > 0 ? Color{30, 90, 200} : Color{200, 50, 40},
                  0.15f + 0.6f * size);
    }
  }
  for (int i = 0; i < n; ++i) {
    const auto [y, x] = place(i, kRadius);
    canvas.disc(y, x, 4, {40, 40, 40});
    const auto [ty, tx] = place(i, kRadius + 14);
    const std::string& name = names[static_cast<std::size_t>(i)];
    const float width = Canvas::text_width(name, 10);
    canvas.text(ty - 5, tx < kMiddle ? tx - width : tx, name, 10, {60, 60, 60});
  }
  return canvas.image();
}

}  // namespace capo::examples
