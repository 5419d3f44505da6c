// The memory plan against the same step measured: ViT-B/16 at 224 px under several tuners.
//   bench_memory [size=vit_b] [image=224] [patch=16] [batch=8]
#include <capo/models/train/memory_plan.h>
#include <capo/models/vit/vit.h>
#include <capo/tuners/spec.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

using namespace capo;

int main(int argc, char** argv) {
  const std::string size = argc > 1 ? argv[1] : "vit_b";
  const int image = argc > 2 ? std::atoi(argv[2]) : 224, patch = argc > 3 ? std::atoi(argv[3]) : 16,
            batch = argc > 4 ? std::atoi(argv[4]) : 8;
  struct Row {
    const char *name, *spec;
  };
  constexpr Row rows[] = {{"linear", "linear"},
                          {"lora", "blocks.*.attn: lora(rank=8, slices=qv); head: train"},
                          {"u-adapter", "blocks.*.mlp: u_adapter(dim=64); head: train"},
                          {"u-prefix", "blocks.*.attn: u_prefix(length=10); head: train"},
                          {"full", "full"}};
  std::printf("%s/%d at %d px, batch %d, AdamW, f32; MiB\n", size.c_str(), patch, image, batch);
  std::printf("%-10s %9s %9s %9s %11s %9s %9s %7s\n", "method", "weights", "gradients", "optimizer", "activations",
              "planned", "measured", "ratio");
  double worst = 0;
  for (const Row& row : rows) {
    const auto make = [&](const nn::Build& build) {
      auto model = std::make_unique<vit::Vit>(vit::config(size, image, patch, 100), build);
      tuners::apply_spec(*model, row.spec);
      return model;
    };
    const Shape x{batch, image, image, 3};
    const train::MemoryPlan plan = train::plan_memory(make, x), seen = train::plan_memory(make, x, {.device = kCpu});
    const auto mib = [](std::int64_t bytes) { return static_cast<double>(bytes) / 1048576.0; };
    const double ratio = static_cast<double>(plan.peak) / static_cast<double>(seen.peak);
    worst = std::max(worst, std::fabs(ratio - 1));
    std::printf("%-10s %9.1f %9.1f %9.1f %11.1f %9.1f %9.1f %7.3f\n", row.name, mib(plan.weights), mib(plan.gradients),
                mib(plan.optimizer), mib(plan.activations), mib(plan.peak), mib(seen.peak), ratio);
    std::fflush(stdout);
  }
  std::printf("RESULT {\"bench\":\"memory\",\"model\":\"%s/%d\",\"batch\":%d,\"worst_error\":%.4f}\n", size.c_str(),
              patch, batch, worst);
}
