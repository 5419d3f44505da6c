// Several neighbours in registers as compute values, by accesses of up to 16 bytes.
#pragma once

#include <capo/cuda/element.cuh>

namespace capo::gpu {

// out[j] = p[j]. p must be aligned to what one access moves: 16 bytes, or all of N where that is less.
template <int N, class T>
__device__ inline void load_many(const T* p, Compute<T>* out) {
  constexpr int kEach = N < kPack<T> ? N : kPack<T>;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    const auto pack = *reinterpret_cast<const Pack<T, kEach>*>(p + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) out[i + j] = load(pack.v[j]);
  }
}

template <int N, class T>
__device__ inline void store_many(T* p, const Compute<T>* in) {
  constexpr int kEach = N < kPack<T> ? N : kPack<T>;
#pragma unroll
  for (int i = 0; i < N; i += kEach) {
    Pack<T, kEach> pack;
#pragma unroll
    for (int j = 0; j < kEach; ++j) pack.v[j] = Store<T>::from(in[i + j]);
    *reinterpret_cast<Pack<T, kEach>*>(p + i) = pack;
  }
}

// Whether all pointers (null ones too) and rows of `columns` elements allow packs of `count`.
template <class... P>
bool packs(std::int64_t columns, int count, const P*... pointers) {
  return columns % count == 0 && (aligned(pointers) && ...);
}

}  // namespace capo::gpu
