// How a kernel is started: on a stream of a GPU, or in the emulator. The only place that does.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/device/base.h"

namespace lmkern::cuda {

struct Grid {
  unsigned x = 1, y = 1, z = 1;  // blocks
  int threads = 256;             // of a block
  std::size_t shared_bytes = 0;  // of a block
  int cluster = 1;               // blocks in a cluster, along x
  bool resident = false;         // all blocks must run at the same time
};

#if defined(LMKERN_SIMT)

using Stream = void*;

template <auto kKernel, class... Args>
void launch(const Grid& grid, Stream, const Args&... args) {
  std::string name = __PRETTY_FUNCTION__;  // [with auto kKernel = lmkern::cuda::name; ...
  const std::size_t begin = name.find("kKernel = ");
  name = begin == std::string::npos ? "kernel" : name.substr(begin + 10);
  name = name.substr(0, name.find_first_of(";]<"));
  const std::size_t scope = name.rfind("::");
  if (scope != std::string::npos) name = name.substr(scope + 2);
  simt::Launch shape{{grid.x, grid.y, grid.z},
                     grid.threads,
                     grid.shared_bytes,
                     grid.cluster,
                     grid.resident,
                     name.c_str()};
  auto arguments = std::tuple<Args...>(args...);
  const simt::GlobalMemory known(&arguments, sizeof arguments);
  simt::launch(
      shape,
      [](void* context) {
        // A copy for each thread, on its own stack, as on the hardware.
        std::apply([](Args... mine) { kKernel(mine...); },
                   *static_cast<std::tuple<Args...>*>(context));
      },
      &arguments);
}

// Whether a grid of such clusters can run on this device at all.
template <auto kKernel>
bool fits(const Grid&) {
  return true;
}

#else

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it would be reported once more, for another launch
  throw std::runtime_error(std::string("lmkern: ") + what + ": " + cudaGetErrorString(error));
}

// A launch of CUDA's; its attributes live as long as this object.
class LaunchConfig {
 public:
  template <class Kernel>
  LaunchConfig(Kernel kernel, const Grid& grid, Stream stream) {
    const auto address = reinterpret_cast<const void*>(kernel);
    if (grid.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared_bytes)),
            "shared memory");
    if (grid.cluster > 8)
      check(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "cluster size");
    if (grid.cluster > 1) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes_[config_.numAttrs++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    if (grid.resident) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes_[config_.numAttrs++].val.cooperative = 1;
    }
    config_.gridDim = {grid.x, grid.y, grid.z};
    config_.blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
    config_.dynamicSmemBytes = grid.shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t& get() const { return config_; }

 private:
  cudaLaunchAttribute attributes_[2];
  cudaLaunchConfig_t config_{};
};

template <auto kKernel>
bool fits(const Grid& grid) {
  // Asking costs more than a launch, and the next call asks the same.
  struct Answer {
    int device, cluster;
    std::size_t shared_bytes;
    bool fits;
  };
  thread_local Answer last{-1, 0, 0, false};
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  if (last.device != device || last.cluster != grid.cluster ||
      last.shared_bytes != grid.shared_bytes) {
    int clusters = 0;
    try {
      const LaunchConfig config(kKernel, grid, nullptr);
      check(cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config.get()), "occupancy");
    } catch (const std::runtime_error&) {  // such clusters are too large for this device
      clusters = 0;
    }
    last = {device, grid.cluster, grid.shared_bytes, clusters > 0};
  }
  return last.fits;
}

template <auto kKernel, class... Args>
void launch(const Grid& grid, Stream stream, const Args&... args) {
  const LaunchConfig config(kKernel, grid, stream);
  check(cudaLaunchKernelEx(&config.get(), kKernel, args...), "launch");
}

#endif

}  // namespace lmkern::cuda
