// How a kernel is started: on a stream of a GPU, or in the emulator. The only place that does.
#pragma once
#include <atomic>
#include <map>
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

// How many clusters of such a grid the device runs at a time; 0: they are too large for it.
template <auto kKernel>
int active_clusters(const Grid& grid) {
  const int clusters = simt::device().multiprocessors / grid.cluster;
  return clusters > 1 ? clusters : 1;
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
  LaunchConfig(const Grid& grid, Stream stream) {
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

// Allows a kernel more shared memory than all devices have, and clusters of more than 8 blocks: as much as
// this device has, once for each kernel and device, so that no thread takes back what another needs.
template <auto kKernel>
void allow(const Grid& grid) {
  const bool shared = grid.shared_bytes > 48 * 1024, cluster = grid.cluster > 8;
  if (!shared && !cluster) return;
  static std::atomic<std::uint64_t> allowed_shared{0}, allowed_cluster{0};  // a bit for a device
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const std::uint64_t bit = std::uint64_t{1} << device % 64;
  const auto address = reinterpret_cast<const void*>(kKernel);
  if (shared && (device >= 64 || (allowed_shared & bit) == 0)) {
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "device attribute");
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "shared memory");
    allowed_shared |= bit;
  }
  if (cluster && (device >= 64 || (allowed_cluster & bit) == 0)) {
    check(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
    allowed_cluster |= bit;
  }
}

template <auto kKernel>
int active_clusters(const Grid& grid) {
  // Asking costs more than a launch, and calls ask the same again and again.
  thread_local std::map<std::tuple<int, int, std::size_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const auto [entry, is_new] = known.try_emplace({device, grid.cluster, grid.shared_bytes}, 0);
  if (is_new) {
    try {
      allow<kKernel>(grid);
      const LaunchConfig config(grid, nullptr);
      check(cudaOccupancyMaxActiveClusters(&entry->second, kKernel, &config.get()), "occupancy");
    } catch (const std::runtime_error&) {  // such clusters are too large for this device
      entry->second = 0;
    }
  }
  return entry->second;
}

template <auto kKernel, class... Args>
void launch(const Grid& grid, Stream stream, const Args&... args) {
  allow<kKernel>(grid);
  const LaunchConfig config(grid, stream);
  check(cudaLaunchKernelEx(&config.get(), kKernel, args...), "launch");
}

#endif

}  // namespace lmkern::cuda
