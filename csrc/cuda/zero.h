// Zeros for counters that a kernel begins with.
#pragma once
#include "cuda/stream.h"

namespace lmkern::cuda {

inline void zero(std::uint32_t* counters, std::int64_t count) {
#if defined(LMKERN_SIMT)
  for (std::int64_t i = 0; i < count; ++i) counters[i] = 0;
#else
  check(cudaMemsetAsync(counters, 0, sizeof(std::uint32_t) * static_cast<std::size_t>(count),
                        current_stream()),
        "memset");
#endif
}

}  // namespace lmkern::cuda
