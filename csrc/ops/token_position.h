// The first layer of a language model: token + position + segment, normalised, dropped out.
//
// Math       x[n, :] = scale token[input[n], :] + position[p(n), :] + segment[segments[n], :]
//            out[n, :] = norm(x[n, :]) keep[n, :]
//            p(n) = positions[n mod L], or offset + n mod L; either table may be absent.
//            norm: layer or RMS norm of the row (norm.h), or none. keep is 0 or 1 / (1 - p), of Philox
//            of (seed, flat index): csrc/cpu/dropout.h.
// Gradient   d_sum = the norm's gradient (norm.h) of g = d_out keep; without a norm, g itself.
//            d_position[l, :] = sum over n with n mod L = l of d_sum[n, :]
//            d_weight, d_bias as in norm.h, of g.
//            The tables' gradients are sums of rows of d_sum, and of d_position, by index:
//            embedding_backward (embedding.h).
// Shapes     input [...] int32 or int64, N elements; L divides N: rows n and n + L share a position.
//            token [V, D]   position [P, D]   positions, L elements   segment [S, D]
//            segments, N elements   out, d_out, d_sum [N, D]   statistics [2, N]; [1, N] for RMS
//            norm; absent without a norm.
// Layout     contiguous, but the tables may have any row stride. Statistics and gradients of
//            parameters are float (double for double), parameters that or like token.
// Aliasing   none.
// Numerics   x is not rounded before it is normalised, and not stored: backward makes it again from
//            the tables. That reads what saving it would have read, without writing it first, and
//            keeps N D elements less. Sums in fixed order: same bits for any thread count.
// Errors     IndexError for an index outside its table, before anything is written; on a GPU, later
//            (cuda/index_errors.h).
// Source     Devlin et al. 2019 (BERT), Radford et al. 2019 (GPT-2), Vaswani et al. 2017 (scale).
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct TokenPosition {
  TensorView input;      // [...]
  TensorView token;      // [V, D]
  TensorView position;   // [P, D], or absent
  TensorView positions;  // L elements, or absent
  std::int64_t offset;   // without positions
  std::int64_t length;   // L
  TensorView segment;    // [S, D], or absent
  TensorView segments;   // N elements, if segment is there
  double scale;
};

struct TokenPositionForwardArgs {
  TokenPosition rows;
  TensorView weight, bias;  // [D], or absent
  double eps;
  double dropout_p;
  TensorView seed;        // int64 [], absent without dropout
  TensorView out;         // [N, D] out
  TensorView statistics;  // [2 or 1, N] out, or absent
};

struct TokenPositionBackwardArgs {
  TokenPosition rows;     // without statistics only its length is read
  TensorView d_out;       // [N, D]
  TensorView statistics;  // [2 or 1, N], or absent
  TensorView weight;      // [D], or absent
  double dropout_p;
  TensorView seed;              // int64 [], absent without dropout
  TensorView d_sum;             // [N, D] out, or absent
  TensorView d_position;        // [L, D] out, or absent
  TensorView d_weight, d_bias;  // [D] out, or absent
  TensorView workspace;         // on a GPU: bytes, as many as cuda::token_position_workspace says
};

void token_position_forward(const TokenPositionForwardArgs& args);
void token_position_backward(const TokenPositionBackwardArgs& args);

}  // namespace lmkern
