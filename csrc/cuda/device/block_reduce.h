// Reductions over a block of whole warps.
#pragma once
#include "cuda/device/barrier.h"
#include "cuda/device/shuffle.h"

namespace lmkern::cuda {

// The sum over the block, the same bits in every thread. `scratch`: one T for each warp, in shared
// memory; it may be used again after the next barrier of the block.
template <class T>
LMKERN_DEVICE T block_sum(T value, T* scratch LMKERN_AND_SITE) {
  value = warp_sum(value LMKERN_AND_HERE);
  if (lane_index() == 0) scratch[warp_index()] = value;
  block_barrier(LMKERN_HERE);
  T sum = T(0);
  for (int warp = 0; warp < warp_count(); ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace lmkern::cuda
