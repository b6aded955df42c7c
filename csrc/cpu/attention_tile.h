// A tile of scores, between a block of queries and a block of keys: the inner part of every pass of
// attention over more than a few queries.
//
// Queries lie along the lanes, keys and head dimensions along the rows of a tile. With that layout
// softmax statistics are plain vector operations, and of the products' operands only a block's q and
// d_out are ever transposed. A tile of 64 keys x 64 queries, 16 KiB, stays in L1 between the passes
// over it: the product (attention_products.h), then what the options make of it (`adjust`).
#pragma once
#include "cpu/attention_problem.h"
#include "cpu/philox.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// A number of vectors as a compile-time value that lambdas can receive.
template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Chooses how many vectors of queries make a block, and calls f(Vectors<N>{}). Wide blocks read k
// and v less often; narrow ones waste fewer lanes on queries that do not exist and, under a causal
// mask, on keys that are not seen.
template <class T, class F>
LMKERN_INLINE void with_query_vectors(const Geometry& g, const F& f) {
  if (g.most_queries <= (g.p.window_right == 0 ? 8 : 2) * kLanes<T>)
    f(Vectors<1>{});
  else
    f(Vectors<4>{});
}

// A block of queries of one head.
template <class S, int kVecs>
class QueryBlock {
 public:
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = kVecs * kLane;
  static constexpr std::int64_t kTile = kKeyBlock * kQueries;  // elements

  const Geometry& g;
  Sequence s{};
  std::int64_t head = 0, query = 0, count = 0;  // the head, its first query, how many

  explicit QueryBlock(const Geometry& geometry) : g(geometry) {}
  void layout(Scratch& scratch) { mask_ = scratch.take<T>(g.p.mask.defined() ? 2 * kTile : 0); }

  void begin(const Sequence& sequence, std::int64_t h, std::int64_t first) {
    s = sequence;
    head = h;
    query = first;
    count = least(s.queries - first, kQueries);
    slope_ = g.p.alibi_slopes.defined()
                 ? g.p.alibi_slopes.template ptr<const T>()[s.index * g.p.alibi_slopes.strides[0] +
                                                            h * g.p.alibi_slopes.strides[1]]
                 : T(0);
  }

  Range visible() const { return g.visible(s, query, count); }
  // The position of each query of vector n.
  LMKERN_INLINE V position(int n) const {
    const V lane = __builtin_convertvector(lane_index<T>(), V);
    return lane + static_cast<T>(query + s.offset + n * kLane);
  }

  HeadRows<const S> rows(const TensorView& view) const {
    return HeadRows<const S>(view, s.batch, head, s.first_query);
  }

  // Whether the mask shows any of n_keys keys to any query; keeps its tile for `adjust`.
  bool sees(std::int64_t key, std::int64_t n_keys) {
    return !g.p.mask.defined() || load_mask(key, n_keys);
  }

  // From products to scores; under a softcap also 1 - tanh^2 into `cap_slope`, where wanted.
  void adjust(std::int64_t key, std::int64_t n_keys, T* tile, T* cap_slope = nullptr) const {
    const bool masked = g.p.mask.defined();
    const bool cut = g.cuts(s, query, count, key, n_keys);
    if (!masked && !cut && slope_ == 0 && g.p.softcap == 0) return;
    const T cap = static_cast<T>(g.p.softcap), cap_inverse = cap == 0 ? T(0) : 1 / cap;
    for (std::int64_t j = 0; j < n_keys; ++j) {
      LMKERN_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        const std::int64_t at = j * kQueries + n * kLane;
        V score = load(tile + at);
        if (cap != 0) {
          const V t = VecMath<T>::tanh(score * cap_inverse);
          score = t * cap;
          if (cap_slope != nullptr) store(cap_slope + at, 1 - t * t);
        }
        if (slope_ != 0) score -= VecMath<T>::abs(position(n) - static_cast<T>(key + j)) * slope_;
        if (masked) score += load(mask_ + at);
        if (cut) score = seen(n, key + j) ? score : splat<T>(T(-__builtin_inf()));
        store(tile + at, score);
      }
    }
  }

  bool drops() const { return g.p.dropout_p > 0; }
  // 0 or 1 / (1 - p) for each weight of a tile; 8 keys take one call of Philox. `key` is a multiple
  // of 8.
  void keep(std::int64_t key, std::int64_t n_keys, T* tile) const {
    constexpr int lanes = kLanes<float>;
    const auto threshold = static_cast<std::uint32_t>(g.p.dropout_p * 65536 + 0.5);
    const float factor =
        threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f;
    for (std::int64_t j = 0; j < n_keys; j += 8)
      for (std::int64_t i = 0; i < kQueries; i += lanes) {
        Words random[4] = {(Words)lane_index<float>() + static_cast<std::uint32_t>(query + i),
                           Words{} + static_cast<std::uint32_t>((key + j) / 8),
                           Words{} + static_cast<std::uint32_t>(head),
                           Words{} + static_cast<std::uint32_t>(s.index)};
        philox(random, static_cast<std::uint64_t>(g.p.seed));
        for (int n = 0; n < 8 && j + n < n_keys; ++n) {
          const Words bits = (random[n / 2] >> (n % 2 * 16)) & 0xffffu;
          const Vec<float> value = bits >= threshold ? splat(factor) : Vec<float>{};
          T* const to = tile + (j + n) * kQueries + i;
          if constexpr (sizeof(T) == sizeof(float))
            store(to, value);
          else
            for (int l = 0; l < lanes && i + l < kQueries; ++l) to[l] = value[l];
        }
      }
  }

 private:
  T* mask_ = nullptr;  // the tile, and the rows from which it is made
  T slope_ = 0;

  LMKERN_INLINE IntVec<T> seen(int n, std::int64_t key) const {
    using Lane = typename VecTypes<T>::IntLane;
    const IntVec<T> distance =
        lane_index<T>() + static_cast<Lane>(query + s.offset + n * kLane - key);
    IntVec<T> sees = distance == distance;
    if (g.p.window_right >= 0) sees &= distance >= static_cast<Lane>(-g.p.window_right);
    if (g.p.window_left >= 0) sees &= distance <= static_cast<Lane>(g.p.window_left);
    return sees;
  }

  // The additive mask of a tile: 0 or -inf for a bool one. Whether any query sees any key.
  bool load_mask(std::int64_t key, std::int64_t n_keys) {
    const TensorView& mask = g.p.mask;
    const std::int64_t origin = s.batch * mask.strides[0] + head * mask.strides[1] +
                                query * mask.strides[2] + key * mask.strides[3];
    const bool same = mask.strides[2] == 0;  // for all queries
    T* const rows = mask_ + kTile;           // [queries][keys of a block]
    const T hidden = T(-__builtin_inf());
    bool any = false;
    const auto fill = [&](auto value_at) __attribute__((always_inline)) {
      for (std::int64_t i = 0; i < (same ? 1 : count); ++i) {
        T* const row = rows + i * kKeyBlock;
        const std::int64_t at = origin + i * mask.strides[2];
        if (mask.strides[3] == 1)
          for (std::int64_t j = 0; j < n_keys; ++j) row[j] = value_at(at + j);
        else
          for (std::int64_t j = 0; j < n_keys; ++j) row[j] = value_at(at + j * mask.strides[3]);
        T highest = hidden;
        for (std::int64_t j = 0; j < n_keys; ++j) highest = row[j] > highest ? row[j] : highest;
        any |= highest != hidden;
      }
    };
    if (mask.dtype == DType::kBool) {
      const auto* p = mask.ptr<const unsigned char>();
      fill([p, hidden](std::int64_t at) { return p[at] != 0 ? T(0) : hidden; });
    } else {
      const S* p = mask.ptr<const S>();
      fill([p](std::int64_t at) { return static_cast<T>(to_accumulate(p[at])); });
    }
    if (!any) return false;
    if (same) {
      for (std::int64_t j = 0; j < n_keys; ++j)
        for (int n = 0; n < kVecs; ++n) store(mask_ + j * kQueries + n * kLane, splat(rows[j]));
    } else {
      transpose_into(static_cast<const T*>(rows), kKeyBlock, count, kQueries, n_keys, mask_,
                     kQueries);
    }
    return true;
  }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
