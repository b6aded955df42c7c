// The Elman cell, h = act(x' + hh). Interface: csrc/cells/lstm.h; formulas: csrc/ops/recurrent.h.
//
// An activation gives its value, and its slope from the value.
#pragma once
#include "core/dtype.h"

namespace lmkern::cells {

template <class Math>
struct Tanh {
  template <class V>
  static LMKERN_HOST_DEVICE V value(const V& x) {
    return Math::tanh(x);
  }
  template <class V>
  static LMKERN_HOST_DEVICE V slope(const V& y) {
    return 1 - y * y;
  }
};

template <class Math>
struct Sigmoid {
  template <class V>
  static LMKERN_HOST_DEVICE V value(const V& x) {
    return Math::sigmoid(x);
  }
  template <class V>
  static LMKERN_HOST_DEVICE V slope(const V& y) {
    return y * (1 - y);
  }
};

template <class Math>
struct Relu {
  template <class V>
  static LMKERN_HOST_DEVICE V value(const V& x) {
    return x < V{} ? V{} : x;  // a NaN stays
  }
  template <class V>
  static LMKERN_HOST_DEVICE V slope(const V& y) {
    return y > V{} ? V{} + 1 : V{};
  }
};

template <class Activation>
struct Elman {
  static constexpr int kGates = 1;
  static constexpr bool kHasC = false, kReadsH = false, kSavesHidden = false;

  template <class V>
  static LMKERN_HOST_DEVICE void update(V (&gates)[1], const V (&hh)[1], const V*, V&) {
    gates[0] = Activation::value(gates[0] + hh[0]);
  }

  template <class V>
  static LMKERN_HOST_DEVICE V output(const V (&gates)[1], const V&, const V&) {
    return gates[0];
  }

  template <class V>
  static LMKERN_HOST_DEVICE void output_backward(const V (&)[1], const V&, const V&, const V& d_h,
                                                 V (&d_act)[1], V&, V& d_h_prev) {
    d_act[0] = d_h;
    d_h_prev = V{};
  }

  template <class V>
  static LMKERN_HOST_DEVICE void update_backward(const V (&gates)[1], const V&, const V&, const V*,
                                                 V (&d_act)[1], V (&d_hh)[1], V&) {
    d_act[0] = d_act[0] * Activation::slope(gates[0]);
    d_hh[0] = d_act[0];
  }
};

}  // namespace lmkern::cells
