// The products of attention between a block of queries and a block of keys, on vectors; those on AMX
// tiles (attention_tiles.h) have the same interface.
//
//   scores   [keys][queries]   = K q^T           add_values   out [Dv][queries] += V^T p
//   d_p      [keys][queries]   = V d_out^T       add_d_q      d_q [D][queries]  += K^T d_s
//   add_d_v  [keys][Dv]       += p d_out         add_d_k      [keys][D]         += d_s q
//
// Tiles p and d_s are [keys][queries], kQueries wide. q is scaled in `scores` only.
#pragma once
#include "cpu/attention_problem.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// Rows of a head as the microkernel's broadcast operand.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;

  LMKERN_INLINE Operand from(std::int64_t row) const { return {data + row * stride, stride}; }
};

// Whether a head's rows should be gathered before use. 16-bit ones must be, to be converted. Others
// are used in place where rows follow each other; heads inside one projection lie a few KiB apart,
// each row on a page of its own and all of them in the same few sets of the L1 cache, where no
// prefetcher follows: reading them again for each block of queries took a fifth of the time.
template <class S>
LMKERN_INLINE bool must_gather(const TensorView& view, bool reused) {
  return sizeof(S) != sizeof(Accumulate<S>) || (reused && view.strides[2] != view.shape[3]);
}

template <class S>
LMKERN_INLINE Operand<Accumulate<S>> operand(HeadRows<const S> rows, bool gather,
                                             std::int64_t first, std::int64_t count,
                                             std::int64_t width, Accumulate<S>* buffer) {
  if constexpr (sizeof(S) == sizeof(Accumulate<S>))
    if (!gather) return {rows.row(first), rows.stride};
  copy_rows<S>(rows, first, count, width, width, 1, buffer);
  return {buffer, width};
}

// Which range of keys of which head is at hand.
struct KeysAtHand {
  std::int64_t head = -1;
  Range range{-1, -1};

  // Whether these are others, which are then at hand.
  LMKERN_INLINE bool change(std::int64_t to, Range keys) {
    if (head == to && range.begin == keys.begin && range.end == keys.end) return false;
    head = to;
    range = keys;
    return true;
  }
};

template <class Storage, int N>
class VectorProducts {
 public:
  using S = Storage;
  using T = Accumulate<S>;
  static constexpr int kVecs = N, kLane = kLanes<T>;
  static constexpr std::int64_t kQueries = N * kLane;

  // reused: rows of k and v are read by more than one block of queries.
  VectorProducts(const Geometry& geometry, bool reused)
      : g(geometry),
        gather_k_(must_gather<S>(g.p.k, reused)),
        gather_v_(must_gather<S>(g.p.v, reused)) {}

  // key_rows: how many keys are at hand at a time.
  void layout(Scratch& scratch, std::int64_t key_rows) {
    q_ = scratch.take<T>(g.depth * kQueries);
    k_buffer_ = scratch.take<T>(gather_k_ ? key_rows * g.depth : 0);
    v_buffer_ = scratch.take<T>(gather_v_ ? key_rows * g.width : 0);
  }

  void load_keys(const Sequence& s, std::int64_t key_head, Range range) {
    if (!at_hand_.change(s.index * g.key_heads + key_head, range)) return;
    const std::int64_t count = range.end - range.begin;
    k_ = operand(HeadRows<const S>(g.p.k, s.batch, key_head, s.first_key), gather_k_, range.begin,
                 count, g.depth, k_buffer_);
    v_ = operand(HeadRows<const S>(g.p.v, s.batch, key_head, s.first_key), gather_v_, range.begin,
                 count, g.width, v_buffer_);
  }

  void load_queries(HeadRows<const S> q, std::int64_t query, std::int64_t count) {
    transpose_into(q.row(query), q.stride, count, kQueries, g.depth, q_, kQueries);
    const T scale = static_cast<T>(g.p.scale);
    for (std::int64_t i = 0; i < g.depth * kQueries; i += kLane)
      store(q_ + i, load(q_ + i) * scale);
  }

  // `at` counts keys from the first one at hand.
  void scores(std::int64_t at, std::int64_t n_keys, T* tile) const {
    const Operand<T> k = k_.from(at);
    multiply_rows<N>(n_keys, g.depth, k.data, k.stride, 1, q_, kQueries, tile, kQueries, false);
  }

  void add_values(std::int64_t at, std::int64_t n_keys, const T* p, T* out, bool accumulate) const {
    const Operand<T> v = v_.from(at);
    multiply_rows<N>(g.width, n_keys, v.data, 1, v.stride, p, kQueries, out, kQueries, accumulate);
  }

 protected:
  const Geometry& g;
  const bool gather_k_, gather_v_;
  KeysAtHand at_hand_;
  Operand<T> k_{}, v_{};
  T *q_ = nullptr, *k_buffer_ = nullptr, *v_buffer_ = nullptr;  // q_ [D][queries], scaled
};

// The backward pass has more products of the same operands.
template <class S, int N>
class VectorGradients : public VectorProducts<S, N> {
 public:
  using Base = VectorProducts<S, N>;
  using T = typename Base::T;
  using Base::kLane;
  using Base::kQueries;

  explicit VectorGradients(const Geometry& geometry) : Base(geometry, true) {}

  void layout(Scratch& scratch, std::int64_t key_rows) {
    Base::layout(scratch, key_rows);
    d_out_ = scratch.take<T>(g.width * kQueries);
    q_rows_ = scratch.take<T>(kQueries * depth_padded);
    d_out_rows_ = scratch.take<T>(kQueries * width_padded);
  }

  void load_gradients(HeadRows<const S> q, HeadRows<const S> d_out, std::int64_t query,
                      std::int64_t count) {
    count_ = count;
    transpose_into(d_out.row(query), d_out.stride, count, kQueries, g.width, d_out_, kQueries);
    copy_rows<S>(q, query, count, g.depth, depth_padded, 1, q_rows_);
    copy_rows<S>(d_out, query, count, g.width, width_padded, 1, d_out_rows_);
  }

  void d_p(std::int64_t at, std::int64_t n_keys, T* tile) const {
    const Operand<T> v = this->v_.from(at);
    multiply_rows<N>(n_keys, g.width, v.data, v.stride, 1, d_out_, kQueries, tile, kQueries, false);
  }
  void add_d_q(std::int64_t at, std::int64_t n_keys, const T* d_s, T* d_q) const {
    const Operand<T> k = this->k_.from(at);
    multiply_rows<N>(g.depth, n_keys, k.data, 1, k.stride, d_s, kQueries, d_q, kQueries, true);
  }
  // Rows of sums are depth_padded and width_padded apart.
  void add_d_v(std::int64_t n_keys, const T* p, T* sum) const {
    multiply_columns(n_keys, width_padded, count_, p, kQueries, 1, d_out_rows_, width_padded, sum,
                     width_padded, true);
  }
  void add_d_k(std::int64_t n_keys, const T* d_s, T* sum) const {
    multiply_columns(n_keys, depth_padded, count_, d_s, kQueries, 1, q_rows_, depth_padded, sum,
                     depth_padded, true);
  }

 private:
  using Base::g;

 public:
  const std::int64_t depth_padded = ceil_div(g.depth, kLane) * kLane;
  const std::int64_t width_padded = ceil_div(g.width, kLane) * kLane;

 private:
  std::int64_t count_ = 0;
  T *d_out_ = nullptr, *q_rows_ = nullptr, *d_out_rows_ = nullptr;
};

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
