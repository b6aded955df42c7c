// Bags of embedding rows (csrc/ops/embedding_bag.h).
//
// Parallel  over bags, the long ones in pieces of columns.
// Traffic   M D read from weight, B D written (max: and B D winners).
// Limits    the terms are listed serially: one pass over N.
#include "cpu/bag_terms.h"
#include "cpu/row_sums.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S>
struct LookupRows {
  using Row = PlainRow<S>;
  const EmbeddingBagForwardArgs& args;
  const BagTerms& terms;
  LMKERN_INLINE Row row(std::int64_t i) const {
    return {args.weight.ptr<const S>() + terms.rows[i] * args.weight.strides[0]};
  }
};

template <class S>
struct WeightedLookupRows {
  using Row = WeightedRow<S>;
  const EmbeddingBagForwardArgs& args;
  const BagTerms& terms;
  LMKERN_INLINE Row row(std::int64_t i) const {
    return {args.weight.ptr<const S>() + terms.rows[i] * args.weight.strides[0],
            sample_weight<S>(args.bags, terms.positions[i])};
  }
};

template <class T>
struct Maxima {
  using Lane = typename VecTypes<T>::IntLane;
  alignas(64) T best[kPieceColumns + kLanes<T>];
  alignas(64) Lane winner[kPieceColumns + kLanes<T>];
};

// Terms first + begin .. + K of a bag against the maxima so far.
template <int K, class S, class Terms>
LMKERN_INLINE void compare_terms(const Terms& terms, std::int64_t first, std::int64_t term,
                                 std::int64_t begin, std::int64_t end,
                                 Maxima<Accumulate<S>>& maxima) {
  using T = Accumulate<S>;
  using Lane = typename VecTypes<T>::IntLane;
  typename Terms::Row rows[K];
  LMKERN_UNROLL
  for (int k = 0; k < K; ++k) rows[k] = terms.row(first + term + k);
  for (std::int64_t d = begin; d < end; d += kLanes<T>) {
    const std::int64_t n = end - d < kLanes<T> ? end - d : kLanes<T>;
    T* const best_at = maxima.best + (d - begin);
    Lane* const winner_at = maxima.winner + (d - begin);
    Vec<T> best = term == 0 ? rows[0].at_n(d, n) : load(best_at);
    IntVec<T> winner{};
    if (term != 0) __builtin_memcpy(&winner, winner_at, sizeof winner);
    LMKERN_UNROLL
    for (int k = 0; k < K; ++k) {
      const Vec<T> value = rows[k].at_n(d, n);
      const auto greater = value > best;
      best = greater ? value : best;
      winner = greater ? IntVec<T>{} + static_cast<Lane>(term + k) : winner;
    }
    store(best_at, best);
    __builtin_memcpy(winner_at, &winner, sizeof winner);
  }
}

template <class S, class Terms>
LMKERN_INLINE void max_bag(const Terms& terms, std::int64_t first, std::int64_t last,
                           std::int64_t begin, std::int64_t end, S* out, std::int32_t* winners) {
  using T = Accumulate<S>;
  Maxima<T> maxima;
  for (std::int64_t piece = begin; piece < end; piece += kPieceColumns) {
    const std::int64_t stop = end - piece < kPieceColumns ? end : piece + kPieceColumns;
    std::int64_t term = 0;
    for (; first + term + 4 <= last; term += 4)
      compare_terms<4, S>(terms, first, term, piece, stop, maxima);
    for (; first + term < last; ++term)
      compare_terms<1, S>(terms, first, term, piece, stop, maxima);
    for (std::int64_t d = piece; d < stop; d += kLanes<T>)
      store_n(out + d, load(maxima.best + (d - piece)),
              stop - d < kLanes<T> ? stop - d : kLanes<T>);
    if (winners != nullptr)
      for (std::int64_t d = piece; d < stop; ++d)
        winners[d] = static_cast<std::int32_t>(maxima.winner[d - piece]);
  }
}

template <class S>
void max_bags(const EmbeddingBagForwardArgs& a, const BagTerms& terms, RowSumItem* items,
              std::int64_t width) {
  const std::int64_t count = plan_row_sums(terms.starts, terms.bags, width, items);
  WorkQueue queue(count);
  parallel(threads_for(terms.starts[terms.bags] * width), [&](int, int) {
    for (std::int64_t n; queue.next(&n);) {
      const RowSumItem& item = items[n];
      for (std::int64_t b = item.first; b < item.last; ++b) {
        const std::int64_t first = terms.starts[b], last = terms.starts[b + 1];
        S* const out = a.out.ptr<S>() + b * width;
        std::int32_t* const winners =
            a.winners.defined() ? a.winners.ptr<std::int32_t>() + b * width : nullptr;
        if (first == last) {
          __builtin_memset(out, 0, width * sizeof(S));
          if (winners != nullptr) __builtin_memset(winners, 0, width * sizeof(std::int32_t));
        } else if (a.bags.per_sample_weights.defined()) {
          max_bag<S>(WeightedLookupRows<S>{a, terms}, first, last, item.begin, item.end, out,
                     winners);
        } else {
          max_bag<S>(LookupRows<S>{a, terms}, first, last, item.begin, item.end, out, winners);
        }
      }
    }
  });
}

template <class S>
void forward(const EmbeddingBagForwardArgs& a) {
  const std::int64_t width = a.weight.shape[1];
  BagTerms terms{a.out.shape[0]};
  RowSumItem* items = nullptr;
  Scratch::place([&](Scratch& scratch) {
    terms.layout(scratch, a.bags);
    items = scratch.take<RowSumItem>(most_row_sum_items(terms.bags, a.bags.indices.numel(), width));
  });
  terms.fill(a.bags);
  if (a.bags.mode == BagMode::kMax) return max_bags<S>(a, terms, items, width);
  const RowSums sums{
      nullptr, terms.starts, nullptr, terms.bags, 0, width, a.bags.mode == BagMode::kMean, items};
  if (a.bags.per_sample_weights.defined())
    write_row_sums(sums, WeightedLookupRows<S>{a, terms}, a.out.ptr<S>());
  else
    write_row_sums(sums, LookupRows<S>{a, terms}, a.out.ptr<S>());
}

}  // namespace

void embedding_bag_forward(const EmbeddingBagForwardArgs& a) {
  dispatch_float_types(a.weight.dtype, [&](auto s) { forward<typename decltype(s)::type>(a); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
