// The LSTM cell: gate math and its gradient for one unit (or one vector of units), shared by host
// and device. See csrc/ops/recurrent.h for the formulas. `Math` supplies sigmoid and tanh for the
// value type V; it is a type of its own in each instruction-set build, which also keeps the
// instantiations of different builds apart.
#pragma once
#include "core/dtype.h"

namespace lmkern::cells {

template <class Math>
struct Lstm {
  static constexpr int kGates = 4;  // torch's order: input, forget, cell, output

  // gates: pre-activations in, activations out.
  template <class V>
  static LMKERN_HOST_DEVICE void forward(V (&gates)[4], const V& c_prev, V& c, V& h) {
    gates[0] = Math::sigmoid(gates[0]);
    gates[1] = Math::sigmoid(gates[1]);
    gates[2] = Math::tanh(gates[2]);
    gates[3] = Math::sigmoid(gates[3]);
    c = gates[1] * c_prev + gates[0] * gates[2];
    h = gates[3] * Math::tanh(c);
  }

  // gates: activations in, d_pre-activations out. d_c: dL/dc_t from step t+1 in, dL/dc_{t-1} out.
  template <class V>
  static LMKERN_HOST_DEVICE void backward(V (&gates)[4], const V& c_prev, const V& c, const V& d_h,
                                          V& d_c) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const V tanh_c = Math::tanh(c);
    d_c = d_c + d_h * o * (1 - tanh_c * tanh_c);
    gates[0] = d_c * g * i * (1 - i);
    gates[1] = d_c * c_prev * f * (1 - f);
    gates[2] = d_c * i * (1 - g * g);
    gates[3] = d_h * tanh_c * o * (1 - o);
    d_c = d_c * f;
  }
};

}  // namespace lmkern::cells
