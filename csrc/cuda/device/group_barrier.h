// A barrier of several blocks that run at the same time, by a counter in global memory: no cooperative
// grid synchronisation, and none of the blocks that do not take part waits.
#pragma once
#include "cuda/device/atomic.h"
#include "cuda/device/barrier.h"
#include "cuda/device/thread.h"

namespace lmkern::cuda {

// `counter` is zero when the kernel begins. All threads of all `members` blocks call wait(); what they
// wrote before is seen by all after. (Launch with Grid::resident.)
struct GroupBarrier {
  std::uint32_t* counter;
  std::uint32_t members;
  std::uint32_t target = 0;

  LMKERN_DEVICE void wait(LMKERN_SITE) {
    target += members;
    block_barrier(LMKERN_HERE);
    if (thread_index() == 0) {
      add_release(counter, 1 LMKERN_AND_HERE);
      // The difference, so that the counter may wrap around.
      while (static_cast<std::int32_t>(load_acquire(counter LMKERN_AND_HERE) - target) < 0)
        spin(LMKERN_HERE);
    }
    block_barrier(LMKERN_HERE);
  }
};

}  // namespace lmkern::cuda
