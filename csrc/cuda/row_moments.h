// Mean and 1 / sqrt(variance + eps) of a row, by a block.
#pragma once
#include "cuda/device/block_reduce.h"
#include "cuda/device/math.h"

namespace lmkern::cuda {

template <class A>
struct RowMoments {
  A mean, rstd;

  // value(u) of u < count, which each thread computes for the same u twice. scratch: two A for each
  // warp; used again after a barrier.
  template <class F>
  static LMKERN_DEVICE RowMoments of(int count, A eps, A* scratch, const F& value LMKERN_AND_SITE) {
    A sum = A(0), squares = A(0);
    for (int u = thread_index(); u < count; u += thread_count()) sum += value(u);
    const A mean = block_sum(sum, scratch LMKERN_AND_HERE) / A(count);
    for (int u = thread_index(); u < count; u += thread_count()) {
      const A centred = value(u) - mean;
      squares += centred * centred;
    }
    const A variance = block_sum(squares, scratch + warp_count() LMKERN_AND_HERE) / A(count);
    return {mean, A(1) / square_root(variance + eps)};
  }
};

}  // namespace lmkern::cuda
