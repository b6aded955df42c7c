// Gradients of bags of embedding rows (csrc/ops/embedding_bag.h).
//
// Parallel  d_weight as embedding_backward.cpp; d_per_sample_weights over positions.
// Traffic   B D read, again and again from cache, U D written; d_per_sample_weights: M D read.
// Limits    as embedding_bag.cpp.
#include "cpu/bag_terms.h"
#include "cpu/row_sums.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

// What the gradient wants to know of a position.
template <class S>
struct Position {
  std::int64_t bag;
  std::int32_t term;  // which of its bag's
  Accumulate<S> factor;
};

template <class S>
struct BagRows {
  using Row = WeightedRow<S>;
  const S* d_out;
  std::int64_t width;
  const std::int64_t* order;
  const Position<S>* positions;
  LMKERN_INLINE Row row(std::int64_t i) const {
    const Position<S>& p = positions[order[i]];
    return {d_out + p.bag * width, p.factor};
  }
};

template <class S>
struct WonRows {
  using Row = WinnerRow<S>;
  BagRows<S> rows;
  const std::int32_t* winners;
  LMKERN_INLINE Row row(std::int64_t i) const {
    const Position<S>& p = rows.positions[rows.order[i]];
    return {rows.d_out + p.bag * rows.width, winners + p.bag * rows.width, p.term, p.factor};
  }
};

// 1, or for means 1 / the number of terms.
template <class S>
LMKERN_INLINE Accumulate<S> bag_factor(const EmbeddingBags& bags, std::int64_t terms) {
  using T = Accumulate<S>;
  return bags.mode == BagMode::kMean ? T(1) / static_cast<T>(terms) : T(1);
}

template <class S>
void backward(const EmbeddingBagBackwardArgs& a) {
  RowSums sums{a.sparse ? nullptr : a.ids.ptr<const std::int64_t>(),
               a.starts.ptr<const std::int64_t>(),
               a.stale.ptr<const std::int64_t>(),
               a.ids.shape[0],
               a.stale.defined() ? a.stale.shape[0] : 0,
               a.d_weight.shape[1],
               a.scale_grad_by_freq};
  BagTerms terms{a.d_out.shape[0]};
  Position<S>* positions = nullptr;
  Scratch::place([&](Scratch& scratch) {
    sums.layout(scratch);
    terms.layout(scratch, a.bags);
    positions = scratch.take<Position<S>>(a.bags.indices.numel());
  });
  terms.fill(a.bags);
  for (std::int64_t b = 0; b < terms.bags; ++b) {
    const std::int64_t first = terms.starts[b], last = terms.starts[b + 1];
    const Accumulate<S> factor = bag_factor<S>(a.bags, last - first);
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t n = terms.positions[i];
      positions[n] = {b, static_cast<std::int32_t>(i - first),
                      sample_weight<S>(a.bags, n) * factor};
    }
  }
  const BagRows<S> rows{a.d_out.ptr<const S>(), sums.width, a.order.ptr<const std::int64_t>(),
                        positions};
  if (a.bags.mode == BagMode::kMax)
    write_row_sums(sums, WonRows<S>{rows, a.winners.ptr<const std::int32_t>()},
                   a.d_weight.ptr<S>());
  else
    write_row_sums(sums, rows, a.d_weight.ptr<S>());
}

template <class S, class Row>
LMKERN_INLINE Accumulate<S> dot(const Row& d_out, const S* weight, std::int64_t width) {
  using T = Accumulate<S>;
  Vec<T> even{}, odd{};
  std::int64_t d = 0;
  for (; d + 2 * kLanes<T> <= width; d += 2 * kLanes<T>) {
    even += d_out.at(d) * load(weight + d);
    odd += d_out.at(d + kLanes<T>) * load(weight + d + kLanes<T>);
  }
  for (; d < width; d += kLanes<T>) {
    const std::int64_t n = width - d < kLanes<T> ? width - d : kLanes<T>;
    even += d_out.at_n(d, n) * load_n(weight + d, n);
  }
  return sum_lanes(even + odd);
}

template <class S>
void weights_backward(const EmbeddingBagWeightsBackwardArgs& a) {
  const std::int64_t width = a.weight.shape[1];
  BagTerms terms{a.d_out.shape[0]};
  std::int64_t* bag_of = nullptr;  // by term
  Scratch::place([&](Scratch& scratch) {
    terms.layout(scratch, a.bags);
    bag_of = scratch.take<std::int64_t>(a.bags.indices.numel());
  });
  terms.fill(a.bags);
  for (std::int64_t b = 0; b < terms.bags; ++b)
    for (std::int64_t i = terms.starts[b]; i < terms.starts[b + 1]; ++i) bag_of[i] = b;
  S* const d_weights = a.d_per_sample_weights.ptr<S>();
  const std::int64_t all = a.bags.indices.numel();
  for (std::int64_t i = 0; i < all; ++i) d_weights[i] = S{};  // padding, outside of bags
  const std::int64_t count = terms.starts[terms.bags];
  parallel(threads_for(count * width), [&](int thread, int threads) {
    const Range range = thread_range(count, 1, thread, threads);
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      const std::int64_t b = bag_of[i], first = terms.starts[b];
      const S* const row = a.weight.ptr<const S>() + terms.rows[i] * a.weight.strides[0];
      const S* const d_out = a.d_out.ptr<const S>() + b * width;
      const Accumulate<S> factor = bag_factor<S>(a.bags, terms.starts[b + 1] - first);
      Accumulate<S> sum;
      if (a.bags.mode == BagMode::kMax)
        sum = dot<S>(WinnerRow<S>{d_out, a.winners.ptr<const std::int32_t>() + b * width,
                                  static_cast<std::int32_t>(i - first), 1},
                     row, width);
      else
        sum = dot<S>(PlainRow<S>{d_out}, row, width);
      Vec<Accumulate<S>> lanes{};
      lanes[0] = sum * factor;
      store_n(d_weights + terms.positions[i], lanes, 1);
    }
  });
}

}  // namespace

void embedding_bag_backward(const EmbeddingBagBackwardArgs& a) {
  dispatch_float_types(a.d_weight.dtype, [&](auto s) { backward<typename decltype(s)::type>(a); });
}

void embedding_bag_weights_backward(const EmbeddingBagWeightsBackwardArgs& a) {
  dispatch_float_types(a.weight.dtype,
                       [&](auto s) { weights_backward<typename decltype(s)::type>(a); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
