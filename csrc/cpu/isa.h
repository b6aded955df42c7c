// The table of CPU kernels, one per instruction set, and the choice among them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ops/attention.h"
#include "ops/embedding.h"
#include "ops/matmul.h"
#include "ops/recurrent.h"
#include "ops/rotary.h"
#include "ops/vec_math.h"

namespace lmkern::cpu {

struct Kernels {
  const char* isa;
  void (*attention_forward)(const AttentionForwardArgs&);
  void (*attention_backward)(const AttentionBackwardArgs&);
  void (*attention_weights)(const AttentionWeightsArgs&);
  void (*embedding_forward)(const EmbeddingForwardArgs&);
  void (*embedding_backward)(const EmbeddingBackwardArgs&);
  void (*recurrent_forward)(const RecurrentForwardArgs&);
  void (*recurrent_backward)(const RecurrentBackwardArgs&);
  void (*recurrent_step)(const RecurrentStepArgs&);
  void (*recurrent_step_backward)(const RecurrentStepBackwardArgs&);
  void (*rotary_embedding)(const RotaryArgs&);
  bool (*matmul)(const MatmulArgs&);
  void (*vec_math)(const VecMathArgs&);
  double (*peak_flops)(int threads, std::int64_t iterations);  // float32 FLOP per second
};

// The best table this processor can run, or the one that the environment variable LMKERN_ISA names.
const Kernels& kernels();

// Names of the instruction sets that were built and that this processor has, best last.
std::vector<std::string> supported_isas();

// Switches the table of the whole process (tests compare instruction sets in one process).
void set_isa(const std::string& name);

}  // namespace lmkern::cpu
