// The LSTM cell: gate math and its gradient for one unit (or one vector of units), shared by host
// and device. Formulas: csrc/ops/recurrent.h.
//
// Every cell has the same four functions, so that one driver serves all of them. `Math` supplies
// sigmoid and tanh for the value type V; it is a type of its own in each instruction-set build,
// which also keeps the instantiations of different builds apart.
//
//   update           gates: x' in, activations out; c: c_{t-1} in, c_t out
//                    (cells without c ignore it)
//   output           h_t from the activations and c as the output reads it (under norm, LN(c))
//   output_backward  d_h in; dL/d(activation) of the gates the output reads, d_c_read and the part
//                    of d_h_{t-1} that bypasses W_hh out
//   update_backward  d_act: dL/d(activation) in, dL/dx' out; d_hh: dL/dhh out; d_c: dL/dc_t in,
//                    dL/dc_{t-1} out
#pragma once
#include "core/dtype.h"

namespace lmkern::cells {

template <class Math>
struct Lstm {
  static constexpr int kGates = 4;  // torch's order: input, forget, cell, output
  static constexpr bool kHasC = true, kReadsH = false, kSavesHidden = false;

  // peephole: p_i, p_f, p_o, or null.
  template <class V>
  static LMKERN_HOST_DEVICE void update(V (&gates)[4], const V (&hh)[4], const V* peephole, V& c) {
    V in = gates[0] + hh[0], forget = gates[1] + hh[1], out = gates[3] + hh[3];
    if (peephole != nullptr) {
      in = in + peephole[0] * c;
      forget = forget + peephole[1] * c;
    }
    gates[0] = Math::sigmoid(in);
    gates[1] = Math::sigmoid(forget);
    gates[2] = Math::tanh(gates[2] + hh[2]);
    c = gates[1] * c + gates[0] * gates[2];
    if (peephole != nullptr) out = out + peephole[2] * c;
    gates[3] = Math::sigmoid(out);
  }

  template <class V>
  static LMKERN_HOST_DEVICE V output(const V (&gates)[4], const V& c_read, const V&) {
    return gates[3] * Math::tanh(c_read);
  }

  template <class V>
  static LMKERN_HOST_DEVICE void output_backward(const V (&gates)[4], const V& c_read, const V&,
                                                 const V& d_h, V (&d_act)[4], V& d_c_read,
                                                 V& d_h_prev) {
    const V tanh_c = Math::tanh(c_read);
    d_act[3] = d_h * tanh_c;
    d_c_read = d_h * gates[3] * (1 - tanh_c * tanh_c);
    d_h_prev = V{};
  }

  template <class V>
  static LMKERN_HOST_DEVICE void update_backward(const V (&gates)[4], const V&, const V& c_prev,
                                                 const V* peephole, V (&d_act)[4], V (&d_hh)[4],
                                                 V& d_c) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    d_act[3] = d_act[3] * o * (1 - o);
    if (peephole != nullptr) d_c = d_c + peephole[2] * d_act[3];
    d_act[0] = d_c * g * i * (1 - i);
    d_act[1] = d_c * c_prev * f * (1 - f);
    d_act[2] = d_c * i * (1 - g * g);
    d_c = d_c * f;
    if (peephole != nullptr) d_c = d_c + peephole[0] * d_act[0] + peephole[1] * d_act[1];
    for (int n = 0; n < 4; ++n) d_hh[n] = d_act[n];
  }
};

}  // namespace lmkern::cells
