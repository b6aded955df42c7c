// The gradient of attention's additive mask, summed over the dimensions along which it is broadcast
// (csrc/ops/attention.h): a pass of its own, over the elements of the mask, so that no two threads
// add to the same one.
//
// Parallel  a work item is a tile of the mask: a block of keys, of queries, and one batch and head,
//           with all of what it was broadcast to.
// Traffic   as two of the backward pass's five products.
#pragma once
#include "cpu/attention_gradient.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

template <class Products>
struct MaskGradient {
  using T = typename Products::T;
  using V = Vec<T>;
  using Gradient = GradientBlock<Products>;
  static constexpr int kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = Gradient::kQueries, kTile = Gradient::Block::kTile;

  const AttentionBackwardArgs& a;
  const Geometry& g;
  const std::int64_t* const shape = a.d_mask.shape;  // 1 where it is broadcast
  const std::int64_t queries = g.p.q.shape[2], keys = g.p.k.shape[2];
  const bool one_query = shape[2] != queries, one_key = shape[3] != keys;
  const std::int64_t query_parts = one_query ? 1 : ceil_div(queries, kQueries);
  const std::int64_t key_parts = one_key ? 1 : ceil_div(keys, kKeyBlock);

  struct Thread {
    Gradient gradient;
    T* sum;

    explicit Thread(const MaskGradient& pass) : gradient(pass.a, pass.g) {
      Scratch::place([&](Scratch& scratch) {
        gradient.layout(scratch, kKeyBlock);
        sum = scratch.take<T>(kTile);
      });
    }
  };

  // What one block of queries of one head adds to a tile, or to all of its row of tiles.
  void add(std::int64_t b, std::int64_t h, std::int64_t query, std::int64_t key,
           Thread& own) const {
    const Sequence s = g.sequence(b);
    Gradient& gradient = own.gradient;
    gradient.begin(s, h, query);
    const Range seen = gradient.block.visible();
    const std::int64_t last = one_key ? keys : key + kKeyBlock;
    for (; key < last; key += kKeyBlock) {
      const std::int64_t n_keys = least(seen.end - key, kKeyBlock);
      if (n_keys <= 0 || key < seen.begin) continue;
      gradient.products.load_keys(s, h / g.group, {key, key + n_keys});
      if (!gradient.tile(key, 0, n_keys, false)) continue;
      for (std::int64_t i = 0; i < n_keys * kQueries; i += kLane)
        store(own.sum + i, load(own.sum + i) + load(gradient.d_s + i));
    }
  }

  void part(std::int64_t mask_b, std::int64_t mask_h, std::int64_t query, std::int64_t key,
            Thread& own) const {
    for (std::int64_t i = 0; i < kTile; i += kLane) store(own.sum + i, V{});
    const bool one_b = shape[0] != g.batch, one_h = shape[1] != g.heads;
    for (std::int64_t b = one_b ? 0 : mask_b; b < (one_b ? g.batch : mask_b + 1); ++b)
      for (std::int64_t h = one_h ? 0 : mask_h; h < (one_h ? g.heads : mask_h + 1); ++h)
        for (std::int64_t i = query; i < (one_query ? queries : query + 1); i += kQueries)
          add(b, h, i, key, own);
    T* const out = a.d_mask.ptr<T>() + (mask_b * shape[1] + mask_h) * shape[2] * shape[3];
    const std::int64_t rows = one_query ? 1 : least(queries - query, kQueries);
    const std::int64_t columns = one_key ? 1 : least(keys - key, kKeyBlock);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) {
        T sum = 0;
        for (std::int64_t l = one_key ? 0 : j; l < (one_key ? kKeyBlock : j + 1); ++l)
          for (std::int64_t n = one_query ? 0 : i; n < (one_query ? kQueries : i + 1); ++n)
            sum += own.sum[l * kQueries + n];
        out[((one_query ? 0 : query) + i) * shape[3] + (one_key ? 0 : key) + j] = sum;
      }
  }

  void run() const {
    const std::int64_t items = shape[0] * shape[1] * query_parts * key_parts;
    WorkQueue queue(items);
    parallel(4 * g.pairs * g.heads * g.depth < 1'000'000 ? 1 : max_threads(), [&](int, int) {
      Thread own(*this);
      for (std::int64_t item; queue.next(&item);) {
        const std::int64_t head = item / key_parts / query_parts;
        part(head / shape[1], head % shape[1], item / key_parts % query_parts * kQueries,
             item % key_parts * kKeyBlock, own);
      }
    });
  }
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
