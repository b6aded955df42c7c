// Copies by the copy engine, and stores into other blocks, which count bytes at an mbarrier. sm_90.
#pragma once
#include "cuda/device/mbarrier.h"
#include "cuda/device/vector.h"

namespace lmkern::cuda {

// PTX 9.7.9.25.4, cp.async.bulk: `bytes`, a multiple of 16, from global to this block's shared memory.
LMKERN_DEVICE void bulk_copy(void* shared, const void* global, std::uint32_t bytes,
                             Mbarrier* barrier LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::bulk_copy(shared, global, bytes, barrier, site);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global_address(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#else
  __trap();
#endif
}

// From this block's shared memory to the same or another place in the shared memory of block `rank`;
// `to` and `barrier` are given as they lie in this block.
LMKERN_DEVICE void bulk_copy_remote(void* to, const void* from, std::uint32_t bytes,
                                    Mbarrier* barrier, int rank LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::bulk_copy(simt::map_shared(to, rank, site), from, bytes,
                  static_cast<Mbarrier*>(simt::map_shared(barrier, rank, site)), site);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(cluster_address(to, rank)),
      "r"(shared_address(from)), "r"(bytes), "r"(cluster_address(barrier, rank))
      : "memory");
#else
  __trap();
#endif
}

// What ordinary stores wrote to shared memory is there for the copy engine (PTX 9.7.13.9, fence.proxy):
// by the writing threads, before the barrier that comes before the copy.
LMKERN_DEVICE void fence_for_bulk_copy() {
#if !defined(LMKERN_SIMT) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// PTX 9.7.9.12.2, st.async: 4 or 16 bytes into the shared memory of block `rank`; `to` and `barrier`
// as they lie in this block.
template <class T>
LMKERN_DEVICE void store_async(T* to, const T& value, Mbarrier* barrier, int rank LMKERN_AND_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
#if defined(LMKERN_SIMT)
  simt::store_async(simt::map_shared(to, rank, site), &value, sizeof(T),
                    static_cast<Mbarrier*>(simt::map_shared(barrier, rank, site)), site);
#elif __CUDA_ARCH__ >= 900
  std::uint32_t words[sizeof(T) / 4];
  __builtin_memcpy(words, &value, sizeof(T));
  if constexpr (sizeof(T) == 4)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
            cluster_address(to, rank)),
        "r"(words[0]), "r"(cluster_address(barrier, rank))
        : "memory");
  else
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(cluster_address(to, rank)),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]),
        "r"(cluster_address(barrier, rank))
        : "memory");
#else
  __trap();
#endif
}

}  // namespace lmkern::cuda
