// Reductions over a block of whole warps.
#pragma once
#include "cuda/device/barrier.h"
#include "cuda/device/shuffle.h"

namespace lmkern::cuda {

// Sums over the block, the same bits in every thread. `scratch`: kCount T for each warp, in shared memory;
// it may be used again after the next barrier of the block.
template <int kCount, class T>
LMKERN_DEVICE void block_sums(T (&values)[kCount], T* scratch LMKERN_AND_SITE) {
  LMKERN_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i] LMKERN_AND_HERE);
  if (lane_index() == 0) {
    LMKERN_UNROLL
    for (int i = 0; i < kCount; ++i) scratch[warp_index() * kCount + i] = values[i];
  }
  block_barrier(LMKERN_HERE);
  LMKERN_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = scratch[i];
  for (int warp = 1; warp < warp_count(); ++warp) {
    LMKERN_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] += scratch[warp * kCount + i];
  }
}

template <class T>
LMKERN_DEVICE T block_sum(T value, T* scratch LMKERN_AND_SITE) {
  T values[1] = {value};
  block_sums(values, scratch LMKERN_AND_HERE);
  return values[0];
}

}  // namespace lmkern::cuda
