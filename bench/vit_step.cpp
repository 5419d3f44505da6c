// One training step of a ViT at 32 x 32, piece by piece: images per second and where the time goes.
//   bench_vit_step [size=vit_ti] [patch=8] [batch=128] [repeats=10] [precision of products: f32 or bf16]
#include <capo/engine/threads.h>
#include <capo/models/train/optim.h>
#include <capo/models/vit/vit.h>
#include <capo/ops/copy.h>
#include <capo/ops/cross_entropy.h>
#include <capo/ops/matmul.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

using namespace capo;

namespace {
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}
}  // namespace

int main(int argc, char** argv) {
  const char* size = argc > 1 ? argv[1] : "vit_ti";
  const int patch = argc > 2 ? std::atoi(argv[2]) : 8, batch = argc > 3 ? std::atoi(argv[3]) : 128;
  const int repeats = argc > 4 ? std::atoi(argv[4]) : 10;
  if (argc > 5 && argv[5][0] == 'b') set_matmul_precision(bf16);
  vit::Vit model(vit::config(size, 32, patch, 200));
  model.train();
  train::AdamW optimizer(model);
  Generator rng(1);
  const Tensor x = rand_normal({batch, 32, 32, 3}, rng);
  std::vector<std::int64_t> label(static_cast<std::size_t>(batch));
  for (std::size_t i = 0; i < label.size(); ++i) label[i] = static_cast<std::int64_t>(i) % 200;
  const Tensor labels = from_vector(label, {batch});
  std::vector<double> forward, backward_time, update;
  double loss_value = 0;
  for (int i = 0; i < repeats + 2; ++i) {
    const double t0 = now();
    const Tensor loss = cross_entropy(model(x), labels);
    const double t1 = now();
    backward(loss);
    const double t2 = now();
    optimizer.step(1e-4);
    optimizer.zero_grad();
    const double t3 = now();
    loss_value = loss.item();
    if (i < 2) continue;  // warm-up
    forward.push_back(t1 - t0);
    backward_time.push_back(t2 - t1);
    update.push_back(t3 - t2);
  }
  const double step = median(forward) + median(backward_time) + median(update);
  std::printf(
      "%s/%d, batch %d, %d threads, %s: forward %.1f ms, backward %.1f ms, AdamW %.1f ms, %.0f images/s, loss %.4f\n",
      size, patch, batch, num_threads(), to_string(matmul_precision()).c_str(), 1e3 * median(forward),
      1e3 * median(backward_time), 1e3 * median(update), batch / step, loss_value);
  std::printf(
      "RESULT {\"bench\":\"vit_step\",\"model\":\"%s/%d\",\"batch\":%d,\"threads\":%d,\"precision\":\"%s\","
      "\"images_per_s\":%.1f}\n",
      size, patch, batch, num_threads(), to_string(matmul_precision()).c_str(), batch / step);
}
