// Sums, means and maxima of bags of embedding rows.
//
// Math       x_n = w_n weight[indices[n], :] with w = per_sample_weights, or 1. For bag b over its
//            positions n that do not look up padding_idx, count(b) of them:
//            sum   out[b, :] = sum of x_n
//            mean  out[b, :] = sum of x_n / count(b)
//            max   out[b, d] = max of x_n[d], of equal ones the first
//            zeros where count(b) = 0.
// Gradient   c_b = 1, for mean 1 / count(b); m_n[d] = 1, for max 1 only where x_n is the maximum:
//            d_weight[v, d] = sum over n with indices[n] = v of w_n c_b m_n[d] d_out[b, d],
//            zero for v = padding_idx, divided by the number of such n if scale_grad_by_freq;
//            d_w[n] = c_b sum over d of m_n[d] d_out[b, d] weight[indices[n], d].
// Shapes     indices [N] int32 or int64, with offsets [B] (bag b begins at offsets[b], the last ends
//            at N) or [B + 1] (include_last_offset); or indices [B, L] without offsets.
//            weight, d_weight [V, D]   per_sample_weights as indices   out, d_out [B, D]
//            winners [B, D] int32, max only: which of its bag's count(b) terms is the maximum.
//            ids, starts, order, stale; rows, order: as in embedding.h, of the indices that lie in
//            a bag. kept [N] int64, on a GPU with padding_idx: how many of positions 0 .. n do not
//            look it up.
// Layout     contiguous, but weight may have any row stride.
// Aliasing   none.
// Numerics   sums in float (double for double) in ascending n, one rounding each; same bits for any
//            thread count. Comparisons with NaN are false: max is NaN only where its first term is.
// Errors     IndexError for an index outside [0, V); ValueError for offsets that do not start at 0,
//            decrease, or pass N. On a GPU, IndexError for both, later (cuda/index_errors.h).
// Source     torch.nn.functional.embedding_bag; weights for mean and max are ours.
#pragma once
#include "core/check.h"
#include "core/tensor_view.h"

namespace lmkern {

enum class BagMode { kSum, kMean, kMax };

struct EmbeddingBags {
  TensorView indices;             // [N] or [B, L]
  TensorView offsets;             // [B] or [B + 1], int32 or int64; absent with [B, L]
  TensorView per_sample_weights;  // as indices; or absent
  bool include_last_offset;
  BagMode mode;
  std::int64_t padding_idx;  // -1: none
};

struct EmbeddingBagForwardArgs {
  EmbeddingBags bags;
  TensorView weight;   // [V, D]
  TensorView out;      // [B, D] out
  TensorView winners;  // [B, D] out, or absent
};

struct EmbeddingBagBackwardArgs {
  EmbeddingBags bags;
  TensorView d_out, winners;      // [B, D]; winners only for max
  TensorView ids, starts, order;  // [U], [U + 1], [M or more]
  TensorView stale;               // [K], or absent
  TensorView d_weight;            // [V, D] in, out; sparse: [U, D] out
  bool sparse;
  bool scale_grad_by_freq;
};

struct EmbeddingBagSortedBackwardArgs {
  EmbeddingBags bags;
  TensorView d_out, winners;  // [B, D]; winners only for max
  TensorView kept;            // [N], or absent
  TensorView rows, order;     // [N] int32, [N] int64
  TensorView d_weight;        // [R, D] in, out: zeros; rows in [0, R) that occur are written
  TensorView workspace;       // as many bytes as cuda::embedding_bag_sorted_workspace says
  bool scale_grad_by_freq;
};

struct EmbeddingBagWeightsBackwardArgs {
  EmbeddingBags bags;
  TensorView d_out, winners;        // [B, D]; winners only for max
  TensorView kept;                  // [N], or absent
  TensorView weight;                // [V, D]
  TensorView d_per_sample_weights;  // as indices, out
};

// Everything about the bags, of rows of `table`'s dtype; returns B.
std::int64_t check_bags(const Check& check, const EmbeddingBags& bags, const TensorView& table,
                        std::int64_t rows);

// winners and kept, of `count` bags of rows of `width`.
void check_bag_terms(const Check& check, const EmbeddingBags& bags, const TensorView& winners,
                     const TensorView& kept, std::int64_t count, std::int64_t width);

// For both backends.
void embedding_bag_forward(const EmbeddingBagForwardArgs& args);
void embedding_bag_weights_backward(const EmbeddingBagWeightsBackwardArgs& args);
// For the CPU.
void embedding_bag_backward(const EmbeddingBagBackwardArgs& args);
// For a GPU.
void embedding_bag_sorted_backward(const EmbeddingBagSortedBackwardArgs& args);

}  // namespace lmkern
