// Barriers of a warp, of a block, of some of its warps, and of a cluster. Each orders what the threads
// did in shared and global memory before it. (One of the whole grid: group_barrier.h.)
#pragma once
#include "cuda/device/base.h"

namespace lmkern::cuda {

// PTX 9.7.13.3, bar.warp.sync.
LMKERN_DEVICE void warp_barrier(std::uint32_t mask = kAllLanes LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::warp_barrier(mask, site);
#else
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
#endif
}

// PTX 9.7.13.1, barrier.sync: all threads of the block.
LMKERN_DEVICE void block_barrier(LMKERN_SITE) {
#if defined(LMKERN_SIMT)
  simt::block_barrier(site);
#else
  asm volatile("barrier.sync 0;" ::: "memory");
#endif
}

// PTX 9.7.13.1, barrier.sync with a name (1 to 15): `threads` threads, a multiple of 32.
LMKERN_DEVICE void named_barrier(int id, int threads LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::named_barrier(id, threads, site);
#else
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// PTX 9.7.13.4, barrier.cluster: all threads of all blocks of the cluster. Between the two a thread
// may do what needs nothing from the others. sm_90. (Like the block's not .aligned, which would want
// the threads of a warp to come together.)
LMKERN_DEVICE void cluster_arrive(LMKERN_SITE) {
#if defined(LMKERN_SIMT)
  simt::cluster_arrive(site);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}
LMKERN_DEVICE void cluster_wait(LMKERN_SITE) {
#if defined(LMKERN_SIMT)
  simt::cluster_wait(site);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}
LMKERN_DEVICE void cluster_barrier(LMKERN_SITE) {
  cluster_arrive(LMKERN_HERE);
  cluster_wait(LMKERN_HERE);
}

}  // namespace lmkern::cuda
