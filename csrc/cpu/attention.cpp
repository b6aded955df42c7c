// Attention forward (csrc/ops/attention.h); a few queries take attention_decode.cpp.
//
// Parallel  a work item is a block of queries of one head; items are handed out dynamically, longest
//           first for causal masks.
// Traffic   q and out once; k and v once per block of queries, from L2 for all but the longest rows.
//           Bound by the products: exp and rescaling are about 15 % at D = 64.
// Limits    blocks of 4 vectors of queries, or of one where there are few queries.
#include "ops/attention.h"
#include "core/dispatch.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_tiles.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class Products>
struct ForwardPass {
  using S = typename Products::S;
  using T = Accumulate<S>;
  using V = Vec<T>;
  using Math = VecMath<T>;
  static constexpr int kVecs = Products::kVecs;
  using Block = QueryBlock<S, kVecs>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = Block::kQueries;

  const AttentionForwardArgs& a;
  const Geometry& g;
  const std::int64_t blocks = ceil_div(g.most_queries, kQueries);

  struct Thread {
    Block block;
    Products products;
    T *out, *scores, *keep;  // out [Dv][queries]

    explicit Thread(const ForwardPass& pass)
        : block(pass.g), products(pass.g, pass.blocks * pass.g.group > 1) {
      Scratch::place([&](Scratch& scratch) {
        block.layout(scratch);
        products.layout(scratch, pass.g.most_keys);
        out = scratch.take<T>(pass.g.width * kQueries);
        scores = scratch.take<T>(Block::kTile);
        keep = scratch.take<T>(pass.g.p.dropout_p > 0 ? Block::kTile : 0);
      });
    }
  };

  void block(const Sequence& s, std::int64_t h, std::int64_t query, Thread& own) const {
    Block& block = own.block;
    block.begin(s, h, query);
    own.products.load_queries(block.rows(g.p.q), query, block.count);
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
      if (!block.sees(key, n_keys)) continue;
      own.products.scores(key, n_keys, own.scores);
      block.adjust(key, n_keys, own.scores);
      const bool rescaled = exponentials(n_keys, own.scores, highest, sum, own.out, first);
      if (block.drops()) {
        block.keep(key, n_keys, own.keep);
        for (std::int64_t i = 0; i < n_keys * kQueries; i += kLane)
          store(own.scores + i, load(own.scores + i) * load(own.keep + i));
      }
      own.products.add_values(key, n_keys, own.scores, own.out, rescaled);
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
        own.products.load_keys(s, h / g.group, {0, s.keys});
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
    with_products<S>(geometry, [&](auto products) {
      ForwardPass<typename decltype(products)::type>{a, geometry}.run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
