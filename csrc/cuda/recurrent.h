// What the recurrent ops offer besides kernels.h.
#pragma once

namespace lmkern::cuda {

// For tests and benchmarks: whether passes may take the persistent path. Of the whole process.
void allow_persistent(bool allowed);

}  // namespace lmkern::cuda
