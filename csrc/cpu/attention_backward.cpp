// Attention backward (csrc/ops/attention.h).
//
// Parallel  one (batch, key head) is one work item: all five products from one recomputation of P.
//           Where there are too few of those for the threads, d_q is computed by blocks of queries
//           and d_k, d_v by blocks of keys, at 7 products in place of 5. Both orders add the same
//           terms in the same sequence, so the bits are the same.
// Traffic   per block of queries: q, out, d_out once, k, v and the running d_k, d_v once (from L2).
// Limits    d_k and d_v accumulate in a thread's scratch of 2 S D elements.
#include "core/dispatch.h"
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

constexpr std::int64_t kKeyChunk = 4 * kKeyBlock;  // of keys, for one item of the split order

template <class S, int kVecs>
struct BackwardPass {
  using T = Accumulate<S>;
  using Math = VecMath<T>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = kVecs * kLane;

  const AttentionBackwardArgs& a;
  const std::int64_t heads = a.q.shape[1], queries = a.q.shape[2], depth = a.q.shape[3];
  const std::int64_t key_heads = a.k.shape[1], keys = a.k.shape[2], width = a.v.shape[3];
  const std::int64_t group = heads > 0 ? heads / key_heads : 1;
  const std::int64_t depth_padded = (depth + kLane - 1) / kLane * kLane;
  const std::int64_t width_padded = (width + kLane - 1) / kLane * kLane;

  const bool gather_k = must_gather<S>(a.k, true), gather_v = must_gather<S>(a.v, true);

  struct Thread {
    T *q, *d_out, *out;       // [D][queries], [Dv][queries] twice; q scaled
    T *q_rows, *d_out_rows;   // [queries][D padded], [queries][Dv padded]; q scaled
    T* d_q;                   // [D][queries]
    T *p, *d_s, *mask;        // [keys of a block][queries]
    T *d_k, *d_v;             // [keys][D padded], [keys][Dv padded]
    T *k, *v;                 // [keys][D], [keys][Dv], where gathered
    Operand<T> keys, values;  // of the head and the range of keys at hand
    std::int64_t head = -1, first_key = -1, end_key = -1;
  };

  // key_rows: how many keys are at hand at a time; sum_rows: of how many d_k and d_v are summed.
  Thread thread(std::int64_t key_rows, std::int64_t sum_rows) const {
    const std::int64_t sizes[] = {depth * kQueries,
                                  width * kQueries,
                                  width * kQueries,
                                  depth_padded * kQueries,
                                  width_padded * kQueries,
                                  depth * kQueries,
                                  kKeyBlock * kQueries,
                                  kKeyBlock * kQueries,
                                  a.mask.defined() ? kKeyBlock * kQueries : 0,
                                  sum_rows * depth_padded,
                                  sum_rows * width_padded,
                                  gather_k ? key_rows * depth : 0,
                                  gather_v ? key_rows * width : 0};
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += size;
    T* at = static_cast<T*>(thread_scratch(total * sizeof(T)));
    Thread own;
    T** const members[] = {&own.q,   &own.d_out, &own.out, &own.q_rows, &own.d_out_rows,
                           &own.d_q, &own.p,     &own.d_s, &own.mask,   &own.d_k,
                           &own.d_v, &own.k,     &own.v};
    for (int i = 0; i < 13; ++i) {
      *members[i] = at;
      at += sizes[i];
    }
    return own;
  }

  void load_keys(std::int64_t b, std::int64_t key_head, std::int64_t first_key,
                 std::int64_t end_key, Thread& own) const {
    const std::int64_t head = b * key_heads + key_head, count = end_key - first_key;
    if (own.head == head && own.first_key == first_key && own.end_key == end_key) return;
    own.head = head;
    own.first_key = first_key;
    own.end_key = end_key;
    own.keys =
        operand(HeadRows<const S>(a.k, b, key_head), gather_k, first_key, count, depth, own.k);
    own.values =
        operand(HeadRows<const S>(a.v, b, key_head), gather_v, first_key, count, width, own.v);
  }

  // to[r][:] = scale * from[r][:], both padded to whole vectors with zeros.
  static void copy_rows(HeadRows<const S> from, std::int64_t first, std::int64_t rows,
                        std::int64_t columns, std::int64_t padded, T scale, T* to) {
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < padded; c += kLane)
        store(to + r * padded + c,
              load_n(from.row(first + r) + c, columns - c < kLane ? columns - c : kLane) * scale);
  }

  // sum[key][:] += sum over queries of weights[key][query] * rows[query][:]
  template <int N>
  static void add_products(const T* weights, std::int64_t n_keys, const T* rows,
                           std::int64_t n_queries, std::int64_t padded, T* sum) {
    for_row_tiles<kTileRows<N>>(
        n_keys, [&](std::int64_t j, auto tile) __attribute__((always_inline)) {
          constexpr int M = decltype(tile)::value;
          Vec<T> acc[M][N];
          T* const to = sum + j * padded;
          LMKERN_UNROLL
          for (int m = 0; m < M; ++m) {
            LMKERN_UNROLL
            for (int n = 0; n < N; ++n) acc[m][n] = load(to + m * padded + n * kLane);
          }
          multiply_tile<M, N, T>(n_queries, weights + j * kQueries, kQueries, 1, rows, padded, acc);
          LMKERN_UNROLL
          for (int m = 0; m < M; ++m) {
            LMKERN_UNROLL
            for (int n = 0; n < N; ++n) store(to + m * padded + n * kLane, acc[m][n]);
          }
        });
  }

  static void add_all_products(const T* weights, std::int64_t n_keys, const T* rows,
                               std::int64_t n_queries, std::int64_t padded, T* sum) {
    std::int64_t c = 0;
    for (; c + 4 * kLane <= padded; c += 4 * kLane)
      add_products<4>(weights, n_keys, rows + c, n_queries, padded, sum + c);
    for (; c + 2 * kLane <= padded; c += 2 * kLane)
      add_products<2>(weights, n_keys, rows + c, n_queries, padded, sum + c);
    for (; c < padded; c += kLane)
      add_products<1>(weights, n_keys, rows + c, n_queries, padded, sum + c);
  }

  // One block of queries of head h against the keys [first_key, end_key).
  void block(std::int64_t b, std::int64_t h, std::int64_t query, std::int64_t first_key,
             std::int64_t end_key, bool want_q, bool want_kv, const Thread& own) const {
    const HeadRows<const S> q(a.q, b, h);
    const HeadRows<const S> out(a.out, b, h), d_out(a.d_out, b, h);
    const std::int64_t count = queries - query < kQueries ? queries - query : kQueries;
    if (a.is_causal && query + count < end_key) end_key = query + count;
    if (first_key >= end_key && !want_q) return;
    const T scale = static_cast<T>(a.scale);

    transpose_into(q.row(query), q.stride, count, kQueries, depth, own.q, kQueries);
    for (std::int64_t i = 0; i < depth * kQueries; i += kLane)
      store(own.q + i, load(own.q + i) * scale);
    transpose_into(d_out.row(query), d_out.stride, count, kQueries, width, own.d_out, kQueries);
    if (want_kv) {
      copy_rows(q, query, count, depth, depth_padded, scale, own.q_rows);
      copy_rows(d_out, query, count, width, width_padded, T(1), own.d_out_rows);
    }
    if (want_q)
      for (std::int64_t i = 0; i < depth * kQueries; i += kLane) store(own.d_q + i, Vec<T>{});

    // Lanes beyond the last query, and queries that see no key, get lse = +inf: their P is zero.
    const T* const lse_row = a.lse.ptr<const T>() + (b * heads + h) * queries + query;
    T lse_lanes[kQueries];
    for (std::int64_t i = 0; i < kQueries; ++i) {
      const bool sees = i < count && lse_row[i] != T(-__builtin_inf());
      lse_lanes[i] = sees ? lse_row[i] : T(__builtin_inf());
    }
    // delta is summed over d in the order of d_P's chain: where one key has all the weight, out is
    // its v, and d_P - delta is exactly zero instead of a rounding error times a large k.
    Vec<T> lse[kVecs], delta[kVecs];
    transpose_into(out.row(query), out.stride, count, kQueries, width, own.out, kQueries);
    for (int n = 0; n < kVecs; ++n) {
      lse[n] = load(lse_lanes + n * kLane);
      delta[n] = Vec<T>{};
      for (std::int64_t d = 0; d < width; ++d) {
        const std::int64_t at = d * kQueries + n * kLane;
        delta[n] += load(own.out + at) * load(own.d_out + at);
      }
    }

    for (std::int64_t key = first_key; key < end_key; key += kKeyBlock) {
      const std::int64_t n_keys = end_key - key < kKeyBlock ? end_key - key : kKeyBlock;
      if (a.mask.defined() &&
          !load_mask(a.mask, b, h, query, count, kQueries, key, n_keys, own.mask))
        continue;
      const Operand<T> k_block = own.keys.from(key - first_key);
      const Operand<T> v_block = own.values.from(key - first_key);
      score_tile<kVecs>(k_block, depth, own.q, a.mask.defined() ? own.mask : nullptr,
                        a.is_causal && key + n_keys - 1 > query, query, key, n_keys,
                        [&](std::int64_t j, Vec<T>(&score)[kVecs]) __attribute__((always_inline)) {
                          LMKERN_UNROLL
                          for (int n = 0; n < kVecs; ++n)
                            store(own.p + j * kQueries + n * kLane,
                                  Math::exp_nonpositive(score[n] - lse[n]));
                        });
      score_tile<kVecs>(v_block, width, own.d_out, static_cast<const T*>(nullptr), false, query,
                        key, n_keys,
                        [&](std::int64_t j, Vec<T>(&d_p)[kVecs]) __attribute__((always_inline)) {
                          LMKERN_UNROLL
                          for (int n = 0; n < kVecs; ++n) {
                            const std::int64_t at = j * kQueries + n * kLane;
                            store(own.d_s + at, load(own.p + at) * (d_p[n] - delta[n]));
                          }
                        });
      if (want_kv) {
        add_all_products(own.p, n_keys, own.d_out_rows, count, width_padded,
                         own.d_v + (key - first_key) * width_padded);
        add_all_products(own.d_s, n_keys, own.q_rows, count, depth_padded,
                         own.d_k + (key - first_key) * depth_padded);
      }
      if (want_q)
        for_row_tiles<kTileRows<kVecs>>(
            depth, [&](std::int64_t d, auto tile) __attribute__((always_inline)) {
              constexpr int M = decltype(tile)::value;
              Vec<T> acc[M][kVecs];
              T* const to = own.d_q + d * kQueries;
              LMKERN_UNROLL
              for (int m = 0; m < M; ++m) {
                LMKERN_UNROLL
                for (int n = 0; n < kVecs; ++n) acc[m][n] = load(to + m * kQueries + n * kLane);
              }
              multiply_tile<M, kVecs, T>(n_keys, k_block.data + d, 1, k_block.stride, own.d_s,
                                         kQueries, acc);
              LMKERN_UNROLL
              for (int m = 0; m < M; ++m) {
                LMKERN_UNROLL
                for (int n = 0; n < kVecs; ++n) store(to + m * kQueries + n * kLane, acc[m][n]);
              }
            });
    }
    if (want_q) {
      for (std::int64_t i = 0; i < depth * kQueries; i += kLane)
        store(own.d_q + i, load(own.d_q + i) * scale);
      const HeadRows<S> d_q(a.d_q, b, h);
      transpose_from(own.d_q, kQueries, count, depth, d_q.row(query), d_q.stride);
    }
  }

  // d_k and d_v of the keys [first_key, end_key) of one key head, from all queries that see them;
  // and, if want_q, the d_q of those queries, for which the keys must be all keys.
  void key_rows(std::int64_t b, std::int64_t key_head, std::int64_t first_key, std::int64_t end_key,
                bool want_q, Thread& own) const {
    const std::int64_t rows = end_key - first_key;
    load_keys(b, key_head, first_key, end_key, own);
    for (std::int64_t i = 0; i < rows * depth_padded; i += kLane) store(own.d_k + i, Vec<T>{});
    for (std::int64_t i = 0; i < rows * width_padded; i += kLane) store(own.d_v + i, Vec<T>{});
    for (std::int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
      for (std::int64_t query = 0; query < queries; query += kQueries)
        block(b, h, query, first_key, end_key, want_q, true, own);
    const HeadRows<S> d_k(a.d_k, b, key_head), d_v(a.d_v, b, key_head);
    for (std::int64_t j = 0; j < rows; ++j) {
      for (std::int64_t c = 0; c < depth; c += kLane)
        store_n(d_k.row(first_key + j) + c, load(own.d_k + j * depth_padded + c),
                depth - c < kLane ? depth - c : kLane);
      for (std::int64_t c = 0; c < width; c += kLane)
        store_n(d_v.row(first_key + j) + c, load(own.d_v + j * width_padded + c),
                width - c < kLane ? width - c : kLane);
    }
  }

  void run() const {
    const std::int64_t items = a.q.shape[0] * key_heads;
    int threads = max_threads();
    if (10 * a.q.shape[0] * heads * queries * keys * depth < 1'000'000) threads = 1;
    // Whole heads leave threads idle where there are few: worth 7 products for 5 from 40 % on.
    const std::int64_t rounds = (items + threads - 1) / threads;
    if (rounds * threads * 5 <= items * 7)
      whole_heads(items, threads);
    else
      split(threads);
  }

  void whole_heads(std::int64_t items, int threads) const {
    WorkQueue queue(items);
    parallel(threads, [&](int, int) {
      Thread own = thread(keys, keys);
      for (std::int64_t item; queue.next(&item);)
        key_rows(item / key_heads, item % key_heads, 0, keys, true, own);
    });
  }

  void split(int threads) const {
    const std::int64_t blocks = (queries + kQueries - 1) / kQueries;
    const std::int64_t chunks = (keys + kKeyChunk - 1) / kKeyChunk;
    const std::int64_t q_items = a.q.shape[0] * heads * blocks;
    const std::int64_t kv_items = a.q.shape[0] * key_heads * chunks;
    WorkQueue queue(q_items + kv_items);
    parallel(threads, [&](int, int) {
      Thread own = thread(keys, kKeyChunk);
      for (std::int64_t item; queue.next(&item);) {
        if (item < kv_items) {  // the longer ones first
          const std::int64_t head = item / chunks, first = item % chunks * kKeyChunk;
          key_rows(head / key_heads, head % key_heads, first,
                   first + kKeyChunk < keys ? first + kKeyChunk : keys, false, own);
        } else {
          const std::int64_t head = (item - kv_items) / blocks, i = (item - kv_items) % blocks;
          load_keys(head / heads, head % heads / group, 0, keys, own);
          block(head / heads, head % heads, (blocks - 1 - i) * kQueries, 0, keys, true, false, own);
        }
      }
    });
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& a) {
  dispatch_float_types(a.q.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    with_query_vectors<Accumulate<S>>(a.q.shape[2], a.is_causal, [&](auto vectors) {
      BackwardPass<S, decltype(vectors)::value>(a).run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
