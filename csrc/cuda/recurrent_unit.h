// One unit of one row in one step: the cell, forward and backward, with everything that needs no other
// unit (reset, peephole, zoneout, padding). The per-step and the persistent path both stand on it.
#pragma once
#include "cuda/recurrent_layer.h"

namespace lmkern::cuda {

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

  // Reads what no other unit makes in this step.
  template <class Cell>
  LMKERN_DEVICE void begin(int t, int b, int u, CellState<Cell, S>& state) const {
    state.active = layer.takes_part(t, b);
    if (!state.active && !layer.has_padding()) return;
    state.row = layer.row(t, b);
    if (state.active) read(u, state);
  }
  template <class Cell>
  LMKERN_DEVICE void read(int u, CellState<Cell, S>& state) const {
    const std::int64_t H = layer.hidden;
    const S* const gate = gates + state.row * Cell::kGates * H + u;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) state.read_gates[g] = gate[g * H];
    const bool biased = layer.norm_hh == nullptr && layer.b_hh != nullptr;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      state.bias[g] = biased ? layer.b_hh[g * H + u] : from_accumulate<S>(A(0));
    state.read_peepholes(layer, u);
    state.resets = layer.resets(state.row);
  }

  // product: h W_hh^T, without b_hh unless normalised. c: c_{t-1} in, c_t out. Leaves c_t before zoneout in
  // state.c_now, for output().
  template <class Cell>
  LMKERN_DEVICE void update(int u, A (&product)[Cell::kGates], A& c,
                            CellState<Cell, S>& state) const {
    const std::int64_t H = layer.hidden, row = state.row;
    state.widen();
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) product[g] += to_accumulate(state.bias[g]);
    if (state.resets) c = A(0);
    state.c_prev = state.c_now = c;
    state.with_peephole(
        [&](const A* peephole) { Cell::update(state.gates, product, peephole, state.c_now); });
    if (save) {
      S* const gate = gates + row * Cell::kGates * H + u;
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

  // A whole step of a unit after begin(), without norm and projection.
  template <class Cell>
  LMKERN_DEVICE void step(CellState<Cell, S>& state, int u, A (&product)[Cell::kGates], A& h,
                          A& c) const {
    if (!state.active) {
      if (!layer.has_padding()) return;
      pad_unit(state.row, u, Cell::kGates);
      pad_output(state.row, u);
      return;
    }
    update<Cell>(u, product, c, state);
    state.h_prev = state.resets ? A(0) : h;
    emit(state.row, u, Cell::output(state.gates, state.c_now, state.h_prev), h);
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

  // Reads what no other unit makes in this step.
  template <class Cell>
  LMKERN_DEVICE void begin(int t, int b, int u, CellState<Cell, S>& state) const {
    state.active = layer.takes_part(t, b);
    if (!state.active && !layer.has_padding()) return;
    state.row = layer.row(t, b);
    if (!state.active) return;
    state.d_y = d_y != nullptr ? d_y[state.row * layer.width + u] : from_accumulate<S>(A(0));
    read(t, b, u, state);
  }
  // What the cell read and made in step t.
  template <class Cell>
  LMKERN_DEVICE void read(int t, int b, int u, CellState<Cell, S>& state) const {
    const std::int64_t H = layer.hidden, P = layer.width, row = state.row;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      state.read_gates[g] = gates[(row * Cell::kGates + g) * H + u];
    state.read_h_prev = from_accumulate<S>(A(0));
    state.c_prev = state.hidden = A(0);
    const int before = layer.reverse ? t + 1 : t - 1;
    state.resets = layer.resets(row);
    if (!state.resets) {
      const bool inner = layer.takes_part(before, b);
      const std::int64_t from = inner ? layer.row(before, b) : 0;
      if constexpr (Cell::kReadsH) {
        if (inner)
          state.read_h_prev = y[from * P + u];
        else if (h0 != nullptr)
          state.read_h_prev = h0[static_cast<std::int64_t>(b) * P + u];
      }
      if constexpr (Cell::kHasC)
        state.c_prev =
            inner ? cells[from * H + u] : load_optional(c0, static_cast<std::int64_t>(b) * H + u);
    }
    if constexpr (Cell::kSavesHidden)
      if (!recompute) state.hidden = hidden[row * H + u];
    state.read_peepholes(layer, u);
  }
  // The cell as it was in forward. product: hh with bias (and norm), of use with `recompute`.
  template <class Cell>
  LMKERN_DEVICE void restore(const A (&product)[Cell::kGates], CellState<Cell, S>& state) const {
    state.widen();
    state.h_prev = to_accumulate(state.read_h_prev);
    state.c_now = A(0);
    if (recompute) {
      A copy[Cell::kGates];
      LMKERN_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) copy[g] = product[g];
      state.c_now = state.c_prev;
      state.with_peephole(
          [&](const A* peephole) { Cell::update(state.gates, copy, peephole, state.c_now); });
      state.hidden = copy[Cell::kGates - 1];
    } else if constexpr (Cell::kHasC) {  // before zoneout, so not the one that was saved
      state.c_now = state.gates[1] * state.c_prev + state.gates[0] * state.gates[2];
    }
  }

  // The share of dL/dh_t that goes through the cell; `bypass` gets what zoneout passes by.
  LMKERN_DEVICE A through_zoneout_h(std::int64_t row, int u, A gradient, A& bypass) const {
    bypass = A(0);
    if (!layer.zones_h()) return gradient;
    const A share = layer.share_h(row * layer.width + u);
    bypass = layer.resets(row) ? A(0) : share * gradient;
    return (1 - share) * gradient;
  }

  // The cell's gradient from d_act and what the output passed on to c; d_c: of c_t in, of c_{t-1} out.
  template <class Cell>
  LMKERN_DEVICE void update(int u, const CellState<Cell, S>& state, A (&d_act)[Cell::kGates],
                            A d_c_read, A (&d_product)[Cell::kGates], A& d_c) const {
    const std::int64_t H = layer.hidden, row = state.row;
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
    state.with_peephole([&](const A* peephole) {
      Cell::update_backward(state.gates, state.hidden, state.c_prev, peephole, d_act, d_product,
                            d_c_now);
    });
    if constexpr (Cell::kHasC) d_c = state.resets ? A(0) : bypass + d_c_now;
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

  // A whole step of a unit after begin(), without norm and projection. d_h_carried: what reaches h_t from
  // later steps in, what bypasses W_hh to h_{t-1} out; d_product: dL/dhh_t, zeros where the row takes no
  // part.
  template <class Cell>
  LMKERN_DEVICE void step(CellState<Cell, S>& state, int u, A& d_h_carried, A& d_c,
                          A (&d_product)[Cell::kGates]) const {
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) d_product[g] = A(0);
    const std::int64_t row = state.row, H = layer.hidden;
    if (!state.active) {
      if (layer.has_padding()) pad_unit(row, u, Cell::kGates);
      return;
    }
    A product[Cell::kGates];
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      product[g] = recompute ? hh[(row * Cell::kGates + g) * H + u] : A(0);
    restore<Cell>(product, state);
    A bypass;
    const A gradient = through_zoneout_h(row, u, d_h_carried + to_accumulate(state.d_y), bypass);
    A d_act[Cell::kGates], d_c_read = A(0), d_h_prev = A(0);
    Cell::output_backward(state.gates, state.c_now, state.h_prev, gradient, d_act, d_c_read,
                          d_h_prev);
    update<Cell>(u, state, d_act, d_c_read, d_product, d_c);
    if (d_hh != nullptr) {
      LMKERN_UNROLL
      for (int g = 0; g < Cell::kGates; ++g)
        d_hh[(row * Cell::kGates + g) * H + u] = from_accumulate<S>(d_product[g]);
    }
    d_h_carried = bypass + (state.resets ? A(0) : d_h_prev);
  }
};

}  // namespace lmkern::cuda
