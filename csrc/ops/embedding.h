// Embedding lookup, its gradient, and renormalisation of rows.
//
// Math       out[n, :] = s(indices[n]) weight[indices[n], :]
//            s(v) = max_norm / (|weight[v, :]|_p + 1e-7) where |weight[v, :]|_p > max_norm, else 1,
//            with p = norm_type; max_norm = infinity: none.
//            renorm: weight[v, :] *= s(v), once for each v.
// Gradient   d_weight[v, :] = sum over n with indices[n] = v of d_out[n, :]; zero for
//            v = padding_idx; divided by the number of such n if scale_grad_by_freq. (That of the
//            scaled lookup is the caller's: d_out is multiplied with its Jacobian first.)
//            In two steps, for a dense and for a sparse gradient. CPU: buckets sorts the
//            positions by index; backward sums each bucket into a row of d_weight. GPU: keys are
//            what torch.sort sorts; sorted_backward sums each run of equal ones. (How many there
//            are is known only there, so that a dense gradient waits for nobody.)
// Shapes     weight [V, D]   indices [...] int32 or int64, N elements   out, d_out [..., D]
//            buckets: ids [U], the distinct indices ascending; order [M], the positions of ids[0],
//            then of ids[1], ..., each ascending, so that ids[u] has starts[u] .. starts[u + 1];
//            M = starts[U] < N where padding_idx occurs. All int64.
//            sorted: keys [N], V for what has no gradient: padding_idx, no valid index, no bag;
//            rows [N] ascending, the row of d_weight for each sorted position, where there is one;
//            order [N], the positions, those of one row ascending.
// Layout     contiguous, but weight may have any row stride.
// Aliasing   none.
// Numerics   the plain lookup copies bits. Norms are in double, s is rounded to float (double for
//            double). Backward adds in float (double for double) in ascending n and writes each row
//            once; same bits for any thread count.
// Errors     IndexError naming index, position and V, before anything is written; on a GPU, later
//            (cuda/index_errors.h).
// Source     torch.nn.functional.embedding, torch.embedding_renorm_.
#pragma once
#include "core/check.h"
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
  TensorView ids;     // [U] ascending, in [0, V); of equal ones the first counts
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

struct EmbeddingKeysArgs {
  TensorView indices;           // [...]
  std::int64_t num_embeddings;  // V
  std::int64_t padding_idx;     // -1: none
  TensorView covered;           // [1]: positions from here on are in no bag; or absent
  TensorView keys;              // [N] int32 out
};

struct EmbeddingSortedBackwardArgs {
  TensorView d_out;        // [N, D]
  TensorView rows, order;  // [N] int32, [N] int64
  TensorView d_weight;     // [R, D] in, out: zeros; rows in [0, R) that occur are written
  TensorView workspace;    // as many bytes as cuda::embedding_sorted_workspace says
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

// What writes rows of a gradient by buckets: `positions` bounds order's elements.
struct BucketedGradient {
  const TensorView &ids, &starts, &order, &stale, &d_weight;
  bool sparse;
};
void check_bucketed_gradient(const Check& check, const BucketedGradient& gradient,
                             std::int64_t positions);
// What writes rows of a gradient by sorted positions, of which there are `positions`.
struct SortedGradient {
  const TensorView &rows, &order, &d_weight, &workspace;
};
void check_sorted_gradient(const Check& check, const SortedGradient& gradient,
                           std::int64_t positions, std::int64_t workspace_bytes);

// For both backends.
void embedding_forward(const EmbeddingForwardArgs& args);
void embedding_renorm(const EmbeddingRenormArgs& args);
// For the CPU.
std::int64_t embedding_buckets(const EmbeddingBucketsArgs& args);  // U
void embedding_backward(const EmbeddingBackwardArgs& args);
void embedding_clear(const EmbeddingClearArgs& args);
bool embedding_is_clear(const EmbeddingIsClearArgs& args);
// For a GPU.
void embedding_keys(const EmbeddingKeysArgs& args);
void embedding_sorted_backward(const EmbeddingSortedBackwardArgs& args);

}  // namespace lmkern
