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
  static void embedding_forward(const EmbeddingForwardArgs& args);
  static void embedding_renorm(const EmbeddingRenormArgs& args);
  static void embedding_keys(const EmbeddingKeysArgs& args);
  static void embedding_sorted_backward(const EmbeddingSortedBackwardArgs& args);
  static void embedding_bag_forward(const EmbeddingBagForwardArgs& args);
  static void embedding_bag_sorted_backward(const EmbeddingBagSortedBackwardArgs& args);
  static void embedding_bag_weights_backward(const EmbeddingBagWeightsBackwardArgs& args);
  static void embedding_sgd(const EmbeddingSgdArgs& args);
  static void embedding_adagrad(const EmbeddingAdagradArgs& args);
  static void embedding_adam(const EmbeddingAdamArgs& args);
  static void recurrent_forward(const RecurrentForwardArgs& args);
  static void recurrent_backward(const RecurrentBackwardArgs& args);
  static void recurrent_step(const RecurrentStepArgs& args);
  static void recurrent_step_backward(const RecurrentStepBackwardArgs& args);
  static void token_position_forward(const TokenPositionForwardArgs& args);
  static void token_position_backward(const TokenPositionBackwardArgs& args);
};

inline Kernels kernels() { return {}; }

// Bytes of scratch memory that a pass needs.
std::int64_t recurrent_workspace(const RecurrentOptions& options, bool backward);
// Of gradients of `positions` lookups of rows of `width`; `is_double`: in float64.
std::int64_t embedding_sorted_workspace(std::int64_t positions, std::int64_t width, bool is_double);
std::int64_t embedding_bag_sorted_workspace(std::int64_t positions, std::int64_t width,
                                            bool is_double);
// Of the gradient of `rows` rows, L = `length`, with so many of d_position, d_weight and d_bias.
std::int64_t token_position_workspace(std::int64_t rows, std::int64_t length, std::int64_t width,
                                      int sums, bool is_double);

}  // namespace lmkern::cuda
