// Matrix product, float32.
//
// Math       out (+)= op(a) op(b) + bias;  op(x) is x, or x^T if transposed
// Shapes     op(a) [M, K]   op(b) [K, N]   bias [N]   out [M, N]
// Layout     rows of a, b and out are contiguous and may have any stride; bias is contiguous.
// Aliasing   out overlaps nothing.
// Numerics   products are exact to 2^-24 of their value and summed in float: the error is no larger
//            than that of a chain of FMAs (csrc/cpu/amx.h). Same bits for any thread count.
// Result     false: not done, because this instruction set has no kernel, there is nothing to
//            multiply, or magnitudes are such that float32 might give a different Inf, NaN or
//            denormal. `out` is then untouched if `accumulate`, and unspecified otherwise.
// Source     three-way splits: Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 artificial
//            intelligence datatype for higher-precision computations".
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct MatmulArgs {
  TensorView a;     // [M, K], or [K, M] if transpose_a
  TensorView b;     // [K, N], or [N, K] if transpose_b
  TensorView bias;  // [N], absent: zeros
  TensorView out;   // [M, N] out
  bool transpose_a;
  bool transpose_b;
  bool accumulate;  // add to out
};

bool matmul(const MatmulArgs& args);

}  // namespace lmkern
