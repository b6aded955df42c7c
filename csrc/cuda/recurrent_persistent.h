// The persistent path of the recurrent layers: how it is divided, and when it can be taken.
//
// A group of blocks holds W_hh in shared memory for the whole sequence, each block the rows (backward:
// the columns) of some units; several groups take a slice of the batch each, and never wait for each
// other. Once a step the blocks of a group exchange h (backward: dL/dhh) through the L2 cache, with one
// barrier. Nothing depends on the batch at compile time.
#pragma once
#include "cuda/recurrent_unit.h"
#include "cuda/slice_product.h"
#include "cuda/stream.h"

namespace lmkern::cuda {

struct PersistentPlan {
  int units = 0;     // of a block; 0: the path cannot be taken
  int group = 0;     // blocks that hold the units of a slice
  int slices = 0;    // of the batch
  int rows = 0;      // of a slice
  int together = 0;  // slices that run at the same time
  int chunk = 0;     // of the operand's depth, staged at a time
  std::size_t shared_bytes = 0;
};

// gates: rows of weights a unit has (backward: 1); depth: what a product sums over; states: values that
// a unit carries from step to step.
template <class S>
PersistentPlan plan_persistent(int hidden, int gates, int depth, int batch, int states) {
  using A = Accumulate<S>;
  // Bytes of weights a multiprocessor reads from shared memory in the time in which all of them together
  // read one byte from the L2 cache.
  constexpr double kSharedPerL2 = 128.0 / 2500;
  const DeviceLimits limits = device_limits();
  PersistentPlan best;
  double best_cost = 0;
  for (int units = gates == 1 ? 16 : 8; gates * units <= kProductWarps * kTileRows; units += 8) {
    if (gates == 1 && units % 16 != 0) continue;
    const int group = (hidden + units - 1) / units;
    if (group > limits.multiprocessors) continue;
    int rows = 0, slices = 0;
    // As many slices as run together, unless they would be narrower than a tile of the product.
    const int most = limits.multiprocessors / group;
    slices = (batch + 7) / 8 < most ? (batch + 7) / 8 : most;
    rows = round_up((batch + slices - 1) / slices, 8);
    if (rows > kTileColumns) rows = kTileColumns;
    slices = (batch + rows - 1) / rows;
    SliceShape<S> shape{gates * units, depth, rows};
    const std::size_t others = shape.weight_bytes() + shape.partial_bytes() +
                               sizeof(A) * static_cast<std::size_t>(states * units * rows);
    if (others >= limits.shared_bytes || !shape.fit_chunk(limits.shared_bytes - others)) continue;
    const int waves = (slices + most - 1) / most;
    const double cost = waves * (static_cast<double>(shape.weight_bytes()) +
                                 static_cast<double>(sizeof(S)) * depth * rows * group *
                                     (slices < most ? slices : most) * kSharedPerL2);
    if (best.units != 0 && cost >= best_cost) continue;
    best_cost = cost;
    best = {units,
            group,
            slices,
            rows,
            slices < most ? slices : most,
            shape.chunk,
            others + shape.staged_bytes()};
  }
  return best;
}

// What a pass keeps in the workspace between the steps: two slots of the product's operand, and a
// counter for the barrier of each slice.
template <class S>
struct PersistentWorkspace {
  S* operands;  // [2][batch][stride]
  std::uint32_t* counters;
  std::int64_t slot;  // elements of one

  static std::int64_t bytes(int depth, int batch) {
    const std::int64_t slot = std::int64_t{SliceShape<S>{0, depth, 0}.operand_stride()} * batch;
    return 2 * slot * static_cast<std::int64_t>(sizeof(S)) + 16 + 4 * std::int64_t{batch};
  }
  PersistentWorkspace(const TensorView& workspace, int depth, int batch)
      : operands(workspace.ptr<S>()),
        slot(std::int64_t{SliceShape<S>{0, depth, 0}.operand_stride()} * batch) {
    const std::int64_t end = (2 * slot * static_cast<std::int64_t>(sizeof(S)) + 15) / 16 * 16;
    counters = reinterpret_cast<std::uint32_t*>(workspace.ptr<char>() + end);
  }
};

// Whether the path was taken.
template <class S>
bool recurrent_forward_persistent(const RecurrentForwardArgs& args);
template <class S>
bool recurrent_backward_persistent(const RecurrentBackwardArgs& args);

}  // namespace lmkern::cuda
