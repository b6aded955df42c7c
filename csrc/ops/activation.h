// Activations with the bias added in the same pass, and the gated ones of feed-forward layers.
//
// Math       f(x) = x w(x):   gelu       w = Φ(x), the normal distribution function
//                             gelu_tanh  w = (1 + tanh u) / 2 = σ(2u), u = sqrt(2/π) (x + 0.044715 x^3)
//                             silu       w = σ(x) = 1 / (1 + e^-x)
//            plain            out = f(x),       x = input + bias
//            gated            out = f(g) * v,   [g | v] = input + bias, or [v | g] if !gate_first;
//                             or g = input, v = up
// Gradient   f' = w + x w',   w' = φ(x) = e^(-x^2/2) / sqrt(2π), 2u' σ(2u) σ(-2u), σ(x) σ(-x)
//            plain            d_input = d_out f'(x)
//            gated            d_g = d_out v f'(g),   d_v = d_out f(g)
//            d_bias = the sum of d_input over all rows
// Shapes     input, d_input [..., D], gated without up [..., 2D]   up, d_up, out, d_out [..., D]
//            bias, d_bias [D], gated [2D]; without up only
// Layout     contiguous; what is read, and is [N, D], may have any distance between rows.
// Aliasing   none. x is not saved: the backward pass adds the bias again.
// Numerics   in float (double for float64) from input to output, rounded once. f is computed as
//            max(x, 0) - |x| w(-|x|): right to 6 ULP for x > 0, and for x < 0 to an absolute error of
//            half an ULP of 1, with a relative error that grows with the exponent in w, 100 ULP at
//            -8, where 1 + erf or 1 + tanh have lost all digits. f(-inf) and f'(-inf) are 0,
//            f(inf) = inf and f'(inf) = 1, where torch has NaN.
//            d_bias adds unrounded d_input in blocks of rows that depend on N alone, in ascending
//            order: the same bits for any thread count.
// Source     Hendrycks and Gimpel 2016 (GELU, SiLU); Shazeer 2020 (GEGLU, SwiGLU), eq. 6.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

enum class Activation { kGelu, kGeluTanh, kSilu };

struct ActivationProblem {
  Activation function;
  bool gated, gate_first;
  TensorView input;  // [..., D] or [..., 2D]
  TensorView up;     // [..., D], may be absent
  TensorView bias;   // [D] or [2D], may be absent
};

struct ActivationForwardArgs {
  ActivationProblem problem;
  TensorView out;  // [..., D] out
};

struct ActivationBackwardArgs {
  ActivationProblem problem;
  TensorView d_out;    // [..., D]
  TensorView d_input;  // like input, out
  TensorView d_up;     // like up, out
  TensorView d_bias;   // like bias, out
};

void activation_forward(const ActivationForwardArgs& args);
void activation_backward(const ActivationBackwardArgs& args);

}  // namespace lmkern
