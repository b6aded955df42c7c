// Scaled dot-product attention.
//
// Math       s = scale * q k^T                  p_i = i + offset, the position of query i
//            s = softcap * tanh(s / softcap)    where given
//            s = s - slope * |p_i - j| + mask   each where given
//            s = -inf                           where query i does not see key j
//            P = softmax(s) over keys, of whose denominator e^sink is a part
//            out = (keep * P) v                 lse = log(e^sink + sum e^s)
// Gradient   with P = e^(s - lse) recomputed and delta = sum_d d_out * out - d_lse:
//            d_v = (keep * P)^T d_out           d_P = keep * (d_out v^T)
//            d_s = P * (d_P - delta)            d_mask = d_s      d_slope = -sum d_s |p_i - j|
//            d_s *= 1 - tanh^2                  under a softcap, from here on
//            d_q = scale * d_s k                d_k = scale * d_s^T q
//            (d_sink = -sum e^(sink - lse) delta: ops/attention.py)
// Shapes     q [B, H, L, D]   k [B, H_kv, S, D]   v [B, H_kv, S, Dv]   out [B, H, L, Dv]
//            lse [B, H, L]    mask [B, H, L, S] (0 strides where it is broadcast)
//            H is a multiple of H_kv; query head h reads key head h / (H / H_kv).
// Packed     with cu_q and cu_k, B = 1 and L and S are rows of n sequences one after the other;
//            sequence b has the rows cu[b] to cu[b + 1], and i, j, L, S above are its own.
// Layout     any strides, the last dimension of q, k, v, out and the gradients contiguous.
// Seen       j < key_lengths[b]; p_i - left <= j <= p_i + right (causal is right = 0); a bool mask
//            that is true, a floating one that is not -inf. offset is 0, or S - L (bottom_right), S
//            being key_lengths[b] where given. What stands in keys beyond it is never read.
// Dropout    keep is 0 or 1 / (1 - p), from Philox of (seed, head, query, key): the same in any
//            pass, for any number of threads. p is rounded to a multiple of 2^-16.
// Aliasing   outputs alias nothing.
// Numerics   online softmax, accumulation in float (double for float64); no L x S array is stored.
//            A query that sees no key gives zeros, lse = -inf (or the sink) and zero gradients. Same
//            bits for any thread count.
//            P = e^(s - lse) loses log(keys) where a mask puts all of a row beyond 1e4 or so: such rows
//            are right in `out`, not in the weights and gradients (as in torch's fused kernels).
// Source     Dao et al. 2022, FlashAttention (Algorithm 1 and 4); Dao 2023; Milakov & Gimelshein
//            2018; Salmon et al. 2011 (Philox 4x32-10).
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct AttentionProblem {
  TensorView q, k, v;
  TensorView mask;          // bool or of q's dtype; may be absent, as all that follow
  TensorView alibi_slopes;  // A [B, H], packed [n, H]
  TensorView sinks;         // A [H]
  TensorView key_lengths;   // int64 [B]
  TensorView cu_q, cu_k;    // int64 [n + 1]
  double scale;
  double softcap;                          // 0: none
  std::int64_t window_left, window_right;  // -1: unbounded
  bool bottom_right;
  double dropout_p;
  std::int64_t seed;
};

struct AttentionForwardArgs {
  AttentionProblem problem;
  TensorView out;  // out
  TensorView lse;  // [B, H, L] out, Accumulate dtype, contiguous
};

struct AttentionBackwardArgs {
  AttentionProblem problem;
  TensorView d_out;
  TensorView d_lse;  // A [B, H, L], contiguous; absent: zeros
  TensorView out, lse;
  TensorView d_q, d_k, d_v;  // out
  TensorView d_distance;     // A [B, H, L] out: sum_j d_s |p_i - j|; absent: not wanted
  TensorView d_mask;  // A [1 or B, 1 or H, 1 or L, 1 or S] out, contiguous; absent: not wanted
};

// The weights, after dropout, in a second pass from lse.
struct AttentionWeightsArgs {
  AttentionProblem problem;
  TensorView lse;
  TensorView weights;  // [B, H, L, S] out, or [B, 1, L, S]: their mean over the heads
  bool only_keep;      // what dropout multiplies the weights with, in their place
};

void attention_forward(const AttentionForwardArgs& args);
void attention_backward(const AttentionBackwardArgs& args);
void attention_weights(const AttentionWeightsArgs& args);

}  // namespace lmkern
