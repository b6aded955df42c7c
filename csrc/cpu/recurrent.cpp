// Forward pass of the recurrent layers (csrc/ops/recurrent.h).
//
// Parallel  RecurrentPlan: a thread owns rows of the batch or panels of hidden units, for all
// steps. Traffic   per step W_hh once (from L2 if a thread's share fits there: read for each tile
// of rows),
//           gates once in and, when training, once out. At B = 1 bound by reading W_hh, from about
//           B = 8 on by FMA.
// Limits    W_hh is packed at each call, in panels of one vector of units with their gates
// adjacent,
//           so that a tile's epilogue has all gates of a unit in registers. That costs about two
//           time steps at B = 1. A pack cached across calls would go stale unseen when weights are
//           written through `.data`, which does not count up a tensor's version.
#include "cpu/recurrent.h"
#include "cells/lstm.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S>
struct ForwardPass {
  using T = Accumulate<S>;
  using Cell = cells::Lstm<VecMath<T>>;
  static constexpr int kGates = Cell::kGates;
  static constexpr std::int64_t kUnits = kLanes<T>;  // units of a panel
  static constexpr std::int64_t kPanelRow = kGates * kUnits;

  const LstmForwardArgs& a;
  const std::int64_t steps = a.gates.shape[0], batch = a.gates.shape[1], hidden = a.w_hh.shape[1];
  const std::int64_t panels = (hidden + kUnits - 1) / kUnits, padded = panels * kUnits;
  const RecurrentPlan plan{steps, batch, panels,
                           panels * hidden * kPanelRow * static_cast<std::int64_t>(sizeof(T)),
                           2 * batch * kGates * hidden * hidden};
  T* packed;   // [panels][H][gates][units]
  T* h[2];     // [B][padded], before and after a step
  T* c;        // [B][padded]
  T* partial;  // [threads][B][gates][units], for multiply_panel

  explicit ForwardPass(const LstmForwardArgs& args) : a(args) {
    const std::int64_t weights = panels * hidden * kPanelRow, state = batch * padded;
    const std::int64_t tiles = plan.threads * batch * kPanelRow;
    packed = static_cast<T*>(thread_scratch((weights + 3 * state + tiles) * sizeof(T)));
    h[0] = packed + weights;
    h[1] = h[0] + state;
    c = h[1] + state;
    partial = c + state;
  }

  std::int64_t units_of(std::int64_t panel) const {
    return panel + 1 < panels ? kUnits : hidden - panel * kUnits;
  }

  // Whether step s has a product to do: the first one has none if it starts from zeros.
  bool recurs(std::int64_t s) const { return s > 0 || a.h0.defined(); }

  void pack(std::int64_t panel) const {
    for (int g = 0; g < kGates; ++g)
      transpose_into(a.w_hh.ptr<const S>() + (g * hidden + panel * kUnits) * hidden, hidden,
                     units_of(panel), kUnits, hidden,
                     packed + panel * hidden * kPanelRow + g * kUnits, kPanelRow);
  }

  void load_state(Range rows, Range own) const {
    for (std::int64_t b = rows.begin; b < rows.end; ++b)
      for (std::int64_t p = own.begin; p < own.end; ++p) {
        const std::int64_t u = p * kUnits, n = units_of(p), from = b * hidden + u,
                           to = b * padded + u;
        store(h[0] + to, a.h0.defined() ? load_n(a.h0.ptr<const S>() + from, n) : Vec<T>{});
        store(c + to, a.c0.defined() ? load_n(a.c0.ptr<const S>() + from, n) : Vec<T>{});
      }
  }

  void store_state(Range rows, Range own) const {
    for (std::int64_t b = rows.begin; b < rows.end; ++b)
      for (std::int64_t p = own.begin; p < own.end; ++p) {
        const std::int64_t u = p * kUnits, n = units_of(p), to = b * hidden + u,
                           from = b * padded + u;
        store_n(a.h_n.ptr<S>() + to, load(h[steps % 2] + from), n);
        store_n(a.c_n.ptr<S>() + to, load(c + from), n);
      }
  }

  void step(std::int64_t s, Range rows, Range own, T* tiles) const {
    const std::int64_t t = a.reverse ? steps - 1 - s : s;
    const T* h_prev = h[s % 2];
    T* h_next = h[(s + 1) % 2];
    S* const gates = a.gates.ptr<S>() + t * batch * kGates * hidden;
    S* const y = a.y.ptr<S>() + t * batch * hidden;
    T* const cells = a.cells.defined() ? a.cells.ptr<T>() + t * batch * hidden : nullptr;
    for (std::int64_t p = own.begin; p < own.end; ++p) {
      const std::int64_t u = p * kUnits, n = units_of(p);
      const T* panel = packed + p * hidden * kPanelRow;
      multiply_panel<kGates, T>(
          rows.end - rows.begin, recurs(s) ? hidden : 0, h_prev + rows.begin * padded, padded,
          panel, tiles, [&](std::int64_t row, auto& acc, auto tile) {
            constexpr int M = decltype(tile)::value;
            const std::int64_t b0 = rows.begin + row;
            for (int m = 0; m < M; ++m) {
              const std::int64_t b = b0 + m, at = b * hidden + u;
              S* const gate = gates + b * kGates * hidden + u;
              Vec<T> activation[kGates], c_next, h_now;
              LMKERN_UNROLL
              for (int g = 0; g < kGates; ++g)
                activation[g] = acc[m][g] + load_n(gate + g * hidden, n);
              Cell::forward(activation, load(c + b * padded + u), c_next, h_now);
              store(c + b * padded + u, c_next);
              store(h_next + b * padded + u, h_now);
              store_n(y + at, h_now, n);
              if (cells != nullptr) {
                store_n(cells + at, c_next, n);
                LMKERN_UNROLL
                for (int g = 0; g < kGates; ++g) store_n(gate + g * hidden, activation[g], n);
              }
            }
          });
    }
  }

  void run() const {
    Barrier barrier;
    parallel(plan.threads, [&](int thread, int threads) {
      const Range rows = plan.rows_of(thread, threads), own = plan.panels_of(thread, threads);
      const Range to_pack = thread_range(panels, 1, thread, threads);
      for (std::int64_t p = to_pack.begin; recurs(steps - 1) && p < to_pack.end; ++p) pack(p);
      load_state(rows, own);
      barrier.wait(threads);
      for (std::int64_t s = 0; s < steps; ++s) {
        step(s, rows, own, partial + thread * batch * kPanelRow);
        if (!plan.by_rows) barrier.wait(threads);
      }
      store_state(rows, own);
    });
  }
};

}  // namespace

void lstm_forward(const LstmForwardArgs& a) {
  dispatch_float_types(a.gates.dtype,
                       [&](auto tag) { ForwardPass<typename decltype(tag)::type>(a).run(); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
