// Atomic operations on integers in global memory, seen by the whole GPU, with the order they impose (PTX 9.7.9.8 ld.acquire, 9.7.9.12 st.release, 9.7.13.6 atom and red; PTX 8, memory model).
// There are none on floating-point numbers: their order of addition would not be ours.
#pragma once
#include "cuda/device/base.h"

namespace lmkern::cuda {

// Sees everything that happened before the store_release or add_release that wrote the value.
LMKERN_DEVICE std::uint32_t load_acquire(const std::uint32_t* address LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return simt::atomic_load(address, simt::Order::kAcquire, site);
#else
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(global_address(address))
               : "memory");
  return value;
#endif
}

LMKERN_DEVICE void store_release(std::uint32_t* address, std::uint32_t value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::atomic_store(address, value, simt::Order::kRelease, site);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global_address(address)), "r"(value)
               : "memory");
#endif
}

// Adds and does not ask for the value before.
LMKERN_DEVICE void add_release(std::uint32_t* address, std::uint32_t value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::atomic_add(address, value, simt::Order::kRelease, site);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global_address(address)), "r"(value)
               : "memory");
#endif
}

// Adds and gives the value before; publishes and learns.
LMKERN_DEVICE std::uint32_t add_acquire_release(std::uint32_t* address,
                                                std::uint32_t value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return simt::atomic_add(address, value, simt::Order::kAcquireRelease, site);
#else
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global_address(address)), "r"(value)
               : "memory");
  return before;
#endif
}

// Without any order: for counts. Shared or global memory.
LMKERN_DEVICE std::uint32_t add_relaxed(std::uint32_t* address,
                                        std::uint32_t value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return simt::atomic_add(address, value, simt::Order::kRelaxed, site);
#else
  return atomicAdd(address, value);
#endif
}

// The smallest wins; unordered.
LMKERN_DEVICE void min_relaxed(unsigned long long* address,
                               unsigned long long value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::atomic_min(address, value, site);
#else
  atomicMin(address, value);
#endif
}

// The larger one stays; gives the value before. Unordered.
LMKERN_DEVICE std::uint32_t max_relaxed(std::uint32_t* address,
                                        std::uint32_t value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return simt::atomic_max(address, value, site);
#else
  return atomicMax(address, value);
#endif
}

// With the host, which reads and writes memory that both see (PTX 8.5, scope .sys).
LMKERN_DEVICE std::uint32_t load_from_host(const std::uint32_t* address LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  return simt::atomic_load(address, simt::Order::kRelaxed, site);
#else
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(global_address(address))
               : "memory");
  return value;
#endif
}
// Publishes what the thread wrote before.
LMKERN_DEVICE void store_to_host(std::uint32_t* address, std::uint32_t value LMKERN_AND_SITE) {
#if defined(LMKERN_SIMT)
  simt::atomic_store(address, value, simt::Order::kRelease, site);
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(global_address(address)), "r"(value)
               : "memory");
#endif
}

// Between two looks at a value that another thread is to change.
LMKERN_DEVICE void spin(LMKERN_SITE) {
#if defined(LMKERN_SIMT)
  simt::spin(site);
#else
  __nanosleep(20);
#endif
}

}  // namespace lmkern::cuda
