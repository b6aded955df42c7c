// Sums of rows by bucket: bags of rows, and the gradients of lookups.
//
//   target[u, :] = scale(u) * sum over starts[u] <= i < starts[u + 1] of term(i)[:]
//
// A Terms says what term(i) is: Terms::row(i) gives a Row of pointers and factors, with
//   Vec<T> at(d)        lanes d, d + 1, ...
//   Vec<T> at_n(d, n)   n of them
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
  typename Terms::Row rows[K];
  LMKERN_UNROLL
  for (int k = 0; k < K; ++k) rows[k] = terms.row(i + k);
  std::int64_t d = begin;
  for (; d + kLanes<T> <= end; d += kLanes<T>) {
    Vec<T> sum = is_first ? Vec<T>{} : load(partial + (d - begin));
    LMKERN_UNROLL
    for (int k = 0; k < K; ++k) sum += rows[k].at(d);
    if (is_last)
      store(target + d, sum * scale);
    else
      store(partial + (d - begin), sum);
  }
  if (const std::int64_t n = end - d; n > 0) {
    Vec<T> sum = is_first ? Vec<T>{} : load(partial + (d - begin));
    LMKERN_UNROLL
    for (int k = 0; k < K; ++k) sum += rows[k].at_n(d, n);
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

// target[rows[u], :] = sum of bucket u, zeros if it is empty; stale rows are cleared.
struct RowSums {
  const std::int64_t* rows;    // [buckets] ascending; null: row u
  const std::int64_t* starts;  // [buckets + 1]
  const std::int64_t* stale;   // [stale_count] ascending
  std::int64_t buckets, stale_count, width;
  bool mean;  // divided by the number of terms
  RowSumItem* items = nullptr;
  std::int64_t* clear = nullptr;
  double scale = 1;  // of every sum

  // Takes what write_row_sums needs.
  LMKERN_INLINE void layout(Scratch& scratch) {
    items = scratch.take<RowSumItem>(most_row_sum_items(buckets, starts[buckets], width));
    clear = scratch.take<std::int64_t>(stale_count);
  }
};

template <class S, class Terms>
LMKERN_INLINE void write_row_sums(const RowSums& r, const Terms& terms, S* target) {
  using T = Accumulate<S>;
  const std::int64_t items = plan_row_sums(r.starts, r.buckets, r.width, r.items);
  std::int64_t clear = 0;  // stale rows that no sum overwrites
  for (std::int64_t k = 0, u = 0; k < r.stale_count; ++k) {
    while (u < r.buckets && r.rows[u] < r.stale[k]) ++u;
    if (u == r.buckets || r.rows[u] != r.stale[k]) r.clear[clear++] = r.stale[k];
  }
  constexpr std::int64_t kBlock = 32;
  WorkQueue sums(items), blocks((clear + kBlock - 1) / kBlock);
  parallel(threads_for((r.starts[r.buckets] + clear) * r.width), [&](int, int) {
    for (std::int64_t n; sums.next(&n);) {
      const RowSumItem& item = r.items[n];
      for (std::int64_t u = item.first; u < item.last; ++u) {
        const std::int64_t first = r.starts[u], last = r.starts[u + 1];
        S* const row = target + (r.rows == nullptr ? u : r.rows[u]) * r.width;
        const T scale = static_cast<T>(r.scale) / (r.mean ? static_cast<T>(last - first) : T(1));
        if (first == last)
          __builtin_memset(row, 0, r.width * sizeof(S));
        else
          sum_terms<S>(terms, first, last, item.begin, item.end, scale, row);
      }
    }
    for (std::int64_t n; blocks.next(&n);) {
      const std::int64_t end = (n + 1) * kBlock < clear ? (n + 1) * kBlock : clear;
      for (std::int64_t k = n * kBlock; k < end; ++k)
        __builtin_memset(target + r.clear[k] * r.width, 0, r.width * sizeof(S));
    }
  });
}

// A row as it lies in memory.
template <class S>
struct PlainRow {
  const S* data;
  LMKERN_INLINE Vec<Accumulate<S>> at(std::int64_t d) const { return load(data + d); }
  LMKERN_INLINE Vec<Accumulate<S>> at_n(std::int64_t d, std::int64_t n) const {
    return load_n(data + d, n);
  }
};

// weight * row
template <class S>
struct WeightedRow {
  const S* data;
  Accumulate<S> weight;
  LMKERN_INLINE Vec<Accumulate<S>> at(std::int64_t d) const { return load(data + d) * weight; }
  LMKERN_INLINE Vec<Accumulate<S>> at_n(std::int64_t d, std::int64_t n) const {
    return load_n(data + d, n) * weight;
  }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
