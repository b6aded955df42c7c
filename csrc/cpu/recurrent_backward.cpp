// Backward pass of the recurrent layers (csrc/ops/recurrent.h).
//
// Parallel  RecurrentPlan, as forward.
// Traffic   per step W_hh once, saved gates and cells once in, d_gates once out. Step t's product
//           d_gates_t W_hh ends in the epilogue that computes d_gates_{t-1} for the same units,
//           while d_h_{t-1} is still in registers: one barrier per step.
// Limits    d_gates is rounded to the storage type for the caller's products over all steps, but
// the
//           recurrence itself goes on in the accumulate type.
#include "cells/lstm.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/recurrent.h"
#include "cpu/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S>
struct BackwardPass {
  using T = Accumulate<S>;
  using Cell = cells::Lstm<VecMath<T>>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kVecs = 2;
  static constexpr std::int64_t kLane = kLanes<T>;
  static constexpr std::int64_t kUnits = kVecs * kLane;  // units of a panel

  const LstmBackwardArgs& a;
  const std::int64_t steps = a.gates.shape[0], batch = a.gates.shape[1], hidden = a.w_hh.shape[1];
  const std::int64_t panels = (hidden + kUnits - 1) / kUnits, padded = panels * kUnits;
  const std::int64_t depth = kGates * hidden;
  const RecurrentPlan plan{steps, batch, panels,
                           panels * depth * kUnits * static_cast<std::int64_t>(sizeof(T)),
                           2 * batch * depth * hidden};
  T* packed;      // [panels][4H][units]
  T* d_gates[2];  // [B][4H], of this and the later step
  T* d_c;         // [B][padded]
  T* partial;     // [threads][B][units], for multiply_panel

  explicit BackwardPass(const LstmBackwardArgs& args) : a(args) {
    const std::int64_t weights = panels * depth * kUnits, tiles = plan.threads * batch * kUnits;
    packed = static_cast<T*>(
        thread_scratch((weights + batch * (2 * depth + padded) + tiles) * sizeof(T)));
    d_gates[0] = packed + weights;
    d_gates[1] = d_gates[0] + batch * depth;
    d_c = d_gates[1] + batch * depth;
    partial = d_c + batch * padded;
  }

  // Valid units of vector v of a panel: 0 to kLane.
  std::int64_t units_of(std::int64_t panel, int v) const {
    const std::int64_t left = hidden - panel * kUnits - v * kLane;
    return left < 0 ? 0 : left < kLane ? left : kLane;
  }

  void pack(std::int64_t panel) const {
    const S* from = a.w_hh.ptr<const S>() + panel * kUnits;
    T* to = packed + panel * depth * kUnits;
    for (std::int64_t k = 0; k < depth; ++k)
      for (int v = 0; v < kVecs; ++v)
        store(to + k * kUnits + v * kLane,
              load_n(from + k * hidden + v * kLane, units_of(panel, v)));
  }

  static Vec<T> load_optional(const TensorView& view, std::int64_t at, std::int64_t n) {
    return view.defined() ? load_n(view.ptr<const S>() + at, n) : Vec<T>{};
  }

  // tiles: this thread's part of `partial`.
  void step(std::int64_t s, Range rows, Range own, T* tiles) const {
    const std::int64_t t = a.reverse ? steps - 1 - s : s;
    const bool last = s + 1 == steps;
    const T* const later = d_gates[(s + 1) & 1] + rows.begin * depth;
    for (std::int64_t p = own.begin; p < own.end; ++p)
      multiply_panel<kVecs, T>(
          rows.end - rows.begin, last ? 0 : depth, later, depth, packed + p * depth * kUnits, tiles,
          [&](std::int64_t row, auto& d_h, auto tile) {
            for (int m = 0; m < decltype(tile)::value; ++m)
              for (int v = 0; v < kVecs; ++v)
                if (const std::int64_t n = units_of(p, v); n > 0) {
                  const std::int64_t b = rows.begin + row + m, u = p * kUnits + v * kLane;
                  if (last) d_h[m][v] = load_optional(a.d_h_n, b * hidden + u, n);
                  unit_gradient(s, t, b, u, n, d_h[m][v]);
                }
          });
  }

  // The cell's gradient for n units from u on, at step s (time t); d_h is what the later step gave.
  void unit_gradient(std::int64_t s, std::int64_t t, std::int64_t b, std::int64_t u, std::int64_t n,
                     Vec<T> d_h) const {
    const std::int64_t at = (t * batch + b) * hidden + u, gates_at = (t * batch + b) * depth + u;
    const std::int64_t before = at + (a.reverse ? batch : -batch) * hidden;
    const Vec<T> c_prev =
        s > 0 ? load_n(a.cells.ptr<const T>() + before, n) : load_optional(a.c0, b * hidden + u, n);
    const Vec<T> c = load_n(a.cells.ptr<const T>() + at, n);
    T* const d_c_at = d_c + b * padded + u;
    Vec<T> gates[kGates], d_c_now = load(d_c_at);
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g)
      gates[g] = load_n(a.gates.ptr<const S>() + gates_at + g * hidden, n);
    Cell::backward(gates, c_prev, c, d_h + load_optional(a.d_y, at, n), d_c_now);
    store(d_c_at, d_c_now);
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      store_n(d_gates[s & 1] + b * depth + u + g * hidden, gates[g], n);
      store_n(a.d_gates.ptr<S>() + gates_at + g * hidden, gates[g], n);
    }
  }

  void run() const {
    Barrier barrier;
    parallel(plan.threads, [&](int thread, int threads) {
      const Range rows = plan.rows_of(thread, threads), own = plan.panels_of(thread, threads);
      const Range to_pack = thread_range(panels, 1, thread, threads);
      for (std::int64_t p = to_pack.begin; steps > 1 && p < to_pack.end; ++p) pack(p);
      for (std::int64_t b = rows.begin; b < rows.end; ++b)
        for (std::int64_t p = own.begin; p < own.end; ++p)
          for (int v = 0; v < kVecs; ++v) {
            const std::int64_t u = p * kUnits + v * kLane;
            store(d_c + b * padded + u, load_optional(a.d_c_n, b * hidden + u, units_of(p, v)));
          }
      barrier.wait(threads);
      for (std::int64_t s = steps - 1; s >= 0; --s) {
        step(s, rows, own, partial + thread * batch * kUnits);
        if (!plan.by_rows) barrier.wait(threads);
      }
      if (!a.d_c0.defined()) return;
      for (std::int64_t b = rows.begin; b < rows.end; ++b)
        for (std::int64_t p = own.begin; p < own.end; ++p)
          for (int v = 0; v < kVecs; ++v) {
            const std::int64_t u = p * kUnits + v * kLane;
            store_n(a.d_c0.ptr<S>() + b * hidden + u, load(d_c + b * padded + u), units_of(p, v));
          }
    });
  }
};

}  // namespace

void lstm_backward(const LstmBackwardArgs& a) {
  dispatch_float_types(a.gates.dtype,
                       [&](auto tag) { BackwardPass<typename decltype(tag)::type>(a).run(); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
