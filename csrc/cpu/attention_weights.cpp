// Attention's weights, in a second pass from lse (csrc/ops/attention.h).
//
// Parallel  a work item is a block of queries, of one head or, for their mean, of all.
// Traffic   one product of the forward pass's two, and the weights: bound by writing them.
#include "core/dispatch.h"
#include "cpu/attention_products.h"
#include "cpu/attention_tile.h"
#include "ops/attention.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {
namespace {

template <class S, int kVecs>
struct WeightsPass {
  using T = Accumulate<S>;
  using V = Vec<T>;
  using Block = QueryBlock<S, kVecs>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = Block::kQueries;

  const AttentionWeightsArgs& a;
  const Geometry& g;
  const std::int64_t queries = g.p.q.shape[2], keys = g.p.k.shape[2];
  const std::int64_t blocks = ceil_div(queries, kQueries), rows = a.weights.shape[1];

  struct Thread {
    Block block;
    VectorProducts<S, kVecs> products;
    T *tile, *keep, *sum;

    explicit Thread(const WeightsPass& pass) : block(pass.g), products(pass.g, pass.blocks > 1) {
      Scratch::place([&](Scratch& scratch) {
        block.layout(scratch);
        products.layout(scratch, pass.keys);
        tile = scratch.take<T>(Block::kTile);
        keep = scratch.take<T>(pass.g.p.dropout_p > 0 ? Block::kTile : 0);
        sum = scratch.take<T>(ceil_div(pass.keys, kKeyBlock) * Block::kTile);
      });
    }
  };

  void add_keep(const Sequence& s, std::int64_t h, std::int64_t query, Thread& own) const {
    own.block.begin(s, h, query);
    for (std::int64_t key = 0; key < keys; key += kKeyBlock)
      own.block.keep(key, least(keys - key, kKeyBlock), own.sum + key * kQueries);
  }

  // Adds factor * the weights of head h to own.sum [keys][queries].
  void add(const Sequence& s, std::int64_t h, std::int64_t query, T factor, Thread& own) const {
    Block& block = own.block;
    block.begin(s, h, query);
    const T* const row = a.lse.ptr<const T>() + (s.batch * g.heads + h) * queries + query;
    alignas(64) T lse[kQueries];
    for (std::int64_t i = 0; i < kQueries; ++i) {
      const bool sees = i < block.count && row[i] != T(-__builtin_inf());
      lse[i] = sees ? row[i] : T(__builtin_inf());
    }
    own.products.load_keys(s, h / g.group, {0, s.keys});
    own.products.load_queries(block.rows(g.p.q), query, block.count);
    const Range seen = block.visible();
    for (std::int64_t key = seen.begin; key < seen.end; key += kKeyBlock) {
      const std::int64_t n_keys = least(seen.end - key, kKeyBlock);
      if (!block.sees(key, n_keys)) continue;
      own.products.scores(key, n_keys, own.tile);
      block.adjust(key, n_keys, own.tile);
      if (block.drops()) block.keep(key, n_keys, own.keep);
      for (std::int64_t i = 0; i < n_keys * kQueries; i += kLane) {
        V p = VecMath<T>::exp_nonpositive(load(own.tile + i) - load(lse + i % kQueries)) * factor;
        if (block.drops()) p *= load(own.keep + i);
        T* const to = own.sum + key * kQueries + i;
        store(to, load(to) + p);
      }
    }
  }

  void run() const {
    const std::int64_t items = g.batch * rows * blocks;
    const bool mean = rows != g.heads;
    WorkQueue queue(items);
    parallel(2 * g.pairs * g.heads * g.depth < 1'000'000 ? 1 : max_threads(), [&](int, int) {
      Thread own(*this);
      for (std::int64_t item; queue.next(&item);) {
        const Sequence s = g.sequence(item / blocks / rows);
        const std::int64_t row = item / blocks % rows, query = item % blocks * kQueries;
        for (std::int64_t i = 0; i < keys * kQueries; i += kLane) store(own.sum + i, V{});
        for (std::int64_t h = mean ? 0 : row; h < (mean ? g.heads : row + 1); ++h)
          if (a.only_keep)
            add_keep(s, h, query, own);
          else
            add(s, h, query, mean ? T(1) / static_cast<T>(g.heads) : T(1), own);
        S* const out = a.weights.ptr<S>() + ((s.batch * rows + row) * queries + query) * keys;
        transpose_from(own.sum, kQueries, least(queries - query, kQueries), keys, out, keys);
      }
    });
  }
};

}  // namespace

void attention_weights(const AttentionWeightsArgs& a) {
  const Geometry geometry(a.problem);
  dispatch_float_types(a.problem.q.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    with_query_vectors<Accumulate<S>>(geometry, [&](auto vectors) {
      WeightsPass<S, decltype(vectors)::value>{a, geometry}.run();
    });
  });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
