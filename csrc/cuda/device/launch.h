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

#else

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("lmkern: ") + what + ": " + cudaGetErrorString(error));
}

template <auto kKernel, class... Args>
void launch(const Grid& grid, Stream stream, const Args&... args) {
  const auto kernel = reinterpret_cast<const void*>(kKernel);
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          "shared memory");
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (grid.cluster > 1) {
    if (grid.cluster > 8)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            "cluster size");
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    ++count;
  }
  if (grid.resident) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = {grid.x, grid.y, grid.z};
  config.blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kKernel, args...), "launch");
}

#endif

}  // namespace lmkern::cuda
