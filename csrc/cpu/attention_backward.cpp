// Attention backward (csrc/ops/attention.h).
//
// Parallel  one (sequence, key head) is one work item: all five products from one recomputation of P.
//           Where there are too few of those for the threads, d_q is computed by blocks of queries
//           and d_k, d_v by blocks of keys, at 7 products in place of 5. Both orders add the same
//           terms in the same sequence, so the bits are the same.
// Traffic   per block of queries: q, out, d_out once, k, v and the running d_k, d_v once (from L2).
// Limits    d_k and d_v accumulate in a thread's scratch of 2 S D elements.
#include "core/dispatch.h"
#include "cpu/attention_mask_gradient.h"
#include "cpu/attention_tiles.h"
#include "ops/attention.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kKeyChunk = 4 * kKeyBlock;  // of keys, for one item of the split order

template <class Products>
struct BackwardPass {
  using S = typename Products::S;
  using T = Accumulate<S>;
  using V = Vec<T>;
  using Gradient = GradientBlock<Products>;
  static constexpr int kVecs = Products::kVecs;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = Gradient::kQueries;

  const AttentionBackwardArgs& a;
  const Geometry& g;

  struct Thread {
    Gradient gradient;
    T* d_q;        // [D][queries]
    T *d_k, *d_v;  // [keys][D padded], [keys][Dv padded]

    // key_rows: how many keys are at hand at a time; sum_rows: of how many d_k and d_v are summed.
    Thread(const BackwardPass& pass, std::int64_t key_rows, std::int64_t sum_rows)
        : gradient(pass.a, pass.g) {
      Scratch::place([&](Scratch& scratch) {
        gradient.layout(scratch, key_rows);
        d_q = scratch.take<T>(pass.g.depth * kQueries);
        d_k = scratch.take<T>(sum_rows * gradient.products.depth_padded);
        d_v = scratch.take<T>(sum_rows * gradient.products.width_padded);
      });
    }
  };

  // One block of queries of head h against the keys of `range`.
  void block(const Sequence& s, std::int64_t h, std::int64_t query, Range range, bool want_q,
             bool want_kv, Thread& own) const {
    const std::int64_t count = least(s.queries - query, kQueries);
    const Range seen = g.visible(s, query, count);
    const std::int64_t begin = most(seen.begin, range.begin), end = least(seen.end, range.end);
    if (begin >= end && !want_q) return;
    Gradient& gradient = own.gradient;
    gradient.begin(s, h, query);
    Products& products = gradient.products;
    if (want_q)
      for (std::int64_t i = 0; i < g.depth * kQueries; i += kLane) store(own.d_q + i, V{});
    for (std::int64_t key = begin; key < end; key += kKeyBlock) {
      const std::int64_t n_keys = least(end - key, kKeyBlock), at = key - range.begin;
      if (!gradient.tile(key, at, n_keys)) continue;
      if (want_kv) {
        products.add_d_v(n_keys, gradient.p, own.d_v + at * products.width_padded);
        products.add_d_k(n_keys, gradient.d_s, own.d_k + at * products.depth_padded);
      }
      if (want_q) products.add_d_q(at, n_keys, gradient.d_s, own.d_q);
    }
    if (!want_q) return;
    const T scale = static_cast<T>(g.p.scale);
    for (std::int64_t i = 0; i < g.depth * kQueries; i += kLane)
      store(own.d_q + i, load(own.d_q + i) * scale);
    const HeadRows<S> d_q(a.d_q, s.batch, h, s.first_query);
    transpose_from(own.d_q, kQueries, count, g.depth, d_q.row(query), d_q.stride);
    if (a.d_distance.defined())
      for (int n = 0; n < kVecs && n * kLane < count; ++n)
        store_n(a.d_distance.ptr<T>() + gradient.row_of_lse() + n * kLane, gradient.distance[n],
                least(count - n * kLane, kLane));
  }

  // d_k and d_v of a range of keys of one key head, from all queries that see them; and, if want_q,
  // the d_q of those queries, for which the keys must be all keys.
  void key_rows(const Sequence& s, std::int64_t key_head, Range range, bool want_q,
                Thread& own) const {
    const std::int64_t rows = range.end - range.begin;
    Products& products = own.gradient.products;
    const std::int64_t depth_padded = products.depth_padded, width_padded = products.width_padded;
    products.load_keys(s, key_head, range);
    for (std::int64_t i = 0; i < rows * depth_padded; i += kLane) store(own.d_k + i, V{});
    for (std::int64_t i = 0; i < rows * width_padded; i += kLane) store(own.d_v + i, V{});
    for (std::int64_t h = key_head * g.group; h < (key_head + 1) * g.group; ++h)
      for (std::int64_t query = 0; query < s.queries; query += kQueries)
        block(s, h, query, range, want_q, true, own);
    const HeadRows<S> d_k(a.d_k, s.batch, key_head, s.first_key);
    const HeadRows<S> d_v(a.d_v, s.batch, key_head, s.first_key);
    for (std::int64_t j = 0; j < rows; ++j) {
      store_row(own.d_k + j * depth_padded, g.depth, static_cast<T>(g.p.scale),
                d_k.row(range.begin + j));
      store_row(own.d_v + j * width_padded, g.width, T(1), d_v.row(range.begin + j));
    }
  }

  static void store_row(const T* from, std::int64_t columns, T factor, S* to) {
    for (std::int64_t c = 0; c < columns; c += kLane)
      store_n(to + c, from == nullptr ? V{} : load(from + c) * factor, least(columns - c, kLane));
  }

  // Keys beyond key_lengths have gradients too: zeros.
  void clear_padding(const Sequence& s, std::int64_t key_head) const {
    if (!g.p.key_lengths.defined()) return;
    const HeadRows<S> d_k(a.d_k, s.batch, key_head, 0), d_v(a.d_v, s.batch, key_head, 0);
    for (std::int64_t j = s.keys; j < g.p.k.shape[2]; ++j) {
      store_row(nullptr, g.depth, 1, d_k.row(j));
      store_row(nullptr, g.width, 1, d_v.row(j));
    }
  }

  void run() const {
    const std::int64_t items = g.sequences * g.key_heads;
    const int threads = 10 * g.pairs * g.heads * g.depth < 1'000'000 ? 1 : max_threads();
    // Whole heads leave threads idle where there are few: worth 7 products for 5 from 40 % on.
    const std::int64_t rounds = ceil_div(items, threads);
    if (rounds * threads * 5 <= items * 7)
      whole_heads(items, threads);
    else
      split(threads);
  }

  void whole_heads(std::int64_t items, int threads) const {
    WorkQueue queue(items);
    parallel(threads, [&](int, int) {
      Thread own(*this, g.most_keys, g.most_keys);
      for (std::int64_t item; queue.next(&item);) {
        const Sequence s = g.sequence(item / g.key_heads);
        key_rows(s, item % g.key_heads, {0, s.keys}, true, own);
        clear_padding(s, item % g.key_heads);
      }
    });
  }

  void split(int threads) const {
    const std::int64_t blocks = ceil_div(g.most_queries, kQueries);
    const std::int64_t chunks = most(1, ceil_div(g.most_keys, kKeyChunk));
    const std::int64_t q_items = g.sequences * g.heads * blocks;
    const std::int64_t kv_items = g.sequences * g.key_heads * chunks;
    WorkQueue queue(q_items + kv_items);
    parallel(threads, [&](int, int) {
      Thread own(*this, g.most_keys, kKeyChunk);
      for (std::int64_t item; queue.next(&item);) {
        if (item < kv_items) {  // the longer ones first
          const std::int64_t row = item / chunks, first = item % chunks * kKeyChunk;
          const Sequence s = g.sequence(row / g.key_heads);
          if (first < s.keys)
            key_rows(s, row % g.key_heads, {first, least(first + kKeyChunk, s.keys)}, false, own);
          if (first == 0) clear_padding(s, row % g.key_heads);
        } else {
          const std::int64_t row = (item - kv_items) / blocks, i = (item - kv_items) % blocks;
          const Sequence s = g.sequence(row / g.heads);
          const std::int64_t query = (blocks - 1 - i) * kQueries;
          if (query >= s.queries) continue;
          own.gradient.products.load_keys(s, row % g.heads / g.group, {0, s.keys});
          block(s, row % g.heads, query, {0, s.keys}, true, false, own);
        }
      }
    });
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& a) {
  const Geometry geometry(a.problem);
  dispatch_float_types(a.problem.q.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    with_gradients<S>(geometry, [&](auto products) {
      BackwardPass<typename decltype(products)::type>{a, geometry}.run();
    });
    if (a.d_mask.defined())
      with_query_vectors<Accumulate<S>>(geometry, [&](auto vectors) {
        MaskGradient<VectorGradients<S, decltype(vectors)::value>>{a, geometry}.run();
      });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
