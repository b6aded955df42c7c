// mbarrier: a barrier in shared memory that counts arrivals and bytes (PTX 9.7.13.15). Its phases
// have parities 0, 1, 0, ...; wait(parity) returns when the phase of that parity is complete. Waiting
// for parity 1 on a new one returns at once.
#pragma once
#include "cuda/device/cluster.h"

namespace lmkern::cuda {

using Mbarrier = std::uint64_t;

// By one thread; others may use it after a barrier (of the cluster, if its other blocks do).
LMKERN_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::mbarrier_init(barrier, arrivals, site);
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#if __CUDA_ARCH__ >= 900
  // For the threads of other blocks, and for the copy engine (PTX 9.7.9.25.2, async proxy).
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
#endif
}

// One arrival. It publishes what the thread did before.
LMKERN_DEVICE void mbarrier_arrive(Mbarrier* barrier LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::mbarrier_arrive(barrier, 0, site);
#else
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(
                   shared_address(barrier))
               : "memory");
#endif
}

// One arrival, which promises that so many bytes will be copied in this phase. sm_90.
LMKERN_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, std::uint32_t bytes LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::mbarrier_arrive(barrier, bytes, site);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// One arrival at the same mbarrier of another block of the cluster. sm_90.
LMKERN_DEVICE void mbarrier_arrive_remote(Mbarrier* barrier, int rank LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::mbarrier_arrive_remote(barrier, rank, site);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   cluster_address(barrier, rank))
               : "memory");
#else
  __trap();
#endif
}

// Until the phase of this parity is complete. Sees what was published, and copied, in it.
LMKERN_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::mbarrier_wait(barrier, parity, site);
#else
  std::uint32_t complete = 0;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
  } while (complete == 0);
#endif
}

}  // namespace lmkern::cuda
