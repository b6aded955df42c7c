// The elementary functions of csrc/cpu/vec_math.h, applied to a whole tensor: how their error
// bounds are tested. Not a public op.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

enum class VecFunction {
  kExp,
  kExpNonpositive,
  kExpNormal,
  kLog,
  kTanh,
  kSigmoid,
  kErf,
  kNormalTail
};

struct VecMathArgs {
  VecFunction function;
  TensorView x;    // [N] float32 or float64
  TensorView out;  // [N] out
};

void vec_math(const VecMathArgs& args);

}  // namespace lmkern
