// Layer and RMS normalisation of rows, alone or fused with the residual connection before it.
//
// Math       x = input, or with a residual
//            x[i, :] = residual[i, :] + (input[i, :] + input_bias) keep[i, :]
//            m = mean of the row, r = 1 / sqrt(mean (x - m)^2 + eps)     RMS norm: m = 0
//            out[i, :] = xhat weight + bias,  xhat = (x - m) r
//            keep is 0 or 1 / (1 - p), of Philox of (seed, flat index): csrc/cpu/dropout.h.
// Gradient   with g = d_out weight, and means along the row:
//            d_x = r (g - mean(g) - xhat mean(g xhat)) + d_sum           RMS norm: without mean(g)
//            d_residual = d_x,  d_input = d_x keep,  d_input_bias = sum_i d_input
//            d_weight = sum_i d_out xhat,  d_bias = sum_i d_out
// Shapes     [N, D], in any number of dimensions of which the last ones make D. statistics: m and r,
//            [2, N], or only r, [1, N], for RMS norm. Parameters [D].
// Layout     contiguous, but what is read may be a matrix of any row stride. Statistics and gradients
//            of parameters are float (double for double), parameters that or like input.
// Aliasing   none.
// Numerics   statistics in two passes: the second one, over the deviations from the first one's
//            mean, also corrects it, so that a mean of 1e4 with a deviation of 1 costs no digits.
//            With a residual, what is normalised is the sum as stored. Sums over rows are taken in
//            blocks that depend on N alone, and the blocks added in order: same bits for any thread
//            count.
// Source     Ba et al. 2016; RMS: Zhang and Sennrich 2019. torch.nn.functional.{layer,rms}_norm.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct NormForwardArgs {
  std::int64_t width;     // D
  TensorView input;       // [N, D]
  TensorView residual;    // [N, D], or absent; then so are input_bias, sum and dropout
  TensorView input_bias;  // [D], or absent
  TensorView weight;      // [D], or absent
  TensorView bias;        // [D], or absent
  double eps;
  double dropout_p;
  std::int64_t seed;
  TensorView sum;         // [N, D] out
  TensorView out;         // [N, D] out
  TensorView statistics;  // [2, N] out; [1, N] for RMS norm
};

struct NormBackwardArgs {
  std::int64_t width;     // D
  TensorView d_out;       // [N, D]
  TensorView d_sum;       // [N, D], or absent
  TensorView x;           // [N, D], what was normalised
  TensorView statistics;  // [2, N]; [1, N] for RMS norm
  TensorView weight;      // [D], or absent
  double dropout_p;
  std::int64_t seed;
  TensorView d_x;           // [N, D] out
  TensorView d_input;       // [N, D] out if dropout_p > 0, else absent: it is d_x
  TensorView d_weight;      // [D] out, or absent
  TensorView d_bias;        // [D] out, or absent
  TensorView d_input_bias;  // [D] out, or absent
};

void norm_forward(const NormForwardArgs& args);
void norm_backward(const NormBackwardArgs& args);

}  // namespace lmkern
