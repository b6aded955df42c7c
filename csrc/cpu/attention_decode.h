// Attention forward for a few queries (csrc/ops/attention.h): decoding with a cache of keys.
//
// Parallel  a work item is a chunk of keys of one key head, with the queries of all heads that read
//           it; the chunks' results are joined afterwards in a fixed order (split KV), so that the
//           division among threads leaves no trace.
// Traffic   k and v once, where they lie: the bound.
// Limits    16-bit values, and widths that are no multiple of the lanes, are copied to float first.
#pragma once
#include "cpu/attention_problem.h"
#include "cpu/dot.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

template <class S>
struct DecodePass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  using Math = VecMath<T>;
  static constexpr std::int64_t kLane = kLanes<T>;
  static constexpr std::int64_t kMostQueries = 4, kChunk = 512, kRows = 16;

  static bool serves(const Geometry& g) {
    return g.most_queries <= kMostQueries && g.p.dropout_p == 0 && g.depth > 0;
  }

  const AttentionForwardArgs& a;
  const Geometry& g;
  const std::int64_t chunks = most(1, ceil_div(g.most_keys, kChunk));
  const std::int64_t rows = g.group * g.most_queries;  // of one key head
  const std::int64_t padded = ceil_div(g.width, kLane) * kLane;
  const bool copies_v = sizeof(S) != sizeof(T) || padded != g.width;

  struct Part {              // of one item's rows
    T *highest, *sum, *out;  // [rows], [rows], [rows][padded]
  };
  struct Thread {
    T *q, *scores, *v;  // [rows][D], [kRows][kChunk], [kChunk][padded]
  };

  Part part(Scratch& scratch) const {
    return {scratch.take<T>(rows), scratch.take<T>(rows), scratch.take<T>(rows * padded)};
  }
  Thread thread(Scratch& scratch) const {
    return {scratch.take<T>(rows * g.depth), scratch.take<T>(kRows * kChunk),
            scratch.take<T>(copies_v ? kChunk * padded : 0)};
  }

  // Row r: query r % queries of head key_head * group + r / queries.
  LMKERN_INLINE std::int64_t head_of(std::int64_t key_head, std::int64_t r,
                                     const Sequence& s) const {
    return key_head * g.group + r / s.queries;
  }

  void chunk(const Sequence& s, std::int64_t key_head, std::int64_t first, const Thread& own,
             const Part& part) const {
    const std::int64_t n_rows = g.group * s.queries;
    const Range visible = g.visible(s, 0, s.queries);
    const std::int64_t begin = most(first, visible.begin), end = least(first + kChunk, visible.end);
    for (std::int64_t r = 0; r < n_rows; ++r) {
      part.highest[r] = T(-__builtin_inf());
      part.sum[r] = 0;
    }
    if (begin >= end) return;
    for (std::int64_t h = 0; h < g.group; ++h)
      copy_rows<S>(HeadRows<const S>(g.p.q, s.batch, key_head * g.group + h, s.first_query), 0,
                   s.queries, g.depth, g.depth, static_cast<T>(g.p.scale),
                   own.q + h * s.queries * g.depth);
    const HeadRows<const S> k(g.p.k, s.batch, key_head, s.first_key);
    const HeadRows<const S> v(g.p.v, s.batch, key_head, s.first_key);
    const T* values = nullptr;
    std::int64_t v_stride = padded;
    if constexpr (sizeof(S) == sizeof(T))
      if (!copies_v) {
        values = v.row(begin);
        v_stride = v.stride;
      }
    if (values == nullptr) {
      copy_rows<S>(v, begin, end - begin, g.width, padded, 1, own.v);
      values = own.v;
    }
    for (std::int64_t r = 0; r < n_rows; r += kRows) {
      const std::int64_t count = least(n_rows - r, kRows);
      for (std::int64_t key = begin; key < end; key += kLane)
        scores(s, key_head, r, count, k, key, least(end - key, kLane), own, key - begin);
      for (std::int64_t i = 0; i < count; ++i)
        exponentials(own.scores + i * kChunk, end - begin, part.highest[r + i], part.sum[r + i]);
      multiply_columns(count, padded, end - begin, own.scores, kChunk, 1, values, v_stride,
                       part.out + r * padded, padded, false);
    }
  }

  // Scores of `count` rows from r on against n keys, at [row][column] of own.scores.
  void scores(const Sequence& s, std::int64_t key_head, std::int64_t r, std::int64_t count,
              const HeadRows<const S>& k, std::int64_t key, std::int64_t n, const Thread& own,
              std::int64_t column) const {
    constexpr int kGroup = kDotGroup<T>, kGroups = kDotGroups<T>;
    V half[kRows][kGroups];
    for (int group = 0; group < kGroups; ++group) {
      const S* keys[kGroup];
      LMKERN_UNROLL
      for (int i = 0; i < kGroup; ++i)  // those beyond the last are read as it, and dropped
        keys[i] = k.row(key + least(group * kGroup + i, n - 1));
      for_row_tiles<kDotRows>(count, [&](std::int64_t i, auto tile) __attribute__((always_inline)) {
        constexpr int M = decltype(tile)::value;
        V sums[M][kGroup] = {};
        add_dots<true>(g.depth, own.q + (r + i) * g.depth, g.depth, keys, kLane * k.stride, sums);
        LMKERN_UNROLL
        for (int m = 0; m < M; ++m) half[i + m][group] = fold<T>(sums[m]);
      });
    }
    for (std::int64_t i = 0; i < count; ++i) {
      V score = half[i][0];
      if constexpr (kGroups == 2) score = fold_halves<T>(half[i][0], half[i][1]);
      store(own.scores + i * kChunk + column, adjusted(s, key_head, r + i, key, n, score));
    }
  }

  LMKERN_INLINE V adjusted(const Sequence& s, std::int64_t key_head, std::int64_t r,
                           std::int64_t key, std::int64_t n, V score) const {
    const std::int64_t h = head_of(key_head, r, s), query = r % s.queries;
    const AttentionProblem& p = g.p;
    using Lane = typename VecTypes<T>::IntLane;
    if (p.softcap != 0) {
      const T cap = static_cast<T>(p.softcap);
      score = Math::tanh(score * (1 / cap)) * cap;
    }
    const IntVec<T> distance = lane_index<T>() + static_cast<Lane>(key - query - s.offset);
    if (p.alibi_slopes.defined()) {
      const TensorView& slopes = p.alibi_slopes;
      const T slope = slopes.ptr<const T>()[s.index * slopes.strides[0] + h * slopes.strides[1]];
      score -= Math::abs(__builtin_convertvector(distance, V)) * slope;
    }
    if (p.mask.defined()) {
      const TensorView& m = p.mask;
      const std::int64_t at = s.batch * m.strides[0] + h * m.strides[1] + query * m.strides[2];
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t j = at + (key + i) * m.strides[3];
        if (m.dtype != DType::kBool)
          score[i] += static_cast<T>(to_accumulate(m.ptr<const S>()[j]));
        else if (!m.ptr<const bool>()[j])
          score[i] = T(-__builtin_inf());
      }
    }
    IntVec<T> sees = lane_index<T>() < static_cast<Lane>(n);
    if (p.window_right >= 0) sees &= distance <= static_cast<Lane>(p.window_right);
    if (p.window_left >= 0) sees &= distance >= static_cast<Lane>(-p.window_left);
    return sees ? score : splat<T>(T(-__builtin_inf()));
  }

  // Scores to weights on the scale of the highest. There are whole vectors of scores.
  static void exponentials(T* scores, std::int64_t n, T& highest, T& sum) {
    V most_of = splat<T>(T(-__builtin_inf())), total{};
    for (std::int64_t j = 0; j < n; j += kLane) most_of = max(load(scores + j), most_of);
    for (int l = 0; l < kLane; ++l) highest = most_of[l] > highest ? most_of[l] : highest;
    const T shift = highest == T(-__builtin_inf()) ? T(0) : highest;
    for (std::int64_t j = 0; j < n; j += kLane) {
      const V p = Math::exp_nonpositive(load(scores + j) - shift);
      total += p;
      store(scores + j, p);
    }
    sum = sum_lanes(total);
  }

  // The chunks of one key head, joined. parts: those of its items, in order.
  void join(const Sequence& s, std::int64_t key_head, const Part* parts, T* sums) const {
    const T hidden = T(-__builtin_inf());
    const auto exp = [](T x) { return Math::exp_nonpositive(splat<T>(x))[0]; };
    for (std::int64_t r = 0; r < g.group * s.queries; ++r) {
      const std::int64_t h = head_of(key_head, r, s), query = r % s.queries;
      const T sink = g.p.sinks.defined() ? g.p.sinks.ptr<const T>()[h] : hidden;
      T highest = sink, total = 0;
      for (std::int64_t c = 0; c < chunks; ++c)
        highest = parts[c].highest[r] > highest ? parts[c].highest[r] : highest;
      for (std::int64_t d = 0; d < padded; d += kLane) store(sums + d, V{});
      const T shift = highest == hidden ? T(0) : highest;
      if (sink != hidden) total = exp(sink - shift);
      for (std::int64_t c = 0; c < chunks; ++c) {
        if (parts[c].sum[r] == 0) continue;
        const T weight = exp(parts[c].highest[r] - shift);  // times NaN it is NaN, even if it is 0
        total += weight * parts[c].sum[r];
        for (std::int64_t d = 0; d < padded; d += kLane)
          store(sums + d, load(sums + d) + load(parts[c].out + r * padded + d) * weight);
      }
      const T inverse = total == 0 ? T(0) : 1 / total;
      S* const out = HeadRows<S>(a.out, s.batch, h, s.first_query).row(query);
      for (std::int64_t d = 0; d < g.width; d += kLane)
        store_n(out + d, load(sums + d) * inverse, least(g.width - d, kLane));
      a.lse.ptr<T>()[(s.batch * g.heads + h) * g.p.q.shape[2] + s.first_query + query] =
          highest + Math::log(splat<T>(total))[0];
    }
  }

  void run() const {
    constexpr std::int64_t kForkBytes = 300'000;  // what a core reads from its cache in about 4 us
    const std::int64_t key_rows = g.sequences * g.key_heads, items = key_rows * chunks;
    const std::int64_t bytes =
        key_rows * g.most_keys * (g.depth + g.width) * static_cast<std::int64_t>(sizeof(S));
    int threads = bytes < kForkBytes ? 1 : max_threads();
    if (threads > items) threads = static_cast<int>(most(1, items));
    Part* parts = nullptr;
    Thread* own = nullptr;
    T* sums = nullptr;
    Scratch::place([&](Scratch& scratch) {
      Part* const all_parts = scratch.take<Part>(items);
      Thread* const all_threads = scratch.take<Thread>(threads);
      sums = scratch.take<T>(threads * padded);
      const bool placing = all_parts != nullptr;  // else only counting
      for (std::int64_t i = 0; i < items; ++i) {
        const Part one = part(scratch);
        if (placing) all_parts[i] = one;
      }
      for (int t = 0; t < threads; ++t) {
        const Thread one = thread(scratch);
        if (placing) all_threads[t] = one;
      }
      parts = all_parts;
      own = all_threads;
    });
    WorkQueue work(items), joins(key_rows);
    Barrier barrier;
    parallel(threads, [&](int index, int of) {
      for (std::int64_t item; work.next(&item);) {
        const std::int64_t row = item / chunks;
        chunk(g.sequence(row / g.key_heads), row % g.key_heads, item % chunks * kChunk, own[index],
              parts[item]);
      }
      barrier.wait(of);
      for (std::int64_t row; joins.next(&row);)
        join(g.sequence(row / g.key_heads), row % g.key_heads, parts + row * chunks,
             sums + index * padded);
    });
  }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
