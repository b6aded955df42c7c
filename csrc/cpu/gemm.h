// The one matrix-product microkernel of the CPU backend, and the loops around it.
//
// A tile of M rows x N vectors is accumulated in registers:
//
//   acc[m][n] += sum_k a[m * a_m + k * a_k] * b[k * b_k + n * lanes]
//
// a is broadcast element by element, so it may have any strides and is never packed; b is read in
// whole vectors, from a packed weight panel, a transposed tile or a padded row; it may be kept in a
// storage type narrower than T. Every product of a recurrent step and of attention's forward and
// backward has this form (csrc/cpu/recurrent.cpp, csrc/cpu/attention.cpp say which). The epilogue
// receives the tile while it is still in registers.
//
// Numerics: FMA chains over k in ascending order, of a length that depends neither on M nor on how
// rows and columns were divided among threads, which is why results do not either.
#pragma once
#include "cpu/vec.h"

namespace lmkern::cpu::LMKERN_ISA_NAMESPACE {

// Rows of a tile that is N vectors wide: as many as the registers hold.
template <int N>
inline constexpr int kTileRows = kAccumulators / N < 8 ? kAccumulators / N : 8;

template <int M, int N, class T, class W>
LMKERN_INLINE void multiply_tile(std::int64_t depth, const T* a, std::int64_t a_m, std::int64_t a_k,
                                 const W* b, std::int64_t b_k, Vec<T> (&acc)[M][N]) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec<T> b_row[N];
    LMKERN_UNROLL
    for (int n = 0; n < N; ++n) b_row[n] = load(b + n * kLanes<T>);
    LMKERN_UNROLL
    for (int m = 0; m < M; ++m) {
      const Vec<T> a_value = splat<T>(a[m * a_m]);
      LMKERN_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = acc[m][n] + a_value * b_row[n];
    }
    a += a_k;
    b += b_k;
  }
}

// A tile height as a compile-time value that lambdas can receive.
template <int M>
struct Rows {
  static constexpr int value = M;
};

namespace detail {

template <int M, class F>
LMKERN_INLINE void with_rows(std::int64_t row, std::int64_t rows, const F& f) {
  if constexpr (M > 0) {
    if (rows == M)
      f(row, Rows<M>{});
    else
      with_rows<M - 1>(row, rows, f);
  }
}

}  // namespace detail

// Covers rows [0, rows) with tiles of at most Max rows, as equal as possible (20 rows are
// 5 + 5 + 5 + 5 rather than 6 + 6 + 6 + 2), and calls f(first_row, Rows<M>{}) for each.
template <int Max, class F>
LMKERN_INLINE void for_row_tiles(std::int64_t rows, const F& f) {
  const std::int64_t tiles = (rows + Max - 1) / Max;
  for (std::int64_t i = 0, row = 0; i < tiles; ++i) {
    const std::int64_t end = rows * (i + 1) / tiles;
    detail::with_rows<Max>(row, end - row, f);
    row = end;
  }
}

// out[row][N vectors] = bias + a b for rows of a (neighbouring elements along k) and one packed
// panel b[k][N vectors], kept in T or in a narrower storage type. The panel is taken in slices that
// fit into the L1 cache, each for all tiles before the next, so that it comes from L2 once and not
// once for each tile. Every slice is summed on its own before it is added: the error grows with the
// length of a slice and the number of slices, not with their product. bias: N vectors, or null.
//
// A function of its own, not inlined: its caller's epilogue is instantiated for every cell and
// option, and would take the tile code of every height with it. Passing tiles through `out`, which
// stays in L1, costs N stores and loads to N * depth multiplications.
template <int N, class T, class W>
__attribute__((noinline)) void multiply_panel(std::int64_t rows, std::int64_t depth, const T* a,
                                              std::int64_t a_m, const W* b, const T* bias, T* out) {
  constexpr std::int64_t kRow = N * kLanes<T>, kFitting = (24 << 10) / (kRow * sizeof(W));
  constexpr std::int64_t kSlice = kFitting < 256 ? kFitting : 256;
  std::int64_t k = 0;
  do {  // once even at depth 0, where tiles are the bias
    const std::int64_t end = k + kSlice < depth ? k + kSlice : depth;
    for_row_tiles<kTileRows<N>>(
        rows, [&](std::int64_t row, auto tile) __attribute__((always_inline)) {
          constexpr int M = decltype(tile)::value;
          Vec<T> acc[M][N] = {};
          multiply_tile<M, N, T>(end - k, a + row * a_m + k, a_m, 1, b + k * kRow, kRow, acc);
          LMKERN_UNROLL
          for (int m = 0; m < M; ++m) {
            T* const to = out + (row + m) * kRow;
            const T* const before = k > 0 ? to : bias;
            LMKERN_UNROLL
            for (int n = 0; n < N; ++n)
              store(to + n * kLanes<T>,
                    before != nullptr ? load(before + n * kLanes<T>) + acc[m][n] : acc[m][n]);
          }
        });
    k = end;
  } while (k < depth);
}

// out[row][N vectors] = a b, or is increased by it, for rows of a with any strides; rows of b are b_k
// apart and rows of out out_m. Like multiply_panel a function of its own.
template <int N, class T>
__attribute__((noinline)) void multiply_rows(std::int64_t rows, std::int64_t depth, const T* a,
                                             std::int64_t a_m, std::int64_t a_k, const T* b,
                                             std::int64_t b_k, T* out, std::int64_t out_m,
                                             bool accumulate) {
  for_row_tiles<kTileRows<N>>(rows,
                              [&](std::int64_t row, auto tile) __attribute__((always_inline)) {
                                constexpr int M = decltype(tile)::value;
                                Vec<T> acc[M][N] = {};
                                T* const to = out + row * out_m;
                                if (accumulate) {
                                  LMKERN_UNROLL
                                  for (int m = 0; m < M; ++m) {
                                    LMKERN_UNROLL
                                    for (int n = 0; n < N; ++n)
                                      acc[m][n] = load(to + m * out_m + n * kLanes<T>);
                                  }
                                }
                                multiply_tile<M, N, T>(depth, a + row * a_m, a_m, a_k, b, b_k, acc);
                                LMKERN_UNROLL
                                for (int m = 0; m < M; ++m) {
                                  LMKERN_UNROLL
                                  for (int n = 0; n < N; ++n)
                                    store(to + m * out_m + n * kLanes<T>, acc[m][n]);
                                }
                              });
}

// The same for any number of columns, a multiple of the lanes.
template <class T>
LMKERN_INLINE void multiply_columns(std::int64_t rows, std::int64_t columns, std::int64_t depth,
                                    const T* a, std::int64_t a_m, std::int64_t a_k, const T* b,
                                    std::int64_t b_k, T* out, std::int64_t out_m, bool accumulate) {
  std::int64_t c = 0;
  for (; c + 4 * kLanes<T> <= columns; c += 4 * kLanes<T>)
    multiply_rows<4>(rows, depth, a, a_m, a_k, b + c, b_k, out + c, out_m, accumulate);
  for (; c + 2 * kLanes<T> <= columns; c += 2 * kLanes<T>)
    multiply_rows<2>(rows, depth, a, a_m, a_k, b + c, b_k, out + c, out_m, accumulate);
  for (; c < columns; c += kLanes<T>)
    multiply_rows<1>(rows, depth, a, a_m, a_k, b + c, b_k, out + c, out_m, accumulate);
}

}  // namespace lmkern::cpu::LMKERN_ISA_NAMESPACE
