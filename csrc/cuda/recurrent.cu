// The launchers of the recurrent ops (csrc/ops/recurrent.h): which path a pass takes, and single steps.
//
// Parallel  single steps: a thread a unit of a row; the products are the caller's.
// Traffic   B (2 G H + 5 H) values, once.
// Limits    single steps take from_x and from_h, not the weights.
#include "cuda/recurrent.h"

#include "core/check.h"
#include "cuda/device/launch.h"
#include "cuda/kernels.h"
#include "cuda/recurrent_cluster.h"
#include "cuda/recurrent_persistent.h"
#include "cuda/recurrent_steps.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

RecurrentPath fastest = RecurrentPath::kCluster;

bool is_empty(const RecurrentOptions& o) { return o.batch == 0 || o.w_hh.shape[0] == 0; }

constexpr int kThreads = 256;

Grid grid_of(std::int64_t batch, std::int64_t hidden) {
  return {.x = static_cast<unsigned>(batch),
          .y = static_cast<unsigned>((hidden + kThreads - 1) / kThreads),
          .threads = kThreads};
}

template <class S>
struct SingleStep {
  using A = Accumulate<S>;
  int hidden;
  const S *from_x, *from_h, *h, *c;
  S *h_next, *y, *c_next, *gates;
  A *cells, *hidden_product;
};

// registers: 48, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kThreads, 1)
single_step(SingleStep<S> p) {
  using A = Accumulate<S>;
  const int b = block_x(), u = block_y() * kThreads + thread_index(), H = p.hidden;
  if (u >= H) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * H + u;
  A gates[Cell::kGates], product[Cell::kGates], c = load_optional(p.c, at);
  LMKERN_UNROLL
  for (int g = 0; g < Cell::kGates; ++g) {
    const std::int64_t gate = (static_cast<std::int64_t>(b) * Cell::kGates + g) * H + u;
    gates[g] = to_accumulate(p.from_x[gate]);
    product[g] = load_optional(p.from_h, gate);
  }
  Cell::update(gates, product, static_cast<const A*>(nullptr), c);
  const S h = from_accumulate<S>(Cell::output(gates, c, load_optional(p.h, at)));
  p.h_next[at] = h;
  if (p.y != nullptr) p.y[at] = h;
  if constexpr (Cell::kHasC) {
    p.c_next[at] = from_accumulate<S>(c);
    if (p.cells != nullptr) p.cells[at] = c;
  }
  if constexpr (Cell::kSavesHidden)
    if (p.hidden_product != nullptr) p.hidden_product[at] = product[Cell::kGates - 1];
  if (p.gates == nullptr) return;
  LMKERN_UNROLL
  for (int g = 0; g < Cell::kGates; ++g)
    p.gates[(static_cast<std::int64_t>(b) * Cell::kGates + g) * H + u] =
        from_accumulate<S>(gates[g]);
}

template <class S>
struct SingleStepBackward {
  using A = Accumulate<S>;
  int hidden;
  const S *d_h, *d_y, *d_c, *gates, *h, *c;
  const A* hidden_product;
  S *d_gates, *d_hh, *d_h_prev, *d_c_prev;
};

// registers: 48, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kThreads, 1)
single_step_backward(SingleStepBackward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const int b = block_x(), u = block_y() * kThreads + thread_index(), H = p.hidden;
  if (u >= H) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * H + u;
  const auto gate_at = [&](int g) { return (static_cast<std::int64_t>(b) * kGates + g) * H + u; };
  A gates[kGates], d_act[kGates], d_product[kGates];
  LMKERN_UNROLL
  for (int g = 0; g < kGates; ++g) gates[g] = to_accumulate(p.gates[gate_at(g)]);
  const A h_prev = load_optional(p.h, at), c_prev = load_optional(p.c, at);
  A c = A(0), hidden = A(0), d_c_read = A(0), d_h_prev = A(0), d_c = load_optional(p.d_c, at);
  if constexpr (Cell::kHasC) c = gates[1] * c_prev + gates[0] * gates[2];
  if constexpr (Cell::kSavesHidden) hidden = p.hidden_product[at];
  const A d_h = load_optional(p.d_h, at) + load_optional(p.d_y, at);
  Cell::output_backward(gates, c, h_prev, d_h, d_act, d_c_read, d_h_prev);
  d_c += d_c_read;
  Cell::update_backward(gates, hidden, c_prev, static_cast<const A*>(nullptr), d_act, d_product,
                        d_c);
  LMKERN_UNROLL
  for (int g = 0; g < kGates; ++g) {
    p.d_gates[gate_at(g)] = from_accumulate<S>(d_act[g]);
    if (p.d_hh != nullptr) p.d_hh[gate_at(g)] = from_accumulate<S>(d_product[g]);
  }
  if (p.d_h_prev != nullptr) p.d_h_prev[at] = from_accumulate<S>(d_h_prev);
  if constexpr (Cell::kHasC) p.d_c_prev[at] = from_accumulate<S>(d_c);
}

}  // namespace

void begin_at(RecurrentPath path) { fastest = path; }

std::int64_t recurrent_workspace(const RecurrentOptions& o, bool backward) {
  if (is_empty(o)) return 0;
  std::int64_t bytes = 0;
  dispatch_float_types(o.w_hh.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    const int gates = gates_of(o.cell), wide = static_cast<int>(o.w_hh.shape[0]);
    const int width = static_cast<int>(o.w_hh.shape[1]), batch = static_cast<int>(o.batch);
    const std::int64_t steps =
        StepWorkspace<S>(nullptr, batch, wide / gates, width, gates, backward, o.w_hr.defined())
            .bytes;
    const std::int64_t resident =
        is_unitwise(o) ? PersistentWorkspace<S>::bytes(backward ? wide : width, batch) : 0;
    bytes = steps > resident ? steps : resident;
  });
  return bytes;
}

void Kernels::recurrent_forward(const RecurrentForwardArgs& a) {
  if (is_empty(a.options)) return;
  dispatch_float_types(a.y.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    if (fastest <= RecurrentPath::kCluster && recurrent_forward_cluster<S>(a)) return;
    if (fastest <= RecurrentPath::kPersistent && recurrent_forward_persistent<S>(a)) return;
    recurrent_forward_steps<S>(a);
  });
}

void Kernels::recurrent_backward(const RecurrentBackwardArgs& a) {
  if (is_empty(a.options)) return;
  dispatch_float_types(a.y.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    if (fastest <= RecurrentPath::kCluster && recurrent_backward_cluster<S>(a)) return;
    if (fastest <= RecurrentPath::kPersistent && recurrent_backward_persistent<S>(a)) return;
    recurrent_backward_steps<S>(a);
  });
}

void Kernels::recurrent_step(const RecurrentStepArgs& a) {
  if (!a.from_x.defined())
    Check("recurrent_step").fail("from_x must be given on a GPU, whose products are the caller's");
  if (a.h_next.numel() == 0) return;
  dispatch_float_types(a.h_next.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = Accumulate<S>;
    const std::int64_t B = a.h_next.shape[0], H = a.h_next.shape[1];
    const SingleStep<S> p{static_cast<int>(H), a.from_x.ptr<const S>(), a.from_h.ptr<const S>(),
                          a.h.ptr<const S>(),  a.c.ptr<const S>(),      a.h_next.ptr<S>(),
                          a.y.ptr<S>(),        a.c_next.ptr<S>(),       a.gates.ptr<S>(),
                          a.cells.ptr<A>(),    a.hidden.ptr<A>()};
    dispatch_cell<S>(a.cell, [&](auto tag) {
      launch<single_step<S, typename decltype(tag)::type>>(grid_of(B, H), current_stream(), p);
    });
  });
}

void Kernels::recurrent_step_backward(const RecurrentStepBackwardArgs& a) {
  if (a.d_b_ih.defined() || a.d_b_hh.defined())
    Check("recurrent_step_backward").fail("d_b_ih and d_b_hh must be absent on a GPU");
  if (a.gates.numel() == 0) return;
  dispatch_float_types(a.gates.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    using A = Accumulate<S>;
    const std::int64_t B = a.gates.shape[0], H = a.gates.shape[1] / gates_of(a.cell);
    const SingleStepBackward<S> p{
        static_cast<int>(H),    a.d_h.ptr<const S>(), a.d_y.ptr<const S>(), a.d_c.ptr<const S>(),
        a.gates.ptr<const S>(), a.h.ptr<const S>(),   a.c.ptr<const S>(),   a.hidden.ptr<const A>(),
        a.d_gates.ptr<S>(),     a.d_hh.ptr<S>(),      a.d_h_prev.ptr<S>(),  a.d_c_prev.ptr<S>()};
    dispatch_cell<S>(a.cell, [&](auto tag) {
      launch<single_step_backward<S, typename decltype(tag)::type>>(grid_of(B, H), current_stream(),
                                                                    p);
    });
  });
}

}  // namespace lmkern::cuda
