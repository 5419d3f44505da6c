// dropout and drop_path: the mask is made from Philox words, never stored.
#include <capo/cuda/pack.cuh>
#include <capo/cuda/philox.cuh>
#include <capo/ops/dropout.h>

namespace {

using capo::DropoutArgs;
namespace gpu = capo::gpu;

constexpr int kThreads = 256;

// One thread, one Philox block: four elements.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads) each_element(DropoutArgs a, float scale) {
  const std::int64_t blocks = (a.elements + 3) / 4, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t b = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < blocks; b += step) {
    std::uint32_t words[4];
    gpu::philox_block(a.range, static_cast<std::uint64_t>(b), words);
    const T* x = static_cast<const T*>(a.x) + 4 * b;
    T* y = static_cast<T*>(a.y) + 4 * b;
    if (kPacked && 4 * b + 4 <= a.elements) {
      float v[4];
      gpu::load_many<4>(x, v);
      for (int j = 0; j < 4; ++j) v[j] = words[j] < a.threshold ? 0.0f : v[j] * scale;
      gpu::store_many<4>(y, v);
    } else {
      for (int j = 0; j < 4 && 4 * b + j < a.elements; ++j)
        y[j] = gpu::Store<T>::from(words[j] < a.threshold ? 0.0f : gpu::load(x[j]) * scale);
    }
  }
}

// One draw for each run of neighbours. A block takes kTile elements of one run.
constexpr int kTile = 8 * kThreads;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) each_run(DropoutArgs a, float scale, std::int64_t tiles) {
  const std::int64_t run = blockIdx.x / tiles, begin = (blockIdx.x - run * tiles) * kTile;
  const std::int64_t end = begin + kTile < a.run ? begin + kTile : a.run;
  std::uint32_t words[4];
  gpu::philox_block(a.range, static_cast<std::uint64_t>(run / 4), words);
  const int which = static_cast<int>(run % 4);
  const std::uint32_t word = which == 0 ? words[0] : which == 1 ? words[1] : which == 2 ? words[2] : words[3];
  const bool drop = word < a.threshold;
  const T* x = static_cast<const T*>(a.x) + run * a.run;
  T* y = static_cast<T*>(a.y) + run * a.run;
  for (std::int64_t i = begin + N * static_cast<std::int64_t>(threadIdx.x); i < end; i += N * kThreads) {
    float v[N] = {};
    if (!drop) gpu::load_many<N>(x + i, v);
    for (int j = 0; j < N; ++j) v[j] *= scale;
    gpu::store_many<N>(y + i, v);
  }
}

template <class T>
void run(const DropoutArgs& a, std::int64_t items, void* stream) {
  const float scale = static_cast<float>(a.scale);
  if (a.run == 1) {
    const bool packed = gpu::packs(0, 1, a.x, a.y);
    gpu::launch("dropout", packed ? each_element<T, true> : each_element<T, false>, gpu::blocks_for(items, kThreads),
                kThreads, 0, stream, a, scale);
    return;
  }
  const std::int64_t tiles = (a.run + kTile - 1) / kTile, blocks = a.elements / a.run * tiles;
  const bool packed = gpu::packs(a.run, gpu::kPack<T>, a.x, a.y);
  gpu::launch("drop_path", packed ? each_run<T, gpu::kPack<T>> : each_run<T, 1>, blocks, kThreads, 0, stream, a, scale,
              tiles);
}

}  // namespace

namespace capo::kernels {

void dropout_cuda(const DropoutArgs& a, std::int64_t items, void* stream) {
  gpu::for_floating("dropout", a.dtype, [&](auto t) { run<decltype(t)>(a, items, stream); });
}

}  // namespace capo::kernels
