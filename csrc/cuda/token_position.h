// The rows that token + position + segment adds up (csrc/ops/token_position.h), for both passes.
#pragma once
#include "cuda/index_errors.h"
#include "cuda/rows.h"
#include "ops/token_position.h"

namespace lmkern::cuda {

// A table, and the indices into it.
template <class S>
struct Table {
  const S* data;  // null: absent
  std::int64_t stride;
  Integers indices;  // absent: row n has index n + offset
  std::int64_t offset;
  IndexErrors errors;

  Table(const char* op, const TensorView& table, const TensorView& indices, std::int64_t offset,
        const char* argument, const char* extent)
      : data(table.ptr<const S>()),
        stride(table.defined() ? table.strides[0] : 0),
        indices(indices),
        offset(offset),
        errors(table.defined() && indices.defined()
                   ? index_errors(op, indices, table.shape[0], argument, extent)
                   : IndexErrors{}) {}

  // `reporter`: whether this thread is the one that reports a bad index.
  LMKERN_DEVICE const S* row(std::int64_t n, bool reporter) const {
    if (data == nullptr) return nullptr;
    if (indices.data == nullptr) return data + (n + offset) * stride;
    const std::int64_t index = indices.at(n), valid = errors.valid_row(index);
    if (reporter && index != valid) errors.report(index, n);
    return data + valid * stride;
  }
};

// The rows that are added up for one n.
template <class S>
struct Addends {
  using T = Accumulate<S>;
  const S *token, *position, *segment;
  T scale;

  template <int kVec>
  LMKERN_DEVICE void load(std::int64_t column, T (&x)[kVec]) const {
    Piece<S, kVec> t;
    t.load(token + column);
    add(column, t, x);
  }
  // The same, of a token's piece that has been read: what comes from memory rather than from a cache.
  template <int kVec>
  LMKERN_DEVICE void add(std::int64_t column, const Piece<S, kVec>& t, T (&x)[kVec]) const {
    Piece<S, kVec> p{}, s{};  // zeros where absent
    if (position != nullptr) p.load(position + column);
    if (segment != nullptr) s.load(segment + column);
    LMKERN_UNROLL
    for (int i = 0; i < kVec; ++i)
      x[i] = to_accumulate(t.at[i]) * scale + to_accumulate(p.at[i]) + to_accumulate(s.at[i]);
  }
};

template <class S>
struct AddedRows {
  Table<S> token, position, segment;
  Accumulate<S> scale;

  AddedRows(const char* op, const TokenPosition& r)
      : token(op, r.token, r.input, 0, nullptr, "V"),
        position(op, r.position, r.positions, r.offset, "positions", "P"),
        segment(op, r.segment, r.segments, 0, "segments", "S"),
        scale(static_cast<Accumulate<S>>(r.scale)) {}

  // Row n, at position l.
  LMKERN_DEVICE Addends<S> at(std::int64_t n, std::int64_t l, bool reporter) const {
    return {token.row(n, reporter), position.row(l, reporter), segment.row(n, reporter), scale};
  }
};

// Rows are walked position by position, so that the row of a position is read from L1: the k-th row.
struct RowOrder {
  std::int64_t length, repeats;  // L, and the rows that share a position
  struct Place {
    std::int64_t n, l;
  };
  RowOrder(std::int64_t rows, std::int64_t length)
      : length(length), repeats(length > 0 ? rows / length : 0) {}
  LMKERN_DEVICE Place at(std::int64_t k) const {
    const RowThread place = split_index(k, repeats);
    return {place.column * length + place.row, place.row};
  }
};

}  // namespace lmkern::cuda
