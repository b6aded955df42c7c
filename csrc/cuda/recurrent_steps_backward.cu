// The per-step path of the recurrent layers (csrc/ops/recurrent.h), backward.
//
// Parallel  as forward (recurrent_steps.cu).
// Traffic   a step: W_hh once, B (2 G H + 6 H) values; two launches, four with a projection.
// Limits    under norm (G + 2) H values must fit in shared memory (LSTM: H <= 9600 in float32).
//
// A step: dL/dh_t from the product of the later step's dL/dhh with W_hh; with a projection its product
// with W_hr; then the cell, and under norm the statistics of the row.
#include "cuda/device/launch.h"
#include "cuda/norm_row.h"
#include "cuda/recurrent_steps.h"
#include "cuda/step_product.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256;

template <class S>
struct StepBackward {
  using A = Accumulate<S>;
  BackwardUnits<S> units;
  StepWorkspace<S> work;
  int s;
};

template <class S>
LMKERN_DEVICE std::int64_t operand_stride(int depth) {
  return SliceShape<S>{0, depth, 0}.operand_stride();
}

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
begin_backward(StepBackward<S> p) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), i = block_y() * kThreads + thread_index();
  if (i < layer.width) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.width + i;
    p.work.h[at] = load_optional(p.units.d_h_n, at);
  }
  if (i < layer.hidden) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.hidden + i;
    p.work.c[at] = load_optional(p.units.d_c_n, at);
  }
}

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
end_backward(StepBackward<S> p) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), i = block_y() * kThreads + thread_index();
  if (i < layer.width && p.units.d_h0 != nullptr) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.width + i;
    p.units.d_h0[at] = from_accumulate<S>(p.work.h[at]);
  }
  if (i < layer.hidden && p.units.d_c0 != nullptr) {
    const std::int64_t at = static_cast<std::int64_t>(b) * layer.hidden + i;
    p.units.d_c0[at] = from_accumulate<S>(p.work.c[at]);
  }
}

// dL/dh_t as it comes from the later step: what bypassed W_hh, and the product with it.
template <class S>
LMKERN_DEVICE Accumulate<S> from_later(const StepBackward<S>& p, int b, int u) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const std::int64_t at = static_cast<std::int64_t>(b) * layer.width + u;
  Accumulate<S> gradient = p.work.h[at];
  if (p.s + 1 >= layer.steps) return gradient;
  Accumulate<S> product = p.work.product[at];
  if (layer.h_mask != nullptr) product *= to_accumulate(layer.h_mask[at]);
  return gradient + product;
}

// What enters the product of this step: dL/dhh_t, but nothing where the step began anew.
template <class S>
LMKERN_DEVICE void put_operand(const StepBackward<S>& p, int t, int b, int at, int depth,
                               Accumulate<S> value) {
  const RecurrentLayer<S>& layer = p.units.layer;
  const bool passes = layer.takes_part(t, b) && !layer.resets(layer.row(t, b));
  p.work.operand[b * operand_stride<S>(depth) + at] =
      from_accumulate<S>(passes ? value : Accumulate<S>(0));
}

// The cell of a unit, without norm and projection. s = -1: only dL/dh_0.
//
// registers: 96, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kThreads, 1)
step_units_backward(StepBackward<S> p) {
  using A = Accumulate<S>;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), u = block_y() * kThreads + thread_index(), H = layer.hidden;
  if (u >= H) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * H + u;
  A d_h = from_later(p, b, u);
  if (p.s >= 0) {
    const int t = layer.time(p.s);
    A d_c = p.work.c[at], d_product[Cell::kGates];
    CellState<Cell, S> state{};
    p.units.template begin<Cell>(t, b, u, state);
    p.units.template step<Cell>(state, u, d_h, d_c, d_product);
    p.work.c[at] = d_c;
    LMKERN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g)
      put_operand(p, t, b, g * H + u, Cell::kGates * H, d_product[g]);
  }
  p.work.h[at] = d_h;
}

// With norm or a projection, before the cell: zoneout's share, and what the projection's product reads.
//
// registers: 48, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 1)
step_hidden_backward(StepBackward<S> p) {
  using A = Accumulate<S>;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), u = block_y() * kThreads + thread_index(), P = layer.width;
  if (u >= P) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * P + u;
  A gradient = from_later(p, b, u), bypass = gradient;
  if (p.s >= 0) {
    const int t = layer.time(p.s);
    const bool active = layer.takes_part(t, b), has_place = active || layer.has_padding();
    const std::int64_t row = has_place ? layer.row(t, b) : 0;
    if (active)
      gradient = p.units.through_zoneout_h(
          row, u, gradient + load_optional(p.units.d_y, row * P + u), bypass);
    else
      gradient = A(0);
    if (layer.w_hr != nullptr) {
      const S narrow = from_accumulate<S>(gradient);
      if (has_place) p.units.d_h[row * P + u] = narrow;
      p.work.projected[b * operand_stride<S>(P) + u] = narrow;
    } else {
      p.work.through[at] = gradient;
    }
  }
  p.work.h[at] = bypass;
}

// The cell of a whole row, with norm or a projection or both. LayerNorm's gradient: with x^ the
// normalised values and d = dL/d(x^), dL/dx = rstd (d - mean(d) - x^ mean(d x^)) over a row.
//
// registers: 168, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kThreads, 1)
step_row_backward(StepBackward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int b = block_x(), H = layer.hidden, wide = kGates * H, t = layer.time(p.s);
  const bool active = layer.takes_part(t, b);
  const bool norm = layer.norm_hh != nullptr, normed_c = layer.norm_c_weight != nullptr;
  if (!active) {
    for (int u = thread_index(); u < H; u += kThreads) {
      if (layer.has_padding()) p.units.pad_unit(layer.row(t, b), u, kGates);
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) put_operand(p, t, b, g * H + u, wide, A(0));
    }
    return;
  }
  const std::int64_t row = layer.row(t, b);
  A* const scratch = shared_memory<A>();  // ten for each warp
  A* const d_normed = scratch + 10 * warp_count();
  A* const c_now = d_normed + wide;
  A* const d_read = c_now + H;
  const A* const through =
      (layer.w_hr != nullptr ? p.work.product : p.work.through) + static_cast<std::int64_t>(b) * H;
  const A* const raw = p.units.hh + (norm || p.units.recompute ? row * wide : 0);
  NormMoments<A> moments{};
  if (norm)
    moments = NormMoments<A>::of_values(wide, layer.eps, scratch, [&](int i) { return raw[i]; });
  const auto normalised = [&](int i) { return moments.normalise(raw[i]); };
  const auto load = [&](int u, CellState<Cell, S>& state) {
    A product[kGates];
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int i = g * H + u;
      product[g] =
          norm ? normalised(i) * to_accumulate(layer.norm_hh[i]) + load_optional(layer.b_hh, i)
          : p.units.recompute ? raw[i]
                              : A(0);
    }
    state.row = row;
    p.units.template read<Cell>(t, b, u, state);
    p.units.template restore<Cell>(product, state);
  };

  NormMoments<A> of_c{};
  A mean_d = A(0), mean_dx = A(0);
  if (normed_c) {
    for (int u = thread_index(); u < H; u += kThreads) {
      CellState<Cell, S> state{};
      load(u, state);
      c_now[u] = state.c_now;
    }
    of_c = NormMoments<A>::of_values(H, layer.eps, scratch + 3 * warp_count(),
                                     [&](int u) { return c_now[u]; });
    A sum_d = A(0), sum_dx = A(0);
    for (int u = thread_index(); u < H; u += kThreads) {
      CellState<Cell, S> state{};
      load(u, state);
      const A x = of_c.normalise(state.c_now);
      const A weight = to_accumulate(layer.norm_c_weight[u]);
      A d_act[kGates], d_normed_c = A(0), d_h_prev;
      Cell::output_backward(state.gates, x * weight + to_accumulate(layer.norm_c_bias[u]),
                            state.h_prev, through[u], d_act, d_normed_c, d_h_prev);
      p.units.d_c_normed[row * H + u] = from_accumulate<S>(d_normed_c);
      const A d = d_normed_c * weight;
      d_read[u] = d;
      sum_d += d;
      sum_dx += d * x;
    }
    mean_d = block_sum(sum_d, scratch + 6 * warp_count()) / A(H);
    mean_dx = block_sum(sum_dx, scratch + 7 * warp_count()) / A(H);
  }

  A sum_d = A(0), sum_dx = A(0);
  for (int u = thread_index(); u < H; u += kThreads) {
    CellState<Cell, S> state{};
    load(u, state);
    A d_act[kGates], d_product[kGates], d_c_read = A(0), d_h_prev = A(0), c_read = state.c_now,
                                        x = A(0);
    if (normed_c) {
      x = of_c.normalise(state.c_now);
      c_read = x * to_accumulate(layer.norm_c_weight[u]) + to_accumulate(layer.norm_c_bias[u]);
    }
    Cell::output_backward(state.gates, c_read, state.h_prev, through[u], d_act, d_c_read, d_h_prev);
    if (normed_c) d_c_read = of_c.rstd * (d_read[u] - mean_d - x * mean_dx);
    p.units.template update<Cell>(u, state, d_act, d_c_read, d_product,
                                  p.work.c[static_cast<std::int64_t>(b) * H + u]);
    if constexpr (Cell::kReadsH)
      if (!layer.resets(row)) p.work.h[static_cast<std::int64_t>(b) * layer.width + u] += d_h_prev;
    LMKERN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int i = g * H + u;
      if (!norm) {
        if (p.units.d_hh != nullptr)
          p.units.d_hh[row * wide + i] = from_accumulate<S>(d_product[g]);
        put_operand(p, t, b, i, wide, d_product[g]);
        continue;
      }
      if (p.units.d_normed != nullptr)
        p.units.d_normed[row * wide + i] = from_accumulate<S>(d_product[g]);
      const A d = d_product[g] * to_accumulate(layer.norm_hh[i]);
      d_normed[i] = d;
      sum_d += d;
      sum_dx += d * normalised(i);
    }
  }
  if (!norm) return;
  mean_d = block_sum(sum_d, scratch + 8 * warp_count()) / A(wide);
  mean_dx = block_sum(sum_dx, scratch + 9 * warp_count()) / A(wide);
  for (int u = thread_index(); u < H; u += kThreads)
    for (int g = 0; g < kGates; ++g) {
      const int i = g * H + u;
      const A d = moments.rstd * (d_normed[i] - mean_d - normalised(i) * mean_dx);
      if (p.units.d_hh != nullptr) p.units.d_hh[row * wide + i] = from_accumulate<S>(d);
      put_operand(p, t, b, i, wide, d);
    }
}

unsigned blocks_of(int units) { return static_cast<unsigned>((units + kThreads - 1) / kThreads); }

template <class S, class Cell>
void run_steps(StepBackward<S> p) {
  using A = Accumulate<S>;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int B = layer.batch, H = layer.hidden, P = layer.width, wide = Cell::kGates * H;
  const bool projects = layer.w_hr != nullptr, rowwise = projects || layer.norm_hh != nullptr;
  const Grid both{
      .x = static_cast<unsigned>(B), .y = blocks_of(H > P ? H : P), .threads = kThreads};
  const Grid outputs{.x = static_cast<unsigned>(B), .y = blocks_of(P), .threads = kThreads};
  const Grid row{
      .x = static_cast<unsigned>(B),
      .threads = kThreads,
      .shared_bytes = sizeof(A) * (static_cast<std::size_t>(wide + 2 * H) + 10 * kThreads / 32)};
  launch<begin_backward<S>>(both, current_stream(), p);
  // One step more than there are, which only brings dL/dh to the initial state.
  const int last = p.units.d_h0 != nullptr ? -1 : 0;
  for (p.s = layer.steps - 1; p.s >= last; --p.s) {
    if (p.s + 1 < layer.steps)
      step_product(layer.w_hh, P, wide, true, p.work.operand, B, p.work.product, layer.tf32);
    if (!rowwise) {
      launch<step_units_backward<S, Cell>>(outputs, current_stream(), p);
      continue;
    }
    launch<step_hidden_backward<S>>(outputs, current_stream(), p);
    if (p.s < 0) break;
    if (projects)
      step_product(layer.w_hr, H, P, true, p.work.projected, B, p.work.product, layer.tf32);
    launch<step_row_backward<S, Cell>>(row, current_stream(), p);
  }
  launch<end_backward<S>>(both, current_stream(), p);
}

}  // namespace

template <class S>
void recurrent_backward_steps(const RecurrentBackwardArgs& a) {
  dispatch_cell<S>(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const BackwardUnits<S> units(a, Cell::kGates);
    const StepWorkspace<S> work(a.workspace.data, units.layer.batch, units.layer.hidden,
                                units.layer.width, Cell::kGates, true, a.options.w_hr.defined());
    run_steps<S, Cell>({units, work, 0});
  });
}

template void recurrent_backward_steps<float>(const RecurrentBackwardArgs&);
template void recurrent_backward_steps<double>(const RecurrentBackwardArgs&);
template void recurrent_backward_steps<bfloat16>(const RecurrentBackwardArgs&);
template void recurrent_backward_steps<float16>(const RecurrentBackwardArgs&);

}  // namespace lmkern::cuda
