// Embedding lookup.
//
// Math       out[n, :] = weight[indices[n], :]
// Gradient   d_weight[v, :] = sum over n with indices[n] = v of d_out[n, :]; zero for
//            v = padding_idx; divided by the number of such n if scale_grad_by_freq.
// Shapes     weight, d_weight [V, D]   indices [...] int32 or int64, N elements
//            out, d_out [..., D]
// Layout     contiguous, but weight may have any row stride.
// Aliasing   none.
// Numerics   forward copies bits. Backward adds in float (double for float64) in ascending n and
//            writes each row of d_weight once, untouched rows as zeros; same bits for any
//            thread count.
// Errors     IndexError naming index, position and V, before anything is written.
// Source     torch.nn.functional.embedding.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct EmbeddingForwardArgs {
  TensorView weight;   // [V, D]
  TensorView indices;  // [...]
  TensorView out;      // [..., D] out
};

struct EmbeddingBackwardArgs {
  TensorView d_out;          // [..., D]
  TensorView indices;        // [...]
  TensorView d_weight;       // [V, D] out
  std::int64_t padding_idx;  // -1: none
  bool scale_grad_by_freq;
};

void embedding_forward(const EmbeddingForwardArgs& args);
void embedding_backward(const EmbeddingBackwardArgs& args);

}  // namespace lmkern
