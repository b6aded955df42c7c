// The CUDA launchers, by the names of the CPU's table (cpu/isa.h). Each is in csrc/cuda/OP*.cu, and
// launches on current_stream().
#pragma once
#include "ops/embedding.h"
#include "ops/embedding_bag.h"
#include "ops/embedding_optimizer.h"
#include "ops/recurrent.h"
#include "ops/token_position.h"

namespace lmkern::cuda {

struct Kernels {
  static void recurrent_forward(const RecurrentForwardArgs& args);
  static void recurrent_backward(const RecurrentBackwardArgs& args);
  static void recurrent_step(const RecurrentStepArgs& args);
  static void recurrent_step_backward(const RecurrentStepBackwardArgs& args);
};

inline Kernels kernels() { return {}; }

// Bytes of scratch memory that a pass needs.
std::int64_t recurrent_workspace(const RecurrentOptions& options, bool backward);

}  // namespace lmkern::cuda
