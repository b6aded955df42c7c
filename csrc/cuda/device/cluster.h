// Clusters: blocks that run at the same time and see each other's shared memory. sm_90; elsewhere a
// block is a cluster of its own.
#pragma once
#include "cuda/device/thread.h"

namespace lmkern::cuda {

// PTX 10, %cluster_ctarank and %cluster_nctarank.
LMKERN_DEVICE int cluster_rank() {
#if defined(LMKERN_SIMT)
  return simt::cluster_rank();
#elif __CUDA_ARCH__ >= 900
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
LMKERN_DEVICE int cluster_size() {
#if defined(LMKERN_SIMT)
  return simt::cluster_size();
#elif __CUDA_ARCH__ >= 900
  std::uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// PTX 9.7.9.22, mapa: the same place in another block's shared memory, for ordinary loads and stores.
template <class T>
LMKERN_DEVICE T* map_shared(T* local, int rank LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return static_cast<T*>(simt::map_shared(local, rank, site));
#elif __CUDA_ARCH__ >= 900
  std::uint64_t remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(local), "r"(rank));
  return reinterpret_cast<T*>(remote);
#else
  __trap();
  return local;
#endif
}

#if !defined(LMKERN_SIMT)
// The same as a shared::cluster address, which asynchronous operations take.
LMKERN_DEVICE std::uint32_t cluster_address(const void* local, int rank) {
  std::uint32_t remote = shared_address(local);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(remote), "r"(rank));
#else
  __trap();
#endif
  return remote;
}
#endif

}  // namespace lmkern::cuda
