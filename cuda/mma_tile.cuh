// Blocks of products on tensor cores: two 16-bit operands pass through shared memory in stages of k, and each warp
// keeps its sums in fragments. Matrix products and convolutions differ only in how they fill a stage and where sums go.
#pragma once

#include <capo/cuda/mma.cuh>

namespace capo::gpu {

inline constexpr int kMmaK = 32, kMmaStages = 3;  // k of a stage; stages in flight

__device__ inline std::uint16_t half_bits(BFloat16 v) { return v.bits; }
__device__ inline std::uint16_t half_bits(Half v) { return v.bits; }
__device__ inline std::uint16_t half_bits(float v) { return Store<BFloat16>::from(v).bits; }

// One operand of a stage: kOuter rows of A, or columns of B. It lies [outer][k] when its neighbours in memory are
// neighbours along k, else [k][outer]. Rows are 16 bytes longer than their content, which puts the eight rows of an
// ldmatrix in distinct banks.
template <int kOuter>
struct MmaOperand {
  static constexpr int kAlongK = kMmaK + 8, kAlongOuter = kOuter + 8;
  static constexpr int kSize = kOuter * kAlongK > kMmaK * kAlongOuter ? kOuter * kAlongK : kMmaK * kAlongOuter;

  __device__ static int at(bool along_k, int outer, int k) {
    return along_k ? outer * kAlongK + k : k * kAlongOuter + outer;
  }
  // The A fragment of rows outer .. +16, k .. +16.
  __device__ static void fragment_a(std::uint32_t (&r)[4], const std::uint16_t* stage, bool along_k, int outer, int k) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (along_k)
      ldmatrix(r, stage + at(true, outer + lane % 16, k + lane / 16 * 8));
    else
      ldmatrix_transposed(r, stage + at(false, outer + lane / 8 % 2 * 8, k + lane / 16 * 8 + lane % 8));
  }
  // The B fragments of columns outer .. +8 (r[0], r[1]) and outer + 8 .. +16 (r[2], r[3]).
  __device__ static void fragment_b(std::uint32_t (&r)[4], const std::uint16_t* stage, bool along_k, int outer, int k) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (along_k)
      ldmatrix(r, stage + at(true, outer + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
    else
      ldmatrix_transposed(r, stage + at(false, outer + lane / 16 * 8, k + lane % 16));
  }
};

// kM x kN sums by kWarpsM x kWarpsN warps.
template <int kM, int kN, int kWarpsM, int kWarpsN>
struct MmaBlock {
  using A = MmaOperand<kM>;
  using B = MmaOperand<kN>;
  static constexpr int kRows = kM, kColumns = kN, kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kBlocks = 512 / kThreads;  // that an SM's registers must hold at once: 128 a thread
  static constexpr int kPitch = kWarpN + 4;  // of a warp's 16 staged rows of sums

  // The launch's dynamic shared memory.
  static constexpr std::size_t shared() {
    return shared_bytes<std::uint16_t>(kMmaStages * A::kSize) + shared_bytes<std::uint16_t>(kMmaStages * B::kSize) +
           shared_bytes<float>(kWarpsM * kWarpsN * 16 * kPitch);
  }

  std::uint16_t *a, *b;
  float* staging;
  int row, column;  // of this warp in the block
  float sum[kWarpM / 16][kWarpN / 8][4];

  template <class Carve>
  __device__ explicit MmaBlock(Carve& carve) : sum() {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    a = carve.template take<std::uint16_t>(kMmaStages * A::kSize);
    b = carve.template take<std::uint16_t>(kMmaStages * B::kSize);
    staging = carve.template take<float>(kWarpsM * kWarpsN * 16 * kPitch) + warp * 16 * kPitch;
    row = warp / kWarpsN * kWarpM;
    column = warp % kWarpsN * kWarpN;
  }

  // sum += the product over `steps` stages: load(step, a, b) fills one, by cp.async or plain stores, all threads.
  template <class T, class Load>
  __device__ void run(std::int64_t steps, bool a_along_k, bool b_along_k, const Load& load) {
#pragma unroll
    for (int s = 0; s < kMmaStages - 1; ++s) {
      if (s < steps) load(static_cast<std::int64_t>(s), a + s * A::kSize, b + s * B::kSize);
      cp_async_commit();
    }
    int now = 0, next = kMmaStages - 1;
    for (std::int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kMmaStages - 2>();
      __syncthreads();  // this stage is there for all, and nobody reads the one that is filled next
      if (step + kMmaStages - 1 < steps) load(step + kMmaStages - 1, a + next * A::kSize, b + next * B::kSize);
      cp_async_commit();
      multiply<T>(a + now * A::kSize, b + now * B::kSize, a_along_k, b_along_k);
      now = now + 1 == kMmaStages ? 0 : now + 1;
      next = next + 1 == kMmaStages ? 0 : next + 1;
    }
    cp_async_wait<0>();
  }

  // f(row, column, x): the eight sums from (row, column) of the block on, each sum once. Neighbouring lanes get
  // neighbouring eights of a row.
  template <class F>
  __device__ void each_eight(const F& f) {
    constexpr int kLanes = kWarpN / 8;  // to a row
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          staging[(lane / 4 + e / 2 * 8) * kPitch + j * 8 + lane % 4 * 2 + e % 2] = sum[i][j][e];
      __syncwarp();
#pragma unroll 1
      for (int r = lane / kLanes; r < 16; r += kWarp / kLanes) {
        float x[8];
        for (int e = 0; e < 8; ++e) x[e] = staging[r * kPitch + lane % kLanes * 8 + e];
        f(row + i * 16 + r, column + lane % kLanes * 8, x);
      }
    }
  }

 private:
  template <class T>
  __device__ void multiply(const std::uint16_t* a_stage, const std::uint16_t* b_stage, bool a_along_k, bool b_along_k) {
#pragma unroll
    for (int k = 0; k < kMmaK; k += 16) {
      std::uint32_t u[kWarpM / 16][4], v[kWarpN / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) A::fragment_a(u[i], a_stage, a_along_k, row + i * 16, k);
#pragma unroll
      for (int j = 0; j < kWarpN / 16; ++j) B::fragment_b(v[j], b_stage, b_along_k, column + j * 16, k);
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kWarpN / 16; ++j) mma<T>(sum[i][2 * j], sum[i][2 * j + 1], u[i], v[j]);
    }
  }
};

}  // namespace capo::gpu
