// The GRU cell. Interface: csrc/cells/lstm.h; formulas: csrc/ops/recurrent.h.
#pragma once
#include "core/dtype.h"

namespace lmkern::cells {

template <class Math>
struct Gru {
  static constexpr int kGates = 3;  // torch's order: reset, update, new
  static constexpr bool kHasC = false, kReadsH = true, kSavesHidden = true;

  template <class V>
  static LMKERN_HOST_DEVICE void update(V (&gates)[3], const V (&hh)[3], const V*, V&) {
    gates[0] = Math::sigmoid(gates[0] + hh[0]);
    gates[1] = Math::sigmoid(gates[1] + hh[1]);
    gates[2] = Math::tanh(gates[2] + gates[0] * hh[2]);
  }

  template <class V>
  static LMKERN_HOST_DEVICE V output(const V (&gates)[3], const V&, const V& h_prev) {
    return gates[2] + gates[1] * (h_prev - gates[2]);
  }

  template <class V>
  static LMKERN_HOST_DEVICE void output_backward(const V (&gates)[3], const V&, const V& h_prev,
                                                 const V& d_h, V (&d_act)[3], V&, V& d_h_prev) {
    d_act[1] = d_h * (h_prev - gates[2]);
    d_act[2] = d_h * (1 - gates[1]);
    d_h_prev = d_h * gates[1];
  }

  // hidden: hh_n, which r multiplied.
  template <class V>
  static LMKERN_HOST_DEVICE void update_backward(const V (&gates)[3], const V& hidden, const V&,
                                                 const V*, V (&d_act)[3], V (&d_hh)[3], V&) {
    const V r = gates[0], z = gates[1], n = gates[2];
    d_act[2] = d_act[2] * (1 - n * n);
    d_act[0] = d_act[2] * hidden * r * (1 - r);
    d_act[1] = d_act[1] * z * (1 - z);
    d_hh[0] = d_act[0];
    d_hh[1] = d_act[1];
    d_hh[2] = d_act[2] * r;
  }
};

}  // namespace lmkern::cells
