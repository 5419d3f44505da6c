// Scaled dot-product attention without a [Nq, Nk] tensor, the exact merge of two attentions, attention maps.
//
// dtypes  q, k, v (o, bias) equal: f32, f64; bf16 and f16 computed in f32 (CUDA: no f64). lse is f64 for f64, else
//         f32. On the CPU 16-bit tensors are widened a block at a time and results rounded once: the bits of the f32 op
//         between two casts. The gradient reads o as it was rounded. attention_map casts whole tensors.
// bits    blocks depend on the shape only: the same for any thread count.
// stack   CPU kernels keep their blocks there: a thread that calls attention() needs 1 MB, 2.5 MB for its gradient.
#pragma once

#include <capo/engine/tensor.h>

namespace capo {

struct AttentionOptions {
  double scale = 0;     // of the scores; 0 means 1 / sqrt(D)
  bool causal = false;  // query i sees keys j <= i + Nk - Nq: the last query is aligned with the last key
  Tensor bias;          // undefined, or broadcastable to [B, H, Nq, Nk]; added after scaling; -inf masks a key
};
struct AttentionOut {
  Tensor o;    // [B, Nq, H, Dv], contiguous
  Tensor lse;  // [B, H, Nq], natural logarithm of the row's sum of exp(score)
};

// q [B, Nq, H, D], k [B, Nk, H, D], v [B, Nk, H, Dv] of any strides (views of one fused qkv are read in place while the
// last axis has stride 1, else copied); D and Dv at most 1024. o = softmax(scale q k^T + bias) v per (b, h). A row that
// sees no key has o = 0, lse = -inf and no gradient.
// grad  of q, k, v and bias, from the cotangents of o and lse (undefined means zero); keeps q, k, v, o, lse and bias
//       and recomputes the probabilities: dS = P (do v^T - rowsum(do o) + dlse). Made of ops in a create_graph pass,
//       where [B, H, Nq, Nk] tensors are held. Source: Dao, FlashAttention-2 (2023); dlse joins because the derivative
//       of lse by S is P.
AttentionOut attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options = {});

// The attention over the union of two disjoint sets of keys, from the results over each: o [B, N, H, D], lse [B, H, N].
// With l = sigmoid(lse2 - lse1) per row and head: o = o1 + l (o2 - o1), lse = log(exp(lse1) + exp(lse2)). Order does
// not matter, three and more merge pairwise. A side with lse = -inf has no weight; both -inf: o = 0, lse = -inf.
// grad  of all four, from the cotangents of o and lse: dlse2 = l (1 - l) <do, o2 - o1> + l g,
//       dlse1 = -l (1 - l) <do, o2 - o1> + (1 - l) g; made of ops in a create_graph pass.
AttentionOut lse_merge(const Tensor& o1, const Tensor& lse1, const Tensor& o2, const Tensor& lse2);

// The probabilities [B, H, Nq, Nk] = exp(scale q k^T + bias - lse) that attention() never forms; for looking at. lse as
// attention() returned it. No gradient. Causal maps: pass the mask as a bias.
Tensor attention_map(const Tensor& q, const Tensor& k, const Tensor& lse, double scale = 0, const Tensor& bias = {});

// Strides count elements; the last axis has stride 1. Work items: forward (b, h, chunk of queries), backward (b, h);
// CUDA: (b, h) in both.
struct AttentionArgs {
  DType dtype;
  const void *q, *k, *v, *bias;  // bias or null
  void *o, *lse;
  std::int64_t heads, nq, nk, d, dv;
  std::int64_t qs[3], ks[3], vs[3];  // batch, token, head
  std::int64_t bs[4];                // batch, head, query, key
  double scale;
  bool causal;
  std::int64_t chunk, chunks;  // queries per item, items per (b, h)
};
inline constexpr std::int64_t kAttentionGradKeys = 256;  // at most, at once, on the CPU; fewer of more channels
struct AttentionGradArgs {
  AttentionArgs forward;      // o and lse are read
  const void *d_o, *dlse;     // contiguous like o and lse; dlse or null
  void* delta;                // [B, H, Nq] scratch: rowsum(do o) - dlse
  void *dq, *dk, *dv, *dbias;  // contiguous, each or null; dbias [B, H, Nq, Nk] like lse, not yet summed
  // CPU: item i is head first + i; dq_sums is null, or f32 [items, Nq, D] for a 16-bit dq of several blocks of keys.
  std::int64_t first;
  void* dq_sums;
};
// An item is one (b, n, h) row.
struct LseMergeArgs {
  DType dtype;
  std::int64_t heads, n, d;
  const void *o1, *lse1, *o2, *lse2;
  void *o, *lse;                     // forward
  const void *d_o, *dlse;            // backward; dlse or null
  void *do1, *dlse1, *do2, *dlse2;   // backward
};

}  // namespace capo
