// The kernels that every instruction set's build defines in its own namespace.
#pragma once
#include "cpu/isa.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

void attention_forward(const AttentionForwardArgs& args);
void attention_backward(const AttentionBackwardArgs& args);
void attention_weights(const AttentionWeightsArgs& args);
void embedding_forward(const EmbeddingForwardArgs& args);
void embedding_backward(const EmbeddingBackwardArgs& args);
void recurrent_forward(const RecurrentForwardArgs& args);
void recurrent_backward(const RecurrentBackwardArgs& args);
void recurrent_step(const RecurrentStepArgs& args);
void recurrent_step_backward(const RecurrentStepBackwardArgs& args);
void rotary_embedding(const RotaryArgs& args);
bool matmul(const MatmulArgs& args);
void vec_math(const VecMathArgs& args);
double peak_flops(int threads, std::int64_t iterations);

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
