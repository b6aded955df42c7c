// The recurrent layers by clusters (csrc/ops/recurrent.h, cuda/recurrent_cluster.h).
//
// Parallel  a cluster a slice of the batch, a block of it some units with all their gates (rows of W_hh,
//           forward and backward); in a block the 8 warps divide tiles of 16 rows and, where those are
//           fewer, the blocks that an operand comes from; then a thread takes (unit, row) pairs.
// Traffic   a step, LSTM, H = 512, bf16, 16 blocks, 8 rows: 128 KiB of weights from shared memory (1024
//           cycles at 128 bytes, 0.6 us); forward 8 KiB of h into each block, backward 16 KiB of partial
//           sums; one mbarrier wait instead of a barrier through the L2 cache (1 us).
// Limits    without norm and projection; the weights of a layer must fit in the shared memory of a
//           cluster of at most 16 blocks with at most 128 rows each (LSTM: H <= 512 in 16 bits).
//
// Forward each block sends its units' h to all (h is small). Backward each multiplies dL/dhh of its own
// gates with its rows of W_hh, which gives a part of dL/dh of every unit, and sends to each block the
// part for its units: half as many bytes as all of dL/dhh, and it is added in the order of the blocks.
//
// A slot of a buffer is written again two steps later. Whoever sends then has heard from all others what
// they made of the step in between, and those had used the slot before.
#include "cuda/recurrent_cluster.h"

#include "cuda/cluster_block.h"
#include "cuda/device/launch.h"
#include "cuda/recurrent_unit.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

template <class S>
struct ClusterForward {
  ForwardUnits<S> units;
  ClusterPlan plan;
};

// registers: 255, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kProductThreads, 1)
cluster_forward(ClusterForward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const RecurrentLayer<S>& layer = p.units.layer;
  const ClusterBlock<S> block(layer, p.plan, kGates, false);
  const ClusterLayout<S>& layout = block.layout;
  const int H = layer.hidden, stride = layout.units + layout.kPad,
            places = layout.units * layout.rows;
  A* const h = shared_memory<A>(layout.states());
  A* const c = h + places;
  const SliceProduct<S> product(layout.shape(), shared_memory<A>(layout.scratch()), layer.tf32);

  const auto write = [&](int turn, int local, int b, S value) {
    block.template outbox<S>(turn, 0)[b * stride + local] = value;
  };
  // Places without a unit or row, and the pad, stay zeros in both slots.
  for (int i = thread_index(); i < 2 * layout.message_elements(); i += kProductThreads)
    block.template outbox<S>(0, 0)[i] = from_accumulate<S>(A(0));
  block_barrier();
  for (int i = thread_index(); i < places; i += kProductThreads) {
    if (!block.exists(i)) continue;
    const int local = i % layout.units, b = i / layout.units;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    h[i] = load_optional(p.units.h0, at);
    c[i] = Cell::kHasC ? load_optional(p.units.c0, at) : A(0);
    write(0, local, b, layer.operand(0, block.b0 + b, block.u0 + local, h[i]));
  }
  if (layer.steps > 0) block.template send<S>(0);

  const int mine = thread_index();
  CellState<Cell, S> state{};
  for (int s = 0; s < layer.steps; ++s) {
    // What does not come from other units is loaded while those are waited for; of a thread's first place.
    if (block.exists(mine))
      p.units.template begin<Cell>(layer.time(s), block.b0 + mine / layout.units,
                                   block.u0 + mine % layout.units, state);
    block.receive(s);
    WarpTile<S> acc;
    acc.clear();
    if (product.tile >= 0)
      for (int from = product.split; from < layout.blocks; from += product.splits)
        acc.template multiply<false>({block.weights +
                                          product.tile * kTileRows * layout.weight_stride() +
                                          from * layout.units,
                                      block.template inbox<S>(s, from), layout.weight_stride(),
                                      stride, layout.units, layout.rows, layer.tf32});
    product.store(acc);
    block_barrier();
    for (int i = mine; i < places; i += kProductThreads) {
      if (!block.exists(i)) continue;
      const int local = i % layout.units, b = i / layout.units, u = block.u0 + local;
      if (i != mine) p.units.template begin<Cell>(layer.time(s), block.b0 + b, u, state);
      A hh[kGates];
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) hh[g] = product.sum(g * layout.units + local, b);
      p.units.template step<Cell>(state, u, hh, h[i], c[i]);
      write(s + 1, local, b, layer.operand(s + 1, block.b0 + b, u, h[i]));
    }
    if (s + 1 < layer.steps) block.template send<S>(s + 1);
  }
  for (int i = thread_index(); i < places; i += kProductThreads) {
    if (!block.exists(i)) continue;
    const int local = i % layout.units, b = i / layout.units;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    p.units.h_n[at] = from_accumulate<S>(h[i]);
    if constexpr (Cell::kHasC) p.units.c_n[at] = from_accumulate<S>(c[i]);
  }
  cluster_barrier();  // what was sent has been read from here
}

template <class S>
struct ClusterBackward {
  BackwardUnits<S> units;
  ClusterPlan plan;
};

// registers: 255, spills: 0
template <class S, class Cell>
LMKERN_KERNEL(kProductThreads, 1)
cluster_backward(ClusterBackward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const RecurrentLayer<S>& layer = p.units.layer;
  const ClusterBlock<S> block(layer, p.plan, kGates, true);
  const ClusterLayout<S>& layout = block.layout;
  const int H = layer.hidden, places = layout.units * layout.rows;
  A* const d_h = shared_memory<A>(layout.states());
  A* const d_c = d_h + places;
  S* const operand = shared_memory<S>(layout.scratch());  // [rows][operand_stride]

  for (int i = thread_index(); i < layout.rows * layout.operand_stride(); i += kProductThreads)
    operand[i] = from_accumulate<S>(A(0));
  for (int i = thread_index(); i < places; i += kProductThreads) {
    if (!block.exists(i)) continue;
    const int local = i % layout.units, b = i / layout.units;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    d_h[i] = load_optional(p.units.d_h_n, at);
    d_c[i] = Cell::kHasC ? load_optional(p.units.d_c_n, at) : A(0);
  }
  block_barrier();

  // One step more than there are, which only brings dL/dh to the initial state.
  const int last = p.units.d_h0 != nullptr ? -1 : 0, mine = thread_index();
  CellState<Cell, S> state{};
  for (int s = layer.steps - 1, turn = 0; s >= last; --s, ++turn) {
    if (s >= 0 && block.exists(mine))
      p.units.template begin<Cell>(layer.time(s), block.b0 + mine / layout.units,
                                   block.u0 + mine % layout.units, state);
    if (turn > 0) block.receive(turn - 1);
    for (int i = mine; i < places; i += kProductThreads) {
      if (!block.exists(i)) continue;
      const int local = i % layout.units, b = i / layout.units, u = block.u0 + local;
      if (turn > 0) {
        A gradient = A(0);
        for (int from = 0; from < layout.blocks; ++from)
          gradient += block.template inbox<A>(turn - 1, from)[local * layout.rows + b];
        if (layer.h_mask != nullptr)
          gradient *= to_accumulate(layer.h_mask[static_cast<std::int64_t>(block.b0 + b) * H + u]);
        d_h[i] += gradient;
      }
      if (s < 0) continue;
      if (i != mine) p.units.template begin<Cell>(layer.time(s), block.b0 + b, u, state);
      A d_product[kGates];
      p.units.template step<Cell>(state, u, d_h[i], d_c[i], d_product);
      // Where the step began anew, nothing of it reaches the state before.
      const bool passes = state.active && !state.resets;
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g)
        operand[b * layout.operand_stride() + g * layout.units + local] =
            from_accumulate<S>(passes ? d_product[g] : A(0));
    }
    if (s == last) break;
    block_barrier();
    // Rows of the product: all units; its depth: the own gates.
    for (int tile = warp_index(); tile < layout.blocks * layout.units / kTileRows;
         tile += kProductWarps) {
      WarpTile<S> acc;
      acc.clear();
      acc.template multiply<true>({block.weights + tile * kTileRows, operand,
                                   layout.weight_stride(), layout.operand_stride(),
                                   layout.tile_rows(), layout.rows, layer.tf32});
      const int to = tile * kTileRows / layout.units, first = tile * kTileRows % layout.units;
      A* const part = block.template outbox<A>(turn, to) + first * layout.rows;
      LMKERN_UNROLL
      for (int j = 0; j < kTileColumns / 8; ++j) {
        if (8 * j >= layout.rows) break;
        LMKERN_UNROLL
        for (int i = 0; i < 4; ++i)
          part[acc.row(i) * layout.rows + acc.column(j, i)] = acc.acc[j][i];
      }
    }
    block.template send<A>(turn);
  }
  for (int i = thread_index(); i < places; i += kProductThreads) {
    if (!block.exists(i)) continue;
    const int local = i % layout.units, b = i / layout.units;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    if (p.units.d_h0 != nullptr) p.units.d_h0[at] = from_accumulate<S>(d_h[i]);
    if constexpr (Cell::kHasC)
      if (p.units.d_c0 != nullptr) p.units.d_c0[at] = from_accumulate<S>(d_c[i]);
  }
  cluster_barrier();  // what was sent has been read from here
}

// Whether the path was taken. `params`: of a plan.
template <auto kKernel, class S, class MakeParams>
bool launch_clusters(int hidden, int gates, int batch, bool backward, const MakeParams& params) {
  ClusterPlan plan = plan_cluster<S>(hidden, gates, batch, backward, 0);
  for (int attempt = 0;; ++attempt) {
    if (plan.blocks == 0) return false;
    const ClusterLayout<S> layout{plan.blocks, plan.units, plan.rows, gates, backward};
    const int slices = (batch + plan.rows - 1) / plan.rows;
    const Grid grid{.x = static_cast<unsigned>(slices * plan.blocks),
                    .threads = kProductThreads,
                    .shared_bytes = layout.bytes(),
                    .cluster = plan.blocks};
    const int active = active_clusters<kKernel>(grid);
    if (active == 0) return false;
    // Fewer run at a time than there are multiprocessors for: a cluster's lie in one part of the device.
    if (attempt == 0 && active < slices) {
      plan = plan_cluster<S>(hidden, gates, batch, backward, active);
      continue;
    }
    launch<kKernel>(grid, current_stream(), params(plan));
    return true;
  }
}

}  // namespace

template <class S>
bool recurrent_forward_cluster(const RecurrentForwardArgs& a) {
  if (!is_unitwise(a.options)) return false;
  bool taken = false;
  dispatch_cell<S>(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const ForwardUnits<S> units(a, Cell::kGates);
    taken = launch_clusters<cluster_forward<S, Cell>, S>(
        units.layer.hidden, Cell::kGates, units.layer.batch, false,
        [&](const ClusterPlan& plan) { return ClusterForward<S>{units, plan}; });
  });
  return taken;
}

template <class S>
bool recurrent_backward_cluster(const RecurrentBackwardArgs& a) {
  if (!is_unitwise(a.options)) return false;
  bool taken = false;
  dispatch_cell<S>(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const BackwardUnits<S> units(a, Cell::kGates);
    taken = launch_clusters<cluster_backward<S, Cell>, S>(
        units.layer.hidden, Cell::kGates, units.layer.batch, true,
        [&](const ClusterPlan& plan) { return ClusterBackward<S>{units, plan}; });
  });
  return taken;
}

template bool recurrent_forward_cluster<float>(const RecurrentForwardArgs&);
template bool recurrent_forward_cluster<double>(const RecurrentForwardArgs&);
template bool recurrent_forward_cluster<bfloat16>(const RecurrentForwardArgs&);
template bool recurrent_forward_cluster<float16>(const RecurrentForwardArgs&);
template bool recurrent_backward_cluster<float>(const RecurrentBackwardArgs&);
template bool recurrent_backward_cluster<double>(const RecurrentBackwardArgs&);
template bool recurrent_backward_cluster<bfloat16>(const RecurrentBackwardArgs&);
template bool recurrent_backward_cluster<float16>(const RecurrentBackwardArgs&);

}  // namespace lmkern::cuda
