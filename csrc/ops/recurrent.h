// Recurrent layers: one layer, one direction, a whole sequence.
//
// Math          With x'_t = x_t W_ih^T + b_ih (made by the caller) and hh_t = m * h_{t-1} W_hh^T +
//               b_hh, where m is the recurrent dropout's mask:
//   LSTM        i, f, o = sigmoid(x' + hh), g = tanh(x' + hh)      gates i | f | g | o
//               c_t = f * c_{t-1} + i * g        h_t = o * tanh(c_t)
//   GRU         r, z = sigmoid(x' + hh), n = tanh(x'_n + r * hh_n) gates r | z | n
//               h_t = (1 - z) * n + z * h_{t-1}
//   Elman       h_t = act(x' + hh), act one of tanh, relu, sigmoid
//   Options, all composable:
//   peephole    i, f also see p_i c_{t-1}, p_f c_{t-1}; o sees p_o c_t            (LSTM)
//   norm        hh = LN(h W_hh^T) * gain + b_hh over all G*H values, and, for the LSTM,
//               h = o * tanh(LN(c) * weight + bias); the carried c is not normalised
//   zoneout     c_t <- z c_{t-1} + (1 - z) c_t, likewise h_t; z is a mask or, without one, a rate.
//               h_t is computed from the c_t before zoneout
//   projection  h_t <- h_t W_hr^T                                                 (LSTM)
//   reset       h_{t-1} = c_{t-1} = 0 in marked rows, before the step
// Gradient      d_act of each gate from d_h and d_c as usual; d_gates is dL/dx', d_hh is
//               dL/d(h W^T). They differ for the GRU (n's share is scaled by r) and under norm.
//               d_h_{t-1} = m * (d_hh_t W_hh) + what z and zoneout pass on.
//               Outside this kernel, as single products over all steps: d_W_ih, d_W_hh, d_x, d_b.
// Shapes        G gates (4, 3, 1), H units, P = width of h (H, or the projection's).
//               N rows in all: T * B for a rectangular batch; with batch_sizes, the rows of a
//               PackedSequence: step t has batch_sizes[t] rows, they follow each other, and row b
//               of a step continues row b of the step before.
// Layout        all contiguous. dtype S: one of float32, float64, bfloat16, float16 for all, but
//               what is marked A (accumulate) is float64 for float64 and float32 otherwise.
// Aliasing      gates is updated in place: x' in, activations out. Outputs alias nothing.
// Numerics      accumulation in A, one chain over k; the recurrence itself is never rounded to S,
//               only what is written out. Same bits for any number of threads. On a GPU: two chains, and
//               h enters its product as S, or as tf32 (`tf32`); sigmoid and tanh of 16-bit types are within
//               2^-16 of their value.
// Source        Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; peepholes:
//               Gers & Schmidhuber 2000; Cho et al. 2014, in cuDNN's variant with b_hn inside
//               r * (.); Elman 1990; layer norm: Ba et al. 2016; zoneout: Krueger et al. 2017;
//               recurrent dropout: Gal & Ghahramani 2016; projection: Sak et al. 2014.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

enum class RecurrentCell : int { kLstm, kGru, kRnnTanh, kRnnRelu, kRnnSigmoid };

// What both passes read besides their activations. Absent views switch an option off.
struct RecurrentOptions {
  RecurrentCell cell;
  bool reverse;              // step T-1 first
  std::int64_t batch;        // B
  TensorView w_hh;           // [G*H, P]
  TensorView b_hh;           // [G*H]
  TensorView w_hr;           // [P, H]
  TensorView peephole;       // [3H]: i, f, o
  TensorView norm_hh;        // [G*H] gain
  TensorView norm_c_weight;  // [H]
  TensorView norm_c_bias;    // [H]
  double eps;
  TensorView h_mask;     // [B, P]
  TensorView zoneout_h;  // bool [N, P]
  TensorView zoneout_c;  // bool [N, H]
  double zoneout_h_rate, zoneout_c_rate;
  TensorView reset;        // bool [N]
  TensorView batch_sizes;  // int64 [T]; absent: T = N / B steps of B rows. CPU only
  // On a GPU, where nothing is sorted and no size is read: row b takes part in the steps t < lengths[b],
  // and step t has its rows at offsets[t] + b (absent: t * B + b). Where it does not, y = 0 and the state
  // is carried on.
  TensorView lengths;  // int64 [B]; absent: all T
  TensorView offsets;  // int64 [T]; absent: a rectangle
  bool tf32;  // on a GPU: products of float32 with w_hh and w_hr round their operands to tf32
};

struct RecurrentForwardArgs {
  RecurrentOptions options;
  TensorView gates;        // [N, G*H] in: x' ; out: activations, if `save`
  TensorView h0;           // [B, P], absent: zeros
  TensorView c0;           // [B, H], absent: zeros
  TensorView first_hh;     // [B, G*H]: h0 W_hh^T, for a single step only; then w_hh is not read
  TensorView y;            // [N, P] out
  TensorView h_n;          // [B, P] out
  TensorView c_n;          // [B, H] out (LSTM)
  TensorView cells;        // A [N, H] out: c_t; absent: not wanted
  TensorView hidden;       // A [N, H] out: the GRU's hh_n; absent: not wanted
  TensorView hh;           // A [N, G*H] out: h W_hh^T before norm; absent: not wanted
  TensorView unprojected;  // [N, H] out: o * tanh(c); absent: not wanted
  bool save;               // write activations back to gates
  // CPU: float32 [enough], packed weights for several calls with the same ones; absent: packed for this
  // call. GPU: uint8 [recurrent_workspace(options, false)].
  TensorView workspace;
  bool packed_ready;  // an earlier call with the same weights, batch and threads has packed
};

struct RecurrentBackwardArgs {
  RecurrentOptions options;
  TensorView d_y;      // [N, P], absent: zeros
  TensorView d_h_n;    // [B, P], absent: zeros
  TensorView d_c_n;    // [B, H], absent: zeros
  TensorView d_cells;  // [N, H], absent: zeros
  TensorView h0;       // [B, P], absent: zeros
  TensorView c0;       // [B, H], absent: zeros
  TensorView y;        // [N, P]
  TensorView gates;    // [N, G*H] activations, or x' if `recompute`
  TensorView cells;    // A [N, H] (LSTM)
  TensorView hidden;   // A [N, H] (GRU)
  TensorView hh;  // A [N, G*H]: under norm h W_hh^T; with `recompute` h W_hh^T + b_hh otherwise
  TensorView d_gates;  // [N, G*H] out
  TensorView d_hh;     // [N, G*H] out, where it differs from d_gates
  TensorView d_h;      // [N, P] out: dL/dh before the projection's product; projection only
  TensorView
      d_normed;  // [N, G*H] out: dL/d(LN(h W^T) * gain + b_hh); norm only, absent: not wanted
  TensorView d_c_normed;  // [N, H] out: dL/d(LN(c) * weight + bias); norm only
  TensorView c_now;       // A [N, H] out: c_t before zoneout, absent: not wanted
  TensorView
      d_h0;  // [B, P] out, absent: not wanted; of a rectangle's single step without m * (d_hh W_hh)
  TensorView d_c0;       // [B, H] out, absent: not wanted
  bool recompute;        // gates are computed again from x' and hh
  TensorView workspace;  // GPU: uint8 [recurrent_workspace(options, true)]; absent on the CPU
};

// One step without options, and its gradient but for the products with the weights.
struct RecurrentStepArgs {
  RecurrentCell cell;
  // Either the products, [B, G*H] with biases, or what they are made of: for small batches, where
  // nothing pays for packing, weights are read as they are.
  TensorView from_x;  // x W_ih^T + b_ih
  TensorView from_h;  // h W_hh^T + b_hh
  TensorView x;       // [B, I]
  TensorView w_ih;    // [G*H, I]
  TensorView w_hh;    // [G*H, H]
  TensorView b_ih;    // [G*H], absent: zeros
  TensorView b_hh;    // [G*H], absent: zeros
  TensorView h;       // [B, H], absent: zeros
  TensorView c;       // [B, H], absent: zeros
  TensorView h_next;  // [B, H] out
  TensorView y;       // [B, H] out: h_next once more; absent: not wanted
  TensorView c_next;  // [B, H] out (LSTM)
  TensorView gates;   // [B, G*H] out: activations; absent: nothing is saved
  TensorView cells;   // A [B, H] out (LSTM), absent: not wanted
  TensorView hidden;  // A [B, H] out (GRU), absent: not wanted
};

struct RecurrentStepBackwardArgs {
  RecurrentCell cell;
  TensorView d_h;       // [B, H], absent: zeros
  TensorView d_y;       // [B, H], absent: zeros; y is h_next once more
  TensorView d_c;       // [B, H], absent: zeros
  TensorView gates;     // [B, G*H] activations
  TensorView hidden;    // A [B, H] (GRU)
  TensorView h;         // [B, H], absent: zeros
  TensorView c;         // [B, H], absent: zeros
  TensorView d_gates;   // [B, G*H] out: dL/d(from_x)
  TensorView d_hh;      // [B, G*H] out: dL/d(from_h), where it differs (GRU)
  TensorView d_h_prev;  // [B, H] out: the part of dL/dh that bypasses W_hh (GRU)
  TensorView d_c_prev;  // [B, H] out (LSTM)
  TensorView d_b_ih;    // [G*H] out, absent: not wanted
  TensorView d_b_hh;    // [G*H] out, absent: not wanted
};

void recurrent_forward(const RecurrentForwardArgs& args);
void recurrent_backward(const RecurrentBackwardArgs& args);
void recurrent_step(const RecurrentStepArgs& args);
void recurrent_step_backward(const RecurrentStepBackwardArgs& args);

int gates_of(RecurrentCell cell);

}  // namespace lmkern
