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

#include "cuda/device/bulk_copy.h"
#include "cuda/device/launch.h"
#include "cuda/recurrent_unit.h"
#include "cuda/slice_product.h"
#include "cuda/stream.h"

namespace lmkern::cuda {
namespace {

struct ClusterPlan {
  int blocks = 0;  // of a cluster; 0: the path cannot be taken
  int units = 0;   // of a block, a multiple of 16
  int rows = 0;    // of the batch, of a cluster, a multiple of 8
};

// Where things lie in a block's shared memory, in bytes, and their extents in elements.
template <class S>
struct ClusterLayout {
  using A = Accumulate<S>;
  static constexpr int kPad = WarpTile<S>::kPad;
  int blocks, units, rows, gates;
  bool backward;

  LMKERN_HOST_DEVICE int tile_rows() const { return round_up(gates * units, kTileRows); }
  // Of W_hh: a row for each gate of each own unit, all units along.
  LMKERN_HOST_DEVICE int weight_stride() const { return blocks * units + kPad; }
  LMKERN_HOST_DEVICE std::size_t weights() const { return 16 * 8; }  // after the mbarriers
  // What one block sends to another: forward [rows][units + pad] of S, backward [units][rows] of A.
  LMKERN_HOST_DEVICE int message_elements() const {
    return backward ? units * rows : rows * (units + kPad);
  }
  LMKERN_HOST_DEVICE std::size_t message_bytes() const {
    return static_cast<std::size_t>(message_elements()) * (backward ? sizeof(A) : sizeof(S));
  }
  LMKERN_HOST_DEVICE std::size_t inbox() const {  // two slots of one message from each block
    return weights() + sizeof(S) * static_cast<std::size_t>(tile_rows()) * weight_stride();
  }
  LMKERN_HOST_DEVICE std::size_t outbox()
      const {  // two slots: forward one message, backward one each
    return inbox() + 2 * blocks * message_bytes();
  }
  LMKERN_HOST_DEVICE std::size_t states() const {
    return outbox() + 2 * (backward ? blocks : 1) * message_bytes();
  }
  LMKERN_HOST_DEVICE std::size_t scratch() const {
    return states() + 2 * sizeof(A) * static_cast<std::size_t>(units * rows);
  }
  // Forward the parts of the product, backward its operand.
  LMKERN_HOST_DEVICE SliceShape<S> shape() const { return {gates * units, blocks * units, rows}; }
  LMKERN_HOST_DEVICE int operand_stride() const { return tile_rows() + kPad; }
  LMKERN_HOST_DEVICE std::size_t bytes() const {
    return scratch() + (backward ? sizeof(S) * static_cast<std::size_t>(rows) * operand_stride()
                                 : shape().partial_bytes());
  }
};

template <class S>
ClusterPlan plan_cluster(int hidden, int gates, int batch, bool backward) {
  const DeviceLimits& limits = device_limits();
  for (int blocks = 2; blocks <= limits.max_cluster; blocks *= 2) {
    const int units = round_up((hidden + blocks - 1) / blocks, 16);
    if (gates * units > kProductWarps * kTileRows || units * (blocks - 1) >= hidden) continue;
    // As few rows as fill the device; more where that would take several turns.
    const int clusters = limits.multiprocessors / blocks > 1 ? limits.multiprocessors / blocks : 1;
    int rows = round_up((batch + clusters - 1) / clusters, 8);
    if (rows > kTileColumns) rows = kTileColumns;
    for (; rows >= 8; rows -= 8)
      if (ClusterLayout<S>{blocks, units, rows, gates, backward}.bytes() <= limits.shared_bytes)
        return {blocks, units, rows};
  }
  return {};
}

// What both kernels begin with.
template <class S>
struct ClusterBlock {
  using A = Accumulate<S>;
  ClusterLayout<S> layout;
  int rank, u0, units, b0, rows;  // units and rows that exist
  Mbarrier* full;                 // of the inbox's slots
  S* weights;

  LMKERN_DEVICE ClusterBlock(const RecurrentLayer<S>& layer, const ClusterPlan& plan, int gates,
                             bool backward)
      : layout{plan.blocks, plan.units, plan.rows, gates, backward},
        rank(cluster_rank()),
        u0(rank * plan.units),
        b0(block_x() / plan.blocks * plan.rows) {
    units = layer.hidden - u0 < plan.units ? layer.hidden - u0 : plan.units;
    rows = layer.batch - b0 < plan.rows ? layer.batch - b0 : plan.rows;
    full = shared_memory<Mbarrier>();
    weights = shared_memory<S>(layout.weights());
    if (thread_index() == 0)
      for (int slot = 0; slot < 2; ++slot) {
        mbarrier_init(full + slot, 1);
        expect(slot);
      }
    const int stride = layout.weight_stride(), H = layer.hidden;
    for (int r = warp_index(); r < layout.tile_rows(); r += kProductWarps) {
      const int g = r / plan.units, u = r % plan.units;
      const bool exists = g < gates && u < units;
      const std::int64_t from = exists ? (static_cast<std::int64_t>(g) * H + u0 + u) * H : 0;
      for (int k = lane_index(); k < stride; k += 32)
        weights[r * stride + k] = exists && k < H ? layer.w_hh[from + k] : from_accumulate<S>(A(0));
    }
    cluster_barrier();
  }

  // By one thread, once for each time a slot is filled.
  LMKERN_DEVICE void expect(int slot LMKERN_AND_SITE) const {
    mbarrier_arrive_expect(full + slot,
                           static_cast<std::uint32_t>(layout.blocks * layout.message_bytes())
                               LMKERN_AND_HERE);
  }
  // The `turn`-th filling of the inbox, from 0, is there; the slot is made ready for the next, which can
  // not be complete before this block has sent its part, and so all its threads have been here.
  LMKERN_DEVICE void receive(int turn LMKERN_AND_SITE) const {
    mbarrier_wait(full + turn % 2, turn / 2 % 2 LMKERN_AND_HERE);
    if (thread_index() == 0) expect(turn % 2 LMKERN_AND_HERE);
  }
  template <class T>
  LMKERN_DEVICE T* inbox(int turn, int from) const {
    return shared_memory<T>(layout.inbox()) +
           static_cast<std::size_t>(turn % 2 * layout.blocks + from) * layout.message_elements();
  }
  // Forward the message to all, backward that to block `to`.
  template <class T>
  LMKERN_DEVICE T* outbox(int turn, int to) const {
    return shared_memory<T>(layout.outbox()) +
           static_cast<std::size_t>(turn % 2 * (layout.backward ? layout.blocks : 1) + to) *
               layout.message_elements();
  }
  // After all threads have written the outbox.
  template <class T>
  LMKERN_DEVICE void send(int turn LMKERN_AND_SITE) const {
    fence_for_bulk_copy();
    block_barrier(LMKERN_HERE);
    if (thread_index() < layout.blocks)
      bulk_copy_remote(inbox<T>(turn, rank), outbox<T>(turn, layout.backward ? thread_index() : 0),
                       static_cast<std::uint32_t>(layout.message_bytes()), full + turn % 2,
                       thread_index() LMKERN_AND_HERE);
  }
};

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
  const SliceProduct<S> product{layout.shape(), shared_memory<A>(layout.scratch())};

  const auto write = [&](int turn, int local, int b, S value) {
    block.template outbox<S>(turn, 0)[b * stride + local] = value;
  };
  // Places without a unit or row, and the pad, stay zeros in both slots.
  for (int i = thread_index(); i < 2 * layout.message_elements(); i += kProductThreads)
    block.template outbox<S>(0, 0)[i] = from_accumulate<S>(A(0));
  block_barrier();
  for (int i = thread_index(); i < places; i += kProductThreads) {
    const int local = i % layout.units, b = i / layout.units;
    if (local >= block.units || b >= block.rows) continue;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    h[i] = load_optional(p.units.h0, at);
    c[i] = Cell::kHasC ? load_optional(p.units.c0, at) : A(0);
    write(0, local, b, layer.operand(0, block.b0 + b, block.u0 + local, h[i]));
  }
  if (layer.steps > 0) block.template send<S>(0);

  for (int s = 0; s < layer.steps; ++s) {
    block.receive(s);
    WarpTile<S> acc;
    acc.clear();
    if (product.tile() >= 0)
      for (int from = product.split(); from < layout.blocks; from += product.shape.splits())
        acc.template multiply<false>(block.weights +
                                         product.tile() * kTileRows * layout.weight_stride() +
                                         from * layout.units,
                                     layout.weight_stride(), block.template inbox<S>(s, from),
                                     stride, layout.units, layout.rows);
    product.store(acc);
    block_barrier();
    for (int i = thread_index(); i < places; i += kProductThreads) {
      const int local = i % layout.units, b = i / layout.units;
      if (local >= block.units || b >= block.rows) continue;
      const int u = block.u0 + local;
      A hh[kGates];
      LMKERN_UNROLL
      for (int g = 0; g < kGates; ++g) hh[g] = product.sum(g * layout.units + local, b);
      p.units.template step<Cell>(layer.time(s), block.b0 + b, u, hh, h[i], c[i]);
      write(s + 1, local, b, layer.operand(s + 1, block.b0 + b, u, h[i]));
    }
    if (s + 1 < layer.steps) block.template send<S>(s + 1);
  }
  for (int i = thread_index(); i < places; i += kProductThreads) {
    const int local = i % layout.units, b = i / layout.units;
    if (local >= block.units || b >= block.rows) continue;
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
    const int local = i % layout.units, b = i / layout.units;
    if (local >= block.units || b >= block.rows) continue;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    d_h[i] = load_optional(p.units.d_h_n, at);
    d_c[i] = Cell::kHasC ? load_optional(p.units.d_c_n, at) : A(0);
  }
  block_barrier();

  // One step more than there are, which only brings dL/dh to the initial state.
  const int last = p.units.d_h0 != nullptr ? -1 : 0;
  for (int s = layer.steps - 1, turn = 0; s >= last; --s, ++turn) {
    if (turn > 0) block.receive(turn - 1);
    for (int i = thread_index(); i < places; i += kProductThreads) {
      const int local = i % layout.units, b = i / layout.units, u = block.u0 + local;
      if (local >= block.units || b >= block.rows) continue;
      if (turn > 0) {
        A gradient = A(0);
        for (int from = 0; from < layout.blocks; ++from)
          gradient += block.template inbox<A>(turn - 1, from)[local * layout.rows + b];
        if (layer.h_mask != nullptr)
          gradient *= to_accumulate(layer.h_mask[static_cast<std::int64_t>(block.b0 + b) * H + u]);
        d_h[i] += gradient;
      }
      if (s < 0) continue;
      const int t = layer.time(s);
      A d_product[kGates];
      p.units.template step<Cell>(t, block.b0 + b, u, d_h[i], d_c[i], d_product);
      // Where the step began anew, nothing of it reaches the state before.
      const bool passes =
          layer.takes_part(t, block.b0 + b) && !layer.resets(layer.row(t, block.b0 + b));
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
      acc.template multiply<true>(block.weights + tile * kTileRows, layout.weight_stride(), operand,
                                  layout.operand_stride(), layout.tile_rows(), layout.rows);
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
    const int local = i % layout.units, b = i / layout.units;
    if (local >= block.units || b >= block.rows) continue;
    const std::int64_t at = static_cast<std::int64_t>(block.b0 + b) * H + block.u0 + local;
    if (p.units.d_h0 != nullptr) p.units.d_h0[at] = from_accumulate<S>(d_h[i]);
    if constexpr (Cell::kHasC)
      if (p.units.d_c0 != nullptr) p.units.d_c0[at] = from_accumulate<S>(d_c[i]);
  }
  cluster_barrier();  // what was sent has been read from here
}

template <auto kKernel, class S, class Params>
bool launch_clusters(const Params& p, int batch, int gates, bool backward) {
  if (p.plan.blocks == 0) return false;
  const ClusterLayout<S> layout{p.plan.blocks, p.plan.units, p.plan.rows, gates, backward};
  const int slices = (batch + p.plan.rows - 1) / p.plan.rows;
  const Grid grid{.x = static_cast<unsigned>(slices * p.plan.blocks),
                  .threads = kProductThreads,
                  .shared_bytes = layout.bytes(),
                  .cluster = p.plan.blocks};
  if (!fits<kKernel>(grid)) return false;
  launch<kKernel>(grid, current_stream(), p);
  return true;
}

}  // namespace

template <class S>
bool recurrent_forward_cluster(const RecurrentForwardArgs& a) {
  if (!is_unitwise(a.options)) return false;
  bool taken = false;
  dispatch_cell(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const ForwardUnits<S> units(a, Cell::kGates);
    const auto plan = plan_cluster<S>(units.layer.hidden, Cell::kGates, units.layer.batch, false);
    taken = launch_clusters<cluster_forward<S, Cell>, S>(ClusterForward<S>{units, plan},
                                                         units.layer.batch, Cell::kGates, false);
  });
  return taken;
}

template <class S>
bool recurrent_backward_cluster(const RecurrentBackwardArgs& a) {
  if (!is_unitwise(a.options)) return false;
  bool taken = false;
  dispatch_cell(a.options.cell, [&](auto tag) {
    using Cell = typename decltype(tag)::type;
    const BackwardUnits<S> units(a, Cell::kGates);
    const auto plan = plan_cluster<S>(units.layer.hidden, Cell::kGates, units.layer.batch, true);
    taken = launch_clusters<cluster_backward<S, Cell>, S>(ClusterBackward<S>{units, plan},
                                                          units.layer.batch, Cell::kGates, true);
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
