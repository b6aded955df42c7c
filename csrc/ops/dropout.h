// Dropout.
//
// Math       out[n] = keep(n) input[n],   keep(n) = 1 / (1 - p) with probability 1 - p, else 0
//            keep(n) is a function of the seed and of n, the flat index: csrc/cpu/dropout.h
// Gradient   d_input[n] = keep(n) d_out[n]: the same function
// Shapes     input, out: any, equal
// Layout     contiguous
// Aliasing   input and out may be the same tensor.
// Numerics   one product in float (double for float64), rounded once. p in multiples of 2^-32. A NaN or
//            an infinity that is dropped gives NaN, as torch's does.
// Source     Srivastava et al. 2014; Salmon et al. 2011 (Philox 4x32-10).
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct DropoutArgs {
  TensorView input;
  TensorView out;  // out
  double p;        // the probability to be dropped
  std::int64_t seed;
};

void dropout(const DropoutArgs& args);

}  // namespace lmkern
