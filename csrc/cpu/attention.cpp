// Attention forward (csrc/ops/attention.h).
//
// Parallel  a work item is a block of queries of one head; items are handed out dynamically,
// longest
//           first for causal masks.
// Traffic   q and out once; k and v once per block of queries, from L2 for all but the longest
// rows.
//           Bound by FMA: exp and rescaling are about 15 % at D = 64.
// Limits    blocks of 4 vectors of queries, or of one where there are few queries, which wastes
// lanes
//           at L = 1.
#include "core/dispatch.h"
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S, int kVecs>
struct ForwardPass {
  using T = Accumulate<S>;
  using Math = VecMath<T>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = kVecs * kLane;

  const AttentionForwardArgs& a;
  const std::int64_t heads = a.q.shape[1], queries = a.q.shape[2], depth = a.q.shape[3];
  const std::int64_t keys = a.k.shape[2], width = a.v.shape[3];
  const std::int64_t group = heads > 0 ? heads / a.k.shape[1] : 1;
  const std::int64_t blocks = (queries + kQueries - 1) / kQueries;

  const bool reused = blocks * group > 1;
  const bool gather_k = must_gather<S>(a.k, reused), gather_v = must_gather<S>(a.v, reused);

  struct Thread {
    T *q, *out, *scores, *mask, *k, *v;  // buffers
    Operand<T> keys, values;             // of the head at hand
    std::int64_t head = -1;
  };

  Thread thread() const {
    const std::int64_t sizes[] = {depth * kQueries,
                                  width * kQueries,
                                  kKeyBlock * kQueries,
                                  a.mask.defined() ? kKeyBlock * kQueries : 0,
                                  gather_k ? keys * depth : 0,
                                  gather_v ? keys * width : 0};
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += size;
    T* at = static_cast<T*>(thread_scratch(total * sizeof(T)));
    Thread own;
    T** const members[] = {&own.q, &own.out, &own.scores, &own.mask, &own.k, &own.v};
    for (int i = 0; i < 6; ++i) {
      *members[i] = at;
      at += sizes[i];
    }
    return own;
  }

  void load_head(std::int64_t b, std::int64_t key_head, Thread& own) const {
    const std::int64_t head = b * a.k.shape[1] + key_head;
    if (own.head == head) return;
    own.head = head;
    own.keys = operand(HeadRows<const S>(a.k, b, key_head), gather_k, 0, keys, depth, own.k);
    own.values = operand(HeadRows<const S>(a.v, b, key_head), gather_v, 0, keys, width, own.v);
  }

  void block(std::int64_t b, std::int64_t h, std::int64_t query, const Thread& own) const {
    const HeadRows<const S> q(a.q, b, h);
    const HeadRows<S> out(a.out, b, h);
    const std::int64_t count = queries - query < kQueries ? queries - query : kQueries;

    transpose_into(q.row(query), q.stride, count, kQueries, depth, own.q, kQueries);
    for (std::int64_t i = 0; i < depth * kQueries; i += kLane)
      store(own.q + i, load(own.q + i) * static_cast<T>(a.scale));
    for (std::int64_t i = 0; i < width * kQueries; i += kLane) store(own.out + i, Vec<T>{});

    const Vec<T> hidden = splat<T>(T(-__builtin_inf()));
    Vec<T> highest[kVecs], sum[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      highest[n] = hidden;
      sum[n] = Vec<T>{};
    }
    const std::int64_t last_key = a.is_causal && query + count < keys ? query + count : keys;
    for (std::int64_t key = 0; key < last_key; key += kKeyBlock) {
      const std::int64_t n_keys = last_key - key < kKeyBlock ? last_key - key : kKeyBlock;
      if (a.mask.defined() &&
          !load_mask(a.mask, b, h, query, count, kQueries, key, n_keys, own.mask))
        continue;

      Vec<T> seen[kVecs];
      for (int n = 0; n < kVecs; ++n) seen[n] = highest[n];
      score_tile<kVecs>(own.keys.from(key), depth, own.q, a.mask.defined() ? own.mask : nullptr,
                        a.is_causal && key + n_keys - 1 > query, query, key, n_keys,
                        [&](std::int64_t j, Vec<T>(&score)[kVecs]) __attribute__((always_inline)) {
                          LMKERN_UNROLL
                          for (int n = 0; n < kVecs; ++n) {
                            store(own.scores + j * kQueries + n * kLane, score[n]);
                            seen[n] = max(score[n], seen[n]);
                          }
                        });

      // A query that has seen no key yet subtracts 0 instead of -inf from its -inf scores.
      Vec<T> rescale[kVecs], shift[kVecs];
      LMKERN_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        shift[n] = seen[n] == hidden ? Vec<T>{} : seen[n];
        rescale[n] = Math::exp_nonpositive(highest[n] - shift[n]);
        highest[n] = seen[n];
        sum[n] *= rescale[n];
      }
      for (std::int64_t j = 0; j < n_keys; ++j) {
        T* const row = own.scores + j * kQueries;
        LMKERN_UNROLL
        for (int n = 0; n < kVecs; ++n) {
          const Vec<T> p = Math::exp_nonpositive(load(row + n * kLane) - shift[n]);
          sum[n] += p;
          store(row + n * kLane, p);
        }
      }

      const Operand<T> values = own.values.from(key);
      for_row_tiles<kTileRows<kVecs>>(
          width, [&](std::int64_t d, auto tile) __attribute__((always_inline)) {
            constexpr int M = decltype(tile)::value;
            Vec<T> acc[M][kVecs];
            T* const to = own.out + d * kQueries;
            LMKERN_UNROLL
            for (int m = 0; m < M; ++m) {
              LMKERN_UNROLL
              for (int n = 0; n < kVecs; ++n)
                acc[m][n] = load(to + m * kQueries + n * kLane) * rescale[n];
            }
            multiply_tile<M, kVecs, T>(n_keys, values.data + d, 1, values.stride, own.scores,
                                       kQueries, acc);
            LMKERN_UNROLL
            for (int m = 0; m < M; ++m) {
              LMKERN_UNROLL
              for (int n = 0; n < kVecs; ++n) store(to + m * kQueries + n * kLane, acc[m][n]);
            }
          });
    }

    T* const lse = a.lse.ptr<T>() + (b * heads + h) * queries + query;
    for (int n = 0; n < kVecs; ++n) {
      const Vec<T> inverse = sum[n] == Vec<T>{} ? Vec<T>{} : T(1) / sum[n];
      for (std::int64_t d = 0; d < width; ++d) {
        T* const at = own.out + d * kQueries + n * kLane;
        store(at, load(at) * inverse);
      }
      const std::int64_t left = count - n * kLane;
      if (left > 0)
        store_n(lse + n * kLane, highest[n] + Math::log(sum[n]), left < kLane ? left : kLane);
    }
    transpose_from(own.out, kQueries, count, width, out.row(query), out.stride);
  }

  void run() const {
    const std::int64_t items = a.q.shape[0] * heads * blocks;
    int threads = max_threads();
    if (4 * items * kQueries * keys * depth < 1'000'000) threads = 1;
    if (threads > items) threads = static_cast<int>(items < 1 ? 1 : items);
    WorkQueue queue(items);
    parallel(threads, [&](int, int) {
      Thread own = thread();
      for (std::int64_t item; queue.next(&item);) {
        const std::int64_t head = item / blocks;
        const std::int64_t i = a.is_causal ? blocks - 1 - item % blocks : item % blocks;
        load_head(head / heads, head % heads / group, own);
        block(head / heads, head % heads, i * kQueries, own);
      }
    });
  }
};

}  // namespace

void attention_forward(const AttentionForwardArgs& a) {
  dispatch_float_types(a.q.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    with_query_vectors<Accumulate<S>>(a.q.shape[2], a.is_causal, [&](auto vectors) {
      ForwardPass<S, decltype(vectors)::value>(a).run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
