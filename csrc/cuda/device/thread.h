// Who a thread is (PTX 10, special registers). Blocks are one-dimensional.
#pragma once
#include "cuda/device/base.h"

namespace lmkern::cuda {

#if defined(LMKERN_SIMT)
LMKERN_DEVICE int thread_index() { return simt::thread_index(); }
LMKERN_DEVICE int thread_count() { return simt::thread_count(); }
LMKERN_DEVICE int block_x() { return static_cast<int>(simt::block_index().x); }
LMKERN_DEVICE int block_y() { return static_cast<int>(simt::block_index().y); }
LMKERN_DEVICE int blocks_x() { return static_cast<int>(simt::block_count().x); }
LMKERN_DEVICE int blocks_y() { return static_cast<int>(simt::block_count().y); }
#else
LMKERN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LMKERN_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
LMKERN_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
LMKERN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
LMKERN_DEVICE int blocks_x() { return static_cast<int>(gridDim.x); }
LMKERN_DEVICE int blocks_y() { return static_cast<int>(gridDim.y); }
#endif

LMKERN_DEVICE int lane_index() { return thread_index() % 32; }
LMKERN_DEVICE int warp_index() { return thread_index() / 32; }
LMKERN_DEVICE int warp_count() { return thread_count() / 32; }

// The block's dynamic shared memory, all there is: `offset` bytes from its begin.
template <class T>
LMKERN_DEVICE T* shared_memory(std::size_t offset = 0) {
#if defined(LMKERN_SIMT)
  return reinterpret_cast<T*>(simt::shared_memory() + offset);
#else
  extern __shared__ __align__(1024) char lmkern_shared_memory[];
  return reinterpret_cast<T*>(lmkern_shared_memory + offset);
#endif
}

}  // namespace lmkern::cuda
