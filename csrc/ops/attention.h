// Scaled dot-product attention.
//
// Math       s = scale * q k^T + mask     p = softmax(s) over keys     out = p v     lse = log sum
// e^s Gradient   with P = e^(s - lse) recomputed, delta = sum_d d_out * out:
//            d_v = P^T d_out      d_P = d_out v^T      d_s = P * (d_P - delta)
//            d_q = scale * d_s k  d_k = scale * d_s^T q
// Shapes     q [B, H, L, D]   k [B, H_kv, S, D]   v [B, H_kv, S, Dv]   out [B, H, L, Dv]   lse [B,
// H, L]
//            mask [B, H, L, S] (0 strides where it is broadcast). H is a multiple of H_kv; query
//            head h reads key head h / (H / H_kv).
// Layout     any strides, the last dimension of q, k, v, out and the gradients contiguous.
// Masks      bool: True takes part; floating (q's dtype): added. is_causal: key j is seen by
// queries
//            i >= j (aligned at the top left, as torch).
// Aliasing   outputs alias nothing.
// Numerics   online softmax, accumulation in float (double for float64); no L x S array is stored.
//            A row that sees no key gives zeros, lse = -inf and zero gradients. Same bits for any
//            thread count.
// Source     Dao et al. 2022, FlashAttention (Algorithm 1 and 4); Dao 2023; Milakov & Gimelshein
// 2018.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct AttentionForwardArgs {
  TensorView q, k, v;
  TensorView mask;  // may be absent
  TensorView out;   // out
  TensorView lse;   // [B, H, L] out, Accumulate dtype, contiguous
  double scale;
  bool is_causal;
};

struct AttentionBackwardArgs {
  TensorView d_out;
  TensorView q, k, v;
  TensorView mask;  // may be absent
  TensorView out, lse;
  TensorView d_q, d_k, d_v;  // out
  double scale;
  bool is_causal;
};

void attention_forward(const AttentionForwardArgs& args);
void attention_backward(const AttentionBackwardArgs& args);

}  // namespace lmkern
