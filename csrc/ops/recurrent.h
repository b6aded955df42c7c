// Recurrent layers: one layer, one direction, a whole sequence.
//
// Math (LSTM)   gates_t = x_t W_ih^T + b_ih + b_hh + h_{t-1} W_hh^T      i | f | g | o, each [B, H]
//               c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
//               h_t = sigmoid(o) * tanh(c_t)
// Gradient      with i, f, g, o now the activations and d_h = d_y_t + d_h_{from t+1}:
//               d_c  = d_c_{from t+1} + d_h o (1 - tanh^2 c_t)
//               d_gates = [d_c g i(1-i), d_c c_{t-1} f(1-f), d_c i (1-g^2), d_h tanh(c_t) o(1-o)]
//               d_c_{t-1} = d_c f        d_h_{t-1} = d_gates W_hh
//               Outside this kernel, as single products: d_W_ih = d_gates^T x, d_W_hh =
//               d_gates^T h_{t-1}, d_x = d_gates W_ih over all steps, d_b = sum of d_gates, and
//               d_h0 = d_gates W_hh of the first step.
// Shapes        T >= 1   gates [T, B, 4H]   w_hh [4H, H]   h0, c0, h_n, c_n [B, H]   y [T, B, H]
// Layout        all contiguous, time first. dtype: one of float32, float64, bfloat16 for all, but
//               cells and c_n's running value are kept in float for bfloat16 (`cells` is float32).
// Aliasing      gates is updated in place: x W_ih^T + b in, activations out. Outputs alias nothing.
// Numerics      accumulation in float (double for float64), one FMA chain over k; h is rounded to
// the
//               storage type only where it is written to y. Same bits for any thread count.
// Source        Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; gate order
//               and biases as torch.nn.LSTM.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct LstmForwardArgs {
  TensorView gates;  // [T, B, 4H] in: x W_ih^T + b;  out: activations, if `cells` is given
  TensorView w_hh;   // [4H, H]
  TensorView h0;     // [B, H], absent: zeros
  TensorView c0;     // [B, H], absent: zeros
  TensorView y;      // [T, B, H] out
  TensorView h_n;    // [B, H] out
  TensorView c_n;    // [B, H] out
  TensorView cells;  // [T, B, H] out, Accumulate dtype; absent: inference, nothing is saved
  bool reverse;      // step T-1 first
};

struct LstmBackwardArgs {
  TensorView d_y;      // [T, B, H], absent: zeros
  TensorView d_h_n;    // [B, H], absent: zeros
  TensorView d_c_n;    // [B, H], absent: zeros
  TensorView w_hh;     // [4H, H]
  TensorView c0;       // [B, H], absent: zeros
  TensorView gates;    // [T, B, 4H] activations, as lstm_forward left them
  TensorView cells;    // [T, B, H]
  TensorView d_gates;  // [T, B, 4H] out
  TensorView d_c0;     // [B, H] out, absent: not wanted
  bool reverse;
};

void lstm_forward(const LstmForwardArgs& args);
void lstm_backward(const LstmBackwardArgs& args);

}  // namespace lmkern
