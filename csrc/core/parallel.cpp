#include "core/parallel.h"

#include <pthread.h>
#include <sched.h>

namespace lmkern {
namespace {

std::atomic<bool> forked{false};

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

int max_threads() {
  if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}

void Barrier::yield() { sched_yield(); }

}  // namespace lmkern
