// Where tensors lie, and which of them this module's kernels take: _C those of the CPU, _C_cuda
// (LMKERN_CUDA_MODULE) those of a GPU, and the emulator's modules (LMKERN_SIMT) those of the CPU, but
// as if they were on a GPU.
#pragma once
#include <cstdint>

namespace lmkern {

enum class DeviceType : std::uint8_t { kCpu, kCuda, kOther };

#if defined(LMKERN_CUDA_MODULE) && !defined(LMKERN_SIMT)
inline constexpr DeviceType kDevice = DeviceType::kCuda;
#else
inline constexpr DeviceType kDevice = DeviceType::kCpu;
#endif

// Whether checks can look at what tensors hold. Where they cannot, kernels check indices themselves
// (cuda/index_errors.h).
#if defined(LMKERN_CUDA_MODULE)
inline constexpr bool kReadable = false;
#else
inline constexpr bool kReadable = true;
#endif

}  // namespace lmkern
