// One product of a step's operand with weights of any size.
#pragma once
#include "cuda/slice_product.h"

namespace lmkern::cuda {

// out[b, m] = sum over k of operand[b, k] w[m, k], or w[k, m] if transposed. weights: [rows, depth], or
// [depth, rows]; operand: [batch, SliceShape::operand_stride()]; out: [batch, rows].
// tf32: whether floats may be rounded to it.
template <class S>
void step_product(const S* weights, int rows, int depth, bool transposed, const S* operand,
                  int batch, Accumulate<S>* out, bool tf32);

}  // namespace lmkern::cuda
