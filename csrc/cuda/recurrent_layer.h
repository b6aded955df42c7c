// What the paths of the recurrent layers have in common: the choice of the cell, the layer's options as a
// kernel reads them, and the state of a cell in a step.
#pragma once
#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "core/dispatch.h"
#include "cuda/device/convert.h"
#include "cuda/device/math.h"
#include "ops/recurrent.h"

namespace lmkern::cuda {

// Calls f(TypeTag<Cell>{}) with the cell's policy, for values that are stored as S.
template <class S, class F>
void dispatch_cell(RecurrentCell cell, const F& f) {
  using M = std::conditional_t<sizeof(S) == 2, FastMath, DeviceMath>;
  switch (cell) {
    case RecurrentCell::kLstm: f(TypeTag<cells::Lstm<M>>{}); break;
    case RecurrentCell::kGru: f(TypeTag<cells::Gru<M>>{}); break;
    case RecurrentCell::kRnnTanh: f(TypeTag<cells::Elman<cells::Tanh<M>>>{}); break;
    case RecurrentCell::kRnnRelu: f(TypeTag<cells::Elman<cells::Relu<M>>>{}); break;
    case RecurrentCell::kRnnSigmoid: f(TypeTag<cells::Elman<cells::Sigmoid<M>>>{}); break;
  }
}

// Whether each unit is left to itself: normalisation and projection need more than one.
inline bool is_unitwise(const RecurrentOptions& o) {
  return !o.norm_hh.defined() && !o.w_hr.defined();
}

// What both passes know of a layer; pointers as in RecurrentOptions, null where absent.
template <class S>
struct RecurrentLayer {
  using A = Accumulate<S>;
  int steps, batch, hidden, width;
  bool reverse, tf32;
  const std::int64_t *lengths, *offsets;
  const S *w_hh, *b_hh, *w_hr, *peephole, *norm_hh, *norm_c_weight, *norm_c_bias, *h_mask;
  const bool *zoneout_h, *zoneout_c, *reset;
  A zoneout_h_rate, zoneout_c_rate, eps;

  RecurrentLayer(const RecurrentOptions& o, std::int64_t rows, int gates)
      : batch(static_cast<int>(o.batch)),
        hidden(static_cast<int>(o.w_hh.shape[0] / gates)),
        width(static_cast<int>(o.w_hh.shape[1])),
        reverse(o.reverse),
        tf32(o.tf32),
        lengths(o.lengths.ptr<const std::int64_t>()),
        offsets(o.offsets.ptr<const std::int64_t>()),
        w_hh(o.w_hh.ptr<const S>()),
        b_hh(o.b_hh.ptr<const S>()),
        w_hr(o.w_hr.ptr<const S>()),
        peephole(o.peephole.ptr<const S>()),
        norm_hh(o.norm_hh.ptr<const S>()),
        norm_c_weight(o.norm_c_weight.ptr<const S>()),
        norm_c_bias(o.norm_c_bias.ptr<const S>()),
        h_mask(o.h_mask.ptr<const S>()),
        zoneout_h(o.zoneout_h.ptr<const bool>()),
        zoneout_c(o.zoneout_c.ptr<const bool>()),
        reset(o.reset.ptr<const bool>()),
        zoneout_h_rate(static_cast<A>(o.zoneout_h_rate)),
        zoneout_c_rate(static_cast<A>(o.zoneout_c_rate)),
        eps(static_cast<A>(o.eps)) {
    steps = o.offsets.defined() ? static_cast<int>(o.offsets.shape[0])
            : o.batch == 0      ? 0
                                : static_cast<int>(rows / o.batch);
  }

  // The time of the s-th step that is taken.
  LMKERN_DEVICE int time(int s) const { return reverse ? steps - 1 - s : s; }
  LMKERN_DEVICE bool takes_part(int t, int b) const {
    return t >= 0 && t < steps && (lengths == nullptr || t < lengths[b]);
  }
  // Whether a row that takes no part in a step has a place in the outputs, for zeros.
  LMKERN_DEVICE bool has_padding() const { return lengths != nullptr && offsets == nullptr; }
  LMKERN_DEVICE std::int64_t row(int t, int b) const {
    return (offsets != nullptr ? offsets[t] : static_cast<std::int64_t>(t) * batch) + b;
  }
  LMKERN_DEVICE bool resets(std::int64_t row) const { return reset != nullptr && reset[row]; }

  LMKERN_DEVICE bool zones_h() const { return zoneout_h != nullptr || zoneout_h_rate != 0; }
  LMKERN_DEVICE bool zones_c() const { return zoneout_c != nullptr || zoneout_c_rate != 0; }
  // Zoneout's share of the old value.
  LMKERN_DEVICE A share_h(std::int64_t at) const {
    return zoneout_h != nullptr ? A(zoneout_h[at]) : zoneout_h_rate;
  }
  LMKERN_DEVICE A share_c(std::int64_t at) const {
    return zoneout_c != nullptr ? A(zoneout_c[at]) : zoneout_c_rate;
  }

  // What enters W_hh in step s: h_{s-1} under the recurrent dropout's mask, unless the step resets.
  LMKERN_DEVICE S operand(int s, int b, int u, A h) const {
    const int t = time(s);
    if (s >= steps || !takes_part(t, b) || resets(row(t, b))) return from_accumulate<S>(A(0));
    if (h_mask != nullptr) h *= to_accumulate(h_mask[static_cast<std::int64_t>(b) * width + u]);
    return from_accumulate<S>(h);
  }
};

template <class S>
LMKERN_DEVICE Accumulate<S> load_optional(const S* pointer, std::int64_t at) {
  return pointer != nullptr ? to_accumulate(pointer[at]) : Accumulate<S>(0);
}

// A cell of a unit in one step. What is read before the step's product is there stays as it was read, so
// that nothing waits for it before it is used.
template <class Cell, class S>
struct CellState {
  using A = Accumulate<S>;
  std::int64_t row;     // of the outputs
  bool active, resets;  // whether the row takes part in the step, and begins anew
  bool peeps;
  S read_gates[Cell::kGates], bias[Cell::kGates], read_peephole[3];
  S d_y, read_h_prev;
  A gates[Cell::kGates];
  A hidden, h_prev, c_prev, c_now;
  A peephole[3];

  // f(peephole or null). A pointer that is chosen would keep all of this out of registers.
  template <class F>
  LMKERN_DEVICE void with_peephole(const F& f) const {
    if constexpr (Cell::kHasC) {
      if (peeps) {
        f(static_cast<const A*>(peephole));
        return;
      }
    }
    f(static_cast<const A*>(nullptr));
  }
  LMKERN_DEVICE void read_peepholes(const RecurrentLayer<S>& layer, int u) {
    peeps = Cell::kHasC && layer.peephole != nullptr;
    LMKERN_UNROLL
    for (int i = 0; i < 3; ++i)
      read_peephole[i] = peeps ? layer.peephole[i * layer.hidden + u] : from_accumulate<S>(A(0));
  }
  LMKERN_DEVICE void widen() {
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) gates[g] = to_accumulate(read_gates[g]);
    LMKERN_UNROLL
    for (int i = 0; i < 3; ++i) peephole[i] = to_accumulate(read_peephole[i]);
  }
};

}  // namespace lmkern::cuda
