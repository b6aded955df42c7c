// The persistent path of the recurrent layers (csrc/ops/recurrent.h), forward.
//
// Parallel  a group of blocks a slice of the batch, a block some units, with all their gates; within it
//           the 8 warps divide the product (slice_product.h), then a thread takes (unit, row) pairs.
// Traffic   a step: the block's rows of W_hh from shared memory (LSTM, H = 1024, bf16: 64 KiB at 128
//           bytes a cycle, 0.3 us), the slice's h from the L2 cache once for each block of the group
//           (B = 64: 128 blocks x 128 KiB, 3 us at 5.5 TB/s; its latency once if it fits in shared memory
//           whole, else four chunks of it are under way at a time), x' in, before the barrier is waited
//           for, and y, gates out; one barrier, about 1 us. Against it, cuDNN's persistent kernel takes
//           2 us a step at H = 768, B = 16.
// Limits    without norm and projection, where the weights fit (recurrent_persistent.h). h is rounded
//           to the storage type for the product, as tensor cores take it; what a unit carries is not.
#include "cuda/recurrent_persistent.h"

#include "cuda/device/group_barrier.h"
#include "cuda/resident_weights.h"
#include "cuda/zero.h"

namespace lmkern::cuda {
namespace {

template <class S>
struct PersistentForward {
  using A = Accumulate<S>;
  ForwardUnits<S> units;
  PersistentPlan plan;
  PersistentWorkspace<S> work;
  int first_slice;
};

// (Only the LSTM of double spills.)
// registers: 255, spills: 96
template <class S, class Cell>
LMKERN_KERNEL(kProductThreads, 1)
persistent_forward(PersistentForward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int H = layer.hidden, slice = p.first_slice + block_x() / p.plan.group;
  const int u0 = block_x() % p.plan.group * p.plan.units, b0 = slice * p.plan.rows;
  const int units = H - u0 < p.plan.units ? H - u0 : p.plan.units;
  const int rows = layer.batch - b0 < p.plan.rows ? layer.batch - b0 : p.plan.rows;
  // The plan's extents, which are the same in every block, place the memory.
  const SliceShape<S> placed{kGates * p.plan.units, layer.width, p.plan.rows, p.plan.chunk};
  S* const weights = shared_memory<S>();
  S* const stages = shared_memory<S>(placed.weight_bytes());
  A* const partial = shared_memory<A>(placed.weight_bytes() + placed.staged_bytes());
  A* const h =
      shared_memory<A>(placed.weight_bytes() + placed.staged_bytes() + placed.partial_bytes());
  A* const c = h + p.plan.units * p.plan.rows;
  const SliceProduct<S> product({kGates * p.plan.units, layer.width, rows, p.plan.chunk}, partial,
                                layer.tf32);
  const std::int64_t stride = product.shape.operand_stride();

  // Row g * units + u of the slice is row g * H + u0 + u of W_hh.
  load_weight_rows(weights, product.shape.weight_stride(), product.tiles * kTileRows,
                   product.shape.padded_depth(), layer.w_hh, layer.width, [&](int r) {
                     const int g = r / p.plan.units, u = r % p.plan.units;
                     return g < kGates && u < units ? g * H + u0 + u : -1;
                   });
  for (int i = thread_index(); i < units * rows; i += kProductThreads) {
    const int u = u0 + i % units, b = b0 + i / units;
    const std::int64_t at = static_cast<std::int64_t>(b) * H + u;
    h[i] = load_optional(p.units.h0, at);
    c[i] = Cell::kHasC ? load_optional(p.units.c0, at) : A(0);
    p.work.operands[b * stride + u] = layer.operand(0, b, u, h[i]);
  }

  GroupBarrier barrier{p.work.counters + slice, static_cast<std::uint32_t>(p.plan.group)};
  const int mine = thread_index();
  CellState<Cell, S> state{};
  for (int s = 0; s < layer.steps; ++s) {
    // What does not come from other units is loaded while those are waited for; of a thread's first place.
    if (mine < units * rows)
      p.units.template begin<Cell>(layer.time(s), b0 + mine / units, u0 + mine % units, state);
    barrier.wait();
    product.run(weights, stages, p.work.operands + (s % 2) * p.work.slot + b0 * stride);
    S* const next = p.work.operands + ((s + 1) % 2) * p.work.slot;
    for (int i = mine; i < units * rows; i += kProductThreads) {
      const int local = i % units, u = u0 + local, b = i / units;
      if (i != mine) p.units.template begin<Cell>(layer.time(s), b0 + b, u, state);
      A hh[kGates];
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) hh[g] = product.sum(g * p.plan.units + local, b);
      p.units.template step<Cell>(state, u, hh, h[i], c[i]);
      next[(b0 + b) * stride + u] = layer.operand(s + 1, b0 + b, u, h[i]);
    }
  }
  for (int i = thread_index(); i < units * rows; i += kProductThreads) {
    const std::int64_t at = static_cast<std::int64_t>(b0 + i / units) * H + u0 + i % units;
    p.units.h_n[at] = from_accumulate<S>(h[i]);
    if constexpr (Cell::kHasC) p.units.c_n[at] = from_accumulate<S>(c[i]);
  }
}

template <class S>
struct PersistentBackward {
  using A = Accumulate<S>;
  BackwardUnits<S> units;
  PersistentPlan plan;
  PersistentWorkspace<S> work;
  int first_slice;
};

// The blocks of a group exchange dL/dhh of all gates, which each needs whole for its columns of W_hh. To
// exchange partial sums of dL/dh instead would move as many bytes (B * H * 4 out and in, against B * 4 H
// * 2 in), and more scratch memory.
//
// (Only the LSTM of double spills.)
// registers: 255, spills: 96
template <class S, class Cell>
LMKERN_KERNEL(kProductThreads, 1)
persistent_backward(PersistentBackward<S> p) {
  using A = Accumulate<S>;
  constexpr int kGates = Cell::kGates;
  const RecurrentLayer<S>& layer = p.units.layer;
  const int H = layer.hidden, depth = kGates * H, slice = p.first_slice + block_x() / p.plan.group;
  const int u0 = block_x() % p.plan.group * p.plan.units, b0 = slice * p.plan.rows;
  const int units = H - u0 < p.plan.units ? H - u0 : p.plan.units;
  const int rows = layer.batch - b0 < p.plan.rows ? layer.batch - b0 : p.plan.rows;
  const SliceShape<S> placed{p.plan.units, depth, p.plan.rows, p.plan.chunk};
  S* const weights = shared_memory<S>();
  S* const stages = shared_memory<S>(placed.weight_bytes());
  A* const partial = shared_memory<A>(placed.weight_bytes() + placed.staged_bytes());
  A* const d_h =
      shared_memory<A>(placed.weight_bytes() + placed.staged_bytes() + placed.partial_bytes());
  A* const d_c = d_h + p.plan.units * p.plan.rows;
  const SliceProduct<S> product({p.plan.units, depth, rows, p.plan.chunk}, partial, layer.tf32);
  const std::int64_t stride = product.shape.operand_stride();

  // Row u of the slice is column u0 + u of W_hh.
  load_weight_columns(weights, product.shape.weight_stride(), product.tiles * kTileRows,
                      product.shape.padded_depth(), layer.w_hh, depth, layer.width, u0, units);
  for (int i = thread_index(); i < units * rows; i += kProductThreads) {
    const std::int64_t at = static_cast<std::int64_t>(b0 + i / units) * H + u0 + i % units;
    d_h[i] = load_optional(p.units.d_h_n, at);
    d_c[i] = Cell::kHasC ? load_optional(p.units.d_c_n, at) : A(0);
  }

  GroupBarrier barrier{p.work.counters + slice, static_cast<std::uint32_t>(p.plan.group)};
  // One step more than there are, which only brings dL/dh to the initial state.
  const int last = p.units.d_h0 != nullptr ? -1 : 0, mine = thread_index();
  CellState<Cell, S> state{};
  for (int s = layer.steps - 1; s >= last; --s) {
    const bool multiplies = s + 1 < layer.steps;
    if (s >= 0 && mine < units * rows)
      p.units.template begin<Cell>(layer.time(s), b0 + mine / units, u0 + mine % units, state);
    if (multiplies) {
      barrier.wait();
      product.run(weights, stages, p.work.operands + ((s + 1) % 2) * p.work.slot + b0 * stride);
    } else {
      block_barrier();
    }
    S* const operand = p.work.operands + (s & 1) * p.work.slot;
    for (int i = mine; i < units * rows; i += kProductThreads) {
      const int local = i % units, u = u0 + local, b = b0 + i / units;
      if (multiplies) {
        A gradient = product.sum(local, i / units);
        if (layer.h_mask != nullptr)
          gradient *= to_accumulate(layer.h_mask[static_cast<std::int64_t>(b) * H + u]);
        d_h[i] += gradient;
      }
      if (s < 0) continue;
      if (i != mine) p.units.template begin<Cell>(layer.time(s), b, u, state);
      A d_product[kGates];
      p.units.template step<Cell>(state, u, d_h[i], d_c[i], d_product);
      // Where the step began anew, nothing of it reaches the state before.
      const bool passes = state.active && !state.resets;
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g)
        operand[b * stride + g * H + u] = from_accumulate<S>(passes ? d_product[g] : A(0));
    }
  }
  for (int i = thread_index(); i < units * rows; i += kProductThreads) {
    const std::int64_t at = static_cast<std::int64_t>(b0 + i / units) * H + u0 + i % units;
    if (p.units.d_h0 != nullptr) p.units.d_h0[at] = from_accumulate<S>(d_h[i]);
    if constexpr (Cell::kHasC)
      if (p.units.d_c0 != nullptr) p.units.d_c0[at] = from_accumulate<S>(d_c[i]);
  }
}

// As many slices at a time as are sure to run together.
template <auto kKernel, class Params>
void launch_slices(Params p) {
  zero(p.work.counters, p.plan.slices);
  for (p.first_slice = 0; p.first_slice < p.plan.slices; p.first_slice += p.plan.together) {
    const int left = p.plan.slices - p.first_slice;
    const int slices = left < p.plan.together ? left : p.plan.together;
    launch<kKernel>(Grid{.x = static_cast<unsigned>(slices * p.plan.group),
                         .threads = kProductThreads,
                         .shared_bytes = p.plan.shared_bytes,
                         .resident = true},
                    current_stream(), p);
  }
}

}  // namespace

template <class S>
bool recurrent_forward_persistent(const RecurrentForwardArgs& a) {
  if (!is_unitwise(a.options)) return false;
  bool taken = false;
  dispatch_cell<S>(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const ForwardUnits<S> units(a, Cell::kGates);
    const int H = units.layer.hidden, batch = units.layer.batch;
    const PersistentPlan plan = plan_persistent<S>(H, Cell::kGates, H, batch, 2);
    if (plan.units == 0) return;
    taken = true;
    launch_slices<persistent_forward<S, Cell>>(
        PersistentForward<S>{units, plan, {a.workspace, H, batch}, 0});
  });
  return taken;
}

template <class S>
bool recurrent_backward_persistent(const RecurrentBackwardArgs& a) {
  if (!is_unitwise(a.options)) return false;
  bool taken = false;
  dispatch_cell<S>(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const BackwardUnits<S> units(a, Cell::kGates);
    const int H = units.layer.hidden, batch = units.layer.batch, depth = Cell::kGates * H;
    const PersistentPlan plan = plan_persistent<S>(H, 1, depth, batch, 2);
    if (plan.units == 0) return;
    taken = true;
    launch_slices<persistent_backward<S, Cell>>(
        PersistentBackward<S>{units, plan, {a.workspace, depth, batch}, 0});
  });
  return taken;
}

template bool recurrent_forward_persistent<float>(const RecurrentForwardArgs&);
template bool recurrent_forward_persistent<double>(const RecurrentForwardArgs&);
template bool recurrent_forward_persistent<bfloat16>(const RecurrentForwardArgs&);
template bool recurrent_forward_persistent<float16>(const RecurrentForwardArgs&);
template bool recurrent_backward_persistent<float>(const RecurrentBackwardArgs&);
template bool recurrent_backward_persistent<double>(const RecurrentBackwardArgs&);
template bool recurrent_backward_persistent<bfloat16>(const RecurrentBackwardArgs&);
template bool recurrent_backward_persistent<float16>(const RecurrentBackwardArgs&);

}  // namespace lmkern::cuda
