// Gradients of bags of embedding rows (csrc/ops/embedding_bag.h).
//
// Parallel  d_weight: a thread for each position finds its bag; then sorted_runs.h.
//           d_per_sample_weights: a warp for each position.
// Traffic   d_weight: N positions of 12 bytes (float64: 16) written and, for each column piece, read;
//           M D of d_out read (max: and of winners), mostly from cache where bags are long; U D
//           written. d_per_sample_weights: M D read from weight, M D from d_out, mostly from cache.
// Limits    as embedding_backward.cu. 100 registers, no spills.
#include "core/dispatch.h"
#include "cuda/bag_view.h"
#include "cuda/kernels.h"
#include "cuda/sorted_runs.h"

namespace lmkern::cuda {
namespace {

constexpr int kThreads = 256;

// Of each position, what its row of d_weight gets: factor times d_out's row `bag` (-1: nothing), for
// max where `term` is the winner.
template <class S>
struct Positions {
  Accumulate<S>* factor;  // [N]
  std::int32_t* bag;      // [N]
  std::int32_t* term;     // [N]
};

// registers: 32, spills: 0
template <class S>
LMKERN_KERNEL(kThreads, 4)
locate_positions(BagView bags, const S* samples, Positions<S> to) {
  using T = Accumulate<S>;
  const std::int64_t n = std::int64_t{block_x()} * kThreads + thread_index();
  if (n >= bags.positions) return;
  const BagView::Term term = bags.locate(n);
  to.bag[n] = static_cast<std::int32_t>(term.bag);
  to.term[n] = static_cast<std::int32_t>(term.term);
  const T factor = bags.template factor<T>(term.count);
  to.factor[n] = samples == nullptr ? factor : to_accumulate(samples[n]) * factor;
}

template <class S>
struct BagGradient {
  Positions<S> positions;
  const S* d_out;
  const std::int32_t* winners;
  std::int64_t width;
};

template <class S, int kVec, bool kMax>
struct BagTermsOf : BagGradient<S> {
  static constexpr int kInFlight = 4, kMinBlocks = 2;

  struct Term {
    Piece<S, kVec> piece;
    Piece<std::int32_t, kVec> won;
    Accumulate<S> factor;
    std::int32_t bag, term;
    LMKERN_DEVICE void load(const BagTermsOf& t, std::int64_t position, std::int64_t column) {
      bag = t.positions.bag[position];
      if (bag < 0) return;
      factor = t.positions.factor[position];
      piece.load(t.d_out + bag * t.width + column);
      if constexpr (kMax) {
        term = t.positions.term[position];
        won.load(t.winners + bag * t.width + column);
      }
    }
    LMKERN_DEVICE void add(Piece<Accumulate<S>, kVec>& sum) const {
      if (bag < 0) return;
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i)
        if (!kMax || won.at[i] == term) sum.at[i] += to_accumulate(piece.at[i]) * factor;
    }
  };
};
template <class S, int kVec>
struct BagTerms : BagTermsOf<S, kVec, false> {};
template <class S, int kVec>
struct WonTerms : BagTermsOf<S, kVec, true> {};

std::int64_t rounded(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class S, int kVec>
void backward(const EmbeddingBagSortedBackwardArgs& a) {
  using T = Accumulate<S>;
  const std::int64_t count = a.bags.indices.numel();
  if (count == 0 || a.d_out.numel() == 0) return;
  char* work = a.workspace.ptr<char>();
  const auto take = [&](std::int64_t bytes) {
    char* const taken = work;
    work += rounded(bytes);
    return taken;
  };
  Positions<S> positions;
  positions.factor = reinterpret_cast<T*>(take(count * static_cast<std::int64_t>(sizeof(T))));
  positions.bag = reinterpret_cast<std::int32_t*>(take(count * 4));
  positions.term = reinterpret_cast<std::int32_t*>(take(count * 4));
  launch<locate_positions<S>>(Grid{.x = blocks_for(count, kThreads), .threads = kThreads},
                              current_stream(), BagView(a.bags, a.kept),
                              a.bags.per_sample_weights.ptr<const S>(), positions);
  const BagGradient<S> gradient{positions, a.d_out.ptr<const S>(),
                                a.winners.ptr<const std::int32_t>(), a.d_out.shape[1]};
  if (a.bags.mode == BagMode::kMax)
    launch_sum_runs(a.rows, a.order, a.d_weight, work, a.scale_grad_by_freq, 1.0,
                    WonTerms<S, kVec>{{gradient}});
  else
    launch_sum_runs(a.rows, a.order, a.d_weight, work, a.scale_grad_by_freq, 1.0,
                    BagTerms<S, kVec>{{gradient}});
}

template <class S>
struct SampleGradient {
  BagView bags;
  const S *d_out, *weight;
  const std::int32_t* winners;  // null but for max
  std::int64_t stride, width;
  S* d_samples;
  IndexErrors errors;
};

// registers: 80, spills: 0
template <class S, int kVec>
LMKERN_KERNEL(kThreads, 3)
sample_gradient(SampleGradient<S> g) {
  using T = Accumulate<S>;
  const std::int64_t n = std::int64_t{block_x()} * (kThreads / 32) + warp_index();
  if (n >= g.bags.positions) return;
  const BagView::Term term = g.bags.locate(n);
  T sum = T(0);
  if (term.bag >= 0) {
    const std::int64_t index = g.bags.indices.at(n), valid = g.errors.valid_row(index);
    if (index != valid && lane_index() == 0) g.errors.report(index, n);
    const S* const row = g.weight + valid * g.stride;
    const S* const d_out = g.d_out + term.bag * g.width;
    const std::int32_t* const winners =
        g.winners == nullptr ? nullptr : g.winners + term.bag * g.width;
    for (std::int64_t d = lane_index() * kVec; d < g.width; d += 32 * kVec) {
      Piece<S, kVec> a, b;
      Piece<std::int32_t, kVec> won;
      a.load(row + d);
      b.load(d_out + d);
      if (winners != nullptr) won.load(winners + d);
      LMKERN_UNROLL
      for (int i = 0; i < kVec; ++i)
        if (winners == nullptr || won.at[i] == term.term)
          sum += to_accumulate(a.at[i]) * to_accumulate(b.at[i]);
    }
    sum = warp_sum(sum) * g.bags.template factor<T>(term.count);
  }
  if (lane_index() == 0) g.d_samples[n] = from_accumulate<S>(sum);
}

template <class S, int kVec>
void weights_backward(const EmbeddingBagWeightsBackwardArgs& a) {
  const SampleGradient<S> g{
      BagView(a.bags, a.kept),
      a.d_out.ptr<const S>(),
      a.weight.ptr<const S>(),
      a.bags.mode == BagMode::kMax ? a.winners.ptr<const std::int32_t>() : nullptr,
      a.weight.strides[0],
      a.weight.shape[1],
      a.d_per_sample_weights.ptr<S>(),
      index_errors("embedding_bag", a.bags.indices, a.weight.shape[0])};
  launch<sample_gradient<S, kVec>>(
      Grid{.x = blocks_for(g.bags.positions, kThreads / 32), .threads = kThreads}, current_stream(),
      g);
}

}  // namespace

std::int64_t embedding_bag_sorted_workspace(std::int64_t positions, std::int64_t width,
                                            bool is_double) {
  return rounded(positions * (is_double ? 8 : 4)) + 2 * rounded(positions * 4) +
         partial_bytes(positions, width, is_double);
}

void Kernels::embedding_bag_sorted_backward(const EmbeddingBagSortedBackwardArgs& a) {
  dispatch_float_types(a.d_weight.dtype, [&](auto s) {
    using S = typename decltype(s)::type;
    if (is_wide<S>(a.d_out.shape[1], {&a.d_out, &a.d_weight, &a.winners, &a.workspace}))
      backward<S, kWide<S>>(a);
    else
      backward<S, 1>(a);
  });
}

void Kernels::embedding_bag_weights_backward(const EmbeddingBagWeightsBackwardArgs& a) {
  if (a.bags.indices.numel() == 0) return;
  dispatch_float_types(a.weight.dtype, [&](auto s) {
    using S = typename decltype(s)::type;
    if (is_wide<S>(a.weight.shape[1], {&a.weight, &a.d_out, &a.winners}))
      weights_backward<S, kWide<S>>(a);
    else
      weights_backward<S, 1>(a);
  });
}

}  // namespace lmkern::cuda
