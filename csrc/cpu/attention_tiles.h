// The products of attention on AMX tiles (cpu/amx.h), for bfloat16, and the choice between them and
// vectors.
//
// q, k, v and d_out are exact; p and d_s are rounded to bfloat16 before they are multiplied, and all
// sums are float. K is copied once for a head, as rows [keys][D]; what is multiplied with p or d_s from
// the other side is copied transposed, in blocks of 64 keys [Dv or D][64]. Tiles of scores pass through
// L1 as float. (float in three planes was tried here: splitting p and d_s takes what tiles save.)
#pragma once
#include "core/dispatch.h"
#include "cpu/amx.h"
#include "cpu/attention_products.h"
#include "cpu/attention_tile.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

#ifdef __AMX_BF16__

// The A operand of a product: rows of bfloat16, with room up to a multiple of 32 rows.
struct TileRows {
  amx::Half* data = nullptr;
  std::int64_t stride = 0;

  static std::int64_t size(std::int64_t rows, std::int64_t columns) {
    return ceil_div(rows, 2 * amx::kTile) * 2 * amx::kTile * amx::plane_stride(columns);
  }
  void layout(Scratch& scratch, std::int64_t rows, std::int64_t columns) {
    stride = amx::plane_stride(columns);
    data = scratch.take<amx::Half>(size(rows, columns));
  }
  TileRows from(std::int64_t row) const { return {data + row * stride, stride}; }
};

class TileProducts {
 public:
  using S = bfloat16;
  using T = float;
  static constexpr int kVecs = 4, kTiles = 4;
  static constexpr std::int64_t kQueries = kVecs * kLanes<float>;
  static_assert(kQueries == kTiles * amx::kTile);

  TileProducts(const Geometry& geometry, bool) : g(geometry) {}

  void layout(Scratch& scratch, std::int64_t key_rows) {
    k_.layout(scratch, key_rows, g.depth);
    v_blocks_.layout(scratch, key_rows, g.width);
    q_panel_ = scratch.take<amx::Half>(amx::blocks_of(g.depth) * kPanel);
    p_panel_ = scratch.take<amx::Half>(amx::blocks_of(kKeyBlock) * kPanel);
    rows_ = scratch.take<float>(kQueries * padded(most(g.depth, g.width)));
  }

  void load_keys(const Sequence& s, std::int64_t key_head, Range range) {
    if (at_hand_.change(s.index * g.key_heads + key_head, range)) copy_keys(s, key_head, range);
  }

  void load_queries(HeadRows<const S> q, std::int64_t query, std::int64_t count) {
    copy_queries(q, query, count, g.depth, scale_is_exact() ? scale() : 1.0f);
    pack_queries(count, g.depth, q_panel_);
  }

  void scores(std::int64_t at, std::int64_t n_keys, T* tile) const {
    multiply(n_keys, g.depth, k_.from(at), q_panel_, tile, false);
    if (scale_is_exact()) return;
    for (std::int64_t i = 0; i < n_keys * kQueries; i += kLanes<float>)
      store(tile + i, load(tile + i) * scale());
  }

  void add_values(std::int64_t at, std::int64_t n_keys, const T* p, T* out, bool accumulate) const {
    pack_keys(p, n_keys);
    multiply(g.width, n_keys, v_blocks_.block(at), p_panel_, out, accumulate);
  }

 protected:
  static constexpr std::int64_t kPanel = amx::kPanelBlock<kTiles, 1>;  // of a block of k

  // [columns][64 keys] of every block of keys.
  struct Blocks {
    TileRows first;
    std::int64_t step = 0;

    void layout(Scratch& scratch, std::int64_t key_rows, std::int64_t columns) {
      step = TileRows::size(columns, kKeyBlock);
      first = {scratch.take<amx::Half>(ceil_div(key_rows, kKeyBlock) * step),
               amx::plane_stride(kKeyBlock)};
    }
    void copy(HeadRows<const S> rows, Range range, std::int64_t columns) const {
      amx::Magnitude ignored;
      for (std::int64_t key = range.begin; key < range.end; key += kKeyBlock)
        amx::planes_from_columns<1, S>(rows.row(key), rows.stride, columns,
                                       least(range.end - key, kKeyBlock),
                                       block(key - range.begin).data, first.stride, 0, ignored);
    }
    TileRows block(std::int64_t at) const {
      return {first.data + at / kKeyBlock * step, first.stride};
    }
  };

  static std::int64_t padded(std::int64_t n) { return ceil_div(n, kLanes<float>) * kLanes<float>; }

  // A scale that is no power of two would round the queries: it waits for the scores.
  float scale() const { return static_cast<float>(g.p.scale); }
  bool scale_is_exact() const {
    const float value = scale();
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffffu) == 0;
  }

  void copy_keys(const Sequence& s, std::int64_t key_head, Range range) const {
    copy_rows_of(HeadRows<const S>(g.p.k, s.batch, key_head, s.first_key), range, g.depth, k_);
    v_blocks_.copy(HeadRows<const S>(g.p.v, s.batch, key_head, s.first_key), range, g.width);
  }
  static void copy_rows_of(HeadRows<const S> rows, Range range, std::int64_t columns,
                           const TileRows& to) {
    amx::Magnitude ignored;
    amx::planes_from_rows<1, S>(rows.row(range.begin), rows.stride, range.end - range.begin,
                                columns, to.data, to.stride, 0, ignored);
  }

  // Rows of a block of queries as float, and those as the columns of a panel.
  void copy_queries(HeadRows<const S> from, std::int64_t query, std::int64_t count,
                    std::int64_t width, float factor) const {
    copy_rows<S>(from, query, count, width, padded(width), factor, rows_);
  }
  void pack_queries(std::int64_t count, std::int64_t width, amx::Half* panel) const {
    const float* rows[kTiles];
    std::int64_t columns[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      rows[t] = rows_ + t * amx::kTile * padded(width);
      columns[t] = most(0, least(count - t * amx::kTile, amx::kTile));
    }
    amx::Magnitude ignored;
    amx::pack_panel_from_rows<kTiles, 1>(rows, columns, padded(width), width, panel, ignored);
  }

  // A tile [keys][queries] as a panel: k is the key.
  void pack_keys(const T* tile, std::int64_t n_keys) const {
    amx::Magnitude ignored;
    amx::pack_panel_from_columns<kTiles, 1>(tile, kQueries, kQueries, n_keys, p_panel_, ignored);
  }

  // out [rows][queries] = a panel, or is increased by it.
  static void multiply(std::int64_t rows, std::int64_t depth, TileRows a, const amx::Half* panel,
                       T* out, bool accumulate) {
    amx::multiply_tiles<kTiles, 1>({.rows = rows,
                                    .columns = kQueries,
                                    .k_blocks = amx::blocks_of(depth),
                                    .a = a.data,
                                    .a_stride = a.stride,
                                    .a_plane = 0,
                                    .panel = panel,
                                    .bias = nullptr,
                                    .out = out,
                                    .out_stride = kQueries,
                                    .accumulate = accumulate});
  }

  const Geometry& g;
  const amx::TileRegisters registers_;
  KeysAtHand at_hand_;
  TileRows k_;
  Blocks v_blocks_;
  amx::Half *q_panel_ = nullptr, *p_panel_ = nullptr;
  float* rows_ = nullptr;  // [queries][D or Dv padded]
};

class TileGradients : public TileProducts {
 public:
  explicit TileGradients(const Geometry& geometry)
      : TileProducts(geometry, true),
        depth_padded(padded(g.depth)),
        width_padded(padded(g.width)) {}
  const std::int64_t depth_padded, width_padded;

  void layout(Scratch& scratch, std::int64_t key_rows) {
    TileProducts::layout(scratch, key_rows);
    v_.layout(scratch, key_rows, g.width);
    k_blocks_.layout(scratch, key_rows, g.depth);
    tile_.layout(scratch, kKeyBlock, kQueries);
    d_out_panel_ = scratch.take<amx::Half>(amx::blocks_of(g.width) * kPanel);
    q_columns_ = scratch.take<amx::Half>(ceil_div(g.depth, kColumns) * kColumnPanel);
    d_out_columns_ = scratch.take<amx::Half>(ceil_div(g.width, kColumns) * kColumnPanel);
  }

  void load_keys(const Sequence& s, std::int64_t key_head, Range range) {
    if (!at_hand_.change(s.index * g.key_heads + key_head, range)) return;
    copy_keys(s, key_head, range);
    copy_rows_of(HeadRows<const S>(g.p.v, s.batch, key_head, s.first_key), range, g.width, v_);
    k_blocks_.copy(HeadRows<const S>(g.p.k, s.batch, key_head, s.first_key), range, g.depth);
  }

  void load_gradients(HeadRows<const S> q, HeadRows<const S> d_out, std::int64_t query,
                      std::int64_t count) {
    count_ = count;
    copy_queries(d_out, query, count, g.width, 1);
    pack_queries(count, g.width, d_out_panel_);
    pack_columns(g.width, d_out_columns_);
    copy_queries(q, query, count, g.depth, 1);
    pack_columns(g.depth, q_columns_);
  }

  void d_p(std::int64_t at, std::int64_t n_keys, T* tile) const {
    multiply(n_keys, g.width, v_.from(at), d_out_panel_, tile, false);
  }
  void add_d_q(std::int64_t at, std::int64_t n_keys, const T* d_s, T* d_q) const {
    pack_keys(d_s, n_keys);
    multiply(g.depth, n_keys, k_blocks_.block(at), p_panel_, d_q, true);
  }
  void add_d_v(std::int64_t n_keys, const T* p, T* sum) const {
    add_sums(n_keys, p, g.width, d_out_columns_, sum, width_padded);
  }
  void add_d_k(std::int64_t n_keys, const T* d_s, T* sum) const {
    add_sums(n_keys, d_s, g.depth, q_columns_, sum, depth_padded);
  }

 private:
  static constexpr std::int64_t kColumns = kTiles * amx::kTile;  // of a panel
  static constexpr std::int64_t kColumnPanel = kQueries / amx::kDepth * kPanel;

  // rows_ [queries][columns] in panels of columns: k is the query.
  void pack_columns(std::int64_t columns, amx::Half* to) const {
    for (std::int64_t c = 0; c < columns; c += kColumns)
      amx::with_tiles(least(columns - c, kColumns), [&](auto tiles) {
        amx::Magnitude ignored;
        amx::pack_panel_from_columns<decltype(tiles)::value, 1>(
            rows_ + c, least(columns - c, kColumns), padded(columns), count_,
            to + c / kColumns * kColumnPanel, ignored);
      });
  }

  // sum [keys][columns padded] += tile [keys][queries] of the panels.
  void add_sums(std::int64_t n_keys, const T* tile, std::int64_t columns, const amx::Half* panels,
                T* sum, std::int64_t sum_stride) const {
    amx::Magnitude ignored;
    amx::planes_from_rows<1>(tile, kQueries, n_keys, count_, tile_.data, tile_.stride, 0, ignored);
    for (std::int64_t c = 0; c < columns; c += kColumns)
      amx::with_tiles(least(columns - c, kColumns), [&](auto tiles) {
        amx::multiply_tiles<decltype(tiles)::value, 1>(
            {.rows = n_keys,
             .columns = least(columns - c, kColumns),
             .k_blocks = amx::blocks_of(count_),
             .a = tile_.data,
             .a_stride = tile_.stride,
             .a_plane = 0,
             .panel = panels + c / kColumns * kColumnPanel,
             .bias = nullptr,
             .out = sum + c,
             .out_stride = sum_stride,
             .accumulate = true});
      });
  }

  std::int64_t count_ = 0;
  TileRows v_, tile_;
  Blocks k_blocks_;
  amx::Half *d_out_panel_ = nullptr, *q_columns_ = nullptr, *d_out_columns_ = nullptr;
};

template <class S>
struct IsBFloat16 {
  static constexpr bool value = false;
};
template <>
struct IsBFloat16<bfloat16> {
  static constexpr bool value = true;
};

LMKERN_INLINE bool tiles_pay(const Geometry& g) {
  return g.most_queries > 32 && g.depth >= 16 && g.width >= 16;
}
#endif

// Calls f(TypeTag<Products>{}) with the products that serve best, of the forward pass and of the
// backward pass. Tiles want whole blocks of queries and whole tiles of depth.
template <class S, class F>
LMKERN_INLINE void with_products(const Geometry& g, const F& f) {
#ifdef __AMX_BF16__
  if constexpr (IsBFloat16<S>::value)
    if (tiles_pay(g)) return f(TypeTag<TileProducts>{});
#endif
  with_query_vectors<Accumulate<S>>(
      g, [&](auto vectors) { f(TypeTag<VectorProducts<S, decltype(vectors)::value>>{}); });
}
template <class S, class F>
LMKERN_INLINE void with_gradients(const Geometry& g, const F& f) {
#ifdef __AMX_BF16__
  if constexpr (IsBFloat16<S>::value)
    if (tiles_pay(g)) return f(TypeTag<TileGradients>{});
#endif
  with_query_vectors<Accumulate<S>>(
      g, [&](auto vectors) { f(TypeTag<VectorGradients<S, decltype(vectors)::value>>{}); });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
