// Threads: all there is of them.
//
// OpenMP, with torch's own libgomp: torch is imported first and its copy has the soname the linker
// looks for, so one process has one pool and torch.set_num_threads (omp_set_num_threads inside)
// rules us too. One parallel region per call; where steps depend on each other, threads meet
// at a Barrier.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>

#include "core/dtype.h"

namespace lmkern {

// How many threads a call may use: torch's setting; 1 inside a parallel region, and 1 in a forked
// child, whose copy of the pool has no threads behind it and would wait for them for ever.
int max_threads();

// Runs f(thread, threads) once on each of at most `threads` threads.
template <class F>
LMKERN_INLINE void parallel(int threads, const F& f) {
  if (threads <= 1) {
    f(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num(), omp_get_num_threads());
}

// The part [begin, end) of n items that falls to one thread, in blocks of `align` items.
struct Range {
  std::int64_t begin, end;
};
LMKERN_INLINE Range thread_range(std::int64_t n, std::int64_t align, int thread, int threads) {
  const std::int64_t blocks = (n + align - 1) / align;
  const std::int64_t begin = blocks * thread / threads * align;
  const std::int64_t end = blocks * (thread + 1) / threads * align;
  return {begin < n ? begin : n, end < n ? end : n};
}

// Hands out the items 0..n-1 one by one: for work items of unequal cost.
class WorkQueue {
 public:
  explicit WorkQueue(std::int64_t n) : n_(n) {}
  LMKERN_INLINE bool next(std::int64_t* item) {
    *item = next_.fetch_add(1, std::memory_order_relaxed);
    return *item < n_;
  }

 private:
  std::atomic<std::int64_t> next_{0};
  const std::int64_t n_;
};

// Meets once per time step: spins, because a step lasts microseconds and a futex wake-up
// costs more, but yields after a while, because on an oversubscribed machine the other thread
// may need this core.
class Barrier {
 public:
  LMKERN_INLINE void wait(int threads) {
    if (threads == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins)
        relax();
      else
        yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;  // about 50-100 us
  static LMKERN_INLINE void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  static void yield();
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

}  // namespace lmkern
