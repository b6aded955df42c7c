// Rotary position embedding of queries and keys.
//
// Math       x'_a = x_a cos - x_b sin     x'_b = x_b cos + x_a sin     for P pairs (a, b) of features:
//            (r, r + P), or (2r, 2r + 1) if interleaved; features from 2P on stay as they are
// Gradient   the turn back: the same with -sin (`inverse`)
// Shapes     q [B, H, L, D]   k [B, H_kv, L, D], may be absent   cos, sin [1 or B, L, P]
// Layout     q, k and the results any strides, their last dimension contiguous; cos, sin contiguous
// Aliasing   none.
// Numerics   products in float (double for float64), rounded once.
// Source     Su et al. 2021 (RoFormer), section 3.2.2.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct RotaryArgs {
  TensorView q, k;
  TensorView cos, sin;      // Accumulate dtype
  TensorView q_out, k_out;  // out
  bool interleaved, inverse;
};

void rotary_embedding(const RotaryArgs& args);

}  // namespace lmkern
