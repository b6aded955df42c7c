// cp.async: copies from global to shared memory that run on while the thread does something else
// (PTX 9.7.9.25.3). A thread's copies form groups; it waits until all but so many are complete. Others
// see what was copied after a barrier.
#pragma once
#include "cuda/device/base.h"

namespace lmkern::cuda {

// kBytes (4, 8 or 16) to `shared`, of which only the first `valid` are read and the rest are zeros:
// valid = 0 masks a row that does not exist, whose address is then not looked at.
template <int kBytes>
LMKERN_DEVICE void copy_async(void* shared, const void* global,
                              int valid = kBytes LMKERN_AND_SITE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(LMKERN_SIMT)
  simt::copy_async(shared, global, kBytes, valid, site);
#else
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global_address(global)), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global_address(global)), "n"(kBytes), "r"(valid)
                 : "memory");
#endif
}

// Closes the group of the copies since the last one.
LMKERN_DEVICE void copy_commit() {
#if defined(LMKERN_SIMT)
  simt::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kLeft groups are under way, the newest.
template <int kLeft>
LMKERN_DEVICE void copy_wait(LMKERN_SITE) {
#if defined(LMKERN_SIMT)
  simt::copy_wait(kLeft, site);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace lmkern::cuda
