// What the recurrent ops offer besides kernels.h.
#pragma once

namespace lmkern::cuda {

// The ways of a pass, from the fastest that its sizes and options allow.
enum class RecurrentPath { kCluster, kPersistent, kSteps };

// For tests and benchmarks: passes try no faster path than this one. Of the whole process.
void begin_at(RecurrentPath path);

}  // namespace lmkern::cuda
