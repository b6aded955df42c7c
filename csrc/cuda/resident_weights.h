// Weights that a block keeps in shared memory for all steps. (A launch waits for them once: many loads are
// under way at a time, or that would take as long as tens of steps.)
#pragma once
#include "cuda/device/copy.h"
#include "cuda/device/vector.h"
#include "cuda/slice_product.h"

namespace lmkern::cuda {

// to[r][k] = w[row_of(r)][k], zeros where row_of(r) < 0 or k >= width; `depth`: width, rounded up to
// kTileDepth. To be used after a barrier.
template <class S, class RowOf>
LMKERN_DEVICE void load_weight_rows(S* to, int stride, int rows, int depth, const S* w, int width,
                                    const RowOf& row_of LMKERN_AND_SITE) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(S));
  const bool vectors = width % kWide == 0 && reinterpret_cast<std::uintptr_t>(w) % 16 == 0;
  for (int r = warp_index(); r < rows; r += kProductWarps) {
    const int row = row_of(r);
    const S* const from = w + static_cast<std::int64_t>(row < 0 ? 0 : row) * width;
    if (vectors) {
      for (int k = lane_index() * kWide; k < depth; k += 32 * kWide) {
        const bool exists = row >= 0 && k < width;
        copy_async<16>(to + r * stride + k, exists ? from + k : w, exists ? 16 : 0 LMKERN_AND_HERE);
      }
    } else {
      for (int k = lane_index(); k < depth; k += 32)
        to[r * stride + k] = row >= 0 && k < width ? from[k] : from_accumulate<S>(Accumulate<S>(0));
    }
  }
  copy_commit();
  copy_wait<0>(LMKERN_HERE);
}

// to[u][k] = w[k][first + u] for k < depth, zeros where u >= units or k >= rows of w. `all`, `depth`: units and
// rows, rounded up to kTileRows and kTileDepth. To be used after a barrier.
template <class S>
LMKERN_DEVICE void load_weight_columns(S* to, int stride, int all, int depth, const S* w, int rows,
                                       int width, int first, int units LMKERN_AND_SITE) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(S));
  for (int i = thread_index(); i < all * (depth / kWide); i += kProductThreads) {
    const int u = i % all, k = i / all * kWide;
    Vector<S, kWide> values;
    LMKERN_UNROLL
    for (int n = 0; n < kWide; ++n)
      values.at[n] = u < units && k + n < rows
                         ? w[static_cast<std::int64_t>(k + n) * width + first + u]
                         : from_accumulate<S>(Accumulate<S>(0));
    store_vector(to + u * stride + k, values LMKERN_AND_HERE);
  }
}

}  // namespace lmkern::cuda
