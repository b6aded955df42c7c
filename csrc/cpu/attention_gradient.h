// A block of queries in the backward pass: P and d_s of a tile, recomputed from lse.
#pragma once
#include "cpu/attention_tile.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

template <class Products>
class GradientBlock {
 public:
  using S = typename Products::S;
  using T = Accumulate<S>;
  static constexpr int kVecs = Products::kVecs;
  using V = Vec<T>;
  using Math = VecMath<T>;
  using Block = QueryBlock<S, kVecs>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = Block::kQueries;

  const AttentionBackwardArgs& a;
  const Geometry& g;
  Block block;
  Products products;
  T *p = nullptr, *d_s = nullptr;  // [keys of a block][queries]; p with dropout
  V distance[kVecs];               // sums of d_s |p_i - j|, where wanted

  GradientBlock(const AttentionBackwardArgs& args, const Geometry& geometry)
      : a(args), g(geometry), block(geometry), products(geometry) {}
  // key_rows: how many keys are at hand at a time.
  void layout(Scratch& scratch, std::int64_t key_rows) {
    block.layout(scratch);
    products.layout(scratch, key_rows);
    d_out_ = scratch.take<T>(g.width * kQueries);
    out_ = scratch.take<T>(g.width * kQueries);
    p = scratch.take<T>(Block::kTile);
    d_s = scratch.take<T>(Block::kTile);
    keep_ = scratch.take<T>(g.p.dropout_p > 0 ? Block::kTile : 0);
    cap_slope_ = scratch.take<T>(g.p.softcap != 0 ? Block::kTile : 0);
  }

  void begin(const Sequence& s, std::int64_t h, std::int64_t query) {
    block.begin(s, h, query);
    const std::int64_t count = block.count;
    const HeadRows<const S> out = block.rows(a.out), d_out = block.rows(a.d_out);
    products.load_queries(block.rows(g.p.q), query, count);
    products.load_gradients(block.rows(g.p.q), d_out, query, count);
    transpose_into(d_out.row(query), d_out.stride, count, kQueries, g.width, d_out_, kQueries);
    transpose_into(out.row(query), out.stride, count, kQueries, g.width, out_, kQueries);
    // Lanes beyond the last query, and queries that see no key, get lse = +inf: their P is zero.
    const std::int64_t row = row_of_lse();
    alignas(64) T lse[kQueries], d_lse[kQueries];
    for (std::int64_t i = 0; i < kQueries; ++i) {
      lse[i] = T(__builtin_inf());
      d_lse[i] = 0;
      if (i >= count) continue;
      const T value = a.lse.ptr<const T>()[row + i];
      if (value != T(-__builtin_inf())) lse[i] = value;
      if (a.d_lse.defined()) d_lse[i] = a.d_lse.ptr<const T>()[row + i];
    }
    // delta is summed over d in the order of d_P's chain: where one key has all the weight, out is
    // its v, and d_P - delta is exactly zero instead of a rounding error times a large k.
    for (int n = 0; n < kVecs; ++n) {
      lse_[n] = load(lse + n * kLane);
      distance[n] = delta_[n] = V{};
      for (std::int64_t d = 0; d < g.width; ++d) {
        const std::int64_t at = d * kQueries + n * kLane;
        delta_[n] += load(out_ + at) * load(d_out_ + at);
      }
      delta_[n] -= load(d_lse + n * kLane);
    }
  }

  // Where this block begins in lse.
  std::int64_t row_of_lse() const {
    const Sequence& s = block.s;
    return (s.batch * g.heads + block.head) * g.p.q.shape[2] + s.first_query + block.query;
  }

  // p and d_s of a tile; d_s with the softcap's slope, if `capped`. Returns false, and nothing, where
  // a mask hides all. `at` counts keys from the first one at hand.
  bool tile(std::int64_t key, std::int64_t at, std::int64_t n_keys, bool capped = true) {
    const bool cap = capped && g.p.softcap != 0, drops = block.drops();
    if (!block.sees(key, n_keys)) return false;
    products.scores(at, n_keys, p);
    block.adjust(key, n_keys, p, cap ? cap_slope_ : nullptr);
    products.d_p(at, n_keys, d_s);
    if (drops) block.keep(key, n_keys, keep_);
    for (std::int64_t j = 0; j < n_keys; ++j) {
      LMKERN_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        const std::int64_t i = j * kQueries + n * kLane;
        V weight = Math::exp_nonpositive(load(p + i) - lse_[n]), d_p = load(d_s + i);
        if (drops) d_p *= load(keep_ + i);
        V d = weight * (d_p - delta_[n]);
        if (drops) weight *= load(keep_ + i);
        if (a.d_distance.defined())
          distance[n] += d * Math::abs(block.position(n) - static_cast<T>(key + j));
        if (cap) d *= load(cap_slope_ + i);
        store(p + i, weight);
        store(d_s + i, d);
      }
    }
    return true;
  }

 private:
  T *d_out_ = nullptr, *out_ = nullptr;       // [Dv][queries]
  T *keep_ = nullptr, *cap_slope_ = nullptr;  // [keys of a block][queries]
  V lse_[kVecs], delta_[kVecs];
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
