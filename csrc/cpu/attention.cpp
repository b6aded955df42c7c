// Attention forward (csrc/ops/attention.h); a few queries take attention_decode.cpp.
//
// Parallel  a work item is a block of queries of one head; items are handed out dynamically, longest
//           first for causal masks.
// Traffic   q and out once; k and v once per block of queries, from L2 for all but the longest rows.
//           Bound by FMA: exp and rescaling are about 15 % at D = 64.
// Limits    blocks of 4 vectors of queries, or of one where there are few queries.
#include "core/dispatch.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_tile.h"
#include "cpu/kernels.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S, int kVecs>
struct ForwardPass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  using Math = VecMath<T>;
  using Block = QueryBlock<S, kVecs>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = Block::kQueries;

  const AttentionForwardArgs& a;
  const Geometry& g;
  const std::int64_t blocks = ceil_div(g.most_queries, kQueries);
  const bool reused = blocks * g.group > 1;
  const bool gather_k = must_gather<S>(g.p.k, reused), gather_v = must_gather<S>(g.p.v, reused);

  struct Thread {
    Block block;
    T *out, *scores, *keep, *k, *v;  // out [Dv][queries]
    Operand<T> keys, values;         // of the head at hand
    std::int64_t head = -1;

    explicit Thread(const ForwardPass& pass) : block(pass.g) {
      Scratch::place([&](Scratch& scratch) { layout(pass, scratch); });
    }
    void layout(const ForwardPass& pass, Scratch& scratch) {
      const Geometry& g = pass.g;
      block.layout(scratch);
      out = scratch.take<T>(g.width * kQueries);
      scores = scratch.take<T>(Block::kTile);
      keep = scratch.take<T>(g.p.dropout_p > 0 ? Block::kTile : 0);
      k = scratch.take<T>(pass.gather_k ? g.most_keys * g.depth : 0);
      v = scratch.take<T>(pass.gather_v ? g.most_keys * g.width : 0);
    }
  };

  void load_head(const Sequence& s, std::int64_t key_head, Thread& own) const {
    const std::int64_t head = s.index * g.key_heads + key_head;
    if (own.head == head) return;
    own.head = head;
    own.keys = operand(HeadRows<const S>(g.p.k, s.batch, key_head, s.first_key), gather_k, 0,
                       s.keys, g.depth, own.k);
    own.values = operand(HeadRows<const S>(g.p.v, s.batch, key_head, s.first_key), gather_v, 0,
                         s.keys, g.width, own.v);
  }

  void block(const Sequence& s, std::int64_t h, std::int64_t query, Thread& own) const {
    Block& block = own.block;
    block.begin(s, h, query);
    const V hidden = splat<T>(T(-__builtin_inf()));
    const T sink = g.p.sinks.defined() ? g.p.sinks.template ptr<const T>()[h] : hidden[0];
    V highest[kVecs], sum[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      highest[n] = splat<T>(sink);
      sum[n] = sink == hidden[0] ? V{} : V{} + 1;
    }
    const Range visible = block.visible();
    bool first = true;
    for (std::int64_t key = visible.begin; key < visible.end; key += kKeyBlock) {
      const std::int64_t n_keys = least(visible.end - key, kKeyBlock);
      if (!block.scores(own.keys.from(key), key, n_keys, own.scores)) continue;
      const bool rescaled = exponentials(n_keys, own.scores, highest, sum, own.out, first);
      if (block.drops()) {
        block.keep(key, n_keys, own.keep);
        for (std::int64_t i = 0; i < n_keys * kQueries; i += kLane)
          store(own.scores + i, load(own.scores + i) * load(own.keep + i));
      }
      const Operand<T> values = own.values.from(key);
      multiply_rows<kVecs>(g.width, n_keys, values.data, 1, values.stride, own.scores, kQueries,
                           own.out, kQueries, rescaled);
      first = false;
    }
    finish(s, h, highest, sum, first, own);
  }

  // Scores to weights, on the scale of the highest score so far. What was summed before comes down
  // to that scale; returns whether there was anything.
  bool exponentials(std::int64_t n_keys, T* scores, V (&highest)[kVecs], V (&sum)[kVecs], T* out,
                    bool first) const {
    const V hidden = splat<T>(T(-__builtin_inf()));
    V seen[kVecs], shift[kVecs], rescale[kVecs], change{};
    for (int n = 0; n < kVecs; ++n) seen[n] = highest[n];
    for (std::int64_t j = 0; j < n_keys; ++j) {
      LMKERN_UNROLL
      for (int n = 0; n < kVecs; ++n)
        seen[n] = max(load(scores + j * kQueries + n * kLane), seen[n]);
    }
    LMKERN_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      // A query that has seen no key yet subtracts 0 instead of -inf from its -inf scores.
      shift[n] = seen[n] == hidden ? V{} : seen[n];
      rescale[n] = Math::exp_nonpositive(highest[n] - shift[n]);
      change += 1 - rescale[n];
      highest[n] = seen[n];
      sum[n] *= rescale[n];
    }
    for (std::int64_t j = 0; j < n_keys; ++j) {
      LMKERN_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        T* const at = scores + j * kQueries + n * kLane;
        const V p = Math::exp_nonpositive(load(at) - shift[n]);
        sum[n] += p;
        store(at, p);
      }
    }
    if (first) return false;
    if (sum_lanes(change) != 0)
      for (std::int64_t d = 0; d < g.width; ++d) {
        LMKERN_UNROLL
        for (int n = 0; n < kVecs; ++n) {
          T* const at = out + d * kQueries + n * kLane;
          store(at, load(at) * rescale[n]);
        }
      }
    return true;
  }

  void finish(const Sequence& s, std::int64_t h, const V (&highest)[kVecs], const V (&sum)[kVecs],
              bool nothing, Thread& own) const {
    const Block& block = own.block;
    T* const lse =
        a.lse.ptr<T>() + (s.batch * g.heads + h) * g.p.q.shape[2] + s.first_query + block.query;
    for (int n = 0; n < kVecs; ++n) {
      const V inverse = nothing || sum[n] == V{} ? V{} : T(1) / sum[n];
      for (std::int64_t d = 0; d < g.width; ++d) {
        T* const at = own.out + d * kQueries + n * kLane;
        store(at, nothing ? V{} : load(at) * inverse);
      }
      const std::int64_t left = block.count - n * kLane;
      if (left > 0) store_n(lse + n * kLane, highest[n] + Math::log(sum[n]), least(left, kLane));
    }
    const HeadRows<S> out(a.out, s.batch, h, s.first_query);
    transpose_from(own.out, kQueries, block.count, g.width, out.row(block.query), out.stride);
  }

  void run() const {
    const std::int64_t items = g.sequences * g.heads * blocks;
    int threads = 4 * g.pairs * g.heads * g.depth < 1'000'000 ? 1 : max_threads();
    if (threads > items) threads = static_cast<int>(items < 1 ? 1 : items);
    WorkQueue queue(items);
    parallel(threads, [&](int, int) {
      Thread own(*this);
      for (std::int64_t item; queue.next(&item);) {
        const Sequence s = g.sequence(item / blocks / g.heads);
        const std::int64_t h = item / blocks % g.heads;
        const std::int64_t query = (blocks - 1 - item % blocks) * kQueries;
        if (query >= s.queries) continue;
        load_head(s, h / g.group, own);
        block(s, h, query, own);
      }
    });
  }
};

}  // namespace

void attention_forward(const AttentionForwardArgs& a) {
  const Geometry geometry(a.problem);
  dispatch_float_types(a.problem.q.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if (DecodePass<S>::serves(geometry)) return DecodePass<S>{a, geometry}.run();
    with_query_vectors<Accumulate<S>>(geometry, [&](auto vectors) {
      ForwardPass<S, decltype(vectors)::value>{a, geometry}.run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
