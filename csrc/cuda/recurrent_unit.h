// One unit of one row in one step: the cell, forward and backward, with everything that needs no other
// unit (reset, peephole, zoneout, padding). The per-step and the persistent path both stand on it.
#pragma once
#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "core/dispatch.h"
#include "cuda/device/convert.h"
#include "cuda/device/math.h"
#include "ops/recurrent.h"

namespace lmkern::cuda {

// Calls f(TypeTag<Cell>{}) with the cell's policy.
template <class F>
void dispatch_cell(RecurrentCell cell, const F& f) {
  using M = DeviceMath;
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
  bool reverse;
  const std::int64_t *lengths, *offsets;
  const S *w_hh, *b_hh, *w_hr, *peephole, *norm_hh, *norm_c_weight, *norm_c_bias, *h_mask;
  const bool *zoneout_h, *zoneout_c, *reset;
  A zoneout_h_rate, zoneout_c_rate, eps;

  RecurrentLayer(const RecurrentOptions& o, std::int64_t rows, int gates)
      : batch(static_cast<int>(o.batch)),
        hidden(static_cast<int>(o.w_hh.shape[0] / gates)),
        width(static_cast<int>(o.w_hh.shape[1])),
        reverse(o.reverse),
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

template <class Cell, class A>
struct CellState {
  A gates[Cell::kGates];
  A hidden, h_prev, c_prev, c_now;
  A peephole[3];
  bool peeps;
  LMKERN_DEVICE const A* peephole_or_null() const { return peeps ? peephole : nullptr; }
};

template <class Cell, class S>
LMKERN_DEVICE void load_peephole(const RecurrentLayer<S>& layer, int u,
                                 CellState<Cell, Accumulate<S>>& state) {
  state.peeps = layer.peephole != nullptr;
  if constexpr (Cell::kHasC)
    if (state.peeps) {
      LMKERN_UNROLL
      for (int i = 0; i < 3; ++i)
        state.peephole[i] = to_accumulate(layer.peephole[i * layer.hidden + u]);
    }
}

template <class S>
struct ForwardUnits {
  using A = Accumulate<S>;
  RecurrentLayer<S> layer;
  const S *h0, *c0;
  S *gates, *y, *h_n, *c_n;
  A *cells, *hidden, *hh;
  S* unprojected;
  bool save;

  ForwardUnits(const RecurrentForwardArgs& a, int gates_count)
      : layer(a.options, a.gates.shape[0], gates_count),
        h0(a.h0.ptr<const S>()),
        c0(a.c0.ptr<const S>()),
        gates(a.gates.ptr<S>()),
        y(a.y.ptr<S>()),
        h_n(a.h_n.ptr<S>()),
        c_n(a.c_n.ptr<S>()),
        cells(a.cells.ptr<A>()),
        hidden(a.hidden.ptr<A>()),
        hh(a.hh.ptr<A>()),
        unprojected(a.unprojected.ptr<S>()),
        save(a.save) {}

  // hh: h W_hh^T, without b_hh unless normalised. c: c_{t-1} in, c_t out. h: h_{t-1}. Leaves c_t before
  // zoneout in state.c_now, for output().
  template <class Cell>
  LMKERN_DEVICE void update(std::int64_t row, int u, A (&product)[Cell::kGates], A& c,
                            CellState<Cell, A>& state) const {
    const std::int64_t H = layer.hidden;
    S* const gate = gates + row * Cell::kGates * H + u;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      if (layer.norm_hh == nullptr) product[g] += load_optional(layer.b_hh, g * H + u);
      state.gates[g] = to_accumulate(gate[g * H]);
    }
    load_peephole(layer, u, state);
    if (layer.resets(row)) c = A(0);
    state.c_prev = state.c_now = c;
    Cell::update(state.gates, product, state.peephole_or_null(), state.c_now);
    if (save) {
      LMKERN_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) gate[g * H] = from_accumulate<S>(state.gates[g]);
    }
    if constexpr (Cell::kSavesHidden)
      if (hidden != nullptr) hidden[row * H + u] = product[Cell::kGates - 1];
    if constexpr (Cell::kHasC) {
      c = state.c_now;
      if (layer.zones_c()) {
        const A share = layer.share_c(row * H + u);
        c = share * state.c_prev + (1 - share) * state.c_now;
      }
      if (cells != nullptr) cells[row * H + u] = c;
    }
  }

  // h_t from the cell's output: zoneout and y. h: h_{t-1} in, h_t out; u counts in P.
  LMKERN_DEVICE void emit(std::int64_t row, int u, A value, A& h) const {
    const std::int64_t at = row * layer.width + u;
    if (layer.zones_h()) {
      const A share = layer.share_h(at), before = layer.resets(row) ? A(0) : h;
      value = share * before + (1 - share) * value;
    }
    h = value;
    y[at] = from_accumulate<S>(value);
  }

  // Zeros where a row takes no part.
  LMKERN_DEVICE void pad_unit(std::int64_t row, int u, int gate_count) const {
    const std::int64_t H = layer.hidden;
    if (save)
      for (int g = 0; g < gate_count; ++g)
        gates[(row * gate_count + g) * H + u] = from_accumulate<S>(A(0));
    if (cells != nullptr) cells[row * H + u] = A(0);
    if (hidden != nullptr) hidden[row * H + u] = A(0);
    if (hh != nullptr)
      for (int g = 0; g < gate_count; ++g) hh[(row * gate_count + g) * H + u] = A(0);
    if (unprojected != nullptr) unprojected[row * H + u] = from_accumulate<S>(A(0));
  }
  LMKERN_DEVICE void pad_output(std::int64_t row, int u) const {
    y[row * layer.width + u] = from_accumulate<S>(A(0));
  }

  // A whole step of a unit, without norm and projection.
  template <class Cell>
  LMKERN_DEVICE void step(int t, int b, int u, A (&product)[Cell::kGates], A& h, A& c) const {
    const bool active = layer.takes_part(t, b);
    if (!active && !layer.has_padding()) return;
    const std::int64_t row = layer.row(t, b);
    if (!active) {
      pad_unit(row, u, Cell::kGates);
      pad_output(row, u);
      return;
    }
    CellState<Cell, A> state;
    update<Cell>(row, u, product, c, state);
    state.h_prev = layer.resets(row) ? A(0) : h;
    emit(row, u, Cell::output(state.gates, state.c_now, state.h_prev), h);
  }
};

template <class S>
struct BackwardUnits {
  using A = Accumulate<S>;
  RecurrentLayer<S> layer;
  const S *d_y, *d_h_n, *d_c_n, *d_cells, *h0, *c0, *y, *gates;
  const A *cells, *hidden, *hh;
  S *d_gates, *d_hh, *d_h, *d_normed, *d_c_normed;
  A* c_now;
  S *d_h0, *d_c0;
  bool recompute;

  BackwardUnits(const RecurrentBackwardArgs& a, int gates_count)
      : layer(a.options, a.gates.shape[0], gates_count),
        d_y(a.d_y.ptr<const S>()),
        d_h_n(a.d_h_n.ptr<const S>()),
        d_c_n(a.d_c_n.ptr<const S>()),
        d_cells(a.d_cells.ptr<const S>()),
        h0(a.h0.ptr<const S>()),
        c0(a.c0.ptr<const S>()),
        y(a.y.ptr<const S>()),
        gates(a.gates.ptr<const S>()),
        cells(a.cells.ptr<const A>()),
        hidden(a.hidden.ptr<const A>()),
        hh(a.hh.ptr<const A>()),
        d_gates(a.d_gates.ptr<S>()),
        d_hh(a.d_hh.ptr<S>()),
        d_h(a.d_h.ptr<S>()),
        d_normed(a.d_normed.ptr<S>()),
        d_c_normed(a.d_c_normed.ptr<S>()),
        c_now(a.c_now.ptr<A>()),
        d_h0(a.d_h0.ptr<S>()),
        d_c0(a.d_c0.ptr<S>()),
        recompute(a.recompute) {}

  // What the cell read and made in step t; product: hh with bias (and norm), read with `recompute`.
  template <class Cell>
  LMKERN_DEVICE void load(int t, int b, std::int64_t row, int u, const A (&product)[Cell::kGates],
                          CellState<Cell, A>& state) const {
    const std::int64_t H = layer.hidden;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      state.gates[g] = to_accumulate(gates[(row * Cell::kGates + g) * H + u]);
    state.h_prev = state.c_prev = state.c_now = state.hidden = A(0);
    const int before = layer.reverse ? t + 1 : t - 1;
    if (!layer.resets(row)) {
      const bool inner = layer.takes_part(before, b);
      const std::int64_t from = inner ? layer.row(before, b) : 0;
      if constexpr (Cell::kReadsH)
        state.h_prev = inner ? to_accumulate(y[from * layer.width + u])
                             : load_optional(h0, static_cast<std::int64_t>(b) * layer.width + u);
      if constexpr (Cell::kHasC)
        state.c_prev =
            inner ? cells[from * H + u] : load_optional(c0, static_cast<std::int64_t>(b) * H + u);
    }
    load_peephole(layer, u, state);
    if (recompute) {
      A copy[Cell::kGates];
      LMKERN_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) copy[g] = product[g];
      state.c_now = state.c_prev;
      Cell::update(state.gates, copy, state.peephole_or_null(), state.c_now);
      state.hidden = copy[Cell::kGates - 1];
    } else {
      if constexpr (Cell::kHasC)  // before zoneout, so not the one that was saved
        state.c_now = state.gates[1] * state.c_prev + state.gates[0] * state.gates[2];
      if constexpr (Cell::kSavesHidden) state.hidden = hidden[row * H + u];
    }
  }

  // The share of dL/dh_t that goes through the cell; `bypass` gets what zoneout passes by.
  LMKERN_DEVICE A through_zoneout_h(std::int64_t row, int u, A gradient, A& bypass) const {
    const std::int64_t at = row * layer.width + u;
    gradient += load_optional(d_y, at);
    bypass = A(0);
    if (!layer.zones_h()) return gradient;
    const A share = layer.share_h(at);
    bypass = layer.resets(row) ? A(0) : share * gradient;
    return (1 - share) * gradient;
  }

  // The cell's gradient from d_act and what the output passed on to c; d_c: of c_t in, of c_{t-1} out.
  template <class Cell>
  LMKERN_DEVICE void update(std::int64_t row, int u, const CellState<Cell, A>& state,
                            A (&d_act)[Cell::kGates], A d_c_read, A (&d_product)[Cell::kGates],
                            A& d_c) const {
    const std::int64_t H = layer.hidden;
    A d_c_now = A(0), bypass = A(0);
    if constexpr (Cell::kHasC) {
      d_c_now = d_c + load_optional(d_cells, row * H + u);
      if (layer.zones_c()) {
        const A share = layer.share_c(row * H + u);
        bypass = share * d_c_now;
        d_c_now = (1 - share) * d_c_now;
      }
      d_c_now += d_c_read;
      if (c_now != nullptr) c_now[row * H + u] = state.c_now;
    }
    Cell::update_backward(state.gates, state.hidden, state.c_prev, state.peephole_or_null(), d_act,
                          d_product, d_c_now);
    if constexpr (Cell::kHasC) d_c = layer.resets(row) ? A(0) : bypass + d_c_now;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      d_gates[(row * Cell::kGates + g) * H + u] = from_accumulate<S>(d_act[g]);
  }

  LMKERN_DEVICE void pad_unit(std::int64_t row, int u, int gate_count) const {
    const std::int64_t H = layer.hidden;
    const S zero = from_accumulate<S>(A(0));
    for (int g = 0; g < gate_count; ++g) {
      const std::int64_t at = (row * gate_count + g) * H + u;
      d_gates[at] = zero;
      if (d_hh != nullptr) d_hh[at] = zero;
      if (d_normed != nullptr) d_normed[at] = zero;
    }
    if (d_c_normed != nullptr) d_c_normed[row * H + u] = zero;
    if (c_now != nullptr) c_now[row * H + u] = A(0);
  }

  // A whole step of a unit, without norm and projection. d_h: what reaches h_t from later steps in,
  // what bypasses W_hh to h_{t-1} out; d_product: dL/dhh_t, zeros where the row takes no part.
  template <class Cell>
  LMKERN_DEVICE void step(int t, int b, int u, A& d_h_carried, A& d_c,
                          A (&d_product)[Cell::kGates]) const {
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) d_product[g] = A(0);
    const bool active = layer.takes_part(t, b);
    if (!active && !layer.has_padding()) return;
    const std::int64_t row = layer.row(t, b), H = layer.hidden;
    if (!active) return pad_unit(row, u, Cell::kGates);
    A bypass, product[Cell::kGates];
    const A gradient = through_zoneout_h(row, u, d_h_carried, bypass);
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      product[g] = recompute ? hh[(row * Cell::kGates + g) * H + u] : A(0);
    CellState<Cell, A> state;
    load<Cell>(t, b, row, u, product, state);
    A d_act[Cell::kGates], d_c_read = A(0), d_h_prev = A(0);
    Cell::output_backward(state.gates, state.c_now, state.h_prev, gradient, d_act, d_c_read,
                          d_h_prev);
    update<Cell>(row, u, state, d_act, d_c_read, d_product, d_c);
    if (d_hh != nullptr) {
      LMKERN_UNROLL
      for (int g = 0; g < Cell::kGates; ++g)
        d_hh[(row * Cell::kGates + g) * H + u] = from_accumulate<S>(d_product[g]);
    }
    d_h_carried = bypass + (layer.resets(row) ? A(0) : d_h_prev);
  }
};

}  // namespace lmkern::cuda
