// Scratch memory of kernels.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace lmkern {

// A buffer of the calling thread that only grows, for the few hundred kilobytes that a kernel wants
// at each call. 64-byte aligned, uninitialised; valid until the thread's next call.
void* thread_scratch(std::size_t bytes);

// Divides one thread_scratch among several buffers: layout(Scratch&) takes them one by one, and is
// called twice, to count and to place.
class Scratch {
 public:
  template <class T>
  LMKERN_INLINE T* take(std::int64_t count) {
    const std::uintptr_t at = base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }

  // As place, in memory of the caller's (64-byte aligned); returns the bytes that it must have.
  template <class F>
  static LMKERN_INLINE std::size_t place_at(void* base, const F& layout) {
    Scratch scratch;
    scratch.base_ = reinterpret_cast<std::uintptr_t>(base);
    layout(scratch);
    return scratch.used_;
  }

  template <class F>
  static LMKERN_INLINE void place(const F& layout) {
    Scratch scratch;
    layout(scratch);
    scratch.base_ = reinterpret_cast<std::uintptr_t>(thread_scratch(scratch.used_));
    scratch.used_ = 0;
    layout(scratch);
  }

 private:
  std::uintptr_t base_ = 0;
  std::size_t used_ = 0;
};

}  // namespace lmkern
