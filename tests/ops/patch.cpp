// References: coordinates moved one by one.
#include <capo/tests/op_test.h>

#include <capo/ops/patch.h>

namespace capo::test {
namespace {

// y[c] = x[from(c)] with both as row-major coordinates.
template <class F>
Tensor moved(const Tensor& x, const Shape& shape, F from) {
  const auto v = to_vector<double>(x);
  std::vector<double> out;
  const std::int64_t n = numel(shape);
  for (std::int64_t k = 0; k < n; ++k) {
    Dims c = Dims::filled(shape.size(), 0);
    std::int64_t rest = k;
    for (int i = shape.size() - 1; i >= 0; --i) {
      c[i] = rest % shape[i];
      rest /= shape[i];
    }
    const Dims at = from(c);
    std::int64_t f = 0;
    for (int i = 0; i < x.rank(); ++i) f = f * x.shape()[i] + at[i];
    out.push_back(v[static_cast<std::size_t>(f)]);
  }
  return values(out, shape);
}

template <class Run, class Reference>
Sample sample(const std::string& label, const Tensor& x, Run run, Reference reference) {
  Sample s{label,
           {x},
           [=](const Tensors& t) { return Tensors{run(t[0])}; },
           [=](const Tensors& t) { return Tensors{reference(t[0])}; }};
  s.second_order = true;
  s.tol = 0;
  s.tol_f32 = 1e-7;
  return s;
}

Tensor patchify_reference(const Tensor& x, std::int64_t ph, std::int64_t pw) {
  const std::int64_t columns = x.size(2) / pw, c = x.size(3);
  return moved(x, {x.size(0), x.size(1) / ph * columns, ph * pw * c}, [=](const Dims& t) {
    return Dims{t[0], t[1] / columns * ph + t[2] / c / pw, t[1] % columns * pw + t[2] / c % pw, t[2] % c};
  });
}

OpCase patchify_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t ph, std::int64_t pw) {
    return sample(
        label, x, [=](const Tensor& t) { return patchify(t, ph, pw); },
        [=](const Tensor& t) { return patchify_reference(t, ph, pw); });
  };
  OpCase c{"patchify", {}, {}};
  c.samples = {one("uneven patches", normal({2, 6, 8, 3}, "a"), 3, 2),
               one("one patch", normal({1, 4, 4, 1}, "a"), 4, 4), one("pixels", normal({2, 3, 5, 2}, "a"), 1, 1),
               one("empty", normal({0, 4, 4, 3}, "a"), 2, 2)};
  c.errors = {{"divide",
               [] {
                 patchify(normal({1, 5, 4, 3}, "a"), 2, 2);
               },
               "divide"},
              {"rank",
               [] {
                 patchify(normal({5, 4, 3}, "a"), 1, 1);
               },
               "[B, H, W, C]"},
              {"zero",
               [] {
                 patchify(normal({1, 4, 4, 3}, "a"), 0, 2);
               },
               "divide"}};
  return c;
}

OpCase unpatchify_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t h, std::int64_t w, std::int64_t c,
                      std::int64_t ph, std::int64_t pw) {
    return sample(
        label, x, [=](const Tensor& t) { return unpatchify(t, h, w, c, ph, pw); },
        [=](const Tensor& t) {
          return moved(t, {t.size(0), h, w, c}, [=](const Dims& p) {
            return Dims{p[0], p[1] / ph * (w / pw) + p[2] / pw, (p[1] % ph * pw + p[2] % pw) * c + p[3]};
          });
        });
  };
  OpCase c{"unpatchify", {}, {}};
  c.samples = {one("uneven patches", normal({2, 8, 18}, "a"), 6, 8, 3, 3, 2),
               one("one patch", normal({1, 1, 16}, "a"), 4, 4, 1, 4, 4),
               one("empty", normal({0, 4, 12}, "a"), 4, 4, 3, 2, 2)};
  c.errors = {{"tokens",
               [] {
                 unpatchify(normal({1, 4, 11}, "a"), 4, 4, 3, 2, 2);
               },
               "[B, 4, 12]"},
              {"divide",
               [] {
                 unpatchify(normal({1, 4, 12}, "a"), 5, 4, 3, 2, 2);
               },
               "divide"}};
  return c;
}

OpCase patchify3d_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t pd, std::int64_t ph, std::int64_t pw) {
    return sample(
        label, x, [=](const Tensor& t) { return patchify3d(t, pd, ph, pw); },
        [=](const Tensor& t) {
          const std::int64_t rows = t.size(2) / ph, columns = t.size(3) / pw, ch = t.size(4);
          return moved(t, {t.size(0), t.size(1) / pd * rows * columns, pd * ph * pw * ch}, [=](const Dims& k) {
            const std::int64_t inside = k[2] / ch;
            return Dims{k[0], k[1] / columns / rows * pd + inside / pw / ph,
                        k[1] / columns % rows * ph + inside / pw % ph, k[1] % columns * pw + inside % pw, k[2] % ch};
          });
        });
  };
  OpCase c{"patchify3d", {}, {}};
  c.samples = {one("uneven patches", normal({2, 2, 6, 4, 3}, "a"), 1, 3, 2),
               one("two deep", normal({1, 4, 2, 2, 1}, "a"), 2, 2, 1),
               one("empty", normal({1, 0, 2, 2, 1}, "a"), 2, 2, 1)};
  c.errors = {{"divide",
               [] {
                 patchify3d(normal({1, 3, 4, 4, 3}, "a"), 2, 2, 2);
               },
               "divide"},
              {"rank",
               [] {
                 patchify3d(normal({5, 4, 3, 1}, "a"), 1, 1, 1);
               },
               "[B, D, H, W, C]"}};
  return c;
}

OpCase pixel_shuffle_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t r) {
    return sample(
        label, x, [=](const Tensor& t) { return pixel_shuffle(t, r); },
        [=](const Tensor& t) {
          return moved(t, {t.size(0), t.size(1) * r, t.size(2) * r, t.size(3) / (r * r)}, [=](const Dims& p) {
            return Dims{p[0], p[1] / r, p[2] / r, p[3] * r * r + p[1] % r * r + p[2] % r};
          });
        });
  };
  OpCase c{"pixel_shuffle", {}, {}};
  c.samples = {one("by 2", normal({2, 3, 2, 12}, "a"), 2), one("by 3", normal({1, 2, 1, 9}, "a"), 3),
               one("by 1", normal({2, 3, 2, 5}, "a"), 1), one("empty", normal({2, 0, 3, 4}, "a"), 2)};
  c.errors = {{"channels",
               [] {
                 pixel_shuffle(normal({1, 2, 2, 6}, "a"), 2);
               },
               "divide"},
              {"a factor whose square overflows",
               [] {
                 pixel_shuffle(normal({1, 2, 2, 12}, "a"), std::int64_t{1} << 32);
               },
               "divide"},
              {"rank",
               [] {
                 pixel_shuffle(normal({2, 2, 4}, "a"), 2);
               },
               "[B, H, W, C r r]"}};
  return c;
}

OpCase pixel_unshuffle_case() {
  const auto one = [](const std::string& label, const Tensor& x, std::int64_t r) {
    return sample(
        label, x, [=](const Tensor& t) { return pixel_unshuffle(t, r); },
        [=](const Tensor& t) {
          return moved(t, {t.size(0), t.size(1) / r, t.size(2) / r, t.size(3) * r * r}, [=](const Dims& p) {
            return Dims{p[0], p[1] * r + p[3] / r % r, p[2] * r + p[3] % r, p[3] / (r * r)};
          });
        });
  };
  OpCase c{"pixel_unshuffle", {}, {}};
  c.samples = {one("by 2", normal({2, 6, 4, 3}, "a"), 2), one("by 3", normal({1, 3, 6, 1}, "a"), 3),
               one("by 1", normal({2, 3, 2, 5}, "a"), 1), one("empty", normal({2, 4, 2, 0}, "a"), 2)};
  c.errors = {{"size",
               [] {
                 pixel_unshuffle(normal({1, 3, 2, 6}, "a"), 2);
               },
               "divide"},
              {"rank",
               [] {
                 pixel_unshuffle(normal({2, 2, 4}, "a"), 2);
               },
               "[B, H, W, C]"}};
  return c;
}

}  // namespace

std::vector<OpCase> op_cases() {
  return {patchify_case(), unpatchify_case(), patchify3d_case(), pixel_shuffle_case(), pixel_unshuffle_case()};
}

}  // namespace capo::test
