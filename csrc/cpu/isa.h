// The table of CPU kernels, one per instruction set, and the choice among them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "ops/embedding_bag.h"
#include "ops/embedding_optimizer.h"
#include "ops/matmul.h"
#include "ops/norm.h"
#include "ops/quantized_embedding.h"
#include "ops/recurrent.h"
#include "ops/rotary.h"
#include "ops/token_position.h"
#include "ops/vec_math.h"

namespace lmkern::cpu {

// Every kernel of csrc/cpu: what it returns, its name, its arguments. Each instruction set's build
// defines all of them in its own namespace; csrc/cpu/table.cpp collects them.
#define LMKERN_KERNELS(KERNEL)                                                  \
  KERNEL(void, attention_forward, AttentionForwardArgs)                         \
  KERNEL(void, attention_backward, AttentionBackwardArgs)                       \
  KERNEL(void, attention_weights, AttentionWeightsArgs)                         \
  KERNEL(void, cross_entropy_forward, CrossEntropyForwardArgs)                  \
  KERNEL(void, cross_entropy_backward, CrossEntropyBackwardArgs)                \
  KERNEL(void, embedding_forward, EmbeddingForwardArgs)                         \
  KERNEL(void, embedding_backward, EmbeddingBackwardArgs)                       \
  KERNEL(bool, matmul, MatmulArgs)                                              \
  KERNEL(void, recurrent_forward, RecurrentForwardArgs)                         \
  KERNEL(void, recurrent_backward, RecurrentBackwardArgs)                       \
  KERNEL(void, recurrent_step, RecurrentStepArgs)                               \
  KERNEL(void, recurrent_step_backward, RecurrentStepBackwardArgs)              \
  KERNEL(void, rotary_embedding, RotaryArgs)                                    \
  KERNEL(void, embedding_renorm, EmbeddingRenormArgs)                           \
  KERNEL(std::int64_t, embedding_buckets, EmbeddingBucketsArgs)                 \
  KERNEL(void, embedding_clear, EmbeddingClearArgs)                             \
  KERNEL(bool, embedding_is_clear, EmbeddingIsClearArgs)                        \
  KERNEL(void, embedding_bag_forward, EmbeddingBagForwardArgs)                  \
  KERNEL(void, embedding_bag_backward, EmbeddingBagBackwardArgs)                \
  KERNEL(void, embedding_bag_weights_backward, EmbeddingBagWeightsBackwardArgs) \
  KERNEL(void, embedding_sgd, EmbeddingSgdArgs)                                 \
  KERNEL(void, embedding_adagrad, EmbeddingAdagradArgs)                         \
  KERNEL(void, embedding_adam, EmbeddingAdamArgs)                               \
  KERNEL(void, norm_forward, NormForwardArgs)                                   \
  KERNEL(void, norm_backward, NormBackwardArgs)                                 \
  KERNEL(void, activation_forward, ActivationForwardArgs)                       \
  KERNEL(void, activation_backward, ActivationBackwardArgs)                     \
  KERNEL(void, dropout, DropoutArgs)                                            \
  KERNEL(void, quantized_embedding, QuantizedEmbeddingArgs)                     \
  KERNEL(void, quantized_embedding_bag, QuantizedEmbeddingBagArgs)              \
  KERNEL(void, token_position_forward, TokenPositionForwardArgs)                \
  KERNEL(void, token_position_backward, TokenPositionBackwardArgs)              \
  KERNEL(void, vec_math, VecMathArgs)

struct Kernels {
  const char* isa;
#define LMKERN_MEMBER(Result, name, Args) Result (*name)(const Args&);
  LMKERN_KERNELS(LMKERN_MEMBER)
#undef LMKERN_MEMBER
  double (*peak_flops)(int threads, std::int64_t iterations);  // float32 FLOP per second
};

// The best table this processor can run, or the one that the environment variable LMKERN_ISA names.
const Kernels& kernels();

// Names of the instruction sets that were built and that this processor has, best last.
std::vector<std::string> supported_isas();

// Switches the table of the whole process (tests compare instruction sets in one process).
void set_isa(const std::string& name);

}  // namespace lmkern::cpu
