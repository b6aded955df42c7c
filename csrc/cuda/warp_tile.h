// A warp's piece of a product: 16 rows of weights times up to 64 rows of a batch, from shared memory,
// accumulated in registers. The weights are the tensor cores' A operand and the batch is N, which is
// padded to 8 only, where M would be padded to 16.
//
// 16-bit types: mma m16n8k16. float and double: FMA, 4 x 8 values a lane.
#pragma once
#include "cuda/device/math.h"
#include "cuda/device/matrix.h"
#include "cuda/device/vector.h"

namespace lmkern::cuda {

inline constexpr int kTileRows = 16, kTileColumns = 64;

template <class S>
struct WarpTile {
  using A = Accumulate<S>;
  static constexpr bool kTensor = sizeof(S) == 2;
  static constexpr int kStep = kTensor ? 16 : 4;  // k is a multiple of this
  // What is added to a row in shared memory, so that neighbouring rows lie in other banks, and rows
  // begin at multiples of 16 bytes.
  static constexpr int kPad = 16 / static_cast<int>(sizeof(S));

  A acc[kTileColumns / 8][4];

  LMKERN_DEVICE void clear() {
    LMKERN_UNROLL
    for (int j = 0; j < kTileColumns / 8; ++j) {
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) acc[j][i] = A(0);
    }
  }

  // Of acc[j][i]: its row of the weights, and its row of the batch.
  static LMKERN_DEVICE int row(int i) {
    return kTensor ? lane_index() / 4 + i / 2 * 8 : 4 * i + lane_index() / 8;
  }
  static LMKERN_DEVICE int column(int j, int i) {
    return kTensor ? 8 * j + lane_index() % 4 * 2 + i % 2 : 8 * j + lane_index() % 8;
  }

  // acc += w h^T over `depth` values of k. w: [16][w_stride] or, transposed, [depth][w_stride] with
  // the 16 rows along; h: [columns rounded up to 8][h_stride], zeros beyond the last row.
  template <bool kTransposed>
  LMKERN_DEVICE void multiply(const S* w, int w_stride, const S* h, int h_stride, int depth,
                              int columns) {
    if constexpr (kTensor)
      multiply_tensor<kTransposed>(w, w_stride, h, h_stride, depth, columns);
    else
      multiply_fma<kTransposed>(w, w_stride, h, h_stride, depth, columns);
  }

 private:
  template <bool kTransposed>
  LMKERN_DEVICE void multiply_tensor(const S* w, int w_stride, const S* h, int h_stride, int depth,
                                     int columns) {
    const int lane = lane_index();
    for (int k = 0; k < depth; k += 16) {
      std::uint32_t a[4];
      if constexpr (kTransposed)
        load_matrix_transposed(a, w + (k + lane / 16 * 8 + lane % 8) * w_stride + lane / 8 % 2 * 8);
      else
        load_matrix(a, w + lane % 16 * w_stride + k + lane / 16 * 8);
      LMKERN_UNROLL
      for (int j = 0; j < kTileColumns / 8; j += 2) {
        if (8 * j >= columns) break;
        const S* const rows = h + (8 * j + lane % 8) * h_stride + k + lane / 8 % 2 * 8;
        if (8 * (j + 1) < columns) {
          std::uint32_t b[4];
          load_matrix(b, rows + lane / 16 * 8 * h_stride);
          const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
          mma_16x8x16<S>(acc[j], a, first);
          mma_16x8x16<S>(acc[j + 1], a, second);
        } else {
          std::uint32_t b[2];
          load_matrix(b, rows);
          mma_16x8x16<S>(acc[j], a, b);
        }
      }
    }
  }

  template <bool kTransposed>
  LMKERN_DEVICE void multiply_fma(const S* w, int w_stride, const S* h, int h_stride, int depth,
                                  int columns) {
    constexpr int kWide = 16 / static_cast<int>(sizeof(S));  // of a vector
    using V = Vector<S, kWide>;
    const int first_row = row(0), first_column = column(0, 0);
    // Summed for itself, and then added: the rounding error of a long depth grows with the number of
    // calls, not of terms.
    A part[kTileColumns / 8][4] = {};
    for (int k = 0; k < depth; k += kWide) {
      V weights[4];
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (kTransposed) {
          LMKERN_UNROLL
          for (int n = 0; n < kWide; ++n)
            weights[i].at[n] = w[(k + n) * w_stride + first_row + 4 * i];
        } else {
          weights[i] = load_vector<V>(w + (first_row + 4 * i) * w_stride + k);
        }
      }
      LMKERN_UNROLL
      for (int j = 0; j < kTileColumns / 8; ++j) {
        if (8 * j >= columns) break;
        const V values = load_vector<V>(h + (first_column + 8 * j) * h_stride + k);
        LMKERN_UNROLL
        for (int n = 0; n < kWide; ++n) {
          LMKERN_UNROLL
          for (int i = 0; i < 4; ++i)
            part[j][i] = multiply_add(weights[i].at[n], values.at[n], part[j][i]);
        }
      }
    }
    LMKERN_UNROLL
    for (int j = 0; j < kTileColumns / 8; ++j) {
      LMKERN_UNROLL
      for (int i = 0; i < 4; ++i) acc[j][i] += part[j][i];
    }
  }
};

}  // namespace lmkern::cuda
