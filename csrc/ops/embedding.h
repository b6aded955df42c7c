// Embedding lookup, its gradient, and renormalisation of rows.
//
// Math       out[n, :] = s(indices[n]) weight[indices[n], :]
//            s(v) = max_norm / (|weight[v, :]|_p + 1e-7) where |weight[v, :]|_p > max_norm, else 1,
//            with p = norm_type; max_norm = infinity: none.
//            renorm: weight[v, :] *= s(v), once for each v.
// Gradient   d_weight[v, :] = sum over n with indices[n] = v of d_out[n, :]; zero for
//            v = padding_idx; divided by the number of such n if scale_grad_by_freq. (That of the
//            scaled lookup is the caller's: d_out is multiplied with its Jacobian first.)
//            In two steps, for a dense and for a sparse gradient: buckets sorts the positions
//            by index; backward sums each bucket into a row of d_weight.
// Shapes     weight [V, D]   indices [...] int32 or int64, N elements   out, d_out [..., D]
//            buckets: ids [U], the distinct indices ascending; order [M], the positions of ids[0],
//            then of ids[1], ..., each ascending, so that ids[u] has starts[u] .. starts[u + 1];
//            M = starts[U] < N where padding_idx occurs. All int64.
// Layout     contiguous, but weight may have any row stride.
// Aliasing   none.
// Numerics   the plain lookup copies bits. Norms are in double, s is rounded to float (double for
//            double). Backward adds in float (double for double) in ascending n and writes each row
//            once; same bits for any thread count.
// Errors     IndexError naming index, position and V, before anything is written.
// Source     torch.nn.functional.embedding, torch.embedding_renorm_.
#pragma once
#include "core/tensor_view.h"

namespace lmkern {

struct EmbeddingForwardArgs {
  TensorView weight;   // [V, D]
  TensorView indices;  // [...]
  TensorView out;      // [..., D] out
  double max_norm, norm_type;
};

struct EmbeddingRenormArgs {
  TensorView weight;  // [V, D] in, out
  TensorView ids;     // [U] distinct, in [0, V)
  double max_norm, norm_type;
};

struct EmbeddingBucketsArgs {
  TensorView indices;             // [...]
  std::int64_t num_embeddings;    // V
  std::int64_t padding_idx;       // -1: none
  TensorView ids, starts, order;  // [min(N, V)], [min(N, V) + 1], [N] out
};

struct EmbeddingBackwardArgs {
  TensorView d_out;               // [N, D]
  TensorView ids, starts, order;  // [U], [U + 1], [M or more] as written by embedding_buckets
  TensorView stale;               // [K] ascending, distinct: rows of d_weight to clear; or absent
  TensorView d_weight;            // [V, D] in, out: rows ids[u] are written, stale ones cleared;
                                  // sparse: [U, D] out, row u for ids[u]
  bool sparse;
  bool scale_grad_by_freq;
  double scale;  // of all rows
};

// Zeros where d_weight is not zero.
struct EmbeddingClearArgs {
  TensorView d_weight;  // [V, D] in, out
};

// Whether about `samples` evenly spaced rows that are not in `written` begin with zeros.
struct EmbeddingIsClearArgs {
  TensorView d_weight;  // [V, D]
  TensorView written;   // [K] ascending, or absent
  std::int64_t samples;
};

void embedding_forward(const EmbeddingForwardArgs& args);
void embedding_renorm(const EmbeddingRenormArgs& args);
std::int64_t embedding_buckets(const EmbeddingBucketsArgs& args);  // U
void embedding_backward(const EmbeddingBackwardArgs& args);
void embedding_clear(const EmbeddingClearArgs& args);
bool embedding_is_clear(const EmbeddingIsClearArgs& args);

}  // namespace lmkern
