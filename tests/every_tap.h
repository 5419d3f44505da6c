// A model's taps: every module that runs them must, and a tap that gives back what it was given must change nothing.
#pragma once

#include <doctest/doctest.h>

#include <capo/autograd/autograd.h>
#include <capo/models/nn/module.h>
#include <capo/tests/op_test.h>

#include <vector>

namespace capo::testing {

struct CountingTap : nn::Tap {
  Tensor apply(const nn::Site& s) override { return ++calls, s.y; }
  AttentionOut apply(const nn::CoreSite& s) override { return ++calls, s.out; }
  int calls = 0;
};

// model(x) with a tap at each of them, which is called at most `most` times (a dropout may serve two layers). No tuner
// or observer may be attached before.
template <class M>
void check_every_tap(M& model, const Tensor& x, double tolerance, int most = 1) {
  const NoGrad off;
  const Tensor bare = model(x);
  std::vector<nn::Module*> modules;
  for (nn::Module* m : model.modules())
    if (m->runs_taps()) modules.push_back(m);
  std::vector<CountingTap> taps(modules.size());
  for (std::size_t i = 0; i < modules.size(); ++i) modules[i]->attach_observer(&taps[i]);
  CHECK(!modules.empty());
  CHECK(test::close(model(x), bare, tolerance));
  for (std::size_t i = 0; i < modules.size(); ++i) {
    CHECK_MESSAGE((taps[i].calls >= 1 && taps[i].calls <= most), modules[i]->path());
    modules[i]->detach_observers();
  }
}

}  // namespace capo::testing
