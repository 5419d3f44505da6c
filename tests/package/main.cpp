// What a user of the installed library writes first: a tensor, an op, a gradient, an error that is caught.
#include <capo/capo.h>

#include <cstdio>

int main() {
  const capo::Tensor x = capo::from_vector<float>({1, 2, 3, 4}, {2, 2});
  capo::set_requires_grad(x, true);
  const capo::Tensor y = capo::sum(capo::square(x));
  capo::backward(y);
  const auto dx = capo::to_vector<float>(capo::grad_of(x));
  try {
    capo::add(x, capo::from_vector<float>({1, 2, 3}, {3}));
    return 1;
  } catch (const capo::Error& e) {
    std::printf("%s\n", e.what());
  }
  std::printf("sum of squares %g, gradient %g %g %g %g\n", y.item(), dx[0], dx[1], dx[2], dx[3]);
  return y.item() == 30 && dx[3] == 8 ? 0 : 1;
}
