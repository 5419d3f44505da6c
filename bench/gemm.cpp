// Rates of matrix products, linear layers and attention in f32, beside the processor's multiply-add peak measured in
// the same run. Repeats are interleaved: every round runs every case once, so that a busy moment hits all of them. One
// thread is timed by its own processor time, several by the wall clock.
//   bench_gemm [repeats=15] [part of a name]
#include <capo/autograd/autograd.h>
#include <capo/bench/peak.h>
#include <capo/engine/cpu.h>
#include <capo/engine/threads.h>
#include <capo/ops/attention.h>
#include <capo/ops/copy.h>
#include <capo/ops/matmul.h>
#include <capo/ops/view.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

using namespace capo;

namespace {

double seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
double now() { return seconds(num_threads() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC); }

// FLOP/s of one core.
double peak() {
  const double start = now(), flops = bench::multiply_adds();
  return std::max(flops, 1.0) / (now() - start);  // where it is not written, shares mean nothing
}

struct Case {
  std::string name;
  double flops;
  std::function<void()> run;
  std::vector<double> seconds = {};
};

Generator rng(1);
Tensor random(const Shape& shape) { return rand_normal(shape, rng); }
Tensor leaf(const Shape& shape) {
  const Tensor t = random(shape);
  set_requires_grad(t, true);
  return t;
}

Case product(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t batch = 1, bool ta = false, bool tb = false) {
  Tensor a = ta ? transpose(random({batch, k, m}), 1, 2) : random({batch, m, k});
  Tensor b = tb ? transpose(random({batch, n, k}), 1, 2) : random({batch, k, n});
  return {cat("matmul ", batch > 1 ? cat(batch, " x ") : "", m, ",", n, ",", k, ta ? " A^T" : "", tb ? " B^T" : ""),
          2.0 * static_cast<double>(batch * m * n * k), [=] { matmul(a, b); }};
}

void layer(std::vector<Case>& cases, std::int64_t rows, std::int64_t in, std::int64_t out, Activation activation) {
  const Tensor x = leaf({rows, in}), w = leaf({out, in}), b = leaf({out}), dy = random({rows, out});
  const std::string name =
      cat("linear ", rows, ": ", in, " -> ", out, activation == Activation::none ? "" : cat(" ", name_of(activation)));
  const double flops = 2.0 * static_cast<double>(rows * in * out);
  cases.push_back({name, flops, [=] { linear(x, w, b, activation); }});
  const Tensor y = linear(x, w, b, activation);
  cases.push_back({name + ", backward", 2 * flops, [=] { grad({y}, {x, w, b}, {dy}, {.keep_graph = true}); }});
}

void attend(std::vector<Case>& cases, std::int64_t B, std::int64_t N, std::int64_t H, std::int64_t D) {
  const Tensor qkv = random({B, N, 3, H, D}), dy = random({B, N, H, D});
  Tensor part[3];
  for (int i = 0; i < 3; ++i) {
    part[i] = select(qkv, 2, i);
    set_requires_grad(part[i], true);
  }
  const std::string name = cat("attention ", B, " x ", N, " x ", H, " x ", D);
  const double flops = 4.0 * static_cast<double>(B * H * N * N * D);
  cases.push_back({name, flops, [=] { attention(part[0], part[1], part[2]); }});
  const Tensor o = attention(part[0], part[1], part[2]).o;
  const Tensor q = part[0], k = part[1], v = part[2];
  cases.push_back({name + ", backward", 2.5 * flops, [=] { grad({o}, {q, k, v}, {dy}, {.keep_graph = true}); }});
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  std::vector<Case> cases;
  cases.push_back(product(1024, 1024, 1024));
  cases.push_back(product(6304, 192, 192));
  cases.push_back(product(6304, 768, 192));
  cases.push_back(product(6304, 192, 768));
  cases.push_back(product(1576, 2304, 768));
  cases.push_back(product(1576, 3072, 768));
  cases.push_back(product(1576, 768, 3072));
  cases.push_back(product(768, 3072, 1576, 1, true));
  cases.push_back(product(128, 128, 128));
  cases.push_back(product(65, 65, 64, 96, false, true));
  cases.push_back(product(65, 64, 65, 96));
  cases.push_back(product(197, 197, 64, 24, false, true));
  cases.push_back(product(197, 64, 197, 24));
  cases.push_back(product(6304, 8, 768, 1, false, true));
  cases.push_back(product(6304, 768, 8, 1, false, true));
  cases.push_back(product(8, 768, 6304, 1, true));
  cases.push_back(product(1, 3072, 768, 1, false, true));
  cases.push_back(product(16, 3072, 768, 1, false, true));
  layer(cases, 2176, 192, 576, Activation::none);
  layer(cases, 2176, 192, 192, Activation::none);
  layer(cases, 2176, 192, 768, Activation::gelu);
  layer(cases, 2176, 768, 192, Activation::none);
  attend(cases, 128, 17, 3, 64);
  attend(cases, 128, 65, 3, 64);
  attend(cases, 8, 197, 12, 64);

  if (argc > 2)
    std::erase_if(cases, [&](const Case& c) { return c.name.find(argv[2]) == std::string::npos; });
  std::vector<int> counts = {1};
  if (num_threads() > 1) counts.push_back(num_threads());
  std::string json;
  for (int threads : counts) {
    set_num_threads(threads);
    double top = 0;
    for (auto& c : cases) c.seconds.clear(), c.run();
    for (int r = 0; r < repeats; ++r) {
      top = std::max(top, peak());
      for (auto& c : cases) {
        const double start = now();
        c.run();
        c.seconds.push_back(now() - start);
      }
    }
    std::printf("%s, %d thread%s, peak %.0f GFLOP/s per core\n%-48s %9s %9s %8s %8s %6s\n", to_string(isa()).c_str(),
                threads, threads > 1 ? "s" : "", top * 1e-9, "f32", "min us", "median", "GFLOP/s", "(median)", "peak");
    for (auto& c : cases) {
      std::sort(c.seconds.begin(), c.seconds.end());
      const double least = c.seconds[0], middle = c.seconds[c.seconds.size() / 2];
      std::printf("%-48s %9.1f %9.1f %8.1f %8.1f %5.0f%%\n", c.name.c_str(), least * 1e6, middle * 1e6,
                  c.flops / least * 1e-9, c.flops / middle * 1e-9, 100 * c.flops / least / (top * threads));
      json += cat(json.empty() ? "" : ", ", "{\"case\": \"", c.name, "\", \"threads\": ", threads,
                  ", \"min_us\": ", least * 1e6, ", \"median_us\": ", middle * 1e6,
                  ", \"gflops\": ", c.flops / least * 1e-9, ", \"peak_gflops\": ", top * threads * 1e-9, "}");
    }
  }
  std::printf("RESULT {\"bench\": \"gemm\", \"isa\": \"%s\", \"cases\": [%s]}\n", to_string(isa()).c_str(),
              json.c_str());
}
