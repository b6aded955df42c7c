// The per-step path of the recurrent layers (csrc/ops/recurrent.h), forward.
//
// Parallel  the product: step_product.cu. Then a thread for each unit of each row, or under norm a
//           block for each row, whose statistics need all units.
// Traffic   a step: W_hh once (step_product.cu), B (G H + 4 H) values; two launches, about 2 us each.
// Limits    under norm 2 H values must fit in shared memory (H <= 29000 in float32).
#include "cuda/recurrent_steps.h"

#include "cuda/device/launch.h"
#include "cuda/norm_row.h"
#include "cuda/step_product.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256;

template <class S>
struct StepForward {
  using A = Accumulate<S>;
  ForwardUnits<S> units;
  StepWorkspace<S> work;
  int s;  // of the steps, in the order of the recurrence
};

template <class S>
LMKERN_DEVICE std::int64_t operand_stride(int depth) {
  return SliceShape<S>{0, depth, 0}.operand_stride();
}

// The initial state, and what enters the first product.
//
// registers: 40, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
begin_forward(StepForward<S> p) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), i = block_y() * kThreads + thread_index();
  if (i < layer.width) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.width + i;
    p.work.h[at] = load_optional(p.units.h0, at);
    p.work.operand[b * operand_stride<S>(layer.width) + i] = layer.operand(0, b, i, p.work.h[at]);
  }
  if (i < layer.hidden) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.hidden + i;
    p.work.c[at] = load_optional(p.units.c0, at);
  }
}

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
end_forward(StepForward<S> p) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), i = block_y() * kThreads + thread_index();
  if (i < layer.width) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.width + i;
    p.units.h_n[at] = from_accumulate<S>(p.work.h[at]);
  }
  if (i < layer.hidden && p.units.c_n != nullptr) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.hidden + i;
    p.units.c_n[at] = from_accumulate<S>(p.work.c[at]);
  }
}

// The cell of a unit, without norm and projection.
//
// registers: 64, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kThreads, 1)
step_units(StepForward<S> p) {
  using A = Accumulate<S>;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), u = block_y() * kThreads + thread_index(), H = layer.hidden;
  if (u >= H) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * H + u;
  A product[Cell::kGates];
  LMKERN_UNROLL
  for (int g = 0; g < Cell::kGates; ++g)
    product[g] = p.work.product[(static_cast<std::int64_t>(b) * Cell::kGates + g) * H + u];
  A h = p.work.h[at], c = p.work.c[at];
  CellState<Cell, S> state{};
  p.units.template begin<Cell>(layer.time(p.s), b, u, state);
  p.units.template step<Cell>(state, u, product, h, c);
  p.work.h[at] = h;
  p.work.c[at] = c;
  p.work.operand[b * operand_stride<S>(H) + u] = layer.operand(p.s + 1, b, u, h);
}

// A row that takes no part: zeros, if it has a place, and what may enter its first step.
template <class S>
LMKERN_DEVICE void pad_row_unit(const StepForward<S>& p, std::int64_t row, int b, int u,
                                int gates) {
  const RecurrentLayer<S>& layer = p.units.layer;
  if (row >= 0) p.units.pad_unit(row, u, gates);
  if (layer.w_hr != nullptr) return;  // the rest is done after the projection
  if (row >= 0) p.units.pad_output(row, u);
  p.work.operand[b * operand_stride<S>(layer.width) + u] =
      layer.operand(p.s + 1, b, u, p.work.h[static_cast<std::int64_t>(b) * layer.width + u]);
}

// The cell of a whole row, with norm or a projection or both.
//
// registers: 160, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kThreads, 1)
step_row(StepForward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), H = layer.hidden, wide = kGates * H, t = layer.time(p.s);
  const bool active = layer.takes_part(t, b);
  const std::int64_t row = active || layer.has_padding() ? layer.row(t, b) : -1;
  if (!active) {
    for (int u = thread_index(); u < H; u += kThreads) pad_row_unit(p, row, b, u, kGates);
    return;
  }
  A* const scratch = shared_memory<A>();  // six for each warp
  A* const last_gate = scratch + 6 * warp_count();
  A* const c_now = last_gate + H;
  const A* const raw = p.work.product + static_cast<std::int64_t>(b) * wide;
  const bool norm = layer.norm_hh != nullptr, normed_c = layer.norm_c_weight != nullptr;
  NormMoments<A> moments{};
  if (norm)
    moments = NormMoments<A>::of_values(wide, layer.eps, scratch, [&](int i) { return raw[i]; });

  const auto output = [&](int u, const A(&gates)[kGates], A c_read) {
    A& h = p.work.h[static_cast<std::int64_t>(b) * layer.width + u];
    const A h_prev = Cell::kReadsH && !layer.resets(row) ? h : A(0);
    const A value = Cell::output(gates, c_read, h_prev);
    if (layer.w_hr == nullptr) {
      p.units.emit(row, u, value, h);
      p.work.operand[b * operand_stride<S>(layer.width) + u] = layer.operand(p.s + 1, b, u, h);
      return;
    }
    const S narrow = from_accumulate<S>(value);
    p.work.projected[b * operand_stride<S>(H) + u] = narrow;
    if (p.units.unprojected != nullptr) p.units.unprojected[row * H + u] = narrow;
  };

  for (int u = thread_index(); u < H; u += kThreads) {
    A product[kGates];
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int i = g * H + u;
      product[g] = raw[i];
      if (!norm) continue;
      if (p.units.hh != nullptr) p.units.hh[row * wide + i] = raw[i];
      product[g] = moments.normalise(raw[i]) * to_accumulate(layer.norm_hh[i]) +
                   load_optional(layer.b_hh, i);
    }
    CellState<Cell, S> state{};
    state.row = row;
    p.units.template read<Cell>(u, state);
    p.units.template update<Cell>(u, product, p.work.c[static_cast<std::int64_t>(b) * H + u],
                                  state);
    if (normed_c) {
      last_gate[u] = state.gates[kGates - 1];
      c_now[u] = state.c_now;
    } else {
      output(u, state.gates, state.c_now);
    }
  }
  if (!normed_c) return;
  const auto of_c = NormMoments<A>::of_values(H, layer.eps, scratch + 3 * warp_count(),
                                              [&](int u) { return c_now[u]; });
  for (int u = thread_index(); u < H; u += kThreads) {
    A gates[kGates] = {};
    gates[kGates - 1] = last_gate[u];  // the only one that an LSTM's output reads
    output(u, gates,
           of_c.normalise(c_now[u]) * to_accumulate(layer.norm_c_weight[u]) +
               to_accumulate(layer.norm_c_bias[u]));
  }
}

// After the projection's product: h_t.
//
// registers: 40, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
step_output(StepForward<S> p) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), u = block_y() * kThreads + thread_index(), t = layer.time(p.s);
  if (u >= layer.width) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * layer.width + u;
  if (layer.takes_part(t, b))
    p.units.emit(layer.row(t, b), u, p.work.product[at], p.work.h[at]);
  else if (layer.has_padding())
    p.units.pad_output(layer.row(t, b), u);
  p.work.operand[b * operand_stride<S>(layer.width) + u] =
      layer.operand(p.s + 1, b, u, p.work.h[at]);
}

unsigned blocks_of(int units) { return static_cast<unsigned>((units + kThreads - 1) / kThreads); }

template <class S, class Cell>
void run_steps(StepForward<S> p) {
  using A = Accumulate<S>;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int B = layer.batch, H = layer.hidden, P = layer.width, wide = Cell::kGates * H;
  const bool projects = layer.w_hr != nullptr, rowwise = projects || layer.norm_hh != nullptr;
  const Grid both{
      .x = static_cast<unsigned>(B), .y = blocks_of(H > P ? H : P), .threads = kThreads};
  const Grid units{.x = static_cast<unsigned>(B), .y = blocks_of(H), .threads = kThreads};
  const Grid outputs{.x = static_cast<unsigned>(B), .y = blocks_of(P), .threads = kThreads};
  const Grid row{.x = static_cast<unsigned>(B),
                 .threads = kThreads,
                 .shared_bytes = sizeof(A) * (static_cast<std::size_t>(2 * H) + 6 * kThreads / 32)};
  launch<begin_forward<S>>(both, current_stream(), p);
  for (p.s = 0; p.s < layer.steps; ++p.s) {
    step_product(layer.w_hh, wide, P, false, p.work.operand, B, p.work.product, layer.tf32);
    if (!rowwise) {
      launch<step_units<S, Cell>>(units, current_stream(), p);
      continue;
    }
    launch<step_row<S, Cell>>(row, current_stream(), p);
    if (!projects) continue;
    step_product(layer.w_hr, P, H, false, p.work.projected, B, p.work.product, layer.tf32);
    launch<step_output<S>>(outputs, current_stream(), p);
  }
  launch<end_forward<S>>(both, current_stream(), p);
}

}  // namespace

template <class S>
void recurrent_forward_steps(const RecurrentForwardArgs& a) {
  dispatch_cell<S>(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const ForwardUnits<S> units(a, Cell::kGates);
    const StepWorkspace<S> work(a.workspace.data, units.layer.batch, units.layer.hidden,
                                units.layer.width, Cell::kGates, false, a.options.w_hr.defined());
    run_steps<S, Cell>({units, work, 0});
  });
}

template void recurrent_forward_steps<float>(const RecurrentForwardArgs&);
template void recurrent_forward_steps<double>(const RecurrentForwardArgs&);
template void recurrent_forward_steps<bfloat16>(const RecurrentForwardArgs&);
template void recurrent_forward_steps<float16>(const RecurrentForwardArgs&);

}  // namespace lmkern::cuda
