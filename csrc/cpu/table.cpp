// This instruction set's row of the kernel table.
#include "cpu/kernels.h"

#define LMKERN_STRING_(x) #x
#define LMKERN_STRING(x) LMKERN_STRING_(x)

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

extern const Kernels table;
const Kernels table = {
    .isa = LMKERN_STRING(LMKERN_ISA_NAMESPACE),
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .attention_weights = attention_weights,
    .embedding_forward = embedding_forward,
    .embedding_backward = embedding_backward,
    .recurrent_forward = recurrent_forward,
    .recurrent_backward = recurrent_backward,
    .recurrent_step = recurrent_step,
    .recurrent_step_backward = recurrent_step_backward,
    .rotary_embedding = rotary_embedding,
    .matmul = matmul,
    .vec_math = vec_math,
    .peak_flops = peak_flops,
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
