// What every wrapper stands on. The kernels of csrc/cuda contain no CUDA syntax of their own, only
// the wrappers of this folder: nvcc compiles their PTX, and the host compiler, with LMKERN_SIMT,
// their second bodies, which call the emulator (csrc/simt). Each wrapper has its two bodies side by
// side, and names the section of the PTX ISA (9.0) that it stands for.
//
// LMKERN_SITE, last among a wrapper's parameters, is the place of the call, for the emulator's
// reports. On a GPU it is nothing.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

#if defined(LMKERN_SIMT)

#include "simt/simt.h"
#define LMKERN_DEVICE inline
#define LMKERN_KERNEL(max_threads, min_blocks) static void
#define LMKERN_SITE lmkern::Site site = {__builtin_FILE(), __builtin_LINE()}
#define LMKERN_AND_SITE , LMKERN_SITE
#define LMKERN_HERE site
#define LMKERN_AND_HERE , site
#define LMKERN_UNROLL

#else

#define LMKERN_DEVICE __device__ __forceinline__
#define LMKERN_KERNEL(max_threads, min_blocks) \
  static __global__ void __launch_bounds__(max_threads, min_blocks)
#define LMKERN_SITE
#define LMKERN_AND_SITE
#define LMKERN_HERE
#define LMKERN_AND_HERE
#define LMKERN_UNROLL _Pragma("unroll")

#endif

namespace lmkern::cuda {

inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

#if !defined(LMKERN_SIMT)
// Addresses in shared memory as PTX wants them (PTX 6.4.1, generic addressing).
LMKERN_DEVICE std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
LMKERN_DEVICE std::uint64_t global_address(const void* pointer) {
  return static_cast<std::uint64_t>(__cvta_generic_to_global(pointer));
}
#endif

}  // namespace lmkern::cuda
