// Gradient of the embedding lookup (embedding_sorted_backward in csrc/ops/embedding.h).
//
// Parallel  sorted_runs.h: a thread for 16 bytes of columns of a chunk of 8 to 64 sorted positions.
// Traffic   N D read, in rows, + U D written; of runs longer than a chunk 2 D / chunk partials in
//           float, written and read. The caller's zeros are V D written.
// Limits    N and V below 2^31. A list of one row alone: N / 64 / 8 partials one after the other. 80
//           registers, no spills.
#include "core/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/sorted_runs.h"
#include "ops/embedding.h"

namespace lmkern::cuda {
namespace {

template <class S, int kVec>
struct PlainTerms {
  const S* d_out;
  std::int64_t width;
  static constexpr int kInFlight = 4, kMinBlocks = 3;

  struct Term {
    Piece<S, kVec> piece;
    LMKERN_DEVICE void load(const PlainTerms& t, std::int64_t position, std::int64_t column) {
      piece.load(t.d_out + position * t.width + column);
    }
    LMKERN_DEVICE void add(Piece<Accumulate<S>, kVec>& sum) const {
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i) sum.at[i] += to_accumulate(piece.at[i]);
    }
  };
};

template <class S, int kVec>
void backward(const EmbeddingSortedBackwardArgs& a) {
  launch_sum_runs(a.rows, a.order, a.d_weight, a.workspace.data, a.scale_grad_by_freq, a.scale,
                  PlainTerms<S, kVec>{a.d_out.ptr<const S>(), a.d_out.shape[1]});
}

}  // namespace

std::int64_t embedding_sorted_workspace(std::int64_t positions, std::int64_t width,
                                        bool is_double) {
  return partial_bytes(positions, width, is_double);
}

void Kernels::embedding_sorted_backward(const EmbeddingSortedBackwardArgs& a) {
  dispatch_float_types(a.d_weight.dtype, [&](auto s) {
    using S = typename decltype(s)::type;
    if (is_wide<S>(a.d_out.shape[1], {&a.d_out, &a.d_weight, &a.workspace}))
      backward<S, kWide<S>>(a);
    else
      backward<S, 1>(a);
  });
}

}  // namespace lmkern::cuda
