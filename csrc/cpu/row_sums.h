// Sums of rows by bucket: the gradient of a lookup, of single rows and of bags.
//
//   target[u, :] = scale(u) * sum over starts[u] <= i < starts[u + 1] of term(i)[:]
//
// A Terms says what term(i) is:
//   Vec<T> at(i, d)        lanes d, d + 1, ...
//   Vec<T> at_n(i, d, n)   n of them
#pragma once
#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

inline constexpr std::int64_t kForkElements = 1 << 15;  // below, a parallel region costs more

LMKERN_INLINE int threads_for(std::int64_t elements) {
  return elements < kForkElements ? 1 : max_threads();
}

// A piece of work: buckets [first, last), columns [begin, end).
struct RowSumItem {
  std::int64_t first, last, begin, end;
};

inline constexpr std::int64_t kItemTerms = 128;      // of small buckets together
inline constexpr std::int64_t kLongBucket = 256;     // shared among threads by columns
inline constexpr std::int64_t kColumns = 256;        // of one item of a long bucket
inline constexpr std::int64_t kPieceColumns = 1024;  // partial sums that stay in L1

// How many items there may be.
LMKERN_INLINE std::int64_t most_row_sum_items(std::int64_t buckets, std::int64_t terms,
                                              std::int64_t width) {
  return buckets + terms / kLongBucket * (width / kColumns + 1);
}

// Zipf-distributed ids put a tenth of all terms into one bucket, so long ones are cut by columns.
LMKERN_INLINE std::int64_t plan_row_sums(const std::int64_t* starts, std::int64_t buckets,
                                         std::int64_t width, RowSumItem* items) {
  std::int64_t count = 0;
  for (std::int64_t u = 0; u < buckets;) {
    if (starts[u + 1] - starts[u] >= kLongBucket) {
      for (std::int64_t d = 0; d < width; d += kColumns)
        items[count++] = {u, u + 1, d, width - d < kColumns ? width : d + kColumns};
      ++u;
      continue;
    }
    std::int64_t last = u + 1;
    while (last < buckets && starts[last + 1] - starts[last] < kLongBucket &&
           starts[last + 1] - starts[u] <= kItemTerms)
      ++last;
    items[count++] = {u, last, 0, width};
    u = last;
  }
  return count;
}

// Adds K terms to the partial sums of columns [begin, end), in the terms' order.
template <int K, class S, class Terms>
LMKERN_INLINE void add_terms(const Terms& terms, std::int64_t i, std::int64_t begin,
                             std::int64_t end, bool is_first, bool is_last, Accumulate<S> scale,
                             Accumulate<S>* partial, S* target) {
  using T = Accumulate<S>;
  std::int64_t d = begin;
  for (; d + kLanes<T> <= end; d += kLanes<T>) {
    Vec<T> sum = is_first ? Vec<T>{} : load(partial + (d - begin));
    LMKERN_UNROLL
    for (int k = 0; k < K; ++k) sum += terms.at(i + k, d);
    if (is_last)
      store(target + d, sum * scale);
    else
      store(partial + (d - begin), sum);
  }
  if (const std::int64_t n = end - d; n > 0) {
    Vec<T> sum = is_first ? Vec<T>{} : load(partial + (d - begin));
    LMKERN_UNROLL
    for (int k = 0; k < K; ++k) sum += terms.at_n(i + k, d, n);
    if (is_last)
      store_n(target + d, sum * scale, n);
    else
      store(partial + (d - begin), sum);
  }
}

// target[begin .. end) = scale * the terms first .. last, of which there is at least one.
template <class S, class Terms>
LMKERN_INLINE void sum_terms(const Terms& terms, std::int64_t first, std::int64_t last,
                             std::int64_t begin, std::int64_t end, Accumulate<S> scale, S* target) {
  using T = Accumulate<S>;
  alignas(64) T partial[kPieceColumns + kLanes<T>];
  for (std::int64_t d = begin; d < end; d += kPieceColumns) {
    const std::int64_t stop = end - d < kPieceColumns ? end : d + kPieceColumns;
    std::int64_t i = first;
    while (i < last) {
      const std::int64_t left = last - i;
      const bool is_first = i == first;
      if (left >= 8) {
        add_terms<8, S>(terms, i, d, stop, is_first, left == 8, scale, partial, target);
        i += 8;
      } else if (left >= 4) {
        add_terms<4, S>(terms, i, d, stop, is_first, left == 4, scale, partial, target);
        i += 4;
      } else if (left >= 2) {
        add_terms<2, S>(terms, i, d, stop, is_first, left == 2, scale, partial, target);
        i += 2;
      } else {
        add_terms<1, S>(terms, i, d, stop, is_first, true, scale, partial, target);
        i += 1;
      }
    }
  }
}

// A gradient by buckets: target rows ids[u] (sparse: u) are written, stale rows cleared.
struct GradientRows {
  const std::int64_t* ids;     // [buckets]
  const std::int64_t* starts;  // [buckets + 1]
  const std::int64_t* stale;   // [stale_count]
  std::int64_t buckets, stale_count, width;
  bool sparse, scale_by_count;
  RowSumItem* items = nullptr;
  std::int64_t* clear = nullptr;

  // Takes what write_gradient needs.
  LMKERN_INLINE void layout(Scratch& scratch) {
    items = scratch.take<RowSumItem>(most_row_sum_items(buckets, starts[buckets], width));
    clear = scratch.take<std::int64_t>(stale_count);
  }
};

template <class S, class Terms>
LMKERN_INLINE void write_gradient(const GradientRows& g, const Terms& terms, S* target) {
  using T = Accumulate<S>;
  const std::int64_t items = plan_row_sums(g.starts, g.buckets, g.width, g.items);
  std::int64_t clear = 0;  // stale rows that no sum overwrites
  for (std::int64_t k = 0, u = 0; k < g.stale_count; ++k) {
    while (u < g.buckets && g.ids[u] < g.stale[k]) ++u;
    if (u == g.buckets || g.ids[u] != g.stale[k]) g.clear[clear++] = g.stale[k];
  }
  constexpr std::int64_t kBlock = 32;
  WorkQueue sums(items), blocks((clear + kBlock - 1) / kBlock);
  parallel(threads_for((g.starts[g.buckets] + clear) * g.width), [&](int, int) {
    for (std::int64_t n; sums.next(&n);) {
      const RowSumItem& item = g.items[n];
      for (std::int64_t u = item.first; u < item.last; ++u) {
        const std::int64_t first = g.starts[u], last = g.starts[u + 1];
        const T scale = g.scale_by_count ? T(1) / static_cast<T>(last - first) : T(1);
        S* const row = target + (g.sparse ? u : g.ids[u]) * g.width;
        sum_terms<S>(terms, first, last, item.begin, item.end, scale, row);
      }
    }
    for (std::int64_t n; blocks.next(&n);) {
      const std::int64_t end = (n + 1) * kBlock < clear ? (n + 1) * kBlock : clear;
      for (std::int64_t k = n * kBlock; k < end; ++k)
        __builtin_memset(target + g.clear[k] * g.width, 0, g.width * sizeof(S));
    }
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
