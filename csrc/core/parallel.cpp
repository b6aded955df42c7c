#include "core/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <cstdlib>
#include <new>

namespace lmkern {
namespace {

std::atomic<bool> forked{false};

struct Scratch {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(data); }
};

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

int max_threads() {
  if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}

void* thread_scratch(std::size_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.bytes) {
    std::free(scratch.data);
    scratch.bytes = 0;
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(64, rounded);
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.bytes = rounded;
  }
  return scratch.data;
}

void Barrier::yield() { sched_yield(); }

}  // namespace lmkern
