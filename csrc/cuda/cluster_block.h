// How a recurrent layer is divided among the blocks of clusters, and what a block of one has in its shared
// memory and sends to the others (cuda/recurrent_cluster.cu).
#pragma once
#include <algorithm>

#include "cuda/device/bulk_copy.h"
#include "cuda/recurrent_layer.h"
#include "cuda/resident_weights.h"
#include "cuda/stream.h"

namespace lmkern::cuda {

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

// clusters: how many run at a time; 0: as many as there are multiprocessors for.
template <class S>
ClusterPlan plan_cluster(int hidden, int gates, int batch, bool backward, int clusters) {
  const DeviceLimits limits = device_limits();
  for (int blocks = 2; blocks <= limits.max_cluster; blocks *= 2) {
    const int units = round_up((hidden + blocks - 1) / blocks, 16);
    if (gates * units > kProductWarps * kTileRows || units * (blocks - 1) >= hidden) continue;
    // As few rows as fill the device; more where that would take several turns.
    const int most = clusters > 0 ? clusters : std::max(limits.multiprocessors / blocks, 1);
    int rows = round_up((batch + most - 1) / most, 8);
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
    const int H = layer.hidden;
    load_weight_rows(weights, layout.weight_stride(), layout.tile_rows(), plan.blocks * plan.units,
                     layer.w_hh, H, [&](int r) {
                       const int g = r / plan.units, u = r % plan.units;
                       return g < gates && u < units ? g * H + u0 + u : -1;
                     });
    cluster_barrier();
  }

  // Whether place i, a unit of a row, is one of the layer's.
  LMKERN_DEVICE bool exists(int i) const {
    return i % layout.units < units && i / layout.units < rows;
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

}  // namespace lmkern::cuda
