// What attention's forward and backward passes share: a tile of scores between a block of queries
// and a block of keys.
//
// Queries lie along the lanes, keys and head dimensions along the rows of a tile. With that layout
// every product of attention is multiply_tile with k or v as the broadcast operand, which is never
// transposed; softmax statistics are plain vector operations; and only a block's q and d_out
// are ever transposed.
#pragma once
#include "core/memory.h"
#include "core/parallel.h"
#include "core/tensor_view.h"
#include "cpu/gemm.h"
#include "cpu/vec_math.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

inline constexpr std::int64_t kKeyBlock = 64;

// A number of vectors as a compile-time value that lambdas can receive.
template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Chooses how many vectors of queries make a block, and calls f(Vectors<N>{}). Wide blocks read k
// and v less often; narrow ones waste fewer lanes on queries that do not exist and, under a causal
// mask, on keys that are not seen.
template <class T, class F>
LMKERN_INLINE void with_query_vectors(std::int64_t queries, bool is_causal, const F& f) {
  if (queries <= (is_causal ? 8 : 2) * kLanes<T>)
    f(Vectors<1>{});
  else
    f(Vectors<4>{});
}

// One head of a [B, H, N, D] tensor: rows of D contiguous elements.
template <class S>
struct HeadRows {
  S* data;
  std::int64_t stride;

  LMKERN_INLINE HeadRows(const TensorView& view, std::int64_t b, std::int64_t h)
      : data(view.ptr<S>() + b * view.strides[0] + h * view.strides[1]), stride(view.strides[2]) {}
  LMKERN_INLINE S* row(std::int64_t i) const { return data + i * stride; }
};

// Rows of a head as the microkernel's broadcast operand.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;

  LMKERN_INLINE Operand from(std::int64_t row) const { return {data + row * stride, stride}; }
};

// Whether a head's rows should be gathered before use. bfloat16 must be, to be converted. Others
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
  constexpr std::int64_t n = kLanes<Accumulate<S>>;
  if constexpr (sizeof(S) == sizeof(Accumulate<S>))
    if (!gather) return {rows.row(first), rows.stride};
  for (std::int64_t r = 0; r < count; ++r) {
    const S* const from = rows.row(first + r);
    Accumulate<S>* const to = buffer + r * width;
    std::int64_t d = 0;
    for (; d + n <= width; d += n) store(to + d, load(from + d));
    if (d < width) store_n(to + d, load_n(from + d, width - d), width - d);
  }
  return {buffer, width};
}

// The additive mask of a tile, [keys][queries] with queries padded to `padded`: 0 or -inf for a
// bool mask. Returns whether any query sees any key.
template <class T>
LMKERN_INLINE bool load_mask(const TensorView& mask, std::int64_t b, std::int64_t h,
                             std::int64_t query, std::int64_t queries, std::int64_t padded,
                             std::int64_t key, std::int64_t keys, T* tile) {
  const T hidden = T(-__builtin_inf());
  const std::int64_t origin =
      b * mask.strides[0] + h * mask.strides[1] + query * mask.strides[2] + key * mask.strides[3];
  bool seen = false;
  const auto fill = [&](auto value_at) __attribute__((always_inline)) {
    for (std::int64_t j = 0; j < keys; ++j) {
      T* const row = tile + j * padded;
      const std::int64_t at = origin + j * mask.strides[3];
      for (std::int64_t i = 0; i < queries; ++i) {
        row[i] = value_at(at + i * mask.strides[2]);
        seen |= row[i] != hidden;
      }
      for (std::int64_t i = queries; i < padded; ++i) row[i] = hidden;
    }
  };
  if (mask.dtype == DType::kBool) {
    const auto* p = mask.ptr<const unsigned char>();
    fill([p, hidden](std::int64_t at) { return p[at] != 0 ? T(0) : hidden; });
  } else if (mask.dtype == DType::kBFloat16) {
    const auto* p = mask.ptr<const bfloat16>();
    fill([p](std::int64_t at) { return static_cast<T>(to_accumulate(p[at])); });
  } else if (mask.dtype == DType::kFloat16) {
    const auto* p = mask.ptr<const float16>();
    fill([p](std::int64_t at) { return static_cast<T>(to_accumulate(p[at])); });
  } else {
    const auto* p = mask.ptr<const T>();
    fill([p](std::int64_t at) { return p[at]; });
  }
  return seen;
}

// -inf where the query of a lane does not see the key.
template <class T>
LMKERN_INLINE Vec<T> causal(Vec<T> score, std::int64_t first_query, std::int64_t key) {
  using Lane = typename VecTypes<T>::IntLane;
  const IntVec<T> query = lane_index<T>() + static_cast<Lane>(first_query - key);
  return query >= Lane{0} ? score : splat<T>(T(-__builtin_inf()));
}

// Scores of `keys` keys against kVecs vectors of queries, handed to f(key, scores) row by row.
// scaled_q is [D][queries]; mask is a tile of load_mask, or null.
template <int kVecs, class T, class F>
LMKERN_INLINE void score_tile(Operand<T> k, std::int64_t depth, const T* scaled_q, const T* mask,
                              bool diagonal, std::int64_t query, std::int64_t key,
                              std::int64_t keys, const F& f) {
  constexpr std::int64_t kQueries = kVecs * kLanes<T>;
  for_row_tiles<kTileRows<kVecs>>(
      keys, [&](std::int64_t row, auto tile) __attribute__((always_inline)) {
        constexpr int M = decltype(tile)::value;
        Vec<T> acc[M][kVecs] = {};
        multiply_tile<M, kVecs, T>(depth, k.data + row * k.stride, k.stride, 1, scaled_q, kQueries,
                                   acc);
        LMKERN_UNROLL
        for (int m = 0; m < M; ++m) {
          if (mask != nullptr) {
            LMKERN_UNROLL
            for (int n = 0; n < kVecs; ++n)
              acc[m][n] += load(mask + (row + m) * kQueries + n * kLanes<T>);
          }
          if (diagonal) {
            LMKERN_UNROLL
            for (int n = 0; n < kVecs; ++n)
              acc[m][n] = causal<T>(acc[m][n], query + n * kLanes<T>, key + row + m);
          }
          f(row + m, acc[m]);
        }
      });
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
